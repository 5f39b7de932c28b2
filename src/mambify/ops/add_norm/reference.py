"""A sum and its RMSNorm in pure torch. Letters: D hidden size."""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.backends import accumulation_dtype


def add_norm(stream: Tensor, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`mambify.ops.add_norm.add_norm`."""
    total = stream + x
    exact = total.to(accumulation_dtype(total))
    scale = torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + eps)
    return (weight_D * (exact * scale)).to(total.dtype), total
