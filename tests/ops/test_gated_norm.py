"""The gated per-head norm against its formula in float64 and against transformers, bit for bit."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated

from mambify.errors import InvalidOptionError
from mambify.ops.backends import HAS_TRITON
from mambify.ops.gated_norm import gated_rms_norm

EPS = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = [
    pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"),
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),  # the mode that gives NaN in allocations
]


def oracle(y: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor]:
    gated = y * z * torch.sigmoid(z)
    return (weight * gated / torch.sqrt((gated**2).mean(-1, keepdim=True) + EPS),)


def norm(backend: str = "reference") -> Any:
    """The operation on the device of its backend; inputs and results are on the CPU."""
    device = DEVICE if backend == "triton" else "cpu"

    def run(y: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (gated_rms_norm(y.to(device), z.to(device), weight.to(device), EPS, backend=backend).cpu(),)

    return run


def inputs(dtype: torch.dtype, tokens: int = 7) -> dict[str, Tensor]:
    return {
        "y": torch.randn(2, tokens, 3, 8).to(dtype),
        "z": torch.randn(2, tokens, 3, 8).to(dtype),
        "weight": (1 + torch.randn(3, 8) / 4).to(dtype),
    }


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("reference", torch.float64, 1e-11),
        ("reference", torch.float32, 1e-5),
        ("reference", torch.bfloat16, 2e-2),
        pytest.param("triton", torch.float32, 1e-5, marks=TRITON),
        pytest.param("triton", torch.bfloat16, 2e-2, marks=TRITON),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_values_and_gradients(tokens: int, backend: str, dtype: torch.dtype, tolerance: float, match: Any) -> None:
    match(norm(backend), oracle, inputs(dtype, tokens), tolerance)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=TRITON)])
@pytest.mark.parametrize("width", [16, 24, 64, 128, 256])
@pytest.mark.parametrize("batch", ["whole rows", "every other row"])
def test_views_of_a_projection(batch: str, width: int, backend: str, match: Any) -> None:
    """z is a slice of in_proj's output; a batch of every other row cannot be taken for one long row."""
    rows, tokens, heads = 3, 17, 2
    values = {
        "y": torch.randn(rows, tokens, heads, width),
        "z": torch.randn(2 * rows, tokens, heads * width + 9),
        "weight": 1 + torch.randn(heads, width) / 4,
    }
    chosen = slice(0, rows) if batch == "whole rows" else slice(0, None, 2)

    def sliced(function: Any) -> Any:
        def run(y: Tensor, z: Tensor, weight: Tensor) -> Any:
            return function(y, z[chosen, :, 5 : 5 + heads * width].unflatten(-1, (heads, width)), weight)

        return run

    match(sliced(norm(backend)), sliced(oracle), values, 1e-5)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=TRITON)])
@pytest.mark.parametrize("width", [2048, 5120])
def test_one_norm_for_all_channels(width: int, backend: str, match: Any) -> None:
    """Stock Mamba2 of one group."""
    shape = (2, 3, 1, width)
    values = {"y": torch.randn(shape), "z": torch.randn(shape), "weight": 1 + torch.randn(1, width) / 4}
    match(norm(backend), oracle, values, 1e-5)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=TRITON)])
def test_one_token_a_row(backend: str, match: Any) -> None:
    """What decoding asks for: PyTorch gives any stride to a dimension of size 1."""
    values = inputs(torch.float32, tokens=6)

    def last(function: Any) -> Any:
        return lambda y, z, weight: function(y[:, -1:], z[:, -1:].as_strided((2, 1, 3, 8), (144, 7, 8, 1)), weight)

    match(last(norm(backend)), last(oracle), values, 1e-5)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=TRITON)])
def test_each_dtype_is_kept(backend: str, match: Any) -> None:
    values = inputs(torch.float32)
    values["z"] = values["z"].bfloat16()
    match(norm(backend), oracle, values, 2e-2)  # gradients come in the dtype of their input


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=TRITON)])
def test_frozen_weight(backend: str, match: Any) -> None:
    values = inputs(torch.float32)
    weight = values.pop("weight")

    def frozen(function: Any) -> Any:
        return lambda y, z: function(y, z, weight.to(y.dtype))

    match(frozen(norm(backend)), frozen(oracle), values, 1e-5)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_kernels_round_as_the_reference_does(weight_dtype: torch.dtype) -> None:
    """First the normalised value to z's dtype, then its product with the weight: rarely anything but equal.

    In float16, because the interpreter cuts off where a conversion to bfloat16 should round."""
    values = inputs(torch.float16, tokens=500)
    values["weight"] = values["weight"].to(weight_dtype) * 3
    (wanted,), (got,) = norm()(**values), norm("triton")(**values)
    assert (wanted != got).float().mean() < 1e-3  # the last bit of a float32 sum decides now and then


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_kernels_refuse_float64() -> None:
    with pytest.raises(InvalidOptionError, match="no backend 'triton' here"):
        norm("triton")(**inputs(torch.float64))


@pytest.mark.skipif(
    "group_size" not in inspect.signature(BambaRMSNormGated.__init__).parameters,
    reason="this transformers has no norm over groups",
)
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


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=TRITON)])
def test_a_head_of_zeros_is_zero_with_finite_gradients(backend: str) -> None:
    values = {name: v.requires_grad_() for name, v in inputs(torch.float32).items()}
    (out,) = norm(backend)(values["y"] * 0, values["z"], values["weight"])
    out.sum().backward()
    assert not out.any()
    assert all(v.grad is not None and v.grad.isfinite().all() for v in values.values())
