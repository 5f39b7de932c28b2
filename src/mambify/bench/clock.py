"""How benchmarks take time, and what the machine can do at best: copy, and multiply matrices."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from mambify.engine.recording import recorded

_MIN_REPEATS, _SECONDS, _AT_MOST = 5, 0.3, 3.0
_MATMUL = {"cpu": (1024, torch.float32), "cuda": (8192, torch.bfloat16)}
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}


def seconds_of(function: Callable[[], object], device: str) -> float:
    """Wall time of one call: the least of five or more after a warm-up; of fewer where it takes seconds.

    The least, because whatever else a machine does can only add to it.
    """
    function()
    taken: list[float] = []
    _synchronize(device)
    while sum(taken) < _SECONDS or (len(taken) < _MIN_REPEATS and sum(taken) < _AT_MOST):
        start = time.perf_counter()
        function()
        _synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def device_seconds_of(function: Callable[[], object], device: str) -> float:
    """Time of one call on the device: on a GPU of a replayed CUDA graph, launches left out; else as :func:`seconds_of`.

    The function must always do the same on the same tensors.
    """
    return seconds_of(recorded(function, device, warm_up=3), device)


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of copying a tensor too large for any cache: the bound of what moves memory."""
    source = torch.ones(_COPY_BYTES[torch.device(device).type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def matmul_peak(device: str) -> float:
    """FLOPs a second (a multiply and an add are two) of one large product, in bfloat16 on a GPU, float32 on a CPU."""
    kind = torch.device(device).type
    size, dtype = _MATMUL[kind]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: left @ right, device)


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
