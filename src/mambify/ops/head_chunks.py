"""Products with an output head, a chunk of positions at a time: how many positions, in which dtype, written where.

Letters: C positions of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GPU_BYTES, _CPU_NUMBERS = 2**28, 2**24
_GPU_TILE, _CPU_LEAST = 128, 16


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the products with the heads: autocast's where it is on, else that of the hidden states."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def default_chunk_size(positions: int, vocabulary: int, logits: torch.dtype, device: torch.device) -> int:
    """The size of about equal chunks, of which one tensor of logits stays within what the device is allowed."""
    if device.type == "cpu":
        return max(_CPU_NUMBERS // vocabulary, _CPU_LEAST)
    tiles = math.ceil(positions / _GPU_TILE)  # of the matrix products, in rows
    most = max(_GPU_BYTES // (vocabulary * logits.itemsize * _GPU_TILE), 1)
    return max(math.ceil(tiles / max(math.ceil(tiles / most), 1)), 1) * _GPU_TILE


def logits_buffer(positions: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows one after the other; on a GPU they start at multiples of 128 bytes, to be read in whole lines."""
    padded = vocabulary if device.type == "cpu" else math.ceil(vocabulary / 64) * 64
    return torch.empty(positions, padded, dtype=dtype, device=device)[:, :vocabulary]


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b`` written to ``out``; where ``out`` is of a wider dtype the sums are not rounded to that of ``a``."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
