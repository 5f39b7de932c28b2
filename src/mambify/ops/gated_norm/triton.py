"""The gated per-head RMSNorm as Triton kernels: a program has ROWS tokens of one head, one row of P channels each.

The forward pass keeps nothing but its inputs; the backward pass makes the gate and the norm again from them:

    u = y · SiLU(z)    r = 1/sqrt(mean_P(u²) + eps)    out = weight · (u r)
    d(u r) = weight · dout    du = r (d(u r) − u r · mean_P(d(u r) · u r))

Letters: B batch, T tokens, H heads, P head dimension; in kernels R = ROWS tokens, P = BLOCK_P ≥ P channels.
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

_TILE = 2048  # elements of a tile, 16 a thread: two 16-byte loads of bfloat16 from each input are under way at once
_WARPS, _MOST_WARPS = 4, 16
_WIDEST = 16_384
_PROGRAMS = 132 * 16  # about two rounds of an H100; more backward programs would only write more partial sums


def supports(*inputs: Tensor) -> bool:
    """Whether the kernels take these inputs: at most float32, head dimensions up to 16,384."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return inputs[0].shape[-1] <= _WIDEST and all(v.dtype in dtypes for v in inputs)


def gated_rms_norm(y_BTHP: Tensor, z_BTHP: Tensor, weight_HP: Tensor, eps: float) -> Tensor:
    """See :func:`mambify.ops.gated_norm.gated_rms_norm`."""
    return _apply(y_BTHP, z_BTHP, weight_HP, eps)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_BTHP: Tensor, z_BTHP: Tensor, weight_HP: Tensor, eps: float) -> Tensor:
        y_BTHP, z_BTHP, weight_HP = last_adjacent(y_BTHP), last_adjacent(z_BTHP), weight_HP.contiguous()
        out_BTHP = torch.empty_like(z_BTHP, memory_format=torch.contiguous_format)
        batch, tokens = _merged(y_BTHP, z_BTHP)
        heads, width, block_p, rows = _sizes(y_BTHP)
        _forward[(triton.cdiv(tokens, rows) * heads, batch)](
            y_BTHP, z_BTHP, weight_HP, out_BTHP, tokens, heads, eps,
            y_BTHP.stride(0), y_BTHP.stride(2), z_BTHP.stride(0), z_BTHP.stride(2),
            Y_TOKEN=_token_stride(y_BTHP), Z_TOKEN=_token_stride(z_BTHP), P=width, BLOCK_P=block_p, ROWS=rows,
            num_warps=_warps(block_p),
        )  # fmt: skip
        ctx.save_for_backward(y_BTHP, z_BTHP, weight_HP)
        ctx.eps = eps
        return out_BTHP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHP: Tensor) -> tuple[Tensor | None, ...]:
        y_BTHP, z_BTHP, weight_HP = ctx.saved_tensors
        dout_BTHP = dout_BTHP.contiguous()
        dy_BTHP = torch.empty_like(y_BTHP, memory_format=torch.contiguous_format)
        dz_BTHP = torch.empty_like(z_BTHP, memory_format=torch.contiguous_format)
        batch, tokens = _merged(y_BTHP, z_BTHP)
        heads, width, block_p, rows = _sizes(y_BTHP)
        blocks = triton.cdiv(tokens, rows)
        repeats = max(1, min(16, blocks * heads * batch // _PROGRAMS))
        parts = triton.cdiv(blocks, repeats)
        partial = None
        if ctx.needs_input_grad[2]:
            partial = y_BTHP.new_empty((batch * parts, heads, width), dtype=torch.float32)
        _backward[(parts * heads, batch)](
            y_BTHP, z_BTHP, weight_HP, dout_BTHP, dy_BTHP, dz_BTHP, partial, tokens, heads, ctx.eps,
            y_BTHP.stride(0), y_BTHP.stride(2), z_BTHP.stride(0), z_BTHP.stride(2),
            Y_TOKEN=_token_stride(y_BTHP), Z_TOKEN=_token_stride(z_BTHP), P=width, BLOCK_P=block_p, ROWS=rows,
            REPEATS=repeats, num_warps=_warps(block_p),
        )  # fmt: skip
        dweight_HP = None if partial is None else partial.sum(0).to(weight_HP.dtype)
        return dy_BTHP, dz_BTHP, dweight_HP, None


_apply: Callable[..., Tensor] = _GatedNorm.apply


def _merged(*tensors_BTHP: Tensor) -> tuple[int, int]:
    """Batch and tokens as the kernels see them: one row of B·T tokens where the strides allow, so that none of a
    tile's rows are lost at the end of each sequence."""
    batch, tokens = tensors_BTHP[0].shape[:2]
    if all(v.stride(0) == tokens * _token_stride(v) for v in tensors_BTHP):
        return 1, batch * tokens
    return batch, tokens


def _token_stride(v_BTHP: Tensor) -> int:
    """From one token to the next; with T = 1 the next is the next row's, and PyTorch may give any stride for T."""
    return v_BTHP.stride(0 if v_BTHP.shape[1] == 1 else 1)


def _sizes(y_BTHP: Tensor) -> tuple[int, int, int, int]:
    """H, P, the power of two that holds P, and the tokens of a tile."""
    heads, width = y_BTHP.shape[2:]
    block_p = triton.next_power_of_2(width)
    return heads, width, block_p, max(1, _TILE // block_p)


def _warps(block_p: int) -> int:
    """More for a row that is wider than a tile: its norm is one sum."""
    return min(_MOST_WARPS, max(_WARPS, block_p // (_TILE // _WARPS)))


@triton.jit
def _forward(
    y_ptr, z_ptr, weight_ptr, out_ptr, T, H, eps, y_batch, y_head, z_batch, z_head,
    Y_TOKEN: tl.constexpr, Z_TOKEN: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # Heads come first: programs that run together read neighbouring memory.
    head = tl.program_id(0) % H
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_P)
    token = tl.program_id(0) // H * ROWS + tl.arange(0, ROWS)
    here = (token < T)[:, None] & (channel < P)[None, :]
    token = token.to(tl.int64)[:, None]
    y = tl.load(y_ptr + batch * y_batch + head * y_head + token * Y_TOKEN + channel[None, :], mask=here, other=0.0)
    z = tl.load(z_ptr + batch * z_batch + head * z_head + token * Z_TOKEN + channel[None, :], mask=here, other=0.0)
    weight = tl.load(weight_ptr + head * P + channel, mask=channel < P, other=0.0)
    z_float = z.to(tl.float32)
    gated = y.to(tl.float32) * (z_float * tl.sigmoid(z_float))
    scale = tl.rsqrt(tl.sum(gated * gated, axis=1) / P + eps)
    normed = (gated * scale[:, None]).to(z.dtype).to(tl.float32)  # rounded before the weight, as the reference does
    out = (normed * weight.to(tl.float32)[None, :]).to(z.dtype)
    tl.store(out_ptr + ((batch * T + token) * H + head) * P + channel[None, :], out, mask=here)


@triton.jit
def _backward(
    y_ptr, z_ptr, weight_ptr, dout_ptr, dy_ptr, dz_ptr, partial_ptr, T, H, eps, y_batch, y_head, z_batch, z_head,
    Y_TOKEN: tl.constexpr, Z_TOKEN: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
    REPEATS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % H
    part = tl.program_id(0) // H
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_P)
    y_ptr += batch * y_batch + head * y_head
    z_ptr += batch * z_batch + head * z_head
    weight = tl.load(weight_ptr + head * P + channel, mask=channel < P, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK_P), tl.float32)
    for repeat in range(REPEATS):
        token = (part * REPEATS + repeat) * ROWS + tl.arange(0, ROWS)
        here = (token < T)[:, None] & (channel < P)[None, :]
        token = token.to(tl.int64)[:, None]
        place = ((batch * T + token) * H + head) * P + channel[None, :]
        y = tl.load(y_ptr + token * Y_TOKEN + channel[None, :], mask=here, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + token * Z_TOKEN + channel[None, :], mask=here, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + place, mask=here, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(z)
        gate = z * sigmoid
        gated = y * gate
        scale = tl.rsqrt(tl.sum(gated * gated, axis=1) / P + eps)[:, None]
        normed = gated * scale
        dweight += dout * normed.to(z_ptr.dtype.element_ty).to(tl.float32)
        dnormed = dout * weight[None, :]
        dgated = scale * (dnormed - normed * (tl.sum(dnormed * normed, axis=1) / P)[:, None])
        tl.store(dy_ptr + place, (dgated * gate).to(dy_ptr.dtype.element_ty), mask=here)
        dgate = dgated * y * (sigmoid + gate * (1 - sigmoid))
        tl.store(dz_ptr + place, dgate.to(dz_ptr.dtype.element_ty), mask=here)
    if partial_ptr is not None:
        parts = tl.cdiv(T, ROWS * REPEATS)
        place = ((batch * parts + part) * H + head) * P + channel
        tl.store(partial_ptr + place, tl.sum(dweight, axis=0), mask=channel < P)
