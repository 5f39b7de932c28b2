"""The gated per-head norm against its formula in float64 and against transformers, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated

from mambify.ops.gated_norm import gated_rms_norm

EPS = 1e-5


def oracle(y: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor]:
    gated = y * z * torch.sigmoid(z)
    return (weight * gated / torch.sqrt((gated**2).mean(-1, keepdim=True) + EPS),)


def inputs(dtype: torch.dtype, tokens: int = 7) -> dict[str, Tensor]:
    return {
        "y": torch.randn(2, tokens, 3, 8).to(dtype),
        "z": torch.randn(2, tokens, 3, 8).to(dtype),
        "weight": (1 + torch.randn(3, 8) / 4).to(dtype),
    }


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_values_and_gradients(dtype: torch.dtype, tolerance: float, match: Any) -> None:
    match(lambda y, z, weight: (gated_rms_norm(y, z, weight, EPS),), oracle, inputs(dtype), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_rounding_as_transformers(dtype: torch.dtype) -> None:
    values = inputs(dtype, tokens=50)
    norm = BambaRMSNormGated(24, group_size=8, eps=EPS).to(dtype)
    norm.weight.data.copy_(values["weight"].flatten())
    wanted = norm(values["y"].flatten(-2), values["z"].flatten(-2))
    got = gated_rms_norm(values["y"], values["z"], values["weight"], EPS)
    assert got.dtype == dtype
    assert torch.equal(got.flatten(-2), wanted)


def test_result_is_in_the_dtype_of_the_gate() -> None:
    values = inputs(torch.float32)
    assert gated_rms_norm(values["y"], values["z"].bfloat16(), values["weight"], EPS).dtype == torch.bfloat16


def test_a_head_of_zeros_is_zero_with_finite_gradients() -> None:
    values = {name: v.requires_grad_() for name, v in inputs(torch.float32).items()}
    out = gated_rms_norm(values["y"] * 0, values["z"], values["weight"], EPS)
    out.sum().backward()
    assert not out.any()
    assert all(v.grad is not None and v.grad.isfinite().all() for v in values.values())
