"""The gated activation of a Transformer's MLP. Letters: F intermediate size."""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.swiglu import reference

if HAS_TRITON:
    from mambify.ops.swiglu import triton as kernels

__all__ = ["swiglu"]


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """``SiLU(gate) · up``, elementwise, over ``[..., F]``; keeps only its two inputs for the backward pass.

    Args:
        backend: "auto", "reference" or "triton".

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that differ.
    """
    check_shape("swiglu", "up", up, tuple(gate.shape))
    supported = gate.dtype == up.dtype != torch.float64
    chosen = pick_backend("swiglu", backend, backends_on(gate.device, supported=supported))
    return reference.swiglu(gate, up) if chosen == "reference" else kernels.swiglu(gate, up)
