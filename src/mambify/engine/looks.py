"""What the host sees of the device without holding it up: a copy is under way while the device goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor


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
        self._under_way: deque[tuple[int, torch.cuda.Event | None, Tensor]] = deque()

    def take(self, values: Tensor) -> None:
        """Looks at ``values`` as they will be when the device has come here; they may change afterwards."""
        event = None
        if self._on_gpu:
            seen = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            seen.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            seen = values.clone()
        self._under_way.append((self.number, event, seen))
        self.number += 1

    def ready(self) -> Iterator[tuple[int, Tensor]]:
        """The looks that are to be dealt with now, (number, values), waiting for the device to have come that far."""
        while len(self._under_way) > self._on_gpu:
            number, event, seen = self._under_way.popleft()
            if event is not None:
                event.synchronize()
            yield number, seen
