"""New tokens of a Mamba1 mixer as a Triton kernel: a program is some sub-heads of one row, or channels of a wide one.

It is the kernel of ops.selective_replay with what feeds it: the rows of the projection of Δ that belong to its
channels, and where x comes unconvolved, their convolution. All that does not depend on each other (the state, A, these
rows, the new tokens, the last inputs of the convolution) is asked for before any of it is used; a program is mostly
one wait for memory.

Letters: S rows, T new tokens, R places of a ring, J = G·Q·U sub-heads, M channels a sub-head, N state size, E rank of
Δ, K conv width; in kernels J, M, N and E are the axes of tiles, blocks of these.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc, unreachable, var-annotated"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.mamba1_step.weights import Mamba1Weights, StepConv
from mambify.ops.overlap import launch_options, wait_for_others
from mambify.ops.ring import RingPlace, check_contiguous
from mambify.ops.selective_replay import SelectiveRing
from mambify.ops.selective_replay.triton import LOG2E, after_pending, one_token, tiles
from mambify.ops.triton_math import softplus

_TILE = 128  # state entries a program, a warp: 8 channels of 16, whose rows of the projection of Δ are 1 to 4 KB
_BLOCK_E = 32  # so that four threads share a row of the projection, as four share a channel's entries of the state


def supports(
    x_STX: Tensor,
    z_STI: Tensor,
    dt_STE: Tensor,
    B_STGUN: Tensor,
    C_STJN: Tensor,
    weights: Mamba1Weights,
    state_SJMN: Tensor,
    ring: SelectiveRing | None,
    conv: StepConv | None,
) -> bool:
    """Whether the kernel takes these inputs: N up to 256, E up to 1024, one dtype for inputs and rings, no float64."""
    given = [x_STX, z_STI, dt_STE, B_STGUN, C_STJN]
    rings = ([] if ring is None else [ring.x, ring.B]) + ([] if conv is None else [conv.ring_SRI])
    return (
        state_SJMN.shape[-1] <= 256
        and weights.dt_IE.shape[1] <= 1024
        and {v.dtype for v in (*given, *rings)} == {x_STX.dtype}
        and x_STX.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and all(v is None or v.dtype != torch.float64 for v in (*weights, *(() if conv is None else conv[:2])))
        and state_SJMN.dtype == torch.float32
    )


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
    conv: StepConv | None,
    overlap: bool,
) -> Tensor:
    """See :func:`mambify.ops.mamba1_step.mamba1_step`."""
    S, T = x_STX.shape[:2]
    J, M, N = weights.A_JMN.shape
    G, U = B_STGUN.shape[2:4]
    check_contiguous("mamba1_step", state_SJMN, *(ring or ()), *(() if conv is None else conv[2:]))
    given = [_rows_whole(v) for v in (x_STX, z_STI, dt_STE, B_STGUN, C_STJN)]
    y_STI = x_STX.new_empty((S, T, J * M))
    block_n = triton.next_power_of_2(N)
    block_m = min(triton.next_power_of_2(M), max(1, _TILE // block_n))
    block_j = min(triton.next_power_of_2(J), max(1, _TILE // (block_m * block_n)))
    rank = weights.dt_IE.shape[1]
    with torch.cuda.device_of(x_STX):  # Triton launches on the current device
        _step[(triton.cdiv(J, block_j) * triton.cdiv(M, block_m), S)](
            *given, *(None if v is None else v.contiguous() for v in weights),
            *((None,) * 3 if conv is None else (conv.weight_IK.contiguous(), conv.bias_I, conv.ring_SRI)),
            state_SJMN, *(ring or (None,) * 3), y_STI, place.head_S, place.pending_S, place.active_S,
            place.folds_above(T), *(v.stride(1) for v in given), J=J, M=M, GU=G * U, U=U, N=N, T=T, R=place.capacity,
            E=rank, K=0 if conv is None else conv.weight_IK.shape[1], BLOCK_J=block_j, BLOCK_M=block_m,
            BLOCK_N=block_n, BLOCK_E=_BLOCK_E, num_warps=1, **launch_options(overlap),
        )  # fmt: skip
    return y_STI


def _rows_whole(tensor: Tensor) -> Tensor:
    """Itself where tokens are equally far apart and everything within one is adjacent, as in a view of a projection;
    with a stride of T that says how far."""
    apart = tensor.stride(0 if tensor.shape[1] == 1 else 1)  # with T = 1 PyTorch may give any stride for T
    if not tensor[0, 0].is_contiguous() or (len(tensor) > 1 and tensor.stride(0) != tensor.shape[1] * apart):
        return tensor.contiguous()
    return tensor.as_strided(tensor.shape, (tensor.stride(0), apart, *tensor.stride()[2:]))


@triton.jit
def _step(
    x_ptr, z_ptr, dt_ptr, B_ptr, C_ptr, dt_weight_ptr, dt_bias_ptr, A_ptr, D_ptr, B_bias_ptr, C_bias_ptr,
    taps_ptr, conv_bias_ptr, conv_ring, state_ptr, ring_x, ring_B, ring_delta, y_ptr,
    head_ptr, pending_ptr, active_ptr, folds_above, x_token, z_token, dt_token, B_token, C_token,
    J: tl.constexpr, M: tl.constexpr, GU: tl.constexpr, U: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    i_JM, here_JM, JN, here_JN, BN, here_BN, JMN, here_JMN = tiles(J, M, GU, U, N, BLOCK_J, BLOCK_M, BLOCK_N)
    e, parts = tl.arange(0, BLOCK_E), ()
    for start in tl.static_range(0, E, BLOCK_E):
        here_JME = here_JM[:, :, None] & (start + e < E)[None, None, :]
        parts += (tl.load(dt_weight_ptr + i_JM[:, :, None] * E + start + e, mask=here_JME, other=0.0),)
    A = tl.load(A_ptr + JMN, mask=here_JMN, other=0.0).to(tl.float32) * LOG2E
    bias = tl.load(dt_bias_ptr + i_JM, mask=here_JM, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + i_JM, mask=here_JM, other=0.0).to(tl.float32)
    wait_for_others(OVERLAP)  # weights have been asked for
    head, pending = tl.load(head_ptr + row).to(tl.int32), tl.load(pending_ptr + row).to(tl.int32)
    active = tl.load(active_ptr + row) != 0
    y_row = y_ptr + row * T * J * M + i_JM
    if active:
        state = state_ptr + row * J * M * N + JMN
        s = tl.load(state, mask=here_JMN, other=0.0)
        xs, dts, Bs, Cs, zs = (), (), (), (), ()
        # Of a convolved x each channel reads its own; else the one of its key/value head.
        x_JM = i_JM if K == 0 else (i_JM // (J // GU * U * M)) * (U * M) + i_JM % (U * M)
        for t in tl.static_range(T):
            token = row * T + t
            xs += (tl.load(x_ptr + token * x_token + x_JM, mask=here_JM, other=0.0),)
            for start in tl.static_range(0, E, BLOCK_E):
                dts += (tl.load(dt_ptr + token * dt_token + start + e, mask=start + e < E, other=0.0),)
            Bs += (_with_bias(B_ptr + token * B_token, B_bias_ptr, BN, here_JN),)
            Cs += (_with_bias(C_ptr + token * C_token, C_bias_ptr, JN, here_JN),)
            zs += (tl.load(z_ptr + token * z_token + i_JM, mask=here_JM, other=0.0).to(tl.float32),)
        if K > 0:
            xs = _convolved(xs, taps_ptr, conv_bias_ptr, conv_ring + row * R * J * M, i_JM, here_JM, head, J * M, K, R)
        if ring_x is not None:
            s = after_pending(
                s, A, ring_x, ring_B, ring_delta, row, i_JM, here_JM, BN, here_JN, head, pending, J * M, GU * N, R
            )  # fmt: skip
            if pending > folds_above:
                tl.store(state, s, mask=here_JMN)
        for t in tl.static_range(T):
            products = tl.zeros((BLOCK_J, BLOCK_M, BLOCK_E), tl.float32)
            for part in tl.static_range(len(parts)):
                products += parts[part].to(tl.float32) * dts[t * len(parts) + part].to(tl.float32)[None, None, :]
            dt = tl.sum(products, 2).to(x_ptr.dtype.element_ty).to(tl.float32)
            delta = softplus(dt + bias)
            x = xs[t].to(tl.float32)
            s = one_token(s, A, delta, x, Bs[t].to(tl.float32))
            y = tl.sum(s * Cs[t].to(tl.float32)[:, None, :], 2) + D * x
            y *= zs[t] * tl.sigmoid(zs[t])
            tl.store(y_row + t * J * M, y.to(y_ptr.dtype.element_ty), mask=here_JM)
            if ring_x is not None:
                place = row * R + ((head + t) & (R - 1))
                tl.store(ring_x + place * J * M + i_JM, xs[t], mask=here_JM)
                tl.store(ring_delta + place * J * M + i_JM, delta, mask=here_JM)
                tl.store(ring_B + place * GU * N + BN, Bs[t], mask=here_BN)
        if ring_x is None:
            tl.store(state, s, mask=here_JMN)
    else:
        for t in tl.static_range(T):
            tl.store(y_row + t * J * M, tl.zeros((BLOCK_J, BLOCK_M), y_ptr.dtype.element_ty), mask=here_JM)


@triton.jit
def _with_bias(values_ptr, bias_ptr, at, here):
    values = tl.load(values_ptr + at, mask=here, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + at, mask=here, other=0.0).to(tl.float32)
        values = (values.to(tl.float32) + bias).to(values.dtype)
    return values


@triton.jit
def _convolved(
    xs, taps_ptr, bias_ptr, ring_ptr, i_JM, here_JM, head, I: tl.constexpr, K: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """SiLU of the convolution of each new token's channels; puts their inputs into the ring, which only this program
    reads and writes there. The order of sums is that of ops.conv_replay."""
    window, taps = (), ()
    for k in tl.static_range(K - 1):
        window += (tl.load(ring_ptr + ((head + k - (K - 1)) & (R - 1)) * I + i_JM, mask=here_JM, other=0.0),)
    for k in tl.static_range(K):
        taps += (tl.load(taps_ptr + i_JM * K + k, mask=here_JM, other=0.0).to(tl.float32),)
    bias = tl.zeros(i_JM.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + i_JM, mask=here_JM, other=0.0).to(tl.float32)
    outputs = ()
    for t in tl.static_range(len(xs)):
        window += (xs[t],)
        total = bias
        for k in tl.static_range(K):
            total += window[t + k].to(tl.float32) * taps[k]
        outputs += ((total * tl.sigmoid(total)).to(xs[t].dtype),)
        tl.store(ring_ptr + ((head + t) & (R - 1)) * I + i_JM, xs[t], mask=here_JM)
    return outputs
