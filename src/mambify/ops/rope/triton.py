"""Rotary embedding as a Triton kernel: one read and one write; the backward pass turns the other way.

Letters: B batch, T tokens, H heads, P head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(x_BTHP: Tensor, cos_BTP: Tensor, sin_BTP: Tensor) -> Tensor:
    """See :func:`mambify.ops.rope.rotate`."""
    y: Tensor = _Rotate.apply(x_BTHP, cos_BTP, sin_BTP)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHP: Tensor, cos_BTP: Tensor, sin_BTP: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTP, sin_BTP)
        return _turned(x_BTHP, cos_BTP, sin_BTP, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHP: Tensor) -> tuple[Tensor, None, None]:
        if dy_BTHP.stride(-1) != 1:
            dy_BTHP = dy_BTHP.contiguous()
        cos_BTP, sin_BTP = ctx.saved_tensors
        return _turned(dy_BTHP, cos_BTP, sin_BTP, -1.0), None, None


def _turned(x_BTHP: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, direction: float) -> Tensor:
    B, T, H, P = x_BTHP.shape
    y_BTHP = torch.empty(x_BTHP.shape, dtype=x_BTHP.dtype, device=x_BTHP.device)
    cos_BTP, sin_BTP = cos_BTP.contiguous(), sin_BTP.contiguous()
    _kernel[(B * T,)](
        x_BTHP,
        cos_BTP,
        sin_BTP,
        y_BTHP,
        direction,
        *x_BTHP.stride()[:3],
        T,
        0 if len(cos_BTP) == 1 else T,
        H=H,
        P=P,
        HEADS=triton.next_power_of_2(H),
        HALF=triton.next_power_of_2(P // 2),
        num_warps=4,
    )
    return y_BTHP


@triton.jit
def _kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, direction, stride_b, stride_t, stride_h, num_tokens, cos_tokens,
    H: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b, t = program // num_tokens, program % num_tokens
    h, p = tl.arange(0, HEADS), tl.arange(0, HALF)
    half = P // 2
    angle = (b * cos_tokens + t) * P + p
    cos = tl.load(cos_ptr + angle, mask=p < half, other=0.0).to(tl.float32)[None, :]
    sin = direction * tl.load(sin_ptr + angle, mask=p < half, other=0.0).to(tl.float32)[None, :]
    here = (h < H)[:, None] & (p < half)[None, :]
    source = x_ptr + b * stride_b + t * stride_t + h[:, None] * stride_h + p[None, :]
    first = tl.load(source, mask=here, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=here, other=0.0).to(tl.float32)
    target = y_ptr + ((b * num_tokens + t) * H + h[:, None]) * P + p[None, :]
    tl.store(target, first * cos - second * sin, mask=here)
    tl.store(target + half, second * cos + first * sin, mask=here)
