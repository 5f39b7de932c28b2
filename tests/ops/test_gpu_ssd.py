"""Mamba2's scan on a GPU, where it is the Triton kernels, against the reference on the CPU in float64.

Letters: B batch, T tokens, H query heads, G key/value heads, P head dimension, N state size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambify.ops.ssd import ssd_scan

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")]

DEVICE = "cuda"
NAMES = ("x", "dt", "A", "B", "C", "D", "S")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}  # of norms; the reference reaches half


def inputs(B: int, T: int, G: int, H: int, P: int, N: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """As a mixer has them: x, B and C are views of one projection; Δ mostly small, with some heads that forget fast."""
    sizes = [G * P, G * N, H * N]
    x, B_, C = torch.randn(B, T, sum(sizes), dtype=torch.float32).to(DEVICE, dtype).split(sizes, dim=-1)
    return {
        "x": x.unflatten(-1, (G, P)),
        "dt": torch.nn.functional.softplus(torch.randn(B, T, H) - 2).to(DEVICE),
        "A": -torch.linspace(0.05, 8.0, H).to(DEVICE),
        "B": B_.unflatten(-1, (G, N)),
        "C": C.unflatten(-1, (H, N)) * N**-0.5,
        "D": torch.randn(H).to(DEVICE),
        "S": torch.randn(B, H, P, N).to(DEVICE),
    }


def results(
    values: dict[str, Tensor], seq_idx_BT: Tensor | None, state: bool = True, backend: str = "auto"
) -> dict[str, Tensor]:
    """Outputs and every gradient; the cotangent of y is a view whose heads are not adjacent."""
    names = NAMES if state else NAMES[:-1]
    given = {name: values[name].detach().requires_grad_() for name in names}
    first = [given[name] for name in NAMES[:-1]]
    y, final = ssd_scan(*first, initial_state_BHPN=given.get("S"), seq_idx_BT=seq_idx_BT, backend=backend)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(*y.shape[:2], 2 * y.shape[2], y.shape[3], generator=generator).to(y)[:, :, ::2]
    dfinal = torch.randn(final.shape, generator=generator).to(final)
    gradients = torch.autograd.grad((y, final), list(given.values()), (dy, dfinal))
    return dict(zip(("y", "final", *names), (y.detach(), final.detach(), *gradients), strict=True))


def agree(values: dict[str, Tensor], tolerance: float, seq_idx_BT: Tensor | None = None, state: bool = True) -> None:
    got = results(values, seq_idx_BT, state)
    exact = {name: v.to("cpu", torch.float64) for name, v in values.items()}
    wanted = results(exact, None if seq_idx_BT is None else seq_idx_BT.cpu(), state, "reference")
    for name, expected in wanted.items():
        assert got[name].isfinite().all(), name
        error = (got[name].to("cpu", torch.float64) - expected).norm() / expected.norm().clamp(min=1.0)
        # dA and dD sum over all tokens with either sign: little is left for the rounding to be compared with.
        assert error < (10 * tolerance if name in {"A", "D"} else tolerance), f"{name}: {error:.1e}"


def documents(B: int, T: int, length: int) -> Tensor:
    """Documents of ``length`` tokens, each row shifted by 7 to the next."""
    token_BT = torch.arange(T, device=DEVICE) + 7 * torch.arange(B, device=DEVICE)[:, None]
    return token_BT.div(length, rounding_mode="floor")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130, 512])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("groups", "heads", "size"), [(3, 9, 64), (2, 8, 128)])
def test_as_on_the_cpu(groups: int, heads: int, size: int, packed: bool, tokens: int, dtype: torch.dtype) -> None:
    values = inputs(2, tokens, groups, heads, size, size, dtype)
    agree(values, TOLERANCE[dtype], documents(2, tokens, 47) if packed else None)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "state_size"), [(16, 16), (32, 64), (64, 16), (64, 128), (128, 64), (128, 16), (16, 128), (80, 72)]
)
@pytest.mark.parametrize("tokens", [100, 128])
def test_sizes(head_dim: int, state_size: int, tokens: int, dtype: torch.dtype) -> None:
    values = inputs(1, tokens, 1, 2, head_dim, state_size, dtype)
    agree(values, TOLERANCE[dtype], documents(1, tokens, 50))


@pytest.mark.parametrize("batch", [1, 40])  # few and many rows get different blocks of the state
@pytest.mark.parametrize("size", [64, 128])
def test_heads_of_their_own_and_no_initial_state(size: int, batch: int) -> None:
    agree(inputs(batch, 192, 4, 4, size, size, torch.bfloat16), TOLERANCE[torch.bfloat16], state=False)


@pytest.mark.parametrize("size", [64, 128])
def test_a_long_row(size: int) -> None:
    agree(inputs(1, 8200, 1, 4, size, size, torch.bfloat16), TOLERANCE[torch.bfloat16], documents(1, 8200, 1900))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_that_forget_everything(dtype: torch.dtype) -> None:
    values = inputs(2, 200, 2, 4, 64, 64, dtype)
    values["dt"][:, ::7] = 50.0
    values["A"][:] = -30.0
    agree(values, TOLERANCE[dtype])


@pytest.mark.parametrize("size", [64, 128])
def test_the_same_bits_each_time(size: int) -> None:
    values = inputs(4, 1000, 2, 8, size, size, torch.bfloat16)
    first, second = (results(values, None) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_in_a_cuda_graph() -> None:
    values = inputs(2, 200, 2, 4, 64, 64, torch.bfloat16)
    seq_idx_BT = documents(2, 200, 70)

    def step() -> list[Tensor]:
        # New leaves each time: where gradients of a leaf are added up is remembered with the stream of its first use.
        leaves = {name: v.detach().requires_grad_() for name, v in values.items()}
        first = [leaves[name] for name in NAMES[:-1]]
        y, final = ssd_scan(*first, initial_state_BHPN=leaves["S"], seq_idx_BT=seq_idx_BT)
        return [y, final, *torch.autograd.grad(y.float().square().mean() + final.mean(), list(leaves.values()))]

    wanted = [v.clone() for v in step()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))


@pytest.mark.slow
def test_offsets_beyond_32_bits() -> None:
    """The last row of a batch with more than 2³¹ entries in C, y and the states is what it is alone."""
    batch, tokens, heads, size = 17, 32768, 32, 128
    if torch.cuda.get_device_properties(0).total_memory < 70e9:
        pytest.skip("needs 70 GB")
    row = inputs(1, tokens, 8, heads, size, size, torch.bfloat16)
    wide = {name: v.expand(batch, *v.shape[1:]).contiguous() if v.ndim > 1 else v for name, v in row.items()}
    assert wide["C"].numel() > 2**31
    outputs = []
    for values in (row, wide):
        leaves = {name: values[name].detach().requires_grad_() for name in NAMES[:-1]}
        y, final = ssd_scan(*leaves.values())
        gradients = torch.autograd.grad((y[-1].sum(), final[-1].sum()), [leaves[n] for n in ("x", "dt", "B", "C")])
        outputs.append([v[-1].float() for v in (y.detach(), final.detach(), *gradients)])
        del y, final, gradients, leaves
    for alone, together in zip(*outputs, strict=True):
        assert (alone - together).norm() < 1e-3 * alone.norm()
