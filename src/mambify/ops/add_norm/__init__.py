"""A block's step between two sublayers: what the last one gave is added to the stream, which the next one reads normed.

Letters: D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.add_norm import reference
from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend

if HAS_TRITON:
    from mambify.ops.add_norm import triton as kernels

__all__ = ["add_norm"]


def add_norm(
    stream: Tensor, x: Tensor, weight_D: Tensor, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``h = stream + x`` and its RMSNorm, ``weight · h / sqrt(mean_D(h²) + eps)``; all ``[..., D]``.

    The sum is rounded to the wider dtype of the two before it is normed, as where one follows the other; the norm is
    computed in float32 and rounded once, to the same dtype. The backward pass keeps nothing but the sum.

    Args:
        backend: "auto", "reference" or "triton" (no float64, D up to 16,384).

    Returns:
        The norm, for the next sublayer, and the sum, which is the stream from here on.

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    check_shape("add_norm", "x", x, tuple(stream.shape))
    check_shape("add_norm", "weight_D", weight_D, (stream.shape[-1],))
    supported = HAS_TRITON and kernels.supports(stream, x, weight_D)
    chosen = pick_backend("add_norm", backend, backends_on(stream.device, supported=supported))
    run = reference.add_norm if chosen == "reference" else kernels.add_norm
    with torch.autocast(stream.device.type, enabled=False):  # the dtypes are those of the inputs, see mambify.norm
        return run(stream, x, weight_D, eps)
