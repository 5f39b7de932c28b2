"""The gated activation as Triton kernels: each pass reads its inputs once and writes its outputs once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 2048


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See :func:`mambify.ops.swiglu.swiglu`."""
    y: Tensor = _SwiGLU.apply(gate.contiguous(), up.contiguous())
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        y = torch.empty_like(gate)
        _forward[(triton.cdiv(y.numel(), _BLOCK),)](gate, up, y, y.numel(), BLOCK=_BLOCK, num_warps=8)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _backward[(triton.cdiv(gate.numel(), _BLOCK),)](
            gate, up, dy.contiguous(), dgate, dup, gate.numel(), BLOCK=_BLOCK, num_warps=8
        )
        return dgate, dup


@triton.jit
def _forward(gate_ptr, up_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = place < numel
    gate = tl.load(gate_ptr + place, mask=here, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=here, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, gate * tl.sigmoid(gate) * up, mask=here)


@triton.jit
def _backward(gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, numel, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = place < numel
    gate = tl.load(gate_ptr + place, mask=here, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=here, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + place, mask=here, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dgate_ptr + place, dy * up * (sigmoid + silu * (1.0 - sigmoid)), mask=here)
    tl.store(dup_ptr + place, dy * silu, mask=here)
