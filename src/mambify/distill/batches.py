"""Which sequences a step trains on: a function of the seed and the step alone.

The text is one endless stream: the sequences in an order drawn from the seed, then all again in another order, and so
on. A step is the next so many of them, on whatever number of processes, each of which takes its share; so a run may be
continued by another number of processes and still sees every sequence as often, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class StepBatches(Sampler[list[int]]):
    """The micro-batches of one process, all steps of a stage.

    Args:
        num_sequences: how many there are to draw from.
        share: sequences of a step that are this process's.
        micro_batch: sequences at a time; divides ``share``.
        num_steps: optimizer steps of the stage.
        seed: of the order.
        rank, count: which process this is, of how many.
        in_order: take the sequences as they stand, from the first on.
    """

    def __init__(
        self,
        num_sequences: int,
        *,
        share: int,
        micro_batch: int,
        num_steps: int,
        seed: int,
        rank: int = 0,
        count: int = 1,
        in_order: bool = False,
    ) -> None:
        assert num_sequences > 0 and share % micro_batch == 0
        self.num_sequences, self.share, self.micro_batch, self.num_steps = num_sequences, share, micro_batch, num_steps
        self.seed, self.rank, self.count, self.in_order = seed, rank, count, in_order

    def __len__(self) -> int:
        return self.num_steps * (self.share // self.micro_batch)

    def __iter__(self) -> Iterator[list[int]]:
        stream = self._stream()
        for _ in range(self.num_steps):
            step = [next(stream) for _ in range(self.share * self.count)]
            mine = step[self.rank * self.share :][: self.share]
            for start in range(0, self.share, self.micro_batch):
                yield mine[start : start + self.micro_batch]

    def _stream(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            if self.in_order:
                yield from range(self.num_sequences)
            else:
                yield from torch.randperm(self.num_sequences, generator=generator).tolist()
