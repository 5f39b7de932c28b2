"""Mamba2 over a few new tokens that may yet be rejected: the state is read once and stays where it is.

Letters: S rows (slots), T new tokens, R places of a ring, H heads of the state, G heads of x, U of B and V of C (each
divides H; what attention leaves has G = U key/value heads and V = H query heads), P head dimension, N state size, L
layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.gated_norm import GatedNorm, gated_rms_norm
from mambify.ops.head_groups import check_head_groups
from mambify.ops.ring import RingPlace
from mambify.ops.ssd_replay import reference

if HAS_TRITON:
    from mambify.ops.ssd_replay import triton as kernels

__all__ = ["SSDRing", "ssd_fold", "ssd_replay"]


class SSDRing(NamedTuple):
    """What a Mamba2 layer keeps of recent tokens: x and B with as many heads as they come with, Δ of every head.

    Attributes:
        x: ``[S, R, G, P]``, or ``[L, S, R, G, P]`` for the layers of a model.
        B: ``[S, R, U, N]``, or ``[L, S, R, U, N]``.
        delta: ``[S, R, H]``, or ``[L, S, R, H]``; Δ after softplus, float32.
    """

    x: Tensor
    B: Tensor
    delta: Tensor

    @classmethod
    def zeros(
        cls, layers: int, slots: int, capacity: int, *, H: int, G: int, P: int, N: int, U: int | None = None,
        dtype: torch.dtype, device: torch.device | str,
    ) -> SSDRing:  # fmt: skip
        """Rings of ``layers`` layers, each buffer in one piece so that :func:`ssd_fold` is one launch for all; U is G
        unless it is given."""
        start = (layers, slots, capacity)
        sizes = ((G, P), (U or G, N))
        x, B = (torch.zeros(*start, *size, dtype=dtype, device=device) for size in sizes)
        return cls(x, B, torch.zeros(*start, H, dtype=torch.float32, device=device))

    def layer(self, number: int) -> SSDRing:
        """One layer's, as views."""
        return SSDRing(*(part[number] for part in self))

    def first(self, slots: int) -> SSDRing:
        """One layer's first rows, as views."""
        return SSDRing(*(part[:slots] for part in self))


