"""Mamba1 over a few new tokens that may yet be rejected: the state is read once and stays where it is.

Letters: S rows (slots), T new tokens, R places of a ring, J = G·Q·U sub-heads, G key/value heads, Q query heads a
key/value head, U sub-heads a query head, M channels a sub-head, N state size, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.ring import RingPlace
from mambify.ops.selective_replay import reference

if HAS_TRITON:
    from mambify.ops.selective_replay import triton as kernels

__all__ = ["SelectiveRing", "selective_fold", "selective_replay"]


class SelectiveRing(NamedTuple):
    """What a Mamba1 layer keeps of recent tokens; B at the granularity of key/value heads.

    Attributes:
        x: ``[S, R, J, M]``, or ``[L, S, R, J, M]`` for the layers of a model.
        B: ``[S, R, G, U, N]``, or ``[L, S, R, G, U, N]``.
        delta: ``[S, R, J, M]``, or ``[L, S, R, J, M]``; Δ after softplus, float32.
    """

    x: Tensor
    B: Tensor
    delta: Tensor

    @classmethod
    def zeros(
        cls, layers: int, slots: int, capacity: int, *, J: int, M: int, G: int, U: int, N: int,
        dtype: torch.dtype, device: torch.device | str,
    ) -> SelectiveRing:  # fmt: skip
        """Rings of ``layers`` layers, each buffer in one piece so that :func:`selective_fold` is one launch for all."""
        start = (layers, slots, capacity)
        x, B = (torch.zeros(*start, *rest, dtype=dtype, device=device) for rest in ((J, M), (G, U, N)))
        return cls(x, B, torch.zeros(*start, J, M, dtype=torch.float32, device=device))

    def layer(self, number: int) -> SelectiveRing:
        """One layer's, as views."""
        return SelectiveRing(*(part[number] for part in self))

    def first(self, slots: int) -> SelectiveRing:
        """One layer's first rows, as views."""
        return SelectiveRing(*(part[:slots] for part in self))


def selective_replay(
    x_STJM: Tensor,
    dt_STJM: Tensor,
    A_JMN: Tensor,
    B_STGUN: Tensor,
    C_STJN: Tensor,
    D_JM: Tensor | None,
    state_SJMN: Tensor,
    ring: SelectiveRing,
    place: RingPlace,
    *,
    dt_bias_JM: Tensor | None = None,
    z_STJM: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Outputs of T new tokens after each row's state and its pending tokens, without taking the state over them.

    Every channel and state entry decays by itself, so the pending tokens and then the new ones are replayed on a copy
    of the state in registers (arXiv 2312.00752, algorithm 2; arXiv 2408.15237, section 4):

        S_t = exp(Δ_t A) ∘ S_{t-1} + (Δ_t x_t) B_tᵀ        y_t = S_t C_t + D x_t

    These are the outputs of T calls of :func:`mambify.ops.selective_scan.selective_scan_step`. The new tokens' x, B
    and Δ are written into the ring at the head. Once it is known how many are accepted, ``rounds.move_on`` makes them
    pending. In rows where places run short (``place.folds_above``) the same call also writes the state after the
    pending tokens. In rows that are not active neither state nor ring changes, and y is zero.

    Stock Mamba1, whose channels all share B and C, has one sub-head of all channels: J = G = U = 1.
    Sub-head j is sub-head j % U of query head j // U, which reads key/value head j // (Q·U) of B.

    Args:
        x_STJM: values. Sets the dtype of ``y``; everything inside is float32.
        dt_STJM: step sizes Δ ≥ 0, after softplus; before it if ``dt_bias_JM`` is given.
        A_JMN: decay rates, A ≤ 0.
        B_STGUN, C_STJN: input and output projections of each sub-head; B of key/value heads.
        D_JM: skip weights, or None for no skip.
        state_SJMN: float32 (the reference takes float64 too), changed in place in rows that fold.
        ring: one layer's, changed in place. Places that are not pending may hold anything.
        place: where each row stands; only read.
        dt_bias_JM: Δ = softplus(dt + dt_bias).
        z_STJM: gate; the output is then y · SiLU(z).
        backend: "auto", "reference" or "triton" (state sizes up to 256; x, B and their rings in one dtype).

    Returns:
        y_STJM in x's dtype.

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together, or more new tokens than the rings are for.
    """
    supported = HAS_TRITON and kernels.supports(x_STJM, dt_STJM, B_STGUN, C_STJN, state_SJMN, *ring)
    chosen = pick_backend("selective_replay", backend, backends_on(x_STJM.device, supported=supported))
    slots, new, J, M = x_STJM.shape
    G, U, N = B_STGUN.shape[2:]
    place.check("selective_replay", slots, new)
    check_shape("selective_replay", "dt_STJM", dt_STJM, (slots, new, J, M))
    check_shape("selective_replay", "A_JMN", A_JMN, (J, M, N))
    check_shape("selective_replay", "B_STGUN", B_STGUN, (slots, new, G, U, N))
    check_shape("selective_replay", "C_STJN", C_STJN, (slots, new, J, N))
    check_shape("selective_replay", "D_JM", D_JM, (J, M))
    check_shape("selective_replay", "dt_bias_JM", dt_bias_JM, (J, M))
    check_shape("selective_replay", "z_STJM", z_STJM, (slots, new, J, M))
    check_shape("selective_replay", "state_SJMN", state_SJMN, (slots, J, M, N))
    _check_ring("selective_replay", ring, (slots, place.capacity), (J, M, N), (G, U))
    run = reference.selective_replay if chosen == "reference" else kernels.selective_replay
    return run(x_STJM, dt_STJM, A_JMN, B_STGUN, C_STJN, D_JM, dt_bias_JM, z_STJM, state_SJMN, ring, place)


def selective_fold(
    state_LSJMN: Tensor, A_LJMN: Tensor, ring: SelectiveRing, place: RingPlace, *, backend: str = "auto"
) -> None:
    """Takes the states of all layers over what is pending in active rows, in place and in one launch.

    ``place.settle()`` is to follow. See :func:`mambify.ops.ssd_replay.ssd_fold`.

    Args:
        state_LSJMN: states of all layers, in one piece.
        ring: of all layers.
        place: where each row stands; only read.
        backend: as :func:`selective_replay`.

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    supported = HAS_TRITON and kernels.supports(ring.x, ring.delta, ring.B, ring.B, state_LSJMN, *ring)
    chosen = pick_backend("selective_fold", backend, backends_on(state_LSJMN.device, supported=supported))
    L, S, J, M, N = state_LSJMN.shape
    place.check("selective_fold", S, 1)
    check_shape("selective_fold", "A_LJMN", A_LJMN, (L, J, M, N))
    _check_ring("selective_fold", ring, (L, S, place.capacity), (J, M, N), tuple(ring.B.shape[-3:-1]))
    run = reference.selective_fold if chosen == "reference" else kernels.selective_fold
    run(state_LSJMN, A_LJMN, ring, place)


def _check_ring(
    operation: str, ring: SelectiveRing, start: tuple[int, ...], JMN: tuple[int, ...], GU: tuple[int, ...]
) -> None:
    J, M, N = JMN
    G, U = GU
    if J % (G * U):
        raise ValueError(f"{operation}: needs G·U dividing J, got G={G}, U={U}, J={J}")
    check_shape(operation, "ring.x", ring.x, (*start, J, M))
    check_shape(operation, "ring.B", ring.B, (*start, G, U, N))
    check_shape(operation, "ring.delta", ring.delta, (*start, J, M))
