"""The kernels of the convolution, the norms and the selective scan on a GPU, against the reference in float64.

Letters as in the operations: B batch, T tokens, C channels, H heads, P head dimension, J sub-heads of M channels, N
state size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mambify.ops.add_norm import add_norm
from mambify.ops.causal_conv import causal_conv
from mambify.ops.gated_norm import gated_rms_norm
from mambify.ops.rope import rotate
from mambify.ops.rotate_kv import rotate_kv
from mambify.ops.selective_scan import selective_scan

# NaN in every allocation comes with PyTorch's deterministic mode, which warns of cumsum and cuBLAS on a GPU.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")]

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
Operation = Callable[..., tuple[Tensor, ...]]


def documents(batch: int, tokens: int) -> Tensor:
    """Ids that change at other places in every row, often and seldom, and come back."""
    place = torch.arange(tokens, device="cuda")
    return torch.stack([(place + 5 * row).div(31 + 16 * row, rounding_mode="floor") % 3 for row in range(batch)])


def agree(operation: Operation, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Outputs and all gradients of ``operation(backend=…, **inputs)``, relative to their norm."""
    results = []
    for backend, to in (("reference", lambda v: v.double()), ("triton", lambda v: v)):
        given = {name: to(v.detach()).requires_grad_() for name, v in inputs.items()}
        outputs = operation(backend=backend, **given)
        torch.manual_seed(1)
        cotangents = [torch.randn(v.shape, device="cuda").to(v) for v in outputs]
        gradients = torch.autograd.grad(outputs, list(given.values()), cotangents)
        assert all(g.dtype == v.dtype for g, v in zip(gradients, given.values(), strict=True))
        names = [*(f"output {i}" for i in range(len(outputs))), *(f"gradient of {name}" for name in given)]
        results.append(dict(zip(names, (v.detach().double() for v in (*outputs, *gradients)), strict=True)))
    wanted, got = results
    for name in wanted:
        assert got[name].isfinite().all(), name
        error = (got[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1.0)
        assert error < TOLERANCE[dtype], f"{name}: {error}"


def projection(batch: int, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, tokens, width, device="cuda").to(dtype)


# width of in_proj, channels before the convolution's, and its own: SmolLM2-135M (odd width), the same padded, an 8B
WIDTHS = [(1545, 576, 960), (1552, 576, 960), (10272, 4096, 6144)]


def conv_case(
    batch: int, tokens: int, widths: tuple[int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype, packed: bool
) -> tuple[Operation, dict[str, Tensor]]:
    width, first, channels = widths
    seq_idx_BT = documents(batch, tokens) if packed else None

    def run(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, backend: str) -> tuple[Tensor, ...]:
        inner = x[..., first : first + channels]
        return causal_conv(inner, weight, bias, initial_state_BCL=state, seq_idx_BT=seq_idx_BT, backend=backend)

    return run, {
        "x": projection(batch, tokens, width, dtype),
        "weight": torch.randn(channels, 4, device="cuda").to(weight_dtype),
        "bias": torch.randn(channels, device="cuda").to(weight_dtype),
        "state": torch.randn(batch, channels, 3, device="cuda").to(dtype),
    }


def norm_case(
    batch: int, tokens: int, heads: int, head_dim: int, width: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[Operation, dict[str, Tensor]]:
    def run(y: Tensor, z: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, ...]:
        gate = z[..., : heads * head_dim].unflatten(-1, (heads, head_dim))
        return (gated_rms_norm(y, gate, weight, 1e-5, backend=backend),)

    return run, {
        "y": torch.randn(batch, tokens, heads, head_dim, device="cuda").to(dtype),
        "z": projection(batch, tokens, width, dtype),
        "weight": (1 + torch.randn(heads, head_dim, device="cuda") / 4).to(weight_dtype),
    }


def scan_case(
    batch: int, tokens: int, heads: int, channels: int, dtype: torch.dtype, packed: bool
) -> tuple[Operation, dict[str, Tensor]]:
    J, M, N = heads, channels, 16
    seq_idx_BT = documents(batch, tokens) if packed else None

    def run(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, S: Tensor, backend: str
    ) -> tuple[Tensor, ...]:
        view = C[..., 4 : 4 + J * N].unflatten(-1, (J, N))
        return selective_scan(
            x, dt, A, B, view, D, initial_state_BJMN=S, seq_idx_BT=seq_idx_BT, chunk_size=64, backend=backend
        )

    return run, {
        "x": torch.randn(batch, tokens, J, M, device="cuda").to(dtype),
        "dt": torch.rand(batch, tokens, J, M, device="cuda") / 2,
        "A": -torch.rand(J, M, N, device="cuda") * 4,
        "B": torch.randn(batch, tokens, J, N, device="cuda").to(dtype),
        "C": projection(batch, tokens, J * N + 36, dtype),
        "D": torch.randn(J, M, device="cuda"),
        "S": torch.randn(batch, J, M, N, device="cuda"),
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 17, 63, 130, 1000])
@pytest.mark.parametrize("widths", WIDTHS[:2], ids=str)
def test_conv(widths: tuple[int, int, int], tokens: int, packed: bool, dtype: torch.dtype) -> None:
    agree(*conv_case(2, tokens, widths, dtype, dtype, packed), dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "widths"), [(32, 512, WIDTHS[0]), (2, 2048, WIDTHS[2])], ids=str)
def test_conv_at_the_sizes_of_training(batch: int, tokens: int, widths: tuple[int, int, int], packed: bool) -> None:
    """Long stretches, weights in float32 beside inputs in bfloat16."""
    agree(*conv_case(batch, tokens, widths, torch.bfloat16, torch.float32, packed), torch.bfloat16)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 63, 1000])
