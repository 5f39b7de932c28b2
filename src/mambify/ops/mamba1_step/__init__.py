"""New tokens of a Mamba1 mixer from its small projection to its last one, in one launch.

Letters: S rows (slots), T new tokens, R places of a ring, I = J·M inner channels, J = G·Q·U sub-heads of M channels, G
key/value heads, Q query heads each, U sub-heads a head, N state size, E rank of Δ, X = G·U·M channels of x before its
heads are repeated, K conv width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.mamba1_step import reference
from mambify.ops.mamba1_step.weights import Mamba1Weights, StepConv
from mambify.ops.ring import RingPlace
from mambify.ops.selective_replay import SelectiveRing

if HAS_TRITON:
    from mambify.ops.mamba1_step import triton as kernels

__all__ = ["Mamba1Weights", "StepConv", "mamba1_step"]


@torch.no_grad()
def mamba1_step(
    x_STX: Tensor,
    z_STI: Tensor,
    dt_STE: Tensor,
    B_STGUN: Tensor,
    C_STJN: Tensor,
    weights: Mamba1Weights,
    state_SJMN: Tensor,
    ring: SelectiveRing | None,
    place: RingPlace,
    *,
    conv: StepConv | None = None,
    overlap: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The gated outputs of T new tokens of every active row; not for training.

        x ← SiLU(conv(x))        where ``conv`` is given
        Δ = softplus(W_dt dt + b)        S ← exp(Δ A) ∘ S + (Δ x) Bᵀ        y = (S C + D x) · SiLU(z)

    It is the projection of Δ and :func:`mambify.ops.selective_replay.selective_replay` with its gate, in the same
    precision: with a ``ring`` the new tokens may yet be rejected and the state stays where it is, with the same rings
    and the same folds. Without one they stand: nothing may be pending in active rows, the state after the last token
    is written at once, and ``rounds.move_on(…, pends=False)`` is to follow, once after all layers. Rows that are not
    active do not change, and their output is zero.

    Args:
        x_STX: values; all I channels where they are convolved already.
        z_STI: gate.
        dt_STE: step sizes before their projection.
        B_STGUN, C_STJN: input and output projections of each sub-head; B of key/value heads.
        state_SJMN: float32 (the reference takes float64 too), changed in place.
        ring: one layer's, changed in place; None for tokens that stand.
        place: where each row stands; only read.
        overlap: the kernel starts while the one before it ends (:mod:`mambify.ops.overlap`).
        backend: "auto", "reference" or "triton" (N up to 256, E up to 1024; inputs and rings in one dtype, no float64).

    Returns:
        y_STI in x's dtype.

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together, or more new tokens than the rings are for.
    """
    inputs = (x_STX, z_STI, dt_STE, B_STGUN, C_STJN)
    supported = HAS_TRITON and kernels.supports(*inputs, weights, state_SJMN, ring, conv)
    chosen = pick_backend("mamba1_step", backend, backends_on(x_STX.device, supported=supported))
    S, T = x_STX.shape[:2]
    J, M, N = weights.A_JMN.shape
    G, U = B_STGUN.shape[2:4]
    inner, rank = weights.dt_IE.shape
    if inner != J * M or J % (G * U):
        raise ValueError(f"mamba1_step: needs J·M = {inner} channels and G·U dividing J, got {J=}, {M=}, {G=}, {U=}")
    place.check("mamba1_step", S, T)
    check_shape("mamba1_step", "x_STX", x_STX, (S, T, inner if conv is None else G * U * M))
    check_shape("mamba1_step", "z_STI", z_STI, (S, T, inner))
    check_shape("mamba1_step", "dt_STE", dt_STE, (S, T, rank))
    check_shape("mamba1_step", "B_STGUN", B_STGUN, (S, T, G, U, N))
    check_shape("mamba1_step", "C_STJN", C_STJN, (S, T, J, N))
    check_shape("mamba1_step", "dt_bias_I", weights.dt_bias_I, (inner,))
    check_shape("mamba1_step", "D_JM", weights.D_JM, (J, M))
    check_shape("mamba1_step", "B_bias_GUN", weights.B_bias_GUN, (G, U, N))
    check_shape("mamba1_step", "C_bias_JN", weights.C_bias_JN, (J, N))
    check_shape("mamba1_step", "state_SJMN", state_SJMN, (S, J, M, N))
    if ring is not None:
        sizes = ((J, M), (G, U, N), (J, M))
        for name, part, size in zip(("x", "B", "delta"), ring, sizes, strict=True):
            check_shape("mamba1_step", f"ring.{name}", part, (S, place.capacity, *size))
    if conv is not None:
        width = conv.weight_IK.shape[1]
        if T + width - 1 > place.capacity:
            raise ValueError(f"mamba1_step: {T} new tokens and a width of {width} need {T + width - 1} places")
        check_shape("mamba1_step", "weight_IK", conv.weight_IK, (inner, width))
        check_shape("mamba1_step", "bias_I", conv.bias_I, (inner,))
        check_shape("mamba1_step", "ring_SRI", conv.ring_SRI, (S, place.capacity, inner))
    given = (*inputs, weights, state_SJMN, ring, place, conv)
    return reference.mamba1_step(*given) if chosen == "reference" else kernels.mamba1_step(*given, overlap)
