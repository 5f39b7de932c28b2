"""Rotary embedding in pure torch, rounded as transformers rounds it."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_BTHP: Tensor, cos_BTP: Tensor, sin_BTP: Tensor) -> Tensor:
    """See :func:`mambify.ops.rope.rotate`."""
    first, second = x_BTHP.chunk(2, dim=-1)
    turned_BTHP = torch.cat([-second, first], dim=-1)
    return x_BTHP * cos_BTP[:, :, None] + turned_BTHP * sin_BTP[:, :, None]
