"""RMSNorm as one fused kernel, the same under mixed precision: x / √(mean x² + eps) · weight over the last axis."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm in the dtype of its input.

    Autocast would run it in float32 and hand float32 on, which costs a cast in each projection that follows. The fused
    kernel accumulates in float32 whatever the dtype. A weight kept in float32, because it is trained, is rounded to the
    input's dtype for the product.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class StreamRMSNorm(RMSNorm):
    """Of a residual stream wider than the weights (float32 over bfloat16): rounded to the dtype of the weight, then
    normed, as transformers' Mamba blocks do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def rms_norm_of_few(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis of a few short rows on a CPU, where the number of operations counts.

    PyTorch's is made of eight there. In float32 this takes five: x √D weight / √(|x|² + D eps).
    """
    if x.dtype != torch.float32:
        return F.rms_norm(x, x.shape[-1:], None, eps) * weight.to(x.dtype)
    D = x.shape[-1]
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    length = length.hypot_(length.new_full((), (D * eps) ** 0.5)).mul_(D**-0.5)
    return x.div(length).mul_(weight)
