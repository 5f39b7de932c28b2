"""Replay for Mamba2 as Triton kernels: a program is one row, one query head and BLOCK_P of its P channels.

A state of P × N float32 is by far the largest thing that is read, and it is read once: a program loads its share,
makes the outputs of all T tokens from it, and writes it only if its row folds. Pending tokens and new ones stand in
one window of R entries, for there are never more. Which rows fold is decided on the device, from counts that all
programs see alike. Programs read pending places and write new ones, which do not meet (see ops/ring.py): none reads
what another writes.

Two ways to make the outputs:

_replay_products   bfloat16, T > 2: T padded to 16 or 32 rows of matrix products. What is float32 (the state, the
                   weights of the window) goes in as a sum of two bfloat16 numbers, exact to 2⁻¹⁷; C, B and x are
                   bfloat16 already. A program issues about 1,100 instructions a warp for 64 × 128 entries, less
                   than half of what a multiprocessor has time for while it reads them. Entries go through in two
                   halves, so that 128 registers do.
_replay_sums       everything else: plain float32 sums, one token after another. A sum over N costs five shuffles for
                   four multiplications: for T = 1 and 2 that is no more work than the products, from about T = 5 on
                   it would take longer than the read.

A head's gate and norm are part of it where a program has all of the head's channels, which up to 64 of them it does.

Folding is float32 in both, S e^{c_n} + Σ_j (weight_j x_j) B_jᵀ, one pending token at a time.

Letters: S rows, T new tokens, R places of a ring = entries of a window, H heads of the state, G of x, U of B, V of C, P
head dimension, N state size; in kernels R, P = BLOCK_P, N = BLOCK_N and T = ROWS ≥ T are the axes of tiles.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="assignment, misc"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.backends import last_adjacent
from mambify.ops.gated_norm import GatedNorm, gated_rms_norm
from mambify.ops.overlap import launch_options, wait_for_others
from mambify.ops.ring import RingPlace, check_contiguous
from mambify.ops.triton_math import softplus

_WIDEST = 128
_BUSY = 132 * 4  # programs that fill an H100: four on each multiprocessor
_SUMMED = 2  # new tokens up to which plain sums cost less than matrix products
_NORMED = 64  # channels of a head that a program has all of, for the norm over them

_Ring = tuple[Tensor, Tensor, Tensor]


def supports(x_STGP: Tensor, dt_STH: Tensor, B_STUN: Tensor, C_STVN: Tensor, state_SHPN: Tensor, *ring: Tensor) -> bool:
    """Whether the kernels take these inputs: P and N up to 128, one dtype for x, B, C and their rings, no float64."""
    ring_x, ring_B, ring_delta = ring
    one = {v.dtype for v in (x_STGP, B_STUN, C_STVN, ring_x, ring_B)}
    return (
        max(x_STGP.shape[-1], B_STUN.shape[-1]) <= _WIDEST
        and len(one) == 1
        and one <= {torch.bfloat16, torch.float16, torch.float32}
        and state_SHPN.dtype == ring_delta.dtype == torch.float32
        and dt_STH.dtype != torch.float64
    )


class _Plan(NamedTuple):
    """How the work is cut.

    Attributes:
        BLOCK_P, BLOCK_N: channels a program, and entries, of which there are N.
        RAGGED: whether tiles hold more than P and N.
        products: whether outputs are made by matrix products.
        warps: of a program.
    """

    BLOCK_P: int
    BLOCK_N: int
    RAGGED: bool
    products: bool
    warps: int

    def grid(self, heads: int, slots: int, P: int) -> tuple[int, int]:
        return heads * triton.cdiv(P, self.BLOCK_P), slots


def _plan(heads: int, P: int, N: int, dtype: torch.dtype, new: int, *, whole: bool = False) -> _Plan:
    """64 channels a program, or 32 where that would not keep the GPU busy; ``heads`` counts those of all rows.

    More channels would spare little, as heads of a group find x and B in the cache, and cost registers.

    Args:
        whole: a program has all channels of a head.
    """
    tile_p, tile_n = (max(16, triton.next_power_of_2(size)) for size in (P, N))
    busy = heads * triton.cdiv(P, 64) >= _BUSY
    block_p = min(tile_p, 64 if whole or busy else 32)
    ragged, products = (tile_p, tile_n) != (P, N), dtype == torch.bfloat16 and new > _SUMMED
    return _Plan(block_p, tile_n, ragged, products, 8 if block_p == 64 and not busy else 4)


def ssd_replay(
    x_STGP: Tensor,
    dt_STH: Tensor,
    A_H: Tensor,
    B_STUN: Tensor,
    C_STVN: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    state_SHPN: Tensor,
    ring: _Ring,
    place: RingPlace,
    norm: GatedNorm | None,
    overlap: bool,
) -> Tensor:
    """See :func:`mambify.ops.ssd_replay.ssd_replay`."""
    slots, new, groups, P = x_STGP.shape
    if norm is not None and P > _NORMED:
        given = (x_STGP, dt_STH, A_H, B_STUN, C_STVN, D_H, dt_bias_H, state_SHPN, ring, place)
        return gated_rms_norm(ssd_replay(*given, None, overlap), *norm)
    heads, N = dt_STH.shape[2], C_STVN.shape[3]
    check_contiguous("ssd_replay", state_SHPN, *ring)
    x_STGP, B_STUN, C_STVN = (last_adjacent(v) for v in (x_STGP, B_STUN, C_STVN))
    plan = _plan(slots * heads, P, N, x_STGP.dtype, new, whole=norm is not None)
    z_STHP, norm_HP, eps, z_strides = None, None, 0.0, (0, 0)
    if norm is not None:
        z_STHP, norm_HP, eps = _heads_adjacent(norm.z_BTHP), norm.weight_HP.contiguous(), norm.eps
        z_strides = z_STHP.stride()[:2]
    y_STHP = (x_STGP if z_STHP is None else z_STHP).new_empty((slots, new, heads, P))
    kernel, options = _replay_sums, {}
    if plan.products:
        # 128 registers: four programs of four warps fit a multiprocessor. Larger windows would spill.
        small = new <= 16 and place.capacity <= 32
        options = {
            "ROWS": 16 if new <= 16 else 32,
            "INNER_N": max(16, plan.BLOCK_N // 2),
            "maxnreg": 128 if small else None,
        }
        kernel = _replay_products
    with torch.cuda.device_of(x_STGP):  # Triton launches on the current device
        kernel[plan.grid(heads, slots, P)](
            x_STGP, dt_STH, A_H, B_STUN, C_STVN, D_H, dt_bias_H, state_SHPN, *ring, y_STHP,
            place.head_S, place.pending_S, place.active_S, z_STHP, norm_HP, place.folds_above(new), eps, *z_strides,
            *x_STGP.stride()[:3], *dt_STH.stride(), *B_STUN.stride()[:3], *C_STVN.stride()[:3],
            H=heads, G=groups, U=B_STUN.shape[2], V=C_STVN.shape[2], P=P, N=N, T=new, R=place.capacity,
            BLOCK_P=plan.BLOCK_P, BLOCK_N=plan.BLOCK_N, RAGGED=plan.RAGGED, **options, num_warps=plan.warps,
            num_stages=1, **launch_options(overlap),
        )  # fmt: skip
    return y_STHP


def _heads_adjacent(z_STHP: Tensor) -> Tensor:
    """With the channels of all heads of a token in one piece."""
    return z_STHP if z_STHP.stride()[2:] == (z_STHP.shape[3], 1) else z_STHP.contiguous()


def ssd_fold(state_LSHPN: Tensor, A_LH: Tensor, ring: _Ring, place: RingPlace) -> None:
    """See :func:`mambify.ops.ssd_replay.ssd_fold`."""
    layers, slots, heads, P, N = state_LSHPN.shape
    check_contiguous("ssd_fold", state_LSHPN, *ring)
    plan = _plan(layers * slots * heads, P, N, ring[0].dtype, 1)
    with torch.cuda.device_of(state_LSHPN):
        _fold[plan.grid(layers * heads, slots, P)](
            A_LH.contiguous(), state_LSHPN, *ring, place.head_S, place.pending_S, place.active_S,
            H=heads, G=ring[0].shape[-2], U=ring[1].shape[-2], P=P, N=N, R=place.capacity,
            BLOCK_P=plan.BLOCK_P, BLOCK_N=plan.BLOCK_N, RAGGED=plan.RAGGED, num_warps=4, num_stages=1,
        )  # fmt: skip


@triton.jit
def _replay_products(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, state_ptr, ring_x, ring_B, ring_delta, y_ptr,
    head_ptr, pending_ptr, active_ptr, z_ptr, norm_ptr, folds_above, eps, z_row, z_token,
    x_row, x_token, x_group, dt_row, dt_token, dt_head, B_row, B_token, B_group, C_row, C_token, C_head,
    H: tl.constexpr, G: tl.constexpr, U: tl.constexpr, V: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr, ROWS: tl.constexpr, INNER_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_others(OVERLAP)
    h, block, p, row = _place(P, BLOCK_P)
    head, pending, active = _counts(head_ptr, pending_ptr, active_ptr, row)
    t = tl.arange(0, ROWS)
    y_tile = y_ptr + ((row * T + t[:, None]) * H + h) * P + p[None, :]
    y_here = _inside((t < T)[:, None], p[None, :], P, RAGGED)
    if active:
        x, delta, rate, B_from, B_to = _window(
            x_ptr, dt_ptr, A_ptr, B_ptr, bias_ptr, ring_x, ring_B, ring_delta, row, h, block, p, head, pending,
            x_row, x_token, x_group, dt_row, dt_token, dt_head, B_row, B_token, B_group,
            H, G, U, P, N, T, R, RAGGED,
        )  # fmt: skip
        e = tl.arange(0, R)
        y = tl.zeros((ROWS, BLOCK_P), tl.float32)
        scores = tl.zeros((ROWS, R), tl.float32)
        for part in tl.static_range(BLOCK_N // INNER_N):
            n = part * INNER_N + tl.arange(0, INNER_N)
            s = _load_state(state_ptr, row * H + h, p, n, P, N, RAGGED)
            C_tile = C_ptr + row * C_row + t[:, None] * C_token + (h // (H // V)) * C_head + n[None, :]
            C = tl.load(C_tile, mask=_inside((t < T)[:, None], n[None, :], N, RAGGED), other=0.0)
            B = _window_of_B(B_from, B_to, h, block, n, pending, H, U, N, T, R, RAGGED)
            scores = tl.dot(C, tl.trans(B), scores)
            s_high, s_low = _halves(s, C.dtype)
            y = tl.dot(C, tl.trans(s_high), y)
            y = tl.dot(C, tl.trans(s_low), y)

        # A token that forgets everything, to e⁻⁸⁷, leaves the sums of those around it right to 10⁻³ at worst.
        decay = tl.cumsum(tl.maximum(rate, -87.0), 0)
        own = e[None, :] == pending + t[:, None]  # entry pending + t of the window is token t
        enter = tl.sum(tl.where(own, decay[None, :], 0.0), 1)
        seen = (e[None, :] <= pending + t[:, None]) & (t < T)[:, None]
        gap = tl.where(seen, enter[:, None] - decay[None, :], -float("inf"))
        weight = tl.exp(gap) * delta[None, :] * scores
        if D_ptr is not None:
            weight = tl.where(own, weight + tl.load(D_ptr + h).to(tl.float32), weight)
        weight_high, weight_low = _halves(weight, x.dtype)
        y *= tl.exp(enter)[:, None]
        y = tl.dot(weight_high, x, y)
        y = tl.dot(weight_low, x, y)
        if norm_ptr is not None:
            z = tl.load(z_ptr + row * z_row + t[:, None] * z_token + (h * P + p)[None, :], mask=y_here, other=0.0)
            scale = tl.load(norm_ptr + h * P + p, mask=p < P, other=0.0).to(tl.float32)
            y = _gated_norm(y, z, scale[None, :], eps, P, 1)
        tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=y_here)
        if pending > folds_above:
            A = tl.load(A_ptr + h).to(tl.float32)
            for start in range(0, BLOCK_N, INNER_N):
                n = start + tl.arange(0, INNER_N)
                _fold_state(
                    state_ptr, A, ring_x, ring_B, ring_delta, row, h, p, n, head, pending, H, G, U, P, N, R, RAGGED
                )  # fmt: skip
    else:
        tl.store(y_tile, tl.zeros((ROWS, BLOCK_P), y_ptr.dtype.element_ty), mask=y_here)


@triton.jit
def _replay_sums(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, state_ptr, ring_x, ring_B, ring_delta, y_ptr,
    head_ptr, pending_ptr, active_ptr, z_ptr, norm_ptr, folds_above, eps, z_row, z_token,
    x_row, x_token, x_group, dt_row, dt_token, dt_head, B_row, B_token, B_group, C_row, C_token, C_head,
    H: tl.constexpr, G: tl.constexpr, U: tl.constexpr, V: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_others(OVERLAP)
    h, block, p, row = _place(P, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    head, pending, active = _counts(head_ptr, pending_ptr, active_ptr, row)
    y_tile = y_ptr + (row * T * H + h) * P + p
    if active:
        s = _load_state(state_ptr, row * H + h, p, n, P, N, RAGGED)
        x, delta, rate, B_from, B_to = _window(
            x_ptr, dt_ptr, A_ptr, B_ptr, bias_ptr, ring_x, ring_B, ring_delta, row, h, block, p, head, pending,
            x_row, x_token, x_group, dt_row, dt_token, dt_head, B_row, B_token, B_group,
            H, G, U, P, N, T, R, RAGGED,
        )  # fmt: skip
        B = _window_of_B(B_from, B_to, h, block, n, pending, H, U, N, T, R, RAGGED)
        x, B = x.to(tl.float32), B.to(tl.float32)
        # In float64 differences of the sums are right to float32 even after a token that forgets everything.
        decay = tl.cumsum(rate.to(tl.float64), 0)
        e = tl.arange(0, R)
        for t in tl.static_range(T):
            C = tl.load(C_ptr + row * C_row + t * C_token + (h // (H // V)) * C_head + n, mask=n < N, other=0.0).to(
                tl.float32
            )
            enter = tl.sum(tl.where(e == pending + t, decay, 0.0), 0)
            gap = tl.where(e <= pending + t, (enter - decay).to(tl.float32), -float("inf"))
            weight = tl.exp(gap) * delta * tl.sum(B * C[None, :], 1)
            if D_ptr is not None:
                weight = tl.where(e == pending + t, weight + tl.load(D_ptr + h).to(tl.float32), weight)
            y = tl.exp(enter.to(tl.float32)) * tl.sum(s * C[None, :], 1) + tl.sum(weight[:, None] * x, 0)
            if norm_ptr is not None:
                z = tl.load(z_ptr + row * z_row + t * z_token + h * P + p, mask=p < P, other=0.0)
                scale = tl.load(norm_ptr + h * P + p, mask=p < P, other=0.0).to(tl.float32)
                y = _gated_norm(y, z, scale, eps, P, 0)
            tl.store(y_tile + t * H * P, y.to(y_ptr.dtype.element_ty), mask=p < P)
        if pending > folds_above:
            A = tl.load(A_ptr + h).to(tl.float32)
            _fold_state(
                state_ptr, A, ring_x, ring_B, ring_delta, row, h, p, n, head, pending, H, G, U, P, N, R, RAGGED
            )  # fmt: skip
    else:
        for t in tl.static_range(T):
            tl.store(y_tile + t * H * P, tl.zeros((BLOCK_P,), y_ptr.dtype.element_ty), mask=p < P)


@triton.jit
def _fold(
    A_ptr, state_ptr, ring_x, ring_B, ring_delta, head_ptr, pending_ptr, active_ptr,
    H: tl.constexpr, G: tl.constexpr, U: tl.constexpr, P: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    layer_h, _, p, slot = _place(P, BLOCK_P)  # heads of all layers
    n = tl.arange(0, BLOCK_N)
    head, pending, active = _counts(head_ptr, pending_ptr, active_ptr, slot)
    if active and pending > 0:
        row = (layer_h // H) * tl.num_programs(1).to(tl.int64) + slot  # of all layers
        A = tl.load(A_ptr + layer_h).to(tl.float32)
        _fold_state(
            state_ptr, A, ring_x, ring_B, ring_delta, row, layer_h % H, p, n, head, pending, H, G, U, P, N, R, RAGGED
        )  # fmt: skip


@triton.jit
def _place(P: tl.constexpr, BLOCK_P: tl.constexpr):
    """The program's head, its block of channels and these [P], its row. Heads of a group, which read
    the same x and B, run side by side."""
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    block = tl.program_id(0) % blocks
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    return tl.program_id(0) // blocks, block, p, tl.program_id(1).to(tl.int64)


@triton.jit
def _counts(head_ptr, pending_ptr, active_ptr, row):
    head, pending = tl.load(head_ptr + row).to(tl.int32), tl.load(pending_ptr + row).to(tl.int32)
    return head, pending, tl.load(active_ptr + row) != 0


@triton.jit
def _inside(mask, place, size: tl.constexpr, RAGGED: tl.constexpr):
    """``mask``, and ``place < size`` where tiles are larger than what they hold."""
    if RAGGED:
        mask = mask & (place < size)
    return mask


@triton.jit
def _load_state(state_ptr, row_head, p, n, P: tl.constexpr, N: tl.constexpr, RAGGED: tl.constexpr):
    tile = state_ptr + (row_head * P + p[:, None]) * N + n[None, :]
    return tl.load(tile, mask=(p < P)[:, None] & (n < N)[None, :], other=0.0) if RAGGED else tl.load(tile)


@triton.jit
def _gated_norm(y, z, scale, eps, P: tl.constexpr, AXIS: tl.constexpr):
    """The norm of a head's channels along ``AXIS``, gated before; rounded where separate operations round."""
    gate = z.to(tl.float32)
    gated = y.to(z.dtype).to(tl.float32) * (gate * tl.sigmoid(gate))
    normed = gated * tl.rsqrt(tl.sum(gated * gated, AXIS, keep_dims=True) / P + eps)
    return scale * normed.to(z.dtype).to(tl.float32)


