"""The depthwise causal convolution in pure torch: K shifted multiply-adds over the whole sequence.

Letters: B batch, T tokens, C channels, K width, L = K − 1, E = L + T inputs with the carried ones in front.

The gradient is written out by hand: autograd would make a zero-filled copy of the input for every tap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mambify.ops.backends import accumulation_dtype, documents


def causal_conv(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    silu: bool,
    initial_state_BCL: Tensor | None,
    seq_idx_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`mambify.ops.causal_conv.causal_conv`."""
    batch, tokens, channels = x_BTC.shape
    carried = weight_CK.shape[1] - 1
    exact = accumulation_dtype(x_BTC, weight_CK)
    if initial_state_BCL is None:
        initial_state_BCL = x_BTC.new_zeros((batch, channels, carried))
    x_BEC = torch.cat([initial_state_BCL.to(x_BTC.dtype).mT, x_BTC], dim=1)
    bias_C = weight_CK.new_zeros(channels) if bias_C is None else bias_C
    own_BE = None
    final_BLC = x_BEC[:, tokens:]
    if seq_idx_BT is not None:
        own_BT = documents(seq_idx_BT)
        own_BE = torch.cat([own_BT[:, :1].expand(-1, carried), own_BT], dim=1)
        final_BLC = final_BLC.masked_fill((own_BE[:, tokens:] != own_BE[:, -1:]).unsqueeze(-1), 0.0)
    y_BTC = _taps(x_BEC, weight_CK.to(exact), bias_C.to(exact), own_BE, silu)
    return y_BTC, final_BLC.mT.contiguous()


def causal_conv_step(
    x_BC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, state_BCL: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`mambify.ops.causal_conv.causal_conv_step`."""
    exact = accumulation_dtype(x_BC, weight_CK)
    window_BCK = torch.cat([state_BCL.to(x_BC.dtype), x_BC.unsqueeze(-1)], dim=-1)
    y_BC = (window_BCK.to(exact) * weight_CK.to(exact)).sum(dim=-1)
    if bias_C is not None:
        y_BC = y_BC + bias_C.to(exact)
    if silu:
        y_BC = functional.silu(y_BC)
    return y_BC.to(x_BC.dtype), window_BCK[..., 1:].to(state_BCL.dtype).contiguous()


class _Taps(torch.autograd.Function):
    """y = act(bias + Σ_k weight_k x[k : k + T]), over inputs of the token's own document (``own_BE``)."""

    @staticmethod
    def forward(
        ctx: Any, x_BEC: Tensor, weight_CK: Tensor, bias_C: Tensor, own_BE: Tensor | None, silu: bool
    ) -> Tensor:
        width = weight_CK.shape[1]
        tokens = x_BEC.shape[1] - width + 1
        sum_BTC = torch.addcmul(bias_C, x_BEC[:, width - 1 :], weight_CK[:, -1])
        for k in range(width - 1):
            sum_BTC.addcmul_(_tap(x_BEC, k, tokens, own_BE), weight_CK[:, k])
        ctx.silu = silu
        ctx.save_for_backward(x_BEC, weight_CK, own_BE, sum_BTC if silu else None)
        return (functional.silu(sum_BTC) if silu else sum_BTC).to(x_BEC.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTC: Tensor) -> tuple[Tensor | None, ...]:
        x_BEC, weight_CK, own_BE, sum_BTC = ctx.saved_tensors
        dsum_BTC = dy_BTC.to(weight_CK.dtype)
        if ctx.silu:
            dsum_BTC = torch.ops.aten.silu_backward(dsum_BTC, sum_BTC)
        width, tokens = weight_CK.shape[1], dsum_BTC.shape[1]
        dx_BEC = torch.zeros_like(x_BEC, dtype=weight_CK.dtype)
        dweight_CK = torch.empty_like(weight_CK)
        for k in range(width):
            reached_BTC = dsum_BTC
            if own_BE is not None:
                reached_BTC = dsum_BTC * (own_BE[:, k : k + tokens] == own_BE[:, width - 1 :]).unsqueeze(-1)
            dx_BEC[:, k : k + tokens].addcmul_(reached_BTC, weight_CK[:, k])
            dweight_CK[:, k] = (reached_BTC * x_BEC[:, k : k + tokens]).sum(dim=(0, 1))
        return dx_BEC.to(x_BEC.dtype), dweight_CK, dsum_BTC.sum(dim=(0, 1)), None, None


def _tap(x_BEC: Tensor, k: int, tokens: int, own_BE: Tensor | None) -> Tensor:
    """The input that tap ``k`` gives each token, zero where it belongs to another document."""
    x_BTC = x_BEC[:, k : k + tokens]
    if own_BE is None:
        return x_BTC
    return x_BTC * (own_BE[:, k : k + tokens] == own_BE[:, -tokens:]).unsqueeze(-1)


_taps: Callable[..., Tensor] = _Taps.apply
