"""Linear layers of few rows with a norm before and a gate or a sum behind, by every backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambify.errors import InvalidOptionError
from mambify.ops.backends import HAS_TRITON
from mambify.ops.conv_replay import conv_replay
from mambify.ops.decode_linear import Convolution, decode_linear
from mambify.ops.ring import RingPlace
from replaying import advance

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # Triton's interpreter multiplies no matrices of bfloat16


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


class Drawn(NamedTuple):
    """What a layer is made of, and what it reads and is added to."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    norm: Tensor | None
    add: Tensor | None

    @classmethod
    def of(
        cls,
        rows: int,
        inputs: int,
        heights: list[int],
        *,
        gated: bool,
        normed: bool,
        biased: bool,
        adds: bool,
        dtype: torch.dtype = torch.float32,
    ) -> Drawn:
        def drawn(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=DEVICE).to(dtype)

        return cls(
            drawn(rows, inputs),
            [drawn(height, inputs) / inputs**0.5 for height in heights],
            [drawn(height) if biased else None for height in heights],
            drawn(inputs) if normed else None,
            drawn(rows, heights[0] if gated else sum(heights)) if adds else None,
        )


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
    outputs = heights[0] if gated else sum(heights)
    x, weights, biases, norm, add = Drawn.of(
        rows, inputs, heights, gated=gated, normed=normed, biased=biased, adds=adds
    )
    wanted = expected(x, weights, biases, norm, gated, add)
    found = decode_linear(x, weights, biases, norm_D=norm, eps=1e-5, gated=gated, add_to_MO=add, backend=backend)
    assert found.shape == (rows, outputs)
    assert (found.double() - wanted).abs().max() < 1e-5
    if add is not None:
        assert found.data_ptr() == add.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("slots", "new"), [(1, 1), (3, 1), (1, 5), (2, 3)])
@pytest.mark.parametrize(("first", "width"), [(0, 4), (3, 2), (7, 4)])
def test_some_outputs_are_convolved(backend: str, slots: int, new: int, first: int, width: int) -> None:
    """As by the product and the convolution one after the other: outputs and rings; a slot that rests keeps its own."""
    channels, outputs = 5, 12
    weight, bias = torch.randn(outputs, 64, device=DEVICE) / 8, torch.randn(outputs, device=DEVICE)
    taps, conv_bias = torch.randn(channels, width, device=DEVICE), torch.randn(channels, device=DEVICE)
    place = RingPlace.empty(slots, 5, device=DEVICE)
    place.head_S.copy_(torch.arange(slots) + place.capacity - 2)
    place.active_S.copy_(torch.arange(slots) != 1)
    ring = torch.randn(slots, place.capacity, channels).to(DEVICE)
    rings = ring, ring.clone()
    for _ in range(2):
        x = torch.randn(slots * new, 64, device=DEVICE)
        found = decode_linear(
            x, [weight], [bias], convolution=Convolution(first, taps, conv_bias, rings[0], place), backend=backend
        )
        wanted = decode_linear(x, [weight], [bias], backend=backend)
        part = wanted[:, first : first + channels]
        part.copy_(conv_replay(part.view(slots, new, channels), taps, conv_bias, rings[1], place).flatten(0, 1))
        advance(place, torch.full((slots,), new, device=DEVICE), new)
        for ours, theirs in zip((found, rings[0]), (wanted, rings[1]), strict=True):
            assert (ours - theirs).abs().max() < 1e-5
        assert slots == 1 or not found[new : 2 * new, first : first + channels].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normed", [True, False])
def test_a_stream_wider_than_the_weights(backend: str, normed: bool) -> None:
    """Its rows are rounded to the weights' dtype, and what is added to it is not."""
    x, weight = torch.randn(3, 72, device=DEVICE), torch.randn(10, 72, device=DEVICE).to(HALF) / 8
    norm = torch.rand(72, device=DEVICE).to(HALF) if normed else None
    found = decode_linear(x, [weight], norm_D=norm, eps=1e-5, backend=backend)
    assert found.dtype == HALF
    wanted = expected(x.to(HALF), [weight], [None], norm, False, None)
    assert (found.double() - wanted).abs().max() < 0.02 * wanted.abs().max()
    stream = 100 * torch.randn(3, 10, device=DEVICE)
    added = decode_linear(x.to(HALF), [weight], add_to_MO=stream.clone(), backend=backend)
    assert added.dtype == torch.float32
    wanted = expected(x.to(HALF), [weight], [None], None, False, stream)
    assert (
        added.double() - wanted
    ).abs().max() < 0.02  # in half precision a stream of this size would be off by 0.06 or more


