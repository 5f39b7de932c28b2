"""Mamba2's scan against the recurrence itself, run token by token in float64.

Letters: B batch, T tokens, H query heads, G key/value heads, P head dimension, N state size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mambify.ops.ssd import ssd_scan, ssd_step

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def oracle(seq_idx_BT: Tensor | None = None) -> Any:
    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, S: Tensor) -> Any:
        repeats = C.shape[2] // x.shape[2]
        x, B, ys = x.repeat_interleave(repeats, 2), B.repeat_interleave(repeats, 2), []
        for t in range(x.shape[1]):
            if seq_idx_BT is not None and t:
                S = S * (seq_idx_BT[:, t] == seq_idx_BT[:, t - 1])[:, None, None, None]
            write = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
            S = torch.exp(A * dt[:, t])[..., None, None] * S + write
            ys.append((S * C[:, t, :, None, :]).sum(-1) + D[:, None] * x[:, t])
        return torch.stack(ys, 1), S

    return run


def scan(seq_idx_BT: Tensor | None = None, **options: Any) -> Any:
    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, S: Tensor) -> Any:
        return ssd_scan(x, dt, A, B, C, D, initial_state_BHPN=S, seq_idx_BT=seq_idx_BT, **options)

    return run


def inputs(
    tokens: int, groups: int = 2, heads: int = 4, dtype: torch.dtype = torch.float64, batch: int = 2
) -> dict[str, Tensor]:
    P, N = 5, 6
    exact = torch.promote_types(dtype, torch.float32)
    return {
        "x": torch.randn(batch, tokens, groups, P).to(dtype),
        "dt": torch.rand(batch, tokens, heads, dtype=exact),
        "A": -torch.rand(heads, dtype=exact),
        "B": torch.randn(batch, tokens, groups, N).to(dtype),
        "C": torch.randn(batch, tokens, heads, N).to(dtype),
        "D": torch.randn(heads, dtype=exact),
        "S": torch.randn(batch, heads, P, N, dtype=exact),
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 63, 64, 65, 130])
def test_values_and_gradients(tokens: int, dtype: torch.dtype, match: Any) -> None:
    match(scan(), oracle(), inputs(tokens, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize(("groups", "heads"), [(1, 1), (3, 3), (1, 4), (3, 6)])
@pytest.mark.parametrize("chunk_size", [1, 7, 16])
def test_grouped_heads_and_chunk_sizes(groups: int, heads: int, chunk_size: int, match: Any) -> None:
    match(scan(chunk_size=chunk_size), oracle(), inputs(33, groups, heads), 1e-11)


def test_without_skip_and_without_initial_state(match: Any) -> None:
    values = inputs(20)
    match(
        lambda x, dt, A, B, C: ssd_scan(x, dt, A, B, C, chunk_size=8),
        lambda x, dt, A, B, C: oracle()(
            x, dt, A, B, C, D=torch.zeros_like(values["D"]), S=torch.zeros_like(values["S"])
        ),
        {name: values[name] for name in ("x", "dt", "A", "B", "C")},
        1e-11,
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


def test_an_id_that_comes_back_is_a_new_document(match: Any) -> None:
    seq_idx_BT = torch.tensor([[0] * 5 + [1] * 6 + [0] * 9, [4] * 10 + [2] * 1 + [4] * 9])
    match(scan(seq_idx_BT, chunk_size=8), oracle(seq_idx_BT), inputs(20), 1e-11)


@pytest.mark.parametrize("split", [1, 7, 8, 9, 19])
@pytest.mark.parametrize("packed", [False, True])
def test_split_with_state_carried_is_the_whole(split: int, packed: bool, match: Any) -> None:
    seq_idx_BT = torch.tensor([[0] * 9 + [1] * 11, [0] * 3 + [1] * 17]) if packed else None

    def halves(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, S: Tensor) -> Any:
        # A document that begins exactly at the split begins with an empty state.
        ys, start = [], 0
        for stop in (split, 20):
            part = slice(start, stop)
            seq = None if seq_idx_BT is None else seq_idx_BT[:, part]
            if start and seq_idx_BT is not None:
                S = S * (seq_idx_BT[:, start] == seq_idx_BT[:, start - 1])[:, None, None, None]
            y, S = scan(seq, chunk_size=8)(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, S)
            ys.append(y)
            start = stop
        return torch.cat(ys, 1), S

    match(halves, oracle(seq_idx_BT), inputs(20), 1e-11)


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
def test_extreme_decays(rate: float, packed: bool, match: Any) -> None:
    seq_idx_BT = torch.arange(70).div(13, rounding_mode="floor").expand(2, -1) if packed else None
    values = inputs(70, dtype=torch.float32)
    values["A"][:] = rate
    given = {name: v.clone().requires_grad_() for name, v in values.items()}
    y, state = scan(seq_idx_BT, chunk_size=32)(**given)
    (y.sum() + state.sum()).backward()
    assert y.isfinite().all() and state.isfinite().all()
    assert all(v.grad is not None and v.grad.isfinite().all() for v in given.values())
    if rate > -1e30:  # beyond, the oracle's own gradient of A is 0 · 1e30
        match(scan(seq_idx_BT, chunk_size=32), oracle(seq_idx_BT), values, 1e-5)


def test_small_decays_stay_exact_after_a_token_that_forgets_everything(match: Any) -> None:
    values = inputs(64, dtype=torch.float32)
    values["A"][:] = -1.0
    values["dt"][:, ::7] = 3e4
    values["x"][:, ::7] *= 1e-4
    values["S"] *= 0.0
    y, _ = scan()(**values)
    wanted, _ = oracle()(**{name: v.double() for name, v in values.items()})
    assert (y - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_steps_of_zero_size_change_nothing() -> None:
    values = inputs(9)
    values["dt"][:] = 0.0
    y, state = scan(chunk_size=4)(**values)
    _, x, C, D, S = None, values["x"], values["C"], values["D"], values["S"]
    assert torch.equal(state, S)
    wanted = torch.einsum("bhpn,bthn->bthp", S, C) + D[:, None] * x.repeat_interleave(2, 2)
    torch.testing.assert_close(y, wanted)


def test_autocast_changes_nothing() -> None:
    values = inputs(40, dtype=torch.float32)
    y, state = scan(chunk_size=16)(**values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_cast, state_cast = scan(chunk_size=16)(**values)
    assert torch.equal(y, y_cast) and torch.equal(state, state_cast)


def test_dtypes() -> None:
    values = inputs(5, dtype=torch.bfloat16)
    y, state = scan()(**values)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert y.is_contiguous()