@triton.jit
def _halves(value, dtype: tl.constexpr):
    """Two numbers of ``dtype`` whose sum is ``value`` to twice its precision."""
    high = value.to(dtype)
    return high, (value - high.to(tl.float32)).to(dtype)


@triton.jit
def _window(
    x_ptr, dt_ptr, A_ptr, B_ptr, bias_ptr, ring_x, ring_B, ring_delta, row, h, block, p, head, pending,
    x_row, x_token, x_group, dt_row, dt_token, dt_head, B_row, B_token, B_group,
    H: tl.constexpr, G: tl.constexpr, U: tl.constexpr, P: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """x [R, P], Δ [R] and A Δ [R] of the pending tokens and then the new ones, zero beyond them; where B is to be
    found and where it goes in the ring, each [R]. Writes new x and Δ into the ring: of the programs that have a
    value, one does."""
    g = h // (H // G)
    t = tl.arange(0, R) - pending
    pends, comes = t < 0, (t >= 0) & (t < T)
    place = row * R + ((head + t) & (R - 1))
    x_to = ring_x + (place * G + g) * P
    x_from = tl.where(pends, x_to, x_ptr + (row * x_row + g * x_group) + t * x_token)
    x = tl.load(x_from[:, None] + p[None, :], mask=_inside((t < T)[:, None], p[None, :], P, RAGGED), other=0.0)
    if h % (H // G) == 0:
        tl.store(x_to[:, None] + p[None, :], x, mask=_inside(comes[:, None], p[None, :], P, RAGGED))

    delta_to = ring_delta + place * H + h
    delta = tl.load(delta_to, mask=pends, other=0.0)
    dt = tl.load(dt_ptr + (row * dt_row + h * dt_head) + t * dt_token, mask=comes, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        dt = softplus(dt + tl.load(bias_ptr + h).to(tl.float32))
    delta = tl.where(comes, dt, delta)
    if block == 0:
        tl.store(delta_to, delta, mask=comes)

    u = h // (H // U)
    B_to = ring_B + (place * U + u) * N
    B_from = tl.where(pends, B_to, B_ptr + (row * B_row + u * B_group) + t * B_token)
    return x, delta, delta * tl.load(A_ptr + h).to(tl.float32), B_from, B_to


@triton.jit
def _window_of_B(
    B_from, B_to, h, block, n, pending,
    H: tl.constexpr, U: tl.constexpr, N: tl.constexpr, T: tl.constexpr, R: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """B [R, N] of the same window; writes the new ones into the ring."""
    t = tl.arange(0, R) - pending
    B = tl.load(B_from[:, None] + n[None, :], mask=_inside((t < T)[:, None], n[None, :], N, RAGGED), other=0.0)
    if (h % (H // U) == 0) & (block == 0):
        comes = (t >= 0) & (t < T)
        tl.store(B_to[:, None] + n[None, :], B, mask=_inside(comes[:, None], n[None, :], N, RAGGED))
    return B


@triton.jit
def _fold_state(
    state_ptr, A, ring_x, ring_B, ring_delta, row, h, p, n, head, pending,
    H: tl.constexpr, G: tl.constexpr, U: tl.constexpr, P: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Takes a share [P, N] of a state over the pending tokens, which are added from the last to the first: each has
    decayed by those after it. The state is read again after its outputs were made: from the cache, and not kept in
    registers meanwhile."""
    g, u = h // (H // G), h // (H // U)
    e = tl.arange(0, R)
    s = _load_state(state_ptr, row * H + h, p, n, P, N, RAGGED)
    delta = tl.load(ring_delta + (row * R + ((head - 1 - e) & (R - 1))) * H + h, mask=e < pending, other=0.0)
    s *= tl.exp(A * tl.sum(delta, 0))
    fade = tl.full([], 1.0, tl.float32)
    for back in range(pending):
        place = row * R + ((head - 1 - back) & (R - 1))
        step = tl.load(ring_delta + place * H + h)
        x = tl.load(ring_x + (place * G + g) * P + p, mask=p < P, other=0.0).to(tl.float32)
        B = tl.load(ring_B + (place * U + u) * N + n, mask=n < N, other=0.0).to(tl.float32)
        s += ((fade * step) * x)[:, None] * B[None, :]
        fade *= tl.exp(A * step)
    tile = state_ptr + ((row * H + h) * P + p[:, None]) * N + n[None, :]
    if RAGGED:
        tl.store(tile, s, mask=(p < P)[:, None] & (n < N)[None, :])
    else:
        tl.store(tile, s)
