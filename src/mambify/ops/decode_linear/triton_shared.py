"""Small linear layers of up to sixteen rows, their inputs shared among the warps of a program, on tensor cores.

A weight of a megabyte is read in less time than a kernel needs to begin and to end, so what counts is the number of
instructions that follow one another. A program has 16 outputs of up to eight rows, and each of its warps a share of
their inputs, all of which it asks for before it waits for the kernel before. Threads keep what they load: tensor cores
sum over inputs, and in which order a product has them is free, so they are told apart such that the eight neighbours
that a thread loads at once are what its own operands need, of weights and of x alike. Nothing goes through shared
memory but the warps' sums.

Whatever the number of rows, sums have one order, and a row's result is the same alone and among others: verifying
tokens gives the very products that plain decoding gave.

As in the other kernels an RMSNorm before is a factor at the end. Norm times x is rounded to the weights' dtype, as it
is where the norm is a kernel of its own.

Letters: M rows, D inputs, O outputs; W warps; C, K, R, T of a convolution as in
:mod:`mambify.ops.decode_linear.triton_convolution`.
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

MOST_INPUTS = 1536  # more were not measured, and a thread would hold too much at once
_OUTPUTS, _ROWS = 16, 8  # of a program


def num_warps_of(inputs: int, *, gated: bool) -> int:
    """Four, which an H100 was fastest with, until a thread would hold more than it has registers for."""
    return 4 if inputs * (2 if gated else 1) <= MOST_INPUTS else 8


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
    warps: int | None = None,
) -> Tensor:
    """See :func:`mambify.ops.decode_linear.decode_linear`; up to sixteen rows, eight with a convolution.

    ``warps``: of a program, by default what suits.
    """
    M, D = x_MD.shape
    outputs = Outputs.of(M, weights, biases, add_to_MO, gated=gated)
    y_MO = outputs.y_MO
    if not M:
        return y_MO
    assert convolution is None or M <= _ROWS
    warps = warps or num_warps_of(D, gated=gated)
    tensors, sizes = arguments_of(convolution, M)
    with torch.cuda.device_of(x_MD):  # Triton launches on the current device
        _shared[(*outputs.grid(_OUTPUTS), triton.cdiv(M, _ROWS))](
            x_MD, norm_D, y_MO, *outputs.weights, *outputs.biases, *tensors, eps, x_MD.stride(0), y_MO.stride(0),
            M=M, D=D, **outputs.sizes, **sizes, GATED=gated, ADD=add_to_MO is not None, W=warps, num_warps=warps,
            **launch_options(overlap),
        )  # fmt: skip
    return y_MO


@triton.jit
def _shared(
    x_ptr, norm_ptr, y_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr,
    taps_ptr, conv_bias_ptr, ring_ptr, head_ptr, active_ptr, eps, x_row, y_row,
    M: tl.constexpr, D: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr,
    FIRST: tl.constexpr, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, T: tl.constexpr, GATED: tl.constexpr,
    ADD: tl.constexpr, OVERLAP: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if GATED:
        _outputs(
            x_ptr, norm_ptr, y_ptr, w0_ptr, w1_ptr, b0_ptr, b1_ptr, None, None, None, None, None, pid, eps, x_row,
            y_row, M, D, O0, 0, 0, 1, 1, 1, True, ADD, OVERLAP, W,
        )  # fmt: skip
    else:
        ends0: tl.constexpr = (O0 + 15) // 16
        ends1: tl.constexpr = ends0 + (O1 + 15) // 16
        # Blocks of outputs that are convolved, of which the first and the last may hold others too.
        conv0: tl.constexpr = FIRST // 16
        conv1: tl.constexpr = (FIRST + C + 15) // 16 if C > 0 else conv0
        if C > 0:  # noqa: SIM102 (known when it is compiled)
            if (pid >= conv0) & (pid < conv1):
                _outputs(
                    x_ptr, norm_ptr, y_ptr, w0_ptr, w0_ptr, b0_ptr, None, taps_ptr, conv_bias_ptr, ring_ptr, head_ptr,
                    active_ptr, pid, eps, x_row, y_row, M, D, O0, FIRST, C, K, R, T, False, ADD, OVERLAP, W,
                )  # fmt: skip
        if (pid < ends0) & ((pid < conv0) | (pid >= conv1)):
            _outputs(
                x_ptr, norm_ptr, y_ptr, w0_ptr, w0_ptr, b0_ptr, None, None, None, None, None, None, pid, eps, x_row,
                y_row, M, D, O0, 0, 0, 1, 1, 1, False, ADD, OVERLAP, W,
            )  # fmt: skip
        if O1 > 0:  # noqa: SIM102
            if (pid >= ends0) & (pid < ends1):
                _outputs(
                    x_ptr, norm_ptr, y_ptr + O0, w1_ptr, w1_ptr, b1_ptr, None, None, None, None, None, None,
                    pid - ends0, eps, x_row, y_row, M, D, O1, 0, 0, 1, 1, 1, False, ADD, OVERLAP, W,
                )  # fmt: skip
        if O2 > 0:  # noqa: SIM102
            if pid >= ends1:
                _outputs(
                    x_ptr, norm_ptr, y_ptr + O0 + O1, w2_ptr, w2_ptr, b2_ptr, None, None, None, None, None, None,
                    pid - ends1, eps, x_row, y_row, M, D, O2, 0, 0, 1, 1, 1, False, ADD, OVERLAP, W,
                )  # fmt: skip


@triton.jit
def _outputs(
    x_ptr, norm_ptr, y_ptr, w_ptr, up_ptr, b_ptr, up_b_ptr, taps_ptr, conv_bias_ptr, ring_ptr, head_ptr, active_ptr,
    block, eps, x_row, y_row,
    M: tl.constexpr, D: tl.constexpr, O: tl.constexpr, FIRST: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """16 outputs of one weight, or of a pair of them, of 8 rows; a warp takes 32 inputs of every W · 32."""
    SPAN: tl.constexpr = W * 32
    STEPS: tl.constexpr = (D + SPAN - 1) // SPAN
    low = block * 16 + tl.arange(0, 8)
    d = tl.arange(0, W)[:, None] * 32 + tl.arange(0, 32)[None, :]
    # Outputs beyond the last read it again.
    first_half = tl.minimum(low, O - 1).to(tl.int64)[:, None, None] * D + d[None, :, :]
    second_half = tl.minimum(low + 8, O - 1).to(tl.int64)[:, None, None] * D + d[None, :, :]
    w_low, w_high, up_low, up_high = (), (), (), ()
    for step in tl.static_range(STEPS):
        w_low += (_load(w_ptr + first_half, step * SPAN, d, D, SPAN),)
        w_high += (_load(w_ptr + second_half, step * SPAN, d, D, SPAN),)
        if GATED:
            up_low += (_load(up_ptr + first_half, step * SPAN, d, D, SPAN),)
            up_high += (_load(up_ptr + second_half, step * SPAN, d, D, SPAN),)
    wait_for_others(OVERLAP)  # weights have been asked for: they do not depend on the kernel before, all else may
    o, m = block * 16 + tl.arange(0, 16), tl.program_id(1) * 8 + tl.arange(0, 8)
    past, taps = (), ()
    if C > 0:
        past, taps = asked_for(taps_ptr, ring_ptr, head_ptr, o, FIRST, C, K, R, M // T)
    x_ptr += m[:, None, None] * x_row + d[None, :, :]
    norms_ptr = norm_ptr
    if norm_ptr is not None:  # for every row, so that a thread has what its part of x is multiplied with
        norms_ptr = tl.broadcast_to((norm_ptr + d)[None, :, :], (8, W, 32))
    given = (m < M)[:, None, None]
    parts = tl.zeros((W, 16, 8), tl.float32)
    up_parts = tl.zeros((W, 16, 8), tl.float32)
    squares = tl.zeros((8, W, 32), tl.float32)
    for step in tl.static_range(STEPS):
        inside = (step * SPAN + d < D)[None, :, :]
        x = tl.load(x_ptr + step * SPAN, mask=given & inside, other=0.0).to(w_ptr.dtype.element_ty)
        if norm_ptr is not None:
            wide = x.to(tl.float32)
            squares += wide * wide
            norm = tl.load(norms_ptr + step * SPAN, mask=inside, other=0.0)
            x = (wide * norm.to(tl.float32)).to(w_ptr.dtype.element_ty)
        x = tl.permute(_in_order(x, W), (0, 2, 1))
        parts = tl.dot(_stacked(w_low[step], w_high[step], W), x, parts, input_precision="ieee")
        if GATED:
            up_parts = tl.dot(_stacked(up_low[step], up_high[step], W), x, up_parts, input_precision="ieee")
    y = tl.sum(parts, 0)
    up_y = y
    if GATED:
        up_y = tl.sum(up_parts, 0)
    if norm_ptr is not None:
        scale_M = tl.rsqrt(tl.sum(tl.sum(squares, 2), 1) / D + eps)[None, :]
        y *= scale_M
        up_y *= scale_M
    y = biased_and_gated(y, up_y, b_ptr, up_b_ptr, o, O, GATED)
    if C > 0:
        y = convolved(y, taps, past, conv_bias_ptr, ring_ptr, head_ptr, active_ptr, o, m, FIRST, C, K, R, T, M, 16)
    written_to(y_ptr, y, o, m, y_row, M, O, ADD)


@triton.jit
def _in_order(tile, W: tl.constexpr):
    """``[8, W, 32]`` as ``[W, 8, 32]``, inputs in the order in which a thread's eight neighbours are its operands.

    Of 32 inputs a thread has those from 8t on. In a product it has those from 4t on, of the first and of the second 16.
    """
    split = tl.reshape(tl.permute(tile, (1, 0, 2)), (W, 8, 4, 2, 4))
    return tl.reshape(tl.permute(split, (0, 1, 3, 2, 4)), (W, 8, 32))


@triton.jit
def _stacked(low, high, W: tl.constexpr):
    """``[W, 16, 32]``: the outputs of two tiles of eight, inputs in order."""
    both = tl.join(_in_order(low, W), _in_order(high, W))
    return tl.reshape(tl.permute(both, (0, 3, 1, 2)), (W, 16, 32))


@triton.jit
def _load(tile_ptr, start: tl.constexpr, d, D: tl.constexpr, SPAN: tl.constexpr):
    """A tile of the weight from input ``start`` on, zero beyond its end; read once."""
    if start + SPAN <= D:
        tile = tl.load(tile_ptr + start, eviction_policy="evict_first")
    else:
        tile = tl.load(tile_ptr + start, mask=(start + d < D)[None, :, :], other=0.0, eviction_policy="evict_first")
    return tile