@needs_triton
@pytest.mark.parametrize(("rows", "inputs"), [(4, 64), (5, 200), (16, 128)])
@pytest.mark.parametrize(
    ("heights", "gated", "normed", "biased", "adds"),
    [([24, 7, 7], False, True, True, False), ([40], False, False, False, True), ([21, 21], True, True, True, False)],
)
def test_tensor_cores(
    rows: int, inputs: int, heights: list[int], gated: bool, normed: bool, biased: bool, adds: bool
) -> None:
    """The kernel that half precision of several rows takes, in the float32 that an interpreter can do."""
    from mambify.ops.decode_linear import triton_dots

    x, weights, biases, norm, add = Drawn.of(
        rows, inputs, heights, gated=gated, normed=normed, biased=biased, adds=adds
    )
    wanted = expected(x, weights, biases, norm, gated, add)
    found = triton_dots.decode_linear(x, weights, biases, norm, 1e-5, gated, add, False)
    assert (found.double() - wanted).abs().max() < 1e-5


@needs_triton
@pytest.mark.parametrize(("rows", "inputs"), [(1, 576), (3, 200), (5, 77), (8, 1100), (13, 200)])
@pytest.mark.parametrize(
    ("heights", "gated", "normed", "biased", "adds"),
    [([24, 7, 7], False, True, True, False), ([40], False, False, False, True), ([21, 21], True, True, True, False)],
)
def test_inputs_shared_among_warps(
    rows: int, inputs: int, heights: list[int], gated: bool, normed: bool, biased: bool, adds: bool
) -> None:
    """The kernel that small weights in half precision take, and that a row's result is the same in any company."""
    from mambify.ops.decode_linear import triton_shared

    x, weights, biases, norm, add = Drawn.of(
        rows, inputs, heights, gated=gated, normed=normed, biased=biased, adds=adds, dtype=torch.float16
    )
    wanted = expected(x, weights, biases, norm, gated, add)

    def found(first: int, last: int) -> Tensor:
        sums = None if add is None else add[first:last].clone()
        return triton_shared.decode_linear(x[first:last], weights, biases, norm, 1e-5, gated, sums, None, False)

    together = found(0, rows)
    assert (together.double() - wanted).abs().max() < 4e-3 * wanted.abs().max()
    assert torch.equal(torch.cat([found(row, row + 1) for row in range(rows)]), together)


@needs_triton
@pytest.mark.parametrize(("slots", "new"), [(1, 1), (1, 5), (4, 2)])
@pytest.mark.parametrize(("first", "channels"), [(0, 20), (9, 30), (16, 32)])
def test_a_convolution_of_outputs_whose_inputs_are_shared(slots: int, new: int, first: int, channels: int) -> None:
    from mambify.ops.decode_linear import triton_shared

    weight, bias = torch.randn(50, 72, device=DEVICE).half() / 8, torch.randn(50, device=DEVICE).half()
    taps, conv_bias = torch.randn(channels, 4, device=DEVICE).half(), torch.randn(channels, device=DEVICE).half()
    place = RingPlace.empty(slots, new, device=DEVICE)
    place.active_S.copy_(torch.arange(slots) != 1)
    ring = torch.randn(slots, place.capacity, channels, device=DEVICE).half()
    rings = ring, ring.clone()
    for _ in range(2):
        x = torch.randn(slots * new, 72, device=DEVICE).half()
        convolution = Convolution(first, taps, conv_bias, rings[0], place)
        found = triton_shared.decode_linear(x, [weight], [bias], None, 0.0, False, None, convolution, False)
        wanted = triton_shared.decode_linear(x, [weight], [bias], None, 0.0, False, None, None, False)
        part = wanted[:, first : first + channels]
        part.copy_(conv_replay(part.view(slots, new, channels), taps, conv_bias, rings[1], place).flatten(0, 1))
        advance(place, torch.full((slots,), new, device=DEVICE), new)
        assert torch.equal(*rings)
        assert (found - wanted).abs().max() < 0.01


