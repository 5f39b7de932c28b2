"""Mamba2's scan against the recurrence itself, run token by token in float64.

Letters: B batch, T tokens, H query heads, G key/value heads, P head dimension, N state size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mambify.errors import InvalidOptionError
from mambify.ops.backends import HAS_TRITON
from mambify.ops.ssd import ssd_scan, ssd_step

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = [
    pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"),
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),  # the mode that gives NaN in allocations
]


def run_of(backend: str, dtype: torch.dtype) -> Any:
    return pytest.param(backend, dtype, marks=TRITON if backend == "triton" else [], id=f"{backend}-{dtype}")


EXACT = [run_of("reference", torch.float64), run_of("triton", torch.float32)]
EVERY = [
    *EXACT,
    run_of("reference", torch.float32),
    run_of("reference", torch.bfloat16),
    # Not bfloat16, which Triton's interpreter multiplies wrongly; the kernels treat both alike.
    run_of("triton", torch.float16),
]
FLOAT32 = [run_of("reference", torch.float32), run_of("triton", torch.float32)]


def oracle(seq_idx_BT: Tensor | None = None) -> Any:
    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, S: Tensor) -> Any:
        x, B, C = (v.repeat_interleave(len(A) // v.shape[2], 2) for v in (x, B, C))
        ys = []
        for t in range(x.shape[1]):
            if seq_idx_BT is not None and t:
                S = S * (seq_idx_BT[:, t] == seq_idx_BT[:, t - 1])[:, None, None, None]
            write = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
            S = torch.exp(A * dt[:, t])[..., None, None] * S + write
            ys.append((S * C[:, t, :, None, :]).sum(-1) + D[:, None] * x[:, t])
        return torch.stack(ys, 1), S

    return run


def scan(seq_idx_BT: Tensor | None = None, backend: str = "reference", **options: Any) -> Any:
    """The operation on CPU tensors; the kernels run on a GPU where there is one."""
    device = DEVICE if backend == "triton" else "cpu"
    seq_idx_BT = None if seq_idx_BT is None else seq_idx_BT.to(device)

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, S: Tensor | None) -> Any:
        given = [None if v is None else v.to(device) for v in (x, dt, A, B, C, D, S)]
        y, state = ssd_scan(
            *given[:6],  # type: ignore[arg-type]
            initial_state_BHPN=given[6],
            seq_idx_BT=seq_idx_BT,
            backend=backend,
            **options,
        )
        return y.cpu(), state.cpu()

    return run


def inputs(
    tokens: int,
    groups: int = 2,
    heads: int = 4,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    head_dim: int = 5,
    state_size: int = 6,
) -> dict[str, Tensor]:
    exact = torch.promote_types(dtype, torch.float32)
    return {
        "x": torch.randn(batch, tokens, groups, head_dim).to(dtype),
        "dt": torch.rand(batch, tokens, heads, dtype=exact),
        "A": -torch.rand(heads, dtype=exact),
        "B": torch.randn(batch, tokens, groups, state_size).to(dtype),
        "C": torch.randn(batch, tokens, heads, state_size).to(dtype),
        "D": torch.randn(heads, dtype=exact),
        "S": torch.randn(batch, heads, head_dim, state_size, dtype=exact),
    }


@pytest.mark.parametrize(("backend", "dtype"), EVERY)
@pytest.mark.parametrize("tokens", [1, 3, 17, 63, 64, 65, 130])
def test_values_and_gradients(tokens: int, backend: str, dtype: torch.dtype, match: Any) -> None:
    sizes = (1, 2, dtype, 1) if backend == "triton" else (2, 4, dtype, 2)  # the interpreter is slow
    match(scan(backend=backend), oracle(), inputs(tokens, *sizes), TOLERANCE[dtype])


def regrouped(values: dict[str, Tensor], **heads: int) -> dict[str, Tensor]:
    """With other numbers of heads of x, B or C."""
    changed = {
        name: torch.randn(*values[name].shape[:2], count, values[name].shape[3]) for name, count in heads.items()
    }
    return values | {name: value.to(values[name].dtype) for name, value in changed.items()}


@pytest.mark.parametrize("heads", [(4, 1, 1), (4, 2, 2), (2, 4, 1), (1, 2, 4), (4, 4, 4)], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_x_B_and_C_each_have_their_own_heads(
    heads: tuple[int, int, int], backend: str, dtype: torch.dtype, match: Any
) -> None:
    """Stock Mamba2: x of every head, B and C of groups of them."""
    values = regrouped(inputs(35, 1, 4, dtype, 1), x=heads[0], B=heads[1], C=heads[2])
    match(scan(backend=backend), oracle(), values, TOLERANCE[dtype])
    with torch.no_grad():  # the kernels then repeat nothing
        actual, expected = scan(backend=backend)(**values), oracle()(**values)
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= 10 * TOLERANCE[dtype] * other.abs().max()


@pytest.mark.parametrize("heads", [(4, 1, 1), (4, 2, 2), (2, 4, 1)], ids=str)
def test_a_step_with_heads_of_their_own(heads: tuple[int, int, int]) -> None:
    values = regrouped(inputs(1, 1, 4), x=heads[0], B=heads[1], C=heads[2])
    expected, expected_state = oracle()(**values)
    one = {name: v[:, 0] if name in ("x", "dt", "B", "C") else v for name, v in values.items()}
    y, state = ssd_step(*(one[name] for name in ("x", "dt", "A", "B", "C", "D", "S")))
    torch.testing.assert_close(y, expected[:, 0])
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize(("groups", "heads"), [(1, 1), (3, 3), (1, 4), (3, 6)])
@pytest.mark.parametrize("chunk_size", [1, 7, 16])
def test_grouped_heads_and_chunk_sizes(groups: int, heads: int, chunk_size: int, match: Any) -> None:
    match(scan(chunk_size=chunk_size), oracle(), inputs(33, groups, heads), 1e-11)


@pytest.mark.parametrize(("groups", "heads"), [(3, 3), (1, 4), (2, 6)])
@pytest.mark.parametrize(("backend", "dtype"), EXACT[1:])
def test_grouped_heads_in_the_kernels(groups: int, heads: int, backend: str, dtype: torch.dtype, match: Any) -> None:
    match(scan(backend=backend), oracle(), inputs(33, groups, heads, dtype, batch=1), TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_without_skip_and_without_initial_state(backend: str, dtype: torch.dtype, match: Any) -> None:
    values = inputs(20, dtype=dtype)
    match(
        lambda x, dt, A, B, C: scan(backend=backend, chunk_size=8)(x, dt, A, B, C, None, None),
        lambda x, dt, A, B, C: oracle()(
            x, dt, A, B, C, D=torch.zeros_like(values["D"]), S=torch.zeros_like(values["S"])
        ),
        {name: values[name] for name in ("x", "dt", "A", "B", "C")},
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("chunk_size", [4, 8, 64])
@pytest.mark.parametrize(
    "starts",
    [((8, 16), (3, 11)), ((7, 9), (1, 24)), ((4, 5, 6, 20), (20,)), (range(25), ())],
    ids=["edge", "beside", "short", "every"],
)
def test_documents(starts: Any, chunk_size: int, match: Any) -> None:
    seq_idx_BT = torch.zeros(2, 25, dtype=torch.int32)
    for row, places in enumerate(starts):
        for place in places:
            seq_idx_BT[row, place:] += 1
    match(scan(seq_idx_BT, chunk_size=chunk_size), oracle(seq_idx_BT), inputs(25), 1e-11)


@pytest.mark.parametrize(
    "starts",
    [((32, 64), (1, 63)), ((31, 33), (7, 96)), ((40, 41, 42, 98), (98,)), (range(99), (64,))],
    ids=["edge", "beside", "short", "every"],
)
@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_documents_and_the_chunks_of_the_kernels(starts: Any, backend: str, dtype: torch.dtype, match: Any) -> None:
    seq_idx_BT = torch.zeros(2, 99, dtype=torch.int64)
    for row, places in enumerate(starts):
        for place in places:
            seq_idx_BT[row, place:] += 1
    run = scan(seq_idx_BT, backend=backend)
    match(run, oracle(seq_idx_BT), inputs(99, 1, 2, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_an_id_that_comes_back_is_a_new_document(backend: str, dtype: torch.dtype, match: Any) -> None:
    seq_idx_BT = torch.tensor([[0] * 5 + [1] * 6 + [0] * 9, [4] * 10 + [2] * 1 + [4] * 9])
    run = scan(seq_idx_BT, backend=backend, chunk_size=8)
    match(run, oracle(seq_idx_BT), inputs(20, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("split", [1, 7, 8, 9, 19])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_split_with_state_carried_is_the_whole(
    split: int, packed: bool, backend: str, dtype: torch.dtype, match: Any
) -> None:
    seq_idx_BT = torch.tensor([[0] * 9 + [1] * 11, [0] * 3 + [1] * 17]) if packed else None

    def halves(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, S: Tensor) -> Any:
        # A document that begins exactly at the split begins with an empty state.
        ys, start = [], 0
        for stop in (split, 20):
            part = slice(start, stop)
            seq = None if seq_idx_BT is None else seq_idx_BT[:, part]
            if start and seq_idx_BT is not None:
                S = S * (seq_idx_BT[:, start] == seq_idx_BT[:, start - 1])[:, None, None, None]
            run = scan(seq, backend=backend, chunk_size=8)
            y, S = run(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, S)
            ys.append(y)
            start = stop
        return torch.cat(ys, 1), S

    match(halves, oracle(seq_idx_BT), inputs(20, 1, 2, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_steps_are_the_scan(dtype: torch.dtype, match: Any) -> None:
    def steps(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, S: Tensor) -> Any:
        ys = []
        for t in range(x.shape[1]):
            y, S = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, S)
            ys.append(y)
        return torch.stack(ys, 1), S

    match(steps, oracle(), inputs(11, dtype=dtype), TOLERANCE[dtype])


def test_step_leaves_its_state_alone_and_keeps_its_dtype() -> None:
    v = inputs(1, dtype=torch.bfloat16)
    before = v["S"].clone()
    y, state = ssd_step(v["x"][:, 0], v["dt"][:, 0], v["A"], v["B"][:, 0], v["C"][:, 0], None, v["S"])
    assert torch.equal(v["S"], before) and not torch.equal(state, before)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32


@pytest.mark.parametrize("rate", [0.0, -1e-12, -50.0, -1e4, -1e30])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), FLOAT32)
def test_extreme_decays(rate: float, packed: bool, backend: str, dtype: torch.dtype, match: Any) -> None:
    seq_idx_BT = torch.arange(70).div(13, rounding_mode="floor")[None] if packed else None
    values = inputs(70, 1, 2, dtype, batch=1)
    values["A"][:] = rate
    run = scan(seq_idx_BT, backend=backend, chunk_size=32)
    given = {name: v.clone().requires_grad_() for name, v in values.items()}
    y, state = run(**given)
    (y.sum() + state.sum()).backward()
    assert y.isfinite().all() and state.isfinite().all()
    assert all(v.grad is not None and v.grad.isfinite().all() for v in given.values())
    if rate > -1e30:  # beyond, the oracle's own gradient of A is 0 · 1e30
        match(run, oracle(seq_idx_BT), values, 1e-5)


@pytest.mark.parametrize(("backend", "dtype"), FLOAT32)
def test_small_decays_stay_exact_after_a_token_that_forgets_everything(backend: str, dtype: torch.dtype) -> None:
    values = inputs(64, dtype=dtype)
    values["A"][:] = -1.0
    values["dt"][:, ::7] = 3e4
    values["x"][:, ::7] *= 1e-4
    values["S"] *= 0.0
    y, _ = scan(backend=backend)(**values)
    wanted, _ = oracle()(**{name: v.double() for name, v in values.items()})
    assert (y - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_steps_of_zero_size_change_nothing(backend: str, dtype: torch.dtype) -> None:
    values = inputs(9, dtype=dtype)
    values["dt"][:] = 0.0
    y, state = scan(backend=backend, chunk_size=4)(**values)
    x, C, D, S = values["x"], values["C"], values["D"], values["S"]
    assert torch.equal(state, S)
    wanted = torch.einsum("bhpn,bthn->bthp", S, C) + D[:, None] * x.repeat_interleave(2, 2)
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize(("backend", "dtype"), FLOAT32)
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    values = inputs(40, dtype=dtype)
    y, state = scan(backend=backend, chunk_size=16)(**values)
    with torch.autocast(DEVICE if backend == "triton" else "cpu", dtype=torch.bfloat16):
        y_cast, state_cast = scan(backend=backend, chunk_size=16)(**values)
    assert torch.equal(y, y_cast) and torch.equal(state, state_cast)


@pytest.mark.parametrize(("backend", "dtype"), [run_of("reference", torch.bfloat16), run_of("triton", torch.float16)])
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    values = inputs(5, dtype=dtype)
    y, state = scan(backend=backend)(**values)
    assert y.dtype == dtype and state.dtype == torch.float32
    assert y.is_contiguous()


@pytest.mark.parametrize(("backend", "dtype"), FLOAT32)
def test_the_value_dtype_of_mixed_inputs_is_that_of_x(backend: str, dtype: torch.dtype) -> None:
    values = inputs(20, dtype=dtype)
    wanted, _ = scan(backend=backend)(**values)
    half = {name: v.half() if name in {"x", "dt", "D"} else v for name, v in values.items()}
    y, state = scan(backend=backend)(**half)
    assert y.dtype == torch.float16 and state.dtype == torch.float32
    assert (y - wanted).norm() < 2e-3 * wanted.norm()


@pytest.mark.parametrize(("backend", "dtype"), FLOAT32)
@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "S"])
def test_shapes_that_do_not_belong_together(name: str, backend: str, dtype: torch.dtype) -> None:
    values = inputs(4, dtype=dtype)
    with pytest.raises(ValueError, match="must have shape"):
        scan(backend=backend)(**values | {name: values[name][..., :-1]})


@pytest.mark.parametrize(("backend", "dtype"), FLOAT32)
def test_lengths_and_groups_that_cannot_be(backend: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="T=0"):
        scan(backend=backend)(**inputs(0, dtype=dtype))
    values = inputs(4, 2, 4, dtype)
    three = {name: values[name][..., :3] for name in ("dt", "A", "D")} | {
        "C": values["C"][:, :, :3],
        "S": values["S"][:, :3],
    }
    with pytest.raises(ValueError, match="G=2, H=3"):
        scan(backend=backend)(**values | three)
    with pytest.raises(ValueError, match="seq_idx_BT must have shape"):
        scan(torch.zeros(2, 5, dtype=torch.int32), backend=backend)(**values)
    with pytest.raises(InvalidOptionError, match="chunk_size"):
        scan(backend=backend, chunk_size=0)(**values)
