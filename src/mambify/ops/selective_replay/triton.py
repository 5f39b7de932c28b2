"""Replay for Mamba1 as a Triton kernel: a program has some sub-heads of one row, or channels of a wide one, with all
their state entries.

A state entry decays by an exponential of its own at every token, so there is no matrix form: a program reads its share
of the state once, replays the pending tokens and then the new ones on it in registers, and writes it only where its row
folds, between the two. The arithmetic is that of stepping. Its cost is exponentials, one a token and state entry: an
H100 makes about five in the time it takes to read an entry. B of a key/value head is read by all sub-heads that use it,
never repeated in memory.

Letters: S rows, T new tokens, R places of a ring, J = G·Q·U sub-heads, M channels a sub-head, N state size; in kernels
J, M and N are the axes of tiles, blocks of these.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc, unreachable, var-annotated"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.ring import RingPlace, check_contiguous
from mambify.ops.triton_math import softplus

_TILE = 512  # state entries a program, 16 a thread: fewer would spend more on tokens than on entries
_LEAST_TILE = 128  # where there are too few programs, what counts is how long one of them takes
_BUSY = 132 * 4  # warps that give each scheduler of an H100 one
LOG2E = tl.constexpr(1.4426950408889634)


def supports(
    x_STJM: Tensor, dt_STJM: Tensor, B_STGUN: Tensor, C_STJN: Tensor, state_SJMN: Tensor, *ring: Tensor
) -> bool:
    """Whether the kernels take these inputs: N up to 256, one dtype for x, B and their rings, no float64."""
    ring_x, ring_B, ring_delta = ring
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return (
        B_STGUN.shape[-1] <= 256
        and all(v.dtype in dtypes for v in (x_STJM, dt_STJM, B_STGUN, C_STJN))
        and x_STJM.dtype == ring_x.dtype
        and B_STGUN.dtype == ring_B.dtype
        and state_SJMN.dtype == ring_delta.dtype == torch.float32
    )


def selective_replay(
    x_STJM: Tensor,
    dt_STJM: Tensor,
    A_JMN: Tensor,
    B_STGUN: Tensor,
    C_STJN: Tensor,
    D_JM: Tensor | None,
    dt_bias_JM: Tensor | None,
    z_STJM: Tensor | None,
    state_SJMN: Tensor,
    ring: tuple[Tensor, Tensor, Tensor],
    place: RingPlace,
) -> Tensor:
    """See :func:`mambify.ops.selective_replay.selective_replay`."""
    S, T, J, M = x_STJM.shape
    G, U, N = B_STGUN.shape[2:]
    check_contiguous("selective_replay", state_SJMN, *ring)
    # Everything within a token must be adjacent, as in a view of a projection.
    x_STJM, dt_STJM, B_STGUN, C_STJN = (_tokens_whole(v) for v in (x_STJM, dt_STJM, B_STGUN, C_STJN))
    if z_STJM is not None:
        z_STJM = _tokens_whole(z_STJM)
    z_strides = (0, 0) if z_STJM is None else z_STJM.stride()[:2]
    y_STJM = x_STJM.new_empty((S, T, J, M))
    blocks = _blocks(S, J, M, N)
    with torch.cuda.device_of(x_STJM):  # Triton launches on the current device
        _replay[(blocks.programs(J, M), S)](
            x_STJM, dt_STJM, A_JMN.contiguous(), B_STGUN, C_STJN, _contiguous(D_JM), _contiguous(dt_bias_JM),
            z_STJM, state_SJMN, *ring, y_STJM, place.head_S, place.pending_S, place.active_S, place.folds_above(T),
            *x_STJM.stride()[:2], *dt_STJM.stride()[:2], *B_STGUN.stride()[:2], *C_STJN.stride()[:2],
            *z_strides, J=J, M=M, GU=G * U, U=U, N=N, T=T, R=place.capacity, **blocks._asdict(), num_warps=1,
        )  # fmt: skip
    return y_STJM


def selective_fold(state_LSJMN: Tensor, A_LJMN: Tensor, ring: tuple[Tensor, Tensor, Tensor], place: RingPlace) -> None:
    """See :func:`mambify.ops.selective_replay.selective_fold`."""
    L, S, J, M, N = state_LSJMN.shape
    check_contiguous("selective_fold", state_LSJMN, *ring)
    G, U = ring[1].shape[-3:-1]
    blocks = _blocks(L * S, J, M, N)
    with torch.cuda.device_of(state_LSJMN):
        _fold[(blocks.programs(J, M), S, L)](
            A_LJMN.contiguous(), state_LSJMN, *ring, place.head_S, place.pending_S, place.active_S,
            J=J, M=M, GU=G * U, U=U, N=N, R=place.capacity, **blocks._asdict(), num_warps=1,
        )  # fmt: skip


class _Blocks(NamedTuple):
    """Sub-heads, channels of each, and state entries of each, that a program has."""

    BLOCK_J: int
    BLOCK_M: int
    BLOCK_N: int

    def programs(self, J: int, M: int) -> int:
        return int(triton.cdiv(J, self.BLOCK_J) * triton.cdiv(M, self.BLOCK_M))


def _blocks(rows: int, J: int, M: int, N: int) -> _Blocks:
    tile = _TILE
    while tile > _LEAST_TILE and rows * triton.cdiv(J * M * N, tile) < _BUSY:
        tile //= 2
    block_n = triton.next_power_of_2(N)
    block_m = min(triton.next_power_of_2(M), max(1, tile // block_n))
    return _Blocks(min(triton.next_power_of_2(J), max(1, tile // (block_m * block_n))), block_m, block_n)


def _tokens_whole(tensor: Tensor) -> Tensor:
    return tensor if tensor[0, 0].is_contiguous() else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@triton.jit
def _replay(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, z_ptr, state_ptr, ring_x, ring_B, ring_delta, y_ptr,
    head_ptr, pending_ptr, active_ptr, folds_above,
    x_row, x_token, dt_row, dt_token, B_row, B_token, C_row, C_token, z_row, z_token,
    J: tl.constexpr, M: tl.constexpr, GU: tl.constexpr, U: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    i_JM, here_JM, JN, here_JN, BN, here_BN, JMN, here_JMN = tiles(J, M, GU, U, N, BLOCK_J, BLOCK_M, BLOCK_N)
    head, pending = tl.load(head_ptr + row).to(tl.int32), tl.load(pending_ptr + row).to(tl.int32)
    active = tl.load(active_ptr + row) != 0
    y_row = y_ptr + row * T * J * M + i_JM
    if active:
        state = state_ptr + row * J * M * N + JMN
        s = tl.load(state, mask=here_JMN, other=0.0)
        A = tl.load(A_ptr + JMN, mask=here_JMN, other=0.0).to(tl.float32) * LOG2E
        # All of the new tokens' inputs are on their way before the first is used.
        xs, deltas, Bs, Cs, zs = (), (), (), (), ()
        for t in tl.static_range(T):
            xs += (tl.load(x_ptr + row * x_row + t * x_token + i_JM, mask=here_JM, other=0.0),)
            deltas += (tl.load(dt_ptr + row * dt_row + t * dt_token + i_JM, mask=here_JM, other=0.0),)
            Bs += (tl.load(B_ptr + row * B_row + t * B_token + BN, mask=here_JN, other=0.0),)
            Cs += (tl.load(C_ptr + row * C_row + t * C_token + JN, mask=here_JN, other=0.0),)
            if z_ptr is not None:
                zs += (tl.load(z_ptr + row * z_row + t * z_token + i_JM, mask=here_JM, other=0.0),)
        s = after_pending(
            s, A, ring_x, ring_B, ring_delta, row, i_JM, here_JM, BN, here_JN, head, pending, J * M, GU * N, R
        )  # fmt: skip
        if pending > folds_above:
            tl.store(state, s, mask=here_JMN)

        bias = tl.zeros((BLOCK_J, BLOCK_M), tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + i_JM, mask=here_JM, other=0.0).to(tl.float32)
        D = tl.zeros((BLOCK_J, BLOCK_M), tl.float32)
        if D_ptr is not None:
            D = tl.load(D_ptr + i_JM, mask=here_JM, other=0.0).to(tl.float32)
        for t in tl.static_range(T):
            place = row * R + ((head + t) & (R - 1))
            delta, x = deltas[t].to(tl.float32), xs[t].to(tl.float32)
            if bias_ptr is not None:
                delta = softplus(delta + bias)
            s = one_token(s, A, delta, x, Bs[t].to(tl.float32))
            y = tl.sum(s * Cs[t].to(tl.float32)[:, None, :], 2) + D * x
            if z_ptr is not None:
                z = zs[t].to(tl.float32)
                y *= z * tl.sigmoid(z)
            tl.store(y_row + t * J * M, y.to(y_ptr.dtype.element_ty), mask=here_JM)
            tl.store(ring_x + place * J * M + i_JM, xs[t], mask=here_JM)
            tl.store(ring_delta + place * J * M + i_JM, delta, mask=here_JM)
            tl.store(ring_B + place * GU * N + BN, Bs[t], mask=here_BN)
    else:
        for t in tl.static_range(T):
            tl.store(y_row + t * J * M, tl.zeros((BLOCK_J, BLOCK_M), y_ptr.dtype.element_ty), mask=here_JM)


@triton.jit
def _fold(
    A_ptr, state_ptr, ring_x, ring_B, ring_delta, head_ptr, pending_ptr, active_ptr,
    J: tl.constexpr, M: tl.constexpr, GU: tl.constexpr, U: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    slot, layer = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = layer * tl.num_programs(1) + slot  # of all layers
    i_JM, here_JM, _, here_JN, BN, _, JMN, here_JMN = tiles(J, M, GU, U, N, BLOCK_J, BLOCK_M, BLOCK_N)
    head, pending = tl.load(head_ptr + slot).to(tl.int32), tl.load(pending_ptr + slot).to(tl.int32)
    active = tl.load(active_ptr + slot) != 0
    if active and pending > 0:
        state = state_ptr + row * J * M * N + JMN
        s = tl.load(state, mask=here_JMN, other=0.0)
        A = tl.load(A_ptr + layer * J * M * N + JMN, mask=here_JMN, other=0.0).to(tl.float32) * LOG2E
        s = after_pending(
            s, A, ring_x, ring_B, ring_delta, row, i_JM, here_JM, BN, here_JN, head, pending, J * M, GU * N, R
        )  # fmt: skip
        tl.store(state, s, mask=here_JMN)


@triton.jit
def tiles(
    J: tl.constexpr, M: tl.constexpr, GU: tl.constexpr, U: tl.constexpr, N: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Offsets and masks of the program's channels [J, M], of C [J, N], of B [J, N] (with the mask
    of those that this program writes into the ring, for it has the first channel that reads them) and of the state."""
    blocks_m: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    j = (tl.program_id(0) // blocks_m) * BLOCK_J + tl.arange(0, BLOCK_J)
    m = (tl.program_id(0) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    i_JM, here_JM = j[:, None] * M + m[None, :], (j < J)[:, None] & (m < M)[None, :]
    JN, here_JN = j[:, None] * N + n[None, :], (j < J)[:, None] & (n < N)[None, :]
    shared: tl.constexpr = J // GU  # query heads a key/value head
    BN = ((j // (shared * U)) * U + j % U)[:, None] * N + n[None, :]
    first = tl.where(tl.program_id(0) % blocks_m == 0, J, 0)
    here_BN = ((j < first) & ((j // U) % shared == 0))[:, None] & (n < N)[None, :]
    JMN, here_JMN = i_JM[:, :, None] * N + n[None, None, :], here_JM[:, :, None] & (n < N)[None, None, :]
    return i_JM, here_JM, JN, here_JN, BN, here_BN, JMN, here_JMN


@triton.jit
def after_pending(
    s, A, ring_x, ring_B, ring_delta, row, i_JM, here_JM, BN, here_JN, head, pending,
    x_size: tl.constexpr, B_size: tl.constexpr, R: tl.constexpr, AT_ONCE: tl.constexpr = 4,
):  # fmt: skip
    """The state [J, M, N] after the pending tokens. The inputs of AT_ONCE of them are on their way together: one by
    one, each would wait for memory. Those beyond the last one have Δ = 0 and change nothing."""
    for start in range(0, pending, AT_ONCE):
        deltas, xs, Bs = (), (), ()
        for k in tl.static_range(AT_ONCE):
            end_x, end_B = tl.where(start + k < pending, x_size, 0), tl.where(start + k < pending, B_size, 0)
            place = row * R + ((head - pending + start + k) & (R - 1))
            deltas += (tl.load(ring_delta + place * x_size + i_JM, mask=here_JM & (i_JM < end_x), other=0.0),)
            xs += (tl.load(ring_x + place * x_size + i_JM, mask=here_JM & (i_JM < end_x), other=0.0),)
            Bs += (tl.load(ring_B + place * B_size + BN, mask=here_JN & (end_B > BN), other=0.0),)
        for k in tl.static_range(AT_ONCE):
            s = one_token(s, A, deltas[k], xs[k].to(tl.float32), Bs[k].to(tl.float32))
    return s


@triton.jit
def one_token(s, A, delta, x, B):
    """One token; A in powers of two."""
    return tl.exp2(A * delta[:, :, None]) * s + (delta * x)[:, :, None] * B[:, None, :]
