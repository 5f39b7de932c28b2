"""The RMSNorm over each head of a gated output, after Mamba2's scan.

Letters: B batch, T tokens, H heads, P head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.gated_norm import reference

if HAS_TRITON:
    from mambify.ops.gated_norm import triton as kernels

__all__ = ["GatedNorm", "gated_rms_norm"]


class GatedNorm(NamedTuple):
    """What :func:`gated_rms_norm` takes beside y, for operations that have it as their last step."""

    z_BTHP: Tensor
    weight_HP: Tensor
    eps: float


def gated_rms_norm(y_BTHP: Tensor, z_BTHP: Tensor, weight_HP: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """Gates, then normalises each head: ``weight · u / sqrt(mean_P(u²) + eps)`` with ``u = y · SiLU(z)``.

    Computed in float32 and rounded to z's dtype before the weight multiplies it, as transformers does in
    BambaRMSNormGated (group size P); the result, [B, T, H, P], is in z's dtype. Where several heads share a norm, as in
    stock Mamba2, H counts the norms.

    Args:
        backend: "auto", "reference" or "triton" (P up to 16,384, no float64).

    Raises InvalidOptionError (unknown backend) or ValueError (shapes).
    """
    supported = HAS_TRITON and kernels.supports(y_BTHP, z_BTHP, weight_HP)
    chosen = pick_backend("gated_rms_norm", backend, backends_on(y_BTHP.device, supported=supported))
    check_shape("gated_rms_norm", "z_BTHP", z_BTHP, tuple(y_BTHP.shape))
    check_shape("gated_rms_norm", "weight_HP", weight_HP, tuple(y_BTHP.shape[-2:]))
    run = kernels.gated_rms_norm if chosen == "triton" else reference.gated_rms_norm
    return run(y_BTHP, z_BTHP, weight_HP, eps)
