"""What the host sees of the device without holding it up: a copy is under way while the device goes on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Look(NamedTuple):
    """What was seen.

    Attributes:
        number: of the look.
        values: a copy on the host.
        seconds: that the device took for what was enqueued since :meth:`Looks.begin`.
    """

    number: int
    values: Tensor
    seconds: float


class _UnderWay(NamedTuple):
    number: int
    values: Tensor
    begun: torch.cuda.Event | float
    taken: torch.cuda.Event | float


class Looks:
    """Copies of values at certain points of the device's work, numbered as they are taken.

    On a GPU the latest look stays under way: the device works on what was enqueued after the one before it while the
    host deals with that. On a CPU there is nothing to wait for.

    Attributes:
        number: of the look that is taken next.
    """

    def __init__(self, device: torch.device) -> None:
        self.number = 0
        self._on_gpu = device.type == "cuda"
        self._begun: torch.cuda.Event | float = 0.0
        self._under_way: deque[_UnderWay] = deque()

    def begin(self) -> None:
        """From here on the device works on what the next look will show."""
        self._begun = self._now()

    def take(self, values: Tensor) -> None:
        """Looks at ``values`` as they will be when the device has come here; they may change afterwards."""
        if self._on_gpu:
            seen = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            seen.copy_(values, non_blocking=True)
        else:
            seen = values.clone()
        self._under_way.append(_UnderWay(self.number, seen, self._begun, self._now()))
        self.number += 1

    def ready(self) -> Iterator[Look]:
        """The looks that are to be dealt with now, each as soon as the device has come that far."""
        while len(self._under_way) > self._on_gpu:
            number, values, begun, taken = self._under_way.popleft()
            if isinstance(begun, torch.cuda.Event) and isinstance(taken, torch.cuda.Event):
                taken.synchronize()
                yield Look(number, values, begun.elapsed_time(taken) / 1e3)
            elif isinstance(begun, float) and isinstance(taken, float):
                yield Look(number, values, taken - begun)

    def _now(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