@needs_triton
def test_more_rows_than_a_program_convolves() -> None:
    """Ten in half precision: the product, and the convolution by a kernel of its own."""
    weight, taps = torch.randn(40, 72, device=DEVICE).half() / 8, torch.randn(24, 4, device=DEVICE).half()
    place = RingPlace.empty(2, 5, device=DEVICE)
    ring = torch.randn(2, place.capacity, 24, device=DEVICE).half()
    rings, x = (ring, ring.clone()), torch.randn(10, 72, device=DEVICE).half()
    found = decode_linear(x, [weight], convolution=Convolution(8, taps, None, rings[0], place), backend="triton")
    wanted = decode_linear(x, [weight], backend="triton")
    part = wanted[:, 8:32]
    part.copy_(conv_replay(part.view(2, 5, 24), taps, None, rings[1], place).flatten(0, 1))
    assert torch.equal(found, wanted) and torch.equal(*rings)


@needs_triton
def test_which_kernel_multiplies() -> None:
    """Large weights and small ones, by rows and by outputs; small ones in one way whatever the number of rows."""
    from mambify.ops.decode_linear.triton import way_of

    def way(rows: int, *heights: int, inputs: int = 576, dtype: torch.dtype = torch.bfloat16, **gated: bool) -> str:
        return way_of(rows, [torch.empty(height, inputs, dtype=dtype, device="meta") for height in heights], **gated)

    assert [way(rows, 4096, 1024, 1024) for rows in (1, 2, 3, 5, 16)] == ["rows"] * 2 + ["tiles"] * 3
    assert [way(rows, 576, 192, 192) for rows in (1, 2, 3, 8, 9)] == ["shared"] * 5
    assert [way(rows, 192, inputs=5120) for rows in (1, 8, 9)] == ["rows", "rows", "tiles"]
    assert way(5, 2112) == "tiles" and way(5, 2096) == "shared"
    assert way(5, 1200, 1200) == "tiles" and way(5, 1200, 1200, gated=True) == "shared"
    assert way(5, 192, inputs=1536) == "shared"
    assert [way(rows, height, dtype=torch.float32) for rows in (1, 5) for height in (576, 8192)] == ["rows"] * 4


@needs_triton
def test_weights_and_inputs_may_be_views() -> None:
    """Rows of x further apart, a weight that is part of a larger one."""
    x, weight = torch.randn(3, 100, device=DEVICE)[:, 20:84], torch.randn(50, 64, device=DEVICE)[10:30]
    found = decode_linear(x, [weight], backend="triton")
    assert (found - x @ weight.T).abs().max() < 1e-5


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Of more inputs than small weights have."""
    x, weight = torch.randn(2, 1600, device=DEVICE).to(dtype), torch.randn(24, 1600, device=DEVICE).to(dtype)
    norm = torch.rand(1600, device=DEVICE).to(dtype)
    found = decode_linear(x, [weight], norm_D=norm, eps=1e-5, backend="triton")
    wanted = expected(x, [weight], [None], norm, False, None)
    assert found.dtype == dtype
    assert (found.double() - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_what_does_not_belong_together_is_refused() -> None:
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    taps, place = torch.randn(3, 4), RingPlace.empty(2, 1, device="cpu", capacity=16)
    ring = torch.zeros(2, 16, 3)
    cases: list[tuple[str, list[Any], dict[str, Any]]] = [
        ("two where gated", [x, [weight]], {"gated": True}),
        ("a weight must have shape", [x, [torch.randn(4, 7)]], {}),
        ("a weight must have shape", [x, [weight, weight[:3]]], {"gated": True}),
        ("a bias must have shape", [x, [weight], [torch.randn(3)]], {}),
        ("norm_D must have shape", [x, [weight]], {"norm_D": torch.randn(4)}),
        ("add_to_MO must have shape", [x, [weight]], {"add_to_MO": torch.randn(2, 8)}),
        ("convolves channels of one weight", [x, [weight]], {"convolution": Convolution(2, taps, None, ring, place)}),
        ("ring_SRC must have shape", [x, [weight]], {"convolution": Convolution(0, taps, None, ring[:, :9], place)}),
    ]
    for message, arguments, settings in cases:
        with pytest.raises(ValueError, match=message):
            decode_linear(*arguments, **settings)
    with pytest.raises(InvalidOptionError, match="no backend 'triton'"):  # more rows than the kernel is for
        decode_linear(torch.randn(9, 8), [weight], backend="triton")
