"""Linear layers of a few rows as one Triton kernel, which reads weights as fast as the memory gives them.

That of up to eight rows in float32, and in half precision of one and two where there are many outputs, of up to eight
where there are few of many inputs.

A program has BLOCK_O outputs and goes along all their inputs: there are no parts to put together, so nothing is summed
in an order that changes. A thread holds 16 bytes of each of these rows of the weight at a time, and asks for the next
16 before it multiplies. Rows of x are multiplied with them one after another in plain float32.

An RMSNorm before costs no pass of its own, for its scale is one number a row: x · norm is multiplied with the weight,
x² is summed beside it, and the result scaled at the end.

Outputs that are convolved over tokens are convolved by the program that made them: a channel needs its own last inputs
and no other's. These are asked for before the weights are gone through.

Warps lie along the inputs, so that threads multiply weights with the very entries of x they have loaded. Their number
depends on D alone, and so does the order of sums.

Letters: M rows, D inputs, O outputs; C channels, K width, R places of the ring, T tokens of a slot; in kernels E =
BLOCK_D / VEC are the threads of a tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.decode_linear.convolution import Convolution
from mambify.ops.decode_linear.outputs import Outputs
from mambify.ops.decode_linear.triton_convolution import arguments_of, asked_for, convolved
from mambify.ops.decode_linear.triton_ends import biased_and_gated, written_to
from mambify.ops.overlap import launch_options, wait_for_others

MOST_ROWS = 8
_PROGRAMS = 2 * 132  # that keep an H100 busy


def num_warps_of(inputs: int) -> int:
    """Warps of a program, by D alone: more where a row of the weight is long enough for them."""
    return 4 if inputs >= 2048 else 2 if inputs % 512 == 0 else 1


def block_of(rows: int, outputs: int, *, gated: bool) -> int:
    """Outputs of a program: as many as registers hold sums of, and still enough programs. A gated one is two rows."""
    block = (4 if rows <= 5 else 2) if gated else (8 if rows <= 4 else 4)
    while block > 1 and triton.cdiv(outputs, block) < _PROGRAMS:
        block //= 2
    return block


def decode_linear(
    x_MD: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm_D: Tensor | None,
    eps: float,
    gated: bool,
    add_to_MO: Tensor | None,
    convolution: Convolution | None,
    overlap: bool,
    block: int | None = None,
) -> Tensor:
    """See :func:`mambify.ops.decode_linear.decode_linear`; ``block``: outputs a program, by default what suits."""
    M, D = x_MD.shape
    outputs = Outputs.of(M, weights, biases, add_to_MO, gated=gated)
    y_MO = outputs.y_MO
    if not M:
        return y_MO
    block = block or block_of(M, sum(outputs.heights), gated=gated)
    warps, vector = num_warps_of(D), 16 // weights[0].element_size()
    tensors, sizes = arguments_of(convolution, M)
    with torch.cuda.device_of(x_MD):  # Triton launches on the current device
        _stream[outputs.grid(block)](
            x_MD, norm_D, y_MO, *outputs.weights, *outputs.biases, *tensors, eps, x_MD.stride(0), y_MO.stride(0),
            M=M, D=D, **outputs.sizes, **sizes, GATED=gated, ADD=add_to_MO is not None,
            BLOCK_O=block, BLOCK_D=32 * warps * vector, VEC=vector, num_warps=warps, **launch_options(overlap),
        )  # fmt: skip
    return y_MO


@triton.jit
def _stream(
    x_ptr, norm_ptr, y_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr,
    taps_ptr, conv_bias_ptr, ring_ptr, head_ptr, active_ptr, eps, x_row, y_row,
    M: tl.constexpr, D: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr,
    FIRST: tl.constexpr, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, T: tl.constexpr, GATED: tl.constexpr,
    ADD: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if GATED:
        _rows_of(
            x_ptr, norm_ptr, y_ptr, w0_ptr, w1_ptr, b0_ptr, b1_ptr, None, None, None, None, None, pid, eps, x_row,
            y_row, M, D, O0, 0, 0, 1, 1, 1, True, ADD, OVERLAP, BLOCK_O, BLOCK_D, VEC,
        )  # fmt: skip
    else:
        ends0: tl.constexpr = (O0 + BLOCK_O - 1) // BLOCK_O
        ends1: tl.constexpr = ends0 + (O1 + BLOCK_O - 1) // BLOCK_O
        # Blocks of outputs that are convolved, of which the first and the last may hold others too.
        conv0: tl.constexpr = FIRST // BLOCK_O
        conv1: tl.constexpr = (FIRST + C + BLOCK_O - 1) // BLOCK_O if C > 0 else conv0
        if C > 0:  # noqa: SIM102 (known when it is compiled)
            if (pid >= conv0) & (pid < conv1):
                _rows_of(
                    x_ptr, norm_ptr, y_ptr, w0_ptr, w0_ptr, b0_ptr, None, taps_ptr, conv_bias_ptr, ring_ptr, head_ptr,
                    active_ptr, pid, eps, x_row, y_row, M, D, O0, FIRST, C, K, R, T, False, ADD, OVERLAP, BLOCK_O,
                    BLOCK_D, VEC,
                )  # fmt: skip
        if (pid < ends0) & ((pid < conv0) | (pid >= conv1)):
            _rows_of(
                x_ptr, norm_ptr, y_ptr, w0_ptr, w0_ptr, b0_ptr, None, None, None, None, None, None, pid, eps, x_row,
                y_row, M, D, O0, 0, 0, 1, 1, 1, False, ADD, OVERLAP, BLOCK_O, BLOCK_D, VEC,
            )  # fmt: skip
        if O1 > 0:  # noqa: SIM102
            if (pid >= ends0) & (pid < ends1):
                _rows_of(
                    x_ptr, norm_ptr, y_ptr + O0, w1_ptr, w1_ptr, b1_ptr, None, None, None, None, None, None,
                    pid - ends0, eps, x_row, y_row, M, D, O1, 0, 0, 1, 1, 1, False, ADD, OVERLAP, BLOCK_O, BLOCK_D, VEC,
                )  # fmt: skip
        if O2 > 0:  # noqa: SIM102
            if pid >= ends1:
                _rows_of(
                    x_ptr, norm_ptr, y_ptr + O0 + O1, w2_ptr, w2_ptr, b2_ptr, None, None, None, None, None, None,
                    pid - ends1, eps, x_row, y_row, M, D, O2, 0, 0, 1, 1, 1, False, ADD, OVERLAP, BLOCK_O, BLOCK_D, VEC,
                )  # fmt: skip


@triton.jit
def _rows_of(
    x_ptr, norm_ptr, y_ptr, w_ptr, up_ptr, b_ptr, up_b_ptr, taps_ptr, conv_bias_ptr, ring_ptr, head_ptr, active_ptr,
    block, eps, x_row, y_row,
    M: tl.constexpr, D: tl.constexpr, O: tl.constexpr, FIRST: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, GATED: tl.constexpr,
    ADD: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """BLOCK_O outputs of one weight, or of a pair of them."""
    E: tl.constexpr = BLOCK_D // VEC
    ROWS: tl.constexpr = 1 if M == 1 else 2 if M == 2 else 4 if M <= 4 else 8
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    d = tl.arange(0, BLOCK_D)
    tile = o.to(tl.int64)[:, None] * D + d[None, :]
    w_ptr += tile
    up_ptr += tile
    here = (o < O)[:, None]
    w = _load(w_ptr, here, d, 0, D, O, BLOCK_O, BLOCK_D)
    up = w
    if GATED:
        up = _load(up_ptr, here, d, 0, D, O, BLOCK_O, BLOCK_D)
    wait_for_others(OVERLAP)  # weights have been asked for: they do not depend on the kernel before, all else may
    past, taps = (), ()
    if C > 0:
        past, taps = asked_for(taps_ptr, ring_ptr, head_ptr, o, FIRST, C, K, R, M // T)
    sums, up_sums, squares = (), (), ()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros((BLOCK_O, E), tl.float32),)
        up_sums += (tl.zeros((BLOCK_O, E), tl.float32),)
        squares += (tl.zeros((1, E), tl.float32),)
    for start in range(0, D, BLOCK_D):
        w_now = tl.reshape(w.to(tl.float32), (BLOCK_O, E, VEC))
        up_now = w_now
        if GATED:
            up_now = tl.reshape(up.to(tl.float32), (BLOCK_O, E, VEC))
            up = _load(up_ptr, here, d, start + BLOCK_D, D, O, BLOCK_O, BLOCK_D)
        w = _load(w_ptr, here, d, start + BLOCK_D, D, O, BLOCK_O, BLOCK_D)
        inside = start + d < D
        scale = tl.full((1, E, VEC), 1.0, tl.float32)
        if norm_ptr is not None:
            scale = tl.load(norm_ptr + start + d, mask=inside, other=0.0).to(tl.float32)
            scale = tl.reshape(scale, (1, E, VEC))
        next_sums, next_up_sums, next_squares = (), (), ()
        for m in tl.static_range(M):
            x = tl.load(x_ptr + m * x_row + start + d, mask=inside, other=0.0)
            x = tl.reshape(x.to(w_ptr.dtype.element_ty).to(tl.float32), (1, E, VEC))
            if norm_ptr is not None:
                next_squares += (squares[m] + tl.sum(x * x, 2),)
                x = x * scale
            else:
                next_squares += (squares[m],)
            next_sums += (sums[m] + tl.sum(w_now * x, 2),)
            if GATED:
                next_up_sums += (up_sums[m] + tl.sum(up_now * x, 2),)
            else:
                next_up_sums += (up_sums[m],)
        for m in tl.static_range(M, ROWS):
            next_sums += (sums[m],)
            next_up_sums += (up_sums[m],)
            next_squares += (squares[m],)
        sums, up_sums, squares = next_sums, next_up_sums, next_squares

    m = tl.arange(0, ROWS)
    y = tl.sum(_side_by_side(sums, ROWS), 1)
    up_y = y
    if GATED:
        up_y = tl.sum(_side_by_side(up_sums, ROWS), 1)
    if norm_ptr is not None:
        scale_1M = tl.rsqrt(tl.sum(_side_by_side(squares, ROWS), 1) / D + eps)
        y *= scale_1M
        up_y *= scale_1M
    y = biased_and_gated(y, up_y, b_ptr, up_b_ptr, o, O, GATED)
    if C > 0:
        y = convolved(y, taps, past, conv_bias_ptr, ring_ptr, head_ptr, active_ptr, o, m, FIRST, C, K, R, T, M, BLOCK_O)
    written_to(y_ptr, y, o, m, y_row, M, O, ADD)


@triton.jit
def _side_by_side(parts, ROWS: tl.constexpr):
    """1, 2, 4 or 8 tensors of one shape along a new last axis, so that one sum over another serves them all."""
    tl.static_assert(ROWS <= 8)
    if ROWS == 1:
        whole = tl.expand_dims(parts[0], -1)
    elif ROWS == 2:
        whole = tl.join(parts[0], parts[1])
    elif ROWS == 4:
        whole = _interleaved(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    else:
        even = _interleaved(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
        odd = _interleaved(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7]))
        whole = _interleaved(even, odd)
    return whole


@triton.jit
def _interleaved(even, odd):
    joined = tl.join(even, odd)
    shape: tl.constexpr = joined.shape[:-2] + [joined.shape[-2] * 2]  # noqa: RUF005 (what the compiler reads)
    return tl.reshape(joined, shape)


@triton.jit
def _load(
    w_ptr, here, d, start, D: tl.constexpr, O: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """A tile of the weight from input ``start`` on, zero beyond its ends; it is read once and needs no place in a
    cache."""
    inside = (start < D) if D % BLOCK_D == 0 else (start + d < D)[None, :]
    mask = inside if O % BLOCK_O == 0 else here & inside
    return tl.load(w_ptr + start, mask=mask, other=0.0, eviction_policy="evict_first")
