"""The gated per-head RMSNorm in pure torch. Letters: B batch, T tokens, H heads, P head dimension."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mambify.ops.backends import accumulation_dtype


def gated_rms_norm(y_BTHP: Tensor, z_BTHP: Tensor, weight_HP: Tensor, eps: float) -> Tensor:
    """See :func:`mambify.ops.gated_norm.gated_rms_norm`."""
    exact = accumulation_dtype(y_BTHP, z_BTHP)
    gated_BTHP = y_BTHP.to(exact) * functional.silu(z_BTHP.to(exact))
    scale_BTH1 = torch.rsqrt(gated_BTHP.square().mean(dim=-1, keepdim=True) + eps)
    return (weight_HP * (gated_BTHP * scale_BTH1).to(z_BTHP.dtype)).to(z_BTHP.dtype)
