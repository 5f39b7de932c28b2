"""Rows into batches: of one size where it is given, else as a budget of tokens holds; halved where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from mambify.errors import InvalidOptionError

T = TypeVar("T")
R = TypeVar("R")

# Tokens in a forward pass. A CPU is busy with few, and small batches hold less padding; on a GPU a step of a small
# model costs the same for thousands.
_CPU_TOKENS = 1024
_GPU_TOKENS = 16384


def batches(
    rows: Sequence[T], length: Callable[[T], int], *, batch_size: int | None, device: torch.device
) -> Iterator[Sequence[T]]:
    """Consecutive slices of ``rows``: of ``batch_size`` rows, or with ``None`` as many as fit when padded.

    Args:
        rows: Sorted so that neighbours are of like length.
        length: Tokens of a row.
        batch_size: Rows of a batch; ``None`` goes by tokens.
        device: Where the model is.

    Raises:
        InvalidOptionError: a batch size below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise InvalidOptionError(f"batch_size must be at least 1, not {batch_size}")
    budget = _GPU_TOKENS if device.type == "cuda" else _CPU_TOKENS
    first, longest = 0, 0
    for index, row in enumerate(rows):
        longest = max(longest, length(row))
        num_rows = index - first + 1
        full = num_rows * longest > budget if batch_size is None else num_rows > batch_size
        if full and num_rows > 1:
            yield rows[first:index]
            first, longest = index, length(row)
    if first < len(rows):
        yield rows[first:]


def halving(run: Callable[[Sequence[T]], list[R]], rows: Sequence[T]) -> list[R]:
    """``run(rows)``; where the GPU's memory is too small for that, the halves one after the other.

    Raises:
        torch.OutOfMemoryError: one row alone is too much.
    """
    try:
        return run(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    # Outside the handler: the failed pass holds no tensor any more.
    torch.cuda.empty_cache()
    middle = len(rows) // 2
    return halving(run, rows[:middle]) + halving(run, rows[middle:])
