"""One token of a Mamba2 mixer between its two projections, in one launch.

Letters: S rows (slots), H query heads, G key/value heads (H = G·Q), P head dimension, N state size, C conv channels
(G·P + G·N + H·N), K conv width, R places of the convolution's ring, E outputs of in_proj (H·P + C + H).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.mamba2_step import reference
from mambify.ops.ring import RingPlace

if HAS_TRITON:
    from mambify.ops.mamba2_step import triton as kernels

__all__ = ["Mamba2Weights", "mamba2_step"]


class Mamba2Weights(NamedTuple):
    """What a Mamba2 mixer has between its projections.

    Attributes:
        conv_CK, conv_bias_C: taps, oldest first, and bias (or None) of the convolution.
        dt_bias_H, A_H, D_H: of the scan; A = −exp(A_log).
        norm_HP: weight of the gated norm.
        eps: of the gated norm.
    """

    conv_CK: Tensor
    conv_bias_C: Tensor | None
    dt_bias_H: Tensor
    A_H: Tensor
    D_H: Tensor
    norm_HP: Tensor
    eps: float


def mamba2_step(
    zxBCdt_SE: Tensor,
    weights: Mamba2Weights,
    state_SHPN: Tensor,
    ring_SRC: Tensor,
    place: RingPlace,
    *,
    overlap: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Takes every active row a token on: convolution, SiLU, Δ, state and gated norm.

        x, B, C ← SiLU(conv(x, B, C))        Δ = softplus(dt + dt_bias)
        S ← exp(A Δ) S + Δ x Bᵀ        y = S C + D x        out = norm · RMSNorm_per_head(y · SiLU(z))

    It is :func:`mambify.ops.conv_replay.conv_replay` with one new token, :func:`mambify.ops.ssd.ssd_step` and
    :func:`mambify.ops.gated_norm.gated_rms_norm`, in the same precision. The state is written at once, so nothing may
    be pending in active rows. ``rounds.move_on(…, pends=False)`` is to follow, once after all layers. Rows that are
    not active do not change, and their output is zero.

    Args:
        zxBCdt_SE: in_proj's output, ``[z | x | B | C | dt]`` of H·P, G·P, G·N, H·N, H.
        state_SHPN: float32 (the reference takes float64 too), changed in place.
        ring_SRC: inputs of the convolution, changed in place; see :mod:`mambify.ops.conv_replay`.
        place: where each row stands; only read.
        overlap: the kernel starts while the one before it ends (:mod:`mambify.ops.overlap`).
        backend: "auto", "reference" or "triton" (P and N up to 128; inputs and ring in one dtype, no float64).

    Returns:
        out_SHP in zxBCdt's dtype.

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    supported = HAS_TRITON and kernels.supports(zxBCdt_SE, weights.conv_CK, state_SHPN, ring_SRC)
    chosen = pick_backend("mamba2_step", backend, backends_on(zxBCdt_SE.device, supported=supported))
    slots, heads, P, N = state_SHPN.shape
    channels, width = weights.conv_CK.shape
    groups, rest = divmod(channels - heads * N, P + N)
    if rest or groups < 1 or heads % groups:
        raise ValueError(f"mamba2_step: {channels} channels are not those of H={heads}, P={P}, N={N} and any G")
    place.check("mamba2_step", slots, 1)
    if width > place.capacity:
        raise ValueError(f"mamba2_step: a width of {width} needs {width} places")
    check_shape("mamba2_step", "zxBCdt_SE", zxBCdt_SE, (slots, heads * P + channels + heads))
    check_shape("mamba2_step", "conv_bias_C", weights.conv_bias_C, (channels,))
    for name in ("dt_bias_H", "A_H", "D_H"):
        check_shape("mamba2_step", name, getattr(weights, name), (heads,))
    check_shape("mamba2_step", "norm_HP", weights.norm_HP, (heads, P))
    check_shape("mamba2_step", "ring_SRC", ring_SRC, (slots, place.capacity, channels))
    given = (zxBCdt_SE, *weights, state_SHPN, ring_SRC, place, groups)
    return reference.mamba2_step(*given) if chosen == "reference" else kernels.mamba2_step(*given, overlap)
