"""Linear layers of few rows with a norm before and a gate or a sum behind, by every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambify.errors import InvalidOptionError
from mambify.ops.backends import HAS_TRITON
from mambify.ops.decode_linear import decode_linear

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def expected(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], norm: Tensor | None, gated: bool, add: Tensor | None
) -> Tensor:
    """The same in float64."""
    x = x.double()
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5) * norm.double()
    parts = [F.linear(x, w.double(), None if b is None else b.double()) for w, b in zip(weights, biases, strict=True)]
    y = F.silu(parts[0]) * parts[1] if gated else torch.cat(parts, 1)
    return y if add is None else add.double() + y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 200), (2, 64), (3, 200), (8, 512)])
@pytest.mark.parametrize(
    ("heights", "gated", "normed", "biased", "adds"),
    [
        ([13], False, True, False, False),
        ([24, 7, 7], False, True, True, False),
        ([40], False, False, False, True),
        ([33], False, False, True, True),
        ([21, 21], True, True, True, False),
        ([16, 16], True, False, False, False),
        ([9, 5], False, False, False, True),
    ],
)
def test_it_is_the_linear_layer(
    backend: str, rows: int, inputs: int, heights: list[int], gated: bool, normed: bool, biased: bool, adds: bool
) -> None:
    x = torch.randn(rows, inputs, device=DEVICE)
    weights = [torch.randn(height, inputs, device=DEVICE) / inputs**0.5 for height in heights]
    biases = [torch.randn(height, device=DEVICE) if biased else None for height in heights]
    norm = torch.randn(inputs, device=DEVICE) if normed else None
    outputs = heights[0] if gated else sum(heights)
    add = torch.randn(rows, outputs, device=DEVICE) if adds else None
    wanted = expected(x, weights, biases, norm, gated, add)
    found = decode_linear(x, weights, biases, norm_D=norm, eps=1e-5, gated=gated, add_to_MO=add, backend=backend)
    assert found.shape == (rows, outputs)
    assert (found.double() - wanted).abs().max() < 1e-5
    if add is not None:
        assert found.data_ptr() == add.data_ptr()


@needs_triton
@pytest.mark.parametrize(("rows", "inputs"), [(4, 64), (5, 200), (16, 128)])
@pytest.mark.parametrize(
    ("heights", "gated", "normed", "biased", "adds"),
    [([24, 7, 7], False, True, True, False), ([40], False, False, False, True), ([21, 21], True, True, True, False)],
)
def test_tensor_cores(
    rows: int, inputs: int, heights: list[int], gated: bool, normed: bool, biased: bool, adds: bool
) -> None:
    """The kernel that half precision of four rows and more takes, in the float32 that an interpreter can do."""
    from mambify.ops.decode_linear import triton_dots

    x = torch.randn(rows, inputs, device=DEVICE)
    weights = [torch.randn(height, inputs, device=DEVICE) / inputs**0.5 for height in heights]
    biases = [torch.randn(height, device=DEVICE) if biased else None for height in heights]
    norm = torch.randn(inputs, device=DEVICE) if normed else None
    add = torch.randn(rows, heights[0] if gated else sum(heights), device=DEVICE) if adds else None
    wanted = expected(x, weights, biases, norm, gated, add)
    found = triton_dots.decode_linear(x, weights, biases, norm, 1e-5, gated, add, False)
    assert (found.double() - wanted).abs().max() < 1e-5


@needs_triton
def test_weights_and_inputs_may_be_views() -> None:
    """Rows of x further apart, a weight that is part of a larger one."""
    x, weight = torch.randn(3, 100, device=DEVICE)[:, 20:84], torch.randn(50, 64, device=DEVICE)[10:30]
    found = decode_linear(x, [weight], backend="triton")
    assert (found - x @ weight.T).abs().max() < 1e-5


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 520, device=DEVICE).to(dtype), torch.randn(24, 520, device=DEVICE).to(dtype)
    norm = torch.rand(520, device=DEVICE).to(dtype)
    found = decode_linear(x, [weight], norm_D=norm, eps=1e-5, backend="triton")
    wanted = expected(x, [weight], [None], norm, False, None)
    assert found.dtype == dtype
    assert (found.double() - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_what_does_not_belong_together_is_refused() -> None:
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    cases: list[tuple[str, list[Any], dict[str, Any]]] = [
        ("two where gated", [x, [weight]], {"gated": True}),
        ("a weight must have shape", [x, [torch.randn(4, 7)]], {}),
        ("a weight must have shape", [x, [weight, weight[:3]]], {"gated": True}),
        ("a bias must have shape", [x, [weight], [torch.randn(3)]], {}),
        ("norm_D must have shape", [x, [weight]], {"norm_D": torch.randn(4)}),
        ("add_to_MO must have shape", [x, [weight]], {"add_to_MO": torch.randn(2, 8)}),
    ]
    for message, arguments, settings in cases:
        with pytest.raises(ValueError, match=message):
            decode_linear(*arguments, **settings)
    with pytest.raises(InvalidOptionError, match="no backend 'triton'"):  # more rows than the kernel is for
        decode_linear(torch.randn(9, 8), [weight], backend="triton")
