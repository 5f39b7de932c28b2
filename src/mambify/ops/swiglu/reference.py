"""The gated activation in pure torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See :func:`mambify.ops.swiglu.swiglu`."""
    return F.silu(gate) * up
