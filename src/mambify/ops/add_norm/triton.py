"""A sum and its RMSNorm as Triton kernels: a program has ROWS tokens, with all D channels of each.

    h = stream + x    r = 1/sqrt(mean_D(h²) + eps)    out = weight · (h r)
    d(h r) = weight · dout    dh = r (d(h r) − h r · mean_D(d(h r) · h r)) + what comes in for h itself

Forward it reads two tensors and writes two, backward it reads three and writes one: no byte more than once.

Letters: N tokens, D hidden size; in kernels R = ROWS tokens, D = BLOCK_D ≥ D channels.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambify.ops.backends import last_adjacent

_TILE, _PER_THREAD = 2048, 16  # elements: two 16-byte loads of bfloat16 from each input are under way at once
_WIDEST = 16_384
_PROGRAMS = 132 * 8  # more backward programs would only write more partial sums of the weight's gradient


def supports(stream: Tensor, x: Tensor, weight_D: Tensor) -> bool:
    """Whether the kernels take these inputs: at most float32, D up to 16,384."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return stream.shape[-1] <= _WIDEST and all(v.dtype in dtypes for v in (stream, x, weight_D))


def add_norm(stream: Tensor, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`mambify.ops.add_norm.add_norm`."""
    normed_ND, total_ND = _apply(stream.flatten(0, -2), x.flatten(0, -2), weight_D, eps)
    return normed_ND.view(stream.shape), total_ND.view(stream.shape)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream_ND: Tensor, x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.dtypes = stream_ND.dtype, x_ND.dtype
        stream_ND, x_ND, weight_D = last_adjacent(stream_ND), last_adjacent(x_ND), weight_D.contiguous()
        tokens, width = stream_ND.shape
        total_ND = stream_ND.new_empty(stream_ND.shape, dtype=torch.promote_types(*ctx.dtypes))
        normed_ND = torch.empty_like(total_ND)
        block, rows, warps = _sizes(width)
        if tokens:
            _forward[(triton.cdiv(tokens, rows),)](
                stream_ND, x_ND, weight_D, normed_ND, total_ND, tokens, stream_ND.stride(0), x_ND.stride(0), eps,
                D=width, BLOCK_D=block, ROWS=rows, num_warps=warps,
            )  # fmt: skip
        ctx.save_for_backward(total_ND, weight_D)
        ctx.eps = eps
        ctx.set_materialize_grads(False)  # the last norm of a model has no stream after it
        return normed_ND, total_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnormed_ND: Tensor | None, dtotal_ND: Tensor | None) -> tuple[Tensor | None, ...]:
        total_ND, weight_D = ctx.saved_tensors
        dnormed_ND = torch.zeros_like(total_ND) if dnormed_ND is None else dnormed_ND.contiguous()
        dtotal_ND = None if dtotal_ND is None else dtotal_ND.contiguous()
        tokens, width = total_ND.shape
        block, rows, warps = _sizes(width)
        tiles = triton.cdiv(tokens, rows)
        repeats = max(1, triton.cdiv(tiles, _PROGRAMS))
        parts = triton.cdiv(tiles, repeats)
        dsum_ND = torch.empty_like(total_ND)
        partial = total_ND.new_empty((parts, width), dtype=torch.float32) if ctx.needs_input_grad[2] else None
        if tokens:
            _backward[(parts,)](
                total_ND, weight_D, dnormed_ND, dtotal_ND, dsum_ND, partial, tokens, ctx.eps,
                D=width, BLOCK_D=block, ROWS=rows, REPEATS=repeats, num_warps=warps,
            )  # fmt: skip
        dweight_D = None if partial is None else partial.sum(0).to(weight_D.dtype)
        dstream_ND, dx_ND = (dsum_ND.to(dtype) for dtype in ctx.dtypes)
        return dstream_ND, dx_ND, dweight_D, None


_apply: Callable[..., tuple[Tensor, Tensor]] = _AddNorm.apply


def _sizes(width: int) -> tuple[int, int, int]:
    """The power of two that holds D, the tokens of a tile, and warps."""
    block = triton.next_power_of_2(width)
    rows = max(1, _TILE // block)
    return block, rows, min(16, max(1, rows * block // (32 * _PER_THREAD)))


@triton.jit
def _forward(
    stream_ptr, x_ptr, weight_ptr, normed_ptr, total_ptr, N, stream_stride, x_stride, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK_D)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = (token < N)[:, None] & (channel < D)[None, :]
    stream = tl.load(stream_ptr + token[:, None] * stream_stride + channel[None, :], mask=here, other=0.0)
    x = tl.load(x_ptr + token[:, None] * x_stride + channel[None, :], mask=here, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
    place = token[:, None] * D + channel[None, :]
    total = (stream.to(tl.float32) + x.to(tl.float32)).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + place, total, mask=here)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=1) / D + eps)[:, None]
    tl.store(normed_ptr + place, (weight[None, :] * (total * scale)).to(normed_ptr.dtype.element_ty), mask=here)


@triton.jit
def _backward(
    total_ptr, weight_ptr, dnormed_ptr, dtotal_ptr, dsum_ptr, partial_ptr, N, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK_D)
    part = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for repeat in range(REPEATS):
        token = (part * REPEATS + repeat) * ROWS + tl.arange(0, ROWS)
        here = (token < N)[:, None] & (channel < D)[None, :]
        place = token[:, None] * D + channel[None, :]
        total = tl.load(total_ptr + place, mask=here, other=0.0).to(tl.float32)
        dnormed = tl.load(dnormed_ptr + place, mask=here, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(total * total, axis=1) / D + eps)[:, None]
        normed = total * scale
        dweight += dnormed * normed
        dnormed *= weight[None, :]
        dsum = scale * (dnormed - normed * (tl.sum(dnormed * normed, axis=1) / D)[:, None])
        if dtotal_ptr is not None:
            dsum += tl.load(dtotal_ptr + place, mask=here, other=0.0).to(tl.float32)
        tl.store(dsum_ptr + place, dsum.to(dsum_ptr.dtype.element_ty), mask=here)
    if partial_ptr is not None:
        tl.store(partial_ptr + part * D + channel, tl.sum(dweight, axis=0), mask=channel < D)
