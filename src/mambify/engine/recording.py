"""Recording a step as a CUDA graph: what it launches, once, to be launched again as one."""

from __future__ import annotations

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
