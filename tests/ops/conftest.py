"""What the tests of operations share: NaN in every allocation, a comparison of values and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
Match = Callable[[Function, Function, Mapping[str, Tensor], float], None]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """``torch.empty`` and its like give NaN, so an element that an operation forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected entry (or to 1 where that is smaller)."""
    assert actual.shape == expected.shape
    if not expected.numel():
        return 0.0
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1.0)
    return float("inf") if error.isnan() else error.item()


@pytest.fixture
def match() -> Match:
    """``match(function, oracle, inputs, tolerance)``: outputs and the gradient of every input agree.

    ``inputs`` are named tensors; ``function`` gets them as they are, ``oracle`` in float64. Every output
    feeds the gradient.
    """

    def check(function: Function, oracle: Function, inputs: Mapping[str, Tensor], tolerance: float) -> None:
        given = {name: v.detach().clone().requires_grad_() for name, v in inputs.items()}
        exact = {name: v.detach().double().requires_grad_() for name, v in inputs.items()}
        actual, expected = function(**given), oracle(**exact)
        assert len(actual) == len(expected)
        cotangents = [torch.randn(v.shape, dtype=torch.float64) for v in expected]
        for place, (value, wanted) in enumerate(zip(actual, expected, strict=True)):
            assert largest_error(value, wanted) < tolerance, f"output {place}"
        gradients = torch.autograd.grad(
            actual, list(given.values()), [c.to(v.dtype) for c, v in zip(cotangents, actual, strict=True)]
        )
        wanted_gradients = torch.autograd.grad(expected, list(exact.values()), cotangents)
        for name, gradient, wanted in zip(given, gradients, wanted_gradients, strict=True):
            assert gradient.dtype == given[name].dtype
            assert largest_error(gradient, wanted) < tolerance, f"gradient of {name}"

    return check
