"""The sum and its norm against their formula in float64, and against torch's own, one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambify.errors import InvalidOptionError
from mambify.ops.add_norm import add_norm
from mambify.ops.backends import HAS_TRITON

if HAS_TRITON:
    from mambify.ops.add_norm import triton as kernels

EPS = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
BACKENDS = ["reference", pytest.param("triton", marks=TRITON)]
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")  # of the mode that gives NaN


def oracle(stream: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = stream + x
    return weight * h / torch.sqrt((h**2).mean(-1, keepdim=True) + EPS), h


def ours(backend: str) -> Any:
    """The operation on the device of its backend; inputs and results are on the CPU."""
    device = DEVICE if backend == "triton" else "cpu"

    def run(stream: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return tuple(v.cpu() for v in add_norm(*(v.to(device) for v in (stream, x, weight)), EPS, backend=backend))

    return run


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    weight = 1 + torch.randn(shape[-1]) / 4
    return {
        k: v.to(dtype) for k, v in {"stream": torch.randn(shape), "x": torch.randn(shape), "weight": weight}.items()
    }


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("reference", torch.float64, 1e-12),
        ("reference", torch.float32, 1e-5),
        ("reference", torch.bfloat16, 2e-2),
        pytest.param("triton", torch.float32, 1e-5, marks=TRITON),
        pytest.param("triton", torch.float16, 4e-3, marks=TRITON),
        pytest.param("triton", torch.bfloat16, 3e-2, marks=TRITON),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 7, 64), (1, 1), (5, 33), (3, 576), (2, 4100), (0, 8)], ids=str)
def test_values_and_gradients(
    shape: tuple[int, ...], backend: str, dtype: torch.dtype, tolerance: float, match: Any
) -> None:
    match(ours(backend), oracle, inputs(*shape, dtype=dtype), tolerance)


@TRITON
def test_programs_that_take_several_tiles(match: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PROGRAMS", 2)
    match(ours("triton"), oracle, inputs(301, 64), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [(True, False), (False, True)])
def test_one_of_the_two_results_may_be_unused(backend: str, used: tuple[bool, bool], match: Any) -> None:
    def chosen(run: Any) -> Any:
        return lambda **given: tuple(v for v, wanted in zip(run(**given), used, strict=True) if wanted)

    def with_weight(run: Any) -> Any:  # the sum alone does not depend on the weight
        return lambda **given: (*chosen(run)(**given), given["weight"] * 1)

    match(with_weight(ours(backend)), with_weight(oracle), inputs(5, 33), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_weight_and_views_of_wider_tensors(backend: str) -> None:
    wide = torch.randn(2, 6, 3, 40, device=DEVICE, requires_grad=True)
    weight = torch.randn(40, device=DEVICE)
    for stream, x in ((wide[0, :, 0], wide[1, :, 2]), (wide[0, 0].T, wide[1, 1].T)):
        scale = weight[: stream.shape[-1]]
        found = add_norm(stream, x, scale, EPS, backend=backend)
        expected = oracle(stream, x, scale)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        gradients = [
            torch.autograd.grad(normed.sin().sum() + h.cos().sum(), wide)[0] for normed, h in (found, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_of_a_wider_dtype_keeps_it(backend: str) -> None:
    given = inputs(5, 33)
    stream, x = given["stream"].to(DEVICE).requires_grad_(), given["x"].to(DEVICE, torch.float16).requires_grad_()
    normed, total = add_norm(stream, x, given["weight"].to(DEVICE), EPS, backend=backend)
    assert normed.dtype == total.dtype == torch.float32
    torch.testing.assert_close(total, stream + x)
    gradients = torch.autograd.grad(normed.square().sum() + total.sum(), [stream, x])
    assert [g.dtype for g in gradients] == [torch.float32, torch.float16]
    torch.testing.assert_close(gradients[0].half(), gradients[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_torchs_norm_after_a_sum(backend: str) -> None:
    given = {k: v.to(DEVICE) for k, v in inputs(2, 7, 96, dtype=torch.float16).items()}
    normed, total = add_norm(*given.values(), EPS, backend=backend)
    assert total.equal(given["stream"] + given["x"])
    expected = F.rms_norm(total, (96,), given["weight"], EPS)
    torch.testing.assert_close(normed, expected, rtol=torch.finfo(torch.float16).eps, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_no_dtype(backend: str) -> None:
    given = {k: v.to(DEVICE) for k, v in inputs(3, 16, dtype=torch.float16).items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        assert [v.dtype for v in add_norm(*given.values(), EPS, backend=backend)] == [torch.float16] * 2


def test_what_does_not_belong_together() -> None:
    stream, weight = torch.randn(2, 3, 8), torch.ones(8)
    with pytest.raises(ValueError, match="add_norm: x must have shape"):
        add_norm(stream, stream[:1], weight, EPS)
    with pytest.raises(ValueError, match="add_norm: weight_D must have shape"):
        add_norm(stream, stream, weight[:1], EPS)
    with pytest.raises(InvalidOptionError, match="no backend 'tritn' here"):
        add_norm(stream, stream, weight, EPS, backend="tritn")
    with pytest.raises(InvalidOptionError, match="no backend 'triton' here"):
        add_norm(stream.double(), stream.double(), weight, EPS, backend="triton")
