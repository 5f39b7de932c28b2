"""What only the Triton kernels of Mamba2's scan have to get right: their tiles, strides and what they may leave out.

Letters: B batch, T tokens, H query heads, G key/value heads, P head dimension, N state size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mambify.errors import InvalidOptionError
from mambify.ops.backends import HAS_TRITON
from mambify.ops.ssd import reference, ssd_scan

if HAS_TRITON:
    from mambify.ops.ssd import triton as kernels

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"),
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),  # the mode that gives NaN in allocations
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "dt", "A", "B", "C", "D", "S")


def inputs(
    tokens: int, groups: int, heads: int, head_dim: int, state_size: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """One row; x, B and C are views of one projection, dt of another."""
    sizes = [groups * head_dim, groups * state_size, heads * state_size]
    xBC_BTL = torch.randn(1, tokens, sum(sizes)).to(DEVICE, dtype)
    x, B, C = xBC_BTL.split(sizes, dim=-1)
    return {
        "x": x.unflatten(-1, (groups, head_dim)),
        "dt": torch.rand(1, tokens, heads + 3).to(DEVICE)[..., 3:],
        "A": -torch.rand(heads).to(DEVICE),
        "B": B.unflatten(-1, (groups, state_size)) / state_size**0.5,
        "C": C.unflatten(-1, (heads, state_size)),
        "D": torch.randn(heads).to(DEVICE),
        "S": torch.randn(1, heads, head_dim, state_size).to(DEVICE),
    }


def run(values: dict[str, Tensor], backend: str = "triton", seq_idx_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    first = [values[name] for name in NAMES[:-1]]
    return ssd_scan(*first, initial_state_BHPN=values["S"], seq_idx_BT=seq_idx_BT, backend=backend)


def results(values: dict[str, Tensor], backend: str, seq_idx_BT: Tensor | None, exact: bool = False) -> Iterator[Any]:
    """Names with outputs and gradients; ``exact`` in float64."""
    dtypes = {name: torch.float64 if exact else v.dtype for name, v in values.items()}
    given = {name: v.detach().to(dtypes[name]).requires_grad_() for name, v in values.items()}
    y, final = run(given, backend, seq_idx_BT)
    generator = torch.Generator().manual_seed(1)
    # A cotangent that is a view too: every second head of a wider tensor.
    wide = torch.randn(*y.shape[:2], 2 * y.shape[2], y.shape[3], generator=generator).to(DEVICE, y.dtype)
    dfinal = torch.randn(final.shape, generator=generator).to(DEVICE, final.dtype)
    gradients = torch.autograd.grad((y, final), list(given.values()), (wide[:, :, ::2], dfinal))
    yield from zip(("y", "final", *NAMES), (y, final, *gradients), strict=True)


def agree(values: dict[str, Tensor], tolerance: float, seq_idx_BT: Tensor | None = None) -> None:
    kernel, wanted = results(values, "triton", seq_idx_BT), results(values, "reference", seq_idx_BT, exact=True)
    for (name, got), (_, expected) in zip(kernel, wanted, strict=True):
        assert got.dtype == (values | {"y": values["x"], "final": values["S"]})[name].dtype
        error = (got.double() - expected).abs().max() / expected.abs().max().clamp(min=1.0)
        assert error < tolerance, name


@pytest.mark.parametrize(
    ("head_dim", "state_size", "groups", "heads"),
    [(16, 32, 1, 2), (32, 16, 1, 1), (64, 64, 1, 2), (128, 20, 1, 1), (20, 128, 1, 1)],
)
def test_head_and_state_sizes(head_dim: int, state_size: int, groups: int, heads: int) -> None:
    agree(inputs(35, groups, heads, head_dim, state_size), 1e-5)


@pytest.mark.parametrize("tokens", [64, 70])
@pytest.mark.parametrize(("head_dim", "state_size"), [(64, 64), (64, 128), (128, 64), (80, 72)])
def test_tiles_of_sixteen_bits(head_dim: int, state_size: int, tokens: int) -> None:
    seq_idx_BT = torch.arange(tokens, device=DEVICE).div(40, rounding_mode="floor")[None]
    agree(inputs(tokens, 1, 2, head_dim, state_size, torch.float16), 3e-3, seq_idx_BT)


@pytest.mark.parametrize("packed", [False, True])
def test_tiles_of_sixteen_bits_are_exact_where_the_products_are(packed: bool, monkeypatch: Any) -> None:
    """The sizes that 16-bit inputs get, with float32 in them: nothing hides behind rounding."""
    sixteen = kernels._plan(torch.empty(1, 70, 1, 64, dtype=torch.float16), heads=2, N=128)
    assert (sixteen.Q, sixteen.gradient_p, sixteen.gradient_n, sixteen.inner_n) == (64, 64, 128, 128)
    monkeypatch.setattr(kernels, "_plan", lambda *_: sixteen)
    seq_idx_BT = torch.tensor([0] * 5 + [1] * 59 + [0] * 6, device=DEVICE)[None] if packed else None
    values = inputs(70, 1, 2, 64, 128)
    if DEVICE == "cuda":
        pytest.skip("such tiles of float32 do not fit the registers")
    agree(values, 1e-5, seq_idx_BT)


@pytest.mark.parametrize("names", [("x",), ("dt",), ("A", "D"), ("B",), ("C",), ("D",), ("S",), ("x", "B", "S")])
def test_gradients_of_some_inputs(names: tuple[str, ...]) -> None:
    values = inputs(40, 1, 2, 16, 16)
    every = dict(results(values, "triton", None))
    given = {name: v.detach().requires_grad_(name in names) for name, v in values.items()}
    y, final = run(given)
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(*y.shape[:2], 2 * y.shape[2], y.shape[3], generator=generator).to(DEVICE)
    dfinal = torch.randn(final.shape, generator=generator).to(DEVICE)
    gradients = torch.autograd.grad((y, final), [given[name] for name in names], (wide[:, :, ::2], dfinal))
    for name, gradient in zip(names, gradients, strict=True):
        assert torch.allclose(gradient, every[name], rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("output", [0, 1])
def test_a_gradient_of_one_output_only(output: int) -> None:
    values = inputs(40, 1, 2, 16, 16)
    gradients = []
    for backend in ("triton", "reference"):
        given = {name: v.detach().requires_grad_() for name, v in values.items()}
        run(given, backend)[output].square().sum().backward()
        # The final state depends neither on C nor on D.
        gradients.append({name: torch.zeros_like(v) if v.grad is None else v.grad for name, v in given.items()})
    for name, wanted in gradients[1].items():
        assert (gradients[0][name] - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp(min=1.0), name


def test_the_same_bits_each_time() -> None:
    values = inputs(40, 2, 4, 16, 16)
    first, second = (dict(results(values, "triton", None)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_columns_that_are_not_adjacent() -> None:
    values = inputs(20, 1, 2, 16, 16)
    wanted = run(values)
    apart = {n: v.mT.contiguous().mT if n in {"x", "B", "C", "S"} else v for n, v in values.items()}
    assert apart["C"].stride(-1) != 1
    assert all(torch.equal(a, b) for a, b in zip(run(apart), wanted, strict=True))


def test_nothing_is_kept_without_gradients() -> None:
    values = inputs(20, 1, 2, 16, 16)
    y, final = run(values)
    assert y.grad_fn is None and final.grad_fn is None
    given = {name: v.detach().requires_grad_() for name, v in values.items()}
    with torch.no_grad():
        assert torch.equal(run(given)[0], y)


def test_what_the_kernels_do_not_take() -> None:
    wide = inputs(4, 1, 1, 16, 129)
    double = {name: v.double() for name, v in inputs(4, 1, 1, 16, 16).items()}
    for values in (wide, double):
        with pytest.raises(InvalidOptionError, match="'triton'"):
            run(values)
        y, _ = run(values, "auto")
        first = [values[name] for name in NAMES[:-1]]
        assert torch.equal(y, reference.ssd_scan(*first, values["S"], None, 4)[0])