@pytest.mark.parametrize(
    ("heads", "head_dim", "width"), [(9, 64, 1545), (32, 128, 10272), (3, 256, 2000), (5, 80, 401)], ids=str
)
def test_norm(heads: int, head_dim: int, width: int, tokens: int, dtype: torch.dtype) -> None:
    agree(*norm_case(2, tokens, heads, head_dim, width, dtype, torch.float32), dtype)


def test_norm_rounds_as_the_reference_does() -> None:
    operation, inputs = norm_case(8, 512, 9, 64, 1545, torch.bfloat16, torch.bfloat16)
    (wanted,), (got,) = operation(backend="reference", **inputs), operation(backend="triton", **inputs)
    assert (wanted != got).float().mean() < 2e-3  # the last bit of a float32 sum decides now and then


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 17, 63, 130, 700])
@pytest.mark.parametrize("channels", [16, 32])
def test_scan(channels: int, tokens: int, packed: bool, dtype: torch.dtype) -> None:
    """700 tokens of so few sub-heads are cut into segments; 32 channels are more than a warp has."""
    agree(*scan_case(2, tokens, 9, channels, dtype, packed), dtype)


def test_scan_at_the_size_of_training() -> None:
    agree(*scan_case(16, 512, 36, 16, torch.bfloat16, packed=False), torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv", "scan"])
def test_a_long_sequence_is_its_parts_with_the_state_carried(name: str) -> None:
    """131,072 tokens, in one go and in uneven parts: any place in a tile, other segments."""
    tokens = 131072
    if name == "conv":
        x = projection(1, tokens, 200, torch.float32)
        weight, bias = torch.randn(192, 4, device="cuda"), torch.randn(192, device="cuda")

        def run(part: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
            return causal_conv(x[:, part, 3:195], weight, bias, initial_state_BCL=state, backend="triton")

    else:
        _, v = scan_case(1, tokens, 4, 16, torch.float32, packed=False)
        C = v["C"][..., 4:68].unflatten(-1, (4, 16))

        def run(part: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
            x, dt, B = (v[k][:, part] for k in ("x", "dt", "B"))
            return selective_scan(x, dt, v["A"], B, C[:, part], v["D"], initial_state_BJMN=state, backend="triton")

    whole, final = run(slice(None), None)
    state, places = None, [0, 1, 1000, 33333, 100001, tokens]
    for start, stop in pairwise(places):
        part, state = run(slice(start, stop), state)
        torch.testing.assert_close(part, whole[:, start:stop], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-4)


CASES = {
    "conv": lambda: conv_case(4, 300, WIDTHS[0], torch.bfloat16, torch.float32, True),
    "norm": lambda: norm_case(4, 300, 9, 64, 1545, torch.bfloat16, torch.float32),
    "scan": lambda: scan_case(2, 600, 9, 16, torch.bfloat16, True),
}


def gradients(operation: Operation, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    outputs = operation(backend="triton", **given)
    return *outputs, *torch.autograd.grad(outputs, list(given.values()), [torch.ones_like(v) for v in outputs])


@pytest.mark.parametrize("name", CASES)
def test_results_are_the_same_bits_every_time(name: str) -> None:
    operation, inputs = CASES[name]()
    given = {k: v.requires_grad_() for k, v in inputs.items()}
    first, second = gradients(operation, given), gradients(operation, given)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_cuda_graph_holds_forward_and_backward(name: str) -> None:
    operation, inputs = CASES[name]()
    given = {k: v.requires_grad_() for k, v in inputs.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(operation, given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(operation, given)
    with torch.no_grad():
        for value in given.values():
            value.mul_(0.9)
    graph.replay()
    wanted = gradients(operation, given)
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "tokens", "width"), [(3, 129, 576), (2, 65, 4096), (1, 7, 16_384), (16, 512, 960)])
def test_add_norm(batch: int, tokens: int, width: int, dtype: torch.dtype) -> None:
    inputs = {"stream": projection(batch, tokens, width, dtype), "x": projection(batch, tokens, width, dtype)}
    inputs["weight_D"] = 1 + projection(1, 1, width, dtype)[0, 0] / 4

    def run(backend: str, **given: Tensor) -> tuple[Tensor, ...]:
        return add_norm(eps=1e-5, backend=backend, **given)

    agree(run, inputs, dtype)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 70_000), (70_000, 1)])
def test_rotations_of_more_rows_than_a_grid_is_high(batch: int, tokens: int) -> None:
    """65,535 is the most blocks that a launch has along any axis but the first."""
    x = torch.randn(batch, tokens, 3, 16, device="cuda")
    angle = torch.rand(1, tokens, 8, device="cuda").repeat(1, 1, 2)
    assert (rotate(x, angle.cos(), angle.sin()) - rotate(x, angle.cos(), angle.sin(), backend="reference")).norm() < 0.1
    tables = [table[0, :, :8].contiguous() for table in (angle.cos(), angle.sin())]
    lengths = torch.zeros(batch, dtype=torch.long, device="cuda")
    found = []
    for backend in ("reference", "triton"):
        kv = [torch.zeros(batch, 1, tokens, 16, device="cuda") for _ in range(2)]
        found.append([rotate_kv(x.flatten(2), *tables, *kv, lengths, backend=backend), *kv])
    assert all((ours - theirs).norm() < 0.1 for theirs, ours in zip(*found, strict=True))
