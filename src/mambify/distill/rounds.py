"""The text of an on-policy stage: rounds of what the student itself writes, mixed with given text.

A round is written when its first sequence is asked for, by the student as it is then. It is kept on disk while the
stage runs, so a run that is continued in the middle of a round goes on with the same text.

Legend: N sequences, T tokens of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from mambify.distill.checkpoints import write_tensors
from mambify.distill.parallel import Processes
from mambify.distill.settings import OnPolicy
from mambify.errors import CheckpointError
from mambify.model import HybridForCausalLM

FOLDER = "rounds"

#: (stage, student, seed, N) → ``input_ids`` and ``labels``, each ``[N, T]``: sequences that the student writes
Writer = Callable[[OnPolicy, HybridForCausalLM, int, int], dict[str, Tensor]]


def round_sizes(stage: OnPolicy, item_tokens: int, step_items: int) -> tuple[int, int]:
    """Sequences of a round, which is whole steps, and how many of them the student writes."""
    steps = max(round(stage.tokens_per_round / (step_items * item_tokens)), 1)
    return steps * step_items, max(round(stage.share * steps * step_items), 1)


def round_seed(seed: int, number: int) -> int:
    """A seed of its own for each round of a run."""
    return int.from_bytes(hashlib.sha256(f"round {number} of {seed}".encode()).digest()[:7], "big")


class Rounds(Dataset[dict[str, Tensor]]):
    """All rounds of a stage in a row; to be read in order.

    Args:
        write: (round, N) → what the student writes; called in the first process only.
        text: what is mixed in, in its own order over and over; ``None`` where the student writes everything.
        num_items: sequences of the whole stage.
        per_round: sequences of a round.
        written: how many of these the student writes.
        seed: of the order within a round.
        directory: of the stage.
    """

    def __init__(
        self,
        write: Callable[[int, int], dict[str, Tensor]],
        text: Dataset[Any] | None,
        *,
        num_items: int,
        per_round: int,
        written: int,
        seed: int,
        directory: Path,
        processes: Processes,
    ) -> None:
        assert text is not None or written == per_round
        self._write, self._text = write, text
        self._num_items, self._per_round, self._written = num_items, per_round, written
        self._seed, self._directory, self._processes = seed, directory / FOLDER, processes
        self._number, self._texts, self._order = -1, dict[str, Tensor](), torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self._num_items

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._num_items:
            raise IndexError(index)
        number, place = divmod(index, self._per_round)
        if number != self._number:
            self._open(number)
        place = int(self._order[place])
        if place < self._written:
            return {name: rows[place].long() for name, rows in self._texts.items()}
        assert self._text is not None
        given = number * (self._per_round - self._written) + place - self._written
        item = self._text[given % len(self._text)]  # type: ignore[arg-type]
        return {name: item[name] for name in self._texts}

    def _open(self, number: int) -> None:
        """Reads a round, after the student has written it if it has not; all processes come here at the same step."""
        path = self._directory / f"{number:05d}.safetensors"
        self._processes.first_does(lambda: None if path.is_file() else self._begin(number, path))
        self._texts = self._processes.all_do(lambda: _read(path))
        generator = torch.Generator().manual_seed(round_seed(self._seed, number))
        self._order, self._number = torch.randperm(self._per_round, generator=generator), number

    def _begin(self, number: int, path: Path) -> None:
        texts = self._write(number, self._written)
        write_tensors({name: rows.int().cpu().contiguous() for name, rows in texts.items()}, path)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing, truncated or malformed: {error}") from error
