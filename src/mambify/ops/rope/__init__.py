"""Rotary position embedding of queries or keys. Letters: B batch, T tokens, H heads, P head dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, pick_backend
from mambify.ops.rope import reference

if HAS_TRITON:
    from mambify.ops.rope import triton as kernels

__all__ = ["rotate"]


def rotate(x_BTHP: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, *, backend: str = "auto") -> Tensor:
    """Turns channel pairs (p, p + P/2) of every head by the angles of its position (arXiv 2104.09864).

    Args:
        cos_BTP, sin_BTP: of the angles, which are the same in both halves of the last axis; the batch may be 1.
        backend: "auto", "reference" or "triton".

    Returns:
        ``[B, T, H, P]`` in x's dtype.

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    B, T, _, P = x_BTHP.shape
    for name, tensor in (("cos_BTP", cos_BTP), ("sin_BTP", sin_BTP)):
        if tensor.shape[1:] != (T, P) or tensor.shape[0] not in (1, B):
            raise ValueError(f"rotate: {name} must have shape {(B, T, P)}, got {tuple(tensor.shape)}")
    supported = x_BTHP.dtype != torch.float64 and P % 2 == 0 and x_BTHP.stride(-1) == 1
    chosen = pick_backend("rotate", backend, backends_on(x_BTHP.device, supported=supported))
    run = reference.rotate if chosen == "reference" else kernels.rotate
    return run(x_BTHP, cos_BTP, sin_BTP)