def ssd_replay(
    x_STGP: Tensor,
    dt_STH: Tensor,
    A_H: Tensor,
    B_STUN: Tensor,
    C_STVN: Tensor,
    D_H: Tensor | None,
    state_SHPN: Tensor,
    ring: SSDRing,
    place: RingPlace,
    *,
    dt_bias_H: Tensor | None = None,
    norm: GatedNorm | None = None,
    overlap: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Outputs of T new tokens after each row's state and its pending tokens, without taking the state over them.

    With S₀ the row's state, j over its pending tokens and the new ones up to t, and c the running sum of A Δ from the
    first pending one on (arXiv 2405.21060, section 6; arXiv 2408.15237, section 4):

        y_t = e^{c_t} S₀ C_t + Σ_{j≤t} e^{c_t−c_j} Δ_j (B_j·C_t) x_j + D x_t

    These are the outputs of T calls of :func:`mambify.ops.ssd.ssd_step`. The new tokens' x, B and Δ are written into
    the ring at the head. Once it is known how many are accepted, ``rounds.move_on`` makes them pending. In rows where
    places run short (``place.folds_above``) the same call also folds what is pending, n tokens, into the state:

        S ← e^{c_n} S₀ + Σ_{j≤n} e^{c_n−c_j} Δ_j x_j B_jᵀ

    Head h reads head h // (H // G) of x, and likewise of B and C; the kernels repeat none of them. In rows that are not
    active neither state nor ring changes, and y is zero. Nothing waits for the device: all shapes are static, and T = 1
    is plain decoding that writes a state once in about R tokens.

    Args:
        x_STGP: values. Sets the dtype of ``y``.
        dt_STH: step sizes Δ ≥ 0, after softplus; before it if ``dt_bias_H`` is given.
        A_H: decay rates, A ≤ 0.
        B_STUN, C_STVN: input and output projections.
        D_H: skip weights, or None for no skip.
        state_SHPN: float32 (the reference takes float64 too), changed in place in rows that fold.
        ring: one layer's, changed in place. Places that are not pending may hold anything.
        place: where each row stands; only read.
        dt_bias_H: Δ = softplus(dt + dt_bias).
        norm: of each head's outputs, gated before it (:mod:`mambify.ops.gated_norm`); what it makes is then the result.
        overlap: the kernel starts while the one before it ends (:mod:`mambify.ops.overlap`).
        backend: "auto", "reference" or "triton" (P and N up to 128; x, B, C and their rings in one dtype).

    Returns:
        y_STHP in x's dtype, or z's where it is normed.

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together, or more new tokens than the rings are for.
    """
    supported = HAS_TRITON and kernels.supports(x_STGP, dt_STH, B_STUN, C_STVN, state_SHPN, *ring)
    chosen = pick_backend("ssd_replay", backend, backends_on(x_STGP.device, supported=supported))
    slots, new, groups, head_dim = x_STGP.shape
    heads, state_size = len(A_H), C_STVN.shape[-1]
    place.check("ssd_replay", slots, new)
    check_shape("ssd_replay", "dt_STH", dt_STH, (slots, new, heads))
    check_head_groups("ssd_replay", heads, G=groups, U=B_STUN.shape[2], V=C_STVN.shape[2])
    check_shape("ssd_replay", "B_STUN", B_STUN, (slots, new, B_STUN.shape[2], state_size))
    check_shape("ssd_replay", "C_STVN", C_STVN, (slots, new, C_STVN.shape[2], state_size))
    check_shape("ssd_replay", "D_H", D_H, (heads,))
    check_shape("ssd_replay", "dt_bias_H", dt_bias_H, (heads,))
    check_shape("ssd_replay", "state_SHPN", state_SHPN, (slots, heads, head_dim, state_size))
    _check_ring("ssd_replay", ring, (slots, place.capacity), state_SHPN.shape[1:], groups, B_STUN.shape[2])
    if norm is not None:
        check_shape("ssd_replay", "z", norm.z_BTHP, (slots, new, heads, head_dim))
        check_shape("ssd_replay", "the norm's weight", norm.weight_HP, (heads, head_dim))
    given = (x_STGP, dt_STH, A_H, B_STUN, C_STVN, D_H, dt_bias_H, state_SHPN, ring, place)
    if chosen == "triton":
        return kernels.ssd_replay(*given, norm, overlap)
    y_STHP = reference.ssd_replay(*given)
    return y_STHP if norm is None else gated_rms_norm(y_STHP, *norm, backend="reference")


def ssd_fold(state_LSHPN: Tensor, A_LH: Tensor, ring: SSDRing, place: RingPlace, *, backend: str = "auto") -> None:
    """Folds what is pending in active rows into the states of all layers, in place and in one launch.

        S ← e^{c_n} S + Σ_{j≤n} e^{c_n−c_j} Δ_j x_j B_jᵀ

    ``place.settle()`` is to follow. Before a state is read by anything else, or in every round, instead of leaving
    the fold to :func:`ssd_replay`, which does it with a state that it has read anyway.

    Args:
        state_LSHPN: states of all layers, in one piece.
        ring: of all layers.
        place: where each row stands; only read.
        backend: as :func:`ssd_replay`.

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    supported = HAS_TRITON and kernels.supports(ring.x, ring.delta, ring.B, ring.B, state_LSHPN, *ring)
    chosen = pick_backend("ssd_fold", backend, backends_on(state_LSHPN.device, supported=supported))
    layers, slots, heads = state_LSHPN.shape[:3]
    place.check("ssd_fold", slots, 1)
    check_shape("ssd_fold", "A_LH", A_LH, (layers, heads))
    groups = ring.x.shape[-2], ring.B.shape[-2]
    check_head_groups("ssd_fold", heads, G=groups[0], U=groups[1])
    _check_ring("ssd_fold", ring, (layers, slots, place.capacity), state_LSHPN.shape[2:], *groups)
    run = reference.ssd_fold if chosen == "reference" else kernels.ssd_fold
    run(state_LSHPN, A_LH, ring, place)


def _check_ring(operation: str, ring: SSDRing, start: tuple[int, ...], HPN: tuple[int, ...], G: int, U: int) -> None:
    heads, head_dim, state_size = HPN
    check_shape(operation, "ring.x", ring.x, (*start, G, head_dim))
    check_shape(operation, "ring.B", ring.B, (*start, U, state_size))
    check_shape(operation, "ring.delta", ring.delta, (*start, heads))
