"""Recording a step as a CUDA graph: what it launches, once, to be launched again as one; and how long it then takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def recorded(
    step: Callable[[], object], device: torch.device | str, *, warm_up: int = 2, pool: Any = None
) -> Callable[[], object]:
    """``step`` as a graph that is replayed; on a CPU ``step`` itself.

    Args:
        step: always does the same on the same tensors, and waits for nothing.
        pool: memory that other graphs use as well, of :func:`torch.cuda.graph_pool_handle`: for graphs that are never
            replayed at the same time and leave nothing there.
        warm_up: how often it runs before, so that kernels are compiled and tuned when it is recorded.
    """
    if torch.device(device).type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


def seconds_of(step: Callable[[], object], device: torch.device, *, times: int = 4) -> float:
    """What ``step`` takes on its device, one after another ``times`` times; on a CPU the less of two."""
    if device.type != "cuda":
        taken = []
        for _ in range(2):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
        return min(taken)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(times):
        step()
    last.record()
    last.synchronize()
    milliseconds: float = first.elapsed_time(last)
    return milliseconds / 1e3 / times
