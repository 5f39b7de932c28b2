from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mambify.ops.backends import HAS_TRITON
from mambify.ops.squared_error import squared_error

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 40_000)])
def test_sums_and_gradient(match: Callable[..., None], backend: str, shape: tuple[int, ...]) -> None:
    teacher = torch.randn(shape)

    def ours(student: Tensor) -> tuple[Tensor]:
        error, energy = squared_error(student.to(DEVICE), teacher.to(DEVICE), backend=backend)
        assert not energy.requires_grad
        assert energy.item() == pytest.approx(float(teacher.double().square().sum()), rel=1e-5)
        return (error.cpu(),)

    match(ours, lambda student: ((student - teacher.double()).square().sum(),), {"student": torch.randn(shape)}, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_are_summed_in_float32(backend: str) -> None:
    student = torch.randn(1000).half().to(DEVICE).requires_grad_()
    teacher = torch.randn(1000).to(DEVICE)
    error, energy = squared_error(student, teacher, backend=backend)
    assert error.dtype == energy.dtype == torch.float32
    error.backward()
    assert student.grad is not None
    assert student.grad.dtype == torch.float16
    assert torch.allclose(student.grad.float(), 2 * (student - teacher), rtol=1e-2, atol=1e-2)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="teacher must have shape"):
        squared_error(torch.randn(3), torch.randn(1))
