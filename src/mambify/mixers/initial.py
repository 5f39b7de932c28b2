"""Pieces of initialisation that the Mamba mixers share; each with the source of its distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def scaled_rows(rows: Tensor, norm_P: Tensor | None) -> Tensor:
    """Multiplies each head's rows (or bias entries) by a per-head norm's weight, where there is one."""
    if norm_P is None:
        return rows
    scale = norm_P.repeat(rows.shape[0] // norm_P.shape[0])
    return rows * (scale[:, None] if rows.dim() == 2 else scale)
