"""Pieces of initialisation that the Mamba mixers share; each with the source of its distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mambify.ops.causal_conv import causal_conv


def uniform_(tensor: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    """Fills from U(-bound, bound)."""
    return tensor.uniform_(-bound, bound, generator=generator)


def linear_(weight_OI: Tensor, generator: torch.Generator) -> Tensor:
    """PyTorch's default for nn.Linear: U(-1/√I, 1/√I)."""
    return uniform_(weight_OI, weight_OI.shape[-1] ** -0.5, generator)


def dt_bias_(bias: Tensor, generator: torch.Generator, low: float = 1e-3, high: float = 0.1) -> Tensor:
    """softplus⁻¹ of Δ, Δ log-uniform in [low, high] and at least 1e-4 (Mamba, section 3.6)."""
    delta = torch.empty_like(bias, dtype=torch.float32).uniform_(0, 1, generator=generator)
    delta = (delta * (math.log(high) - math.log(low)) + math.log(low)).exp().clamp(min=1e-4)
    return bias.copy_(inverse_softplus(delta))


def inverse_softplus(value: Tensor) -> Tensor:
    """x with softplus(x) = value, for value > 0."""
    return value + torch.log(-torch.expm1(-value))


def identity_conv_(weight_C1K: Tensor) -> Tensor:
    """The tap of the current token 1, the older ones 0: the convolution starts by passing its input on."""
    weight_C1K.zero_()
    weight_C1K[..., -1] = 1.0
    return weight_C1K


def scale_conv_(conv: nn.Conv1d, x_BTC: Tensor, rms_J: Tensor) -> None:
    """Scales a depthwise causal convolution so that J equal blocks of its output have these root mean squares.

    Args:
        x_BTC: the input to measure on.
        rms_J: in the order of the channels.
    """
    assert conv.bias is not None
    y_BTC, _ = causal_conv(x_BTC, conv.weight.squeeze(1), conv.bias, activation=None)
    found_J = y_BTC.unflatten(-1, (len(rms_J), -1)).square().mean((0, 1, 3)).sqrt()
    factor_C = (rms_J / found_J.clamp(min=1e-12)).repeat_interleave(len(conv.bias) // len(rms_J))
    conv.weight.mul_(factor_C[:, None, None])
    conv.bias.mul_(factor_C)


def scaled_rows(rows: Tensor, norm_P: Tensor | None) -> Tensor:
    """Multiplies each head's rows (or bias entries) by a per-head norm's weight, where there is one."""
    if norm_P is None:
        return rows
    scale = norm_P.repeat(rows.shape[0] // norm_P.shape[0])
    return rows * (scale[:, None] if rows.dim() == 2 else scale)
