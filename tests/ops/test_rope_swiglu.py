"""The frozen blocks' elementwise operations: both implementations against float64, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from mambify.ops.backends import HAS_TRITON
from mambify.ops.rope import rotate
from mambify.ops.swiglu import swiglu

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Match = Callable[..., None]


def on_device(operation: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    """Runs an operation where the kernels are, with inputs and output on the CPU."""

    def run(**inputs: Tensor) -> tuple[Tensor]:
        return (operation(**{name: value.to(DEVICE) for name, value in inputs.items()}).cpu(),)

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1,), (3, 7, 33), (2, 2048), (5, 1000)])
def test_swiglu(match: Match, backend: str, shape: tuple[int, ...]) -> None:
    inputs: Mapping[str, Tensor] = {"gate": 3 * torch.randn(shape), "up": torch.randn(shape)}
    match(
        on_device(lambda gate, up: swiglu(gate, up, backend=backend)),
        lambda gate, up: (gate * torch.sigmoid(gate) * up,),
        inputs,
        1e-5,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "head_dim"), [(9, 64), (1, 2), (3, 24)])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotation(match: Match, backend: str, heads: int, head_dim: int, rows: int) -> None:
    angle = torch.rand(rows, 5, head_dim // 2) * 6
    cos, sin = (f(angle).repeat(1, 1, 2) for f in (torch.cos, torch.sin))

    def turn(x: Tensor) -> Tensor:
        return rotate(x.unflatten(-1, (-1, head_dim)), cos.to(x), sin.to(x), backend=backend)

    def exact(x: Tensor) -> tuple[Tensor]:
        a, b = x.unflatten(-1, (-1, head_dim)).chunk(2, -1)
        turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)[:, :, None].to(torch.complex128)
        return (torch.cat([turned.real, turned.imag], -1),)

    match(on_device(turn), exact, {"x": torch.randn(2, 5, heads * head_dim)}, 1e-5)


def test_a_view_of_a_wider_projection_is_rotated() -> None:
    wide = torch.randn(2, 5, 300)
    x = wide[..., 20 : 20 + 6 * 16].unflatten(-1, (6, 16))
    cos, sin = torch.randn(2, 1, 5, 8).repeat(1, 1, 1, 2)
    for backend in ("reference", "triton") if HAS_TRITON else ("reference",):
        actual = rotate(x.to(DEVICE), cos.to(DEVICE), sin.to(DEVICE), backend=backend).cpu()
        assert torch.allclose(actual, rotate(x.contiguous(), cos, sin, backend="reference"), atol=1e-5)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="cos_BTP"):
        rotate(torch.randn(2, 5, 3, 8), torch.randn(2, 4, 8), torch.randn(2, 5, 8))
    with pytest.raises(ValueError, match="up must have shape"):
        swiglu(torch.randn(3), torch.randn(4))
