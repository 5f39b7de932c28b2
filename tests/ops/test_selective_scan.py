"""Mamba1's scan against the recurrence itself, run token by token in float64.

Letters: B batch, T tokens, J sub-heads, M channels a sub-head, N state size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mambify.errors import InvalidOptionError
from mambify.ops.backends import HAS_TRITON
from mambify.ops.selective_scan import selective_scan, selective_scan_step

if HAS_TRITON:
    from mambify.ops.selective_scan import triton as kernels

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = [
    pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"),
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),  # the mode that gives NaN in allocations
]


def oracle(seq_idx_BT: Tensor | None = None) -> Any:
    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, S: Tensor) -> Any:
        ys = []
        for t in range(x.shape[1]):
            if seq_idx_BT is not None and t:
                S = S * (seq_idx_BT[:, t] == seq_idx_BT[:, t - 1])[:, None, None, None]
            S = torch.exp(dt[:, t, ..., None] * A) * S + (dt[:, t] * x[:, t])[..., None] * B[:, t, :, None, :]
            ys.append((S * C[:, t, :, None, :]).sum(-1) + D * x[:, t])
        return torch.stack(ys, 1), S

    return run


def scan(seq_idx_BT: Tensor | None = None, **options: Any) -> Any:
    """The operation on the device of its backend; inputs and results are on the CPU."""
    device = DEVICE if options.get("backend") == "triton" else "cpu"

    def run(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, S: Tensor | None = None
    ) -> Any:
        D, S, ids = (None if v is None else v.to(device) for v in (D, S, seq_idx_BT))
        x, dt, A, B, C = (v.to(device) for v in (x, dt, A, B, C))
        y, final = selective_scan(x, dt, A, B, C, D, initial_state_BJMN=S, seq_idx_BT=ids, **options)
        return y.cpu(), final.cpu()

    return run


def inputs(
    tokens: int, dtype: torch.dtype = torch.float64, batch: int = 2, sizes: tuple[int, int, int] = (3, 4, 5)
) -> dict[str, Tensor]:
    J, M, N = sizes
    exact = torch.promote_types(dtype, torch.float32)
    return {
        "x": torch.randn(batch, tokens, J, M).to(dtype),
        "dt": torch.rand(batch, tokens, J, M, dtype=exact),
        "A": -torch.rand(J, M, N, dtype=exact) * 2,
        "B": torch.randn(batch, tokens, J, N).to(dtype),
        "C": torch.randn(batch, tokens, J, N).to(dtype),
        "D": torch.randn(J, M, dtype=exact),
        "S": torch.randn(batch, J, M, N, dtype=exact),
    }


def zeros_for_absent(function: Any, values: dict[str, Tensor]) -> Any:
    """An oracle that is given neither D nor S."""
    return lambda **given: function(**given, **{k: torch.zeros_like(values[k].double()) for k in ("D", "S")})


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 15, 16, 17, 65, 130])
def test_values_and_gradients(tokens: int, dtype: torch.dtype, match: Any) -> None:
    match(scan(), oracle(), inputs(tokens, dtype=dtype), TOLERANCE[dtype])


class TestKernels:
    """The Triton kernels: few and small shapes, because the interpreter is slow."""

    pytestmark = TRITON
    scan = staticmethod(lambda seq_idx_BT=None: scan(seq_idx_BT, backend="triton"))

    @pytest.mark.parametrize(
        ("tokens", "dtype"),
        [(1, torch.float32), (17, torch.float32), (17, torch.bfloat16), (63, torch.float32), (130, torch.float32)],
        ids=str,
    )
    def test_values_and_gradients(self, tokens: int, dtype: torch.dtype, match: Any) -> None:
        match(self.scan(), oracle(), inputs(tokens, dtype=dtype, batch=1, sizes=(2, 4, 5)), TOLERANCE[dtype])

    @pytest.mark.parametrize("sizes", [(2, 16, 16), (1, 20, 16), (1, 3, 200), (1, 1, 1)], ids=str)
    def test_sizes(self, sizes: tuple[int, int, int], match: Any) -> None:
        """Of sub-heads: that of the mixer, more channels than one warp has, long and least states."""
        match(self.scan(), oracle(), inputs(10, torch.float32, sizes=sizes), 1e-5)

    def test_segments(self, match: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A sequence cut in three, as where batch and sub-heads are too few for a GPU."""
        monkeypatch.setattr(kernels, "_segment", lambda *_, **__: 2 * kernels.SAVED_EVERY)
        seq_idx_BT = torch.tensor([0] * 30 + [1] * 34 + [2] * 66)[None]
        match(self.scan(seq_idx_BT), oracle(seq_idx_BT), inputs(130, torch.float32, 1, (1, 4, 5)), 1e-5)

    def test_segments_cover_every_token_once(self) -> None:
        for tokens in (1, 31, 32, 33, 2000, 131072):
            for programs in (1, 36, 527, 528, 5000):
                segment = kernels._segment(tokens, programs, enough=528, wanted=1056, shortest=256)
                assert segment % kernels.SAVED_EVERY == 0
                assert programs < 528 or segment >= tokens
                assert -(-tokens // segment) * programs <= max(1056 + programs, programs)

    def test_documents(self, match: Any) -> None:
        seq_idx_BT = torch.zeros(2, 41, dtype=torch.int32)
        for row, places in enumerate(((4, 8, 31, 32, 40), (1, 2, 33))):
            for place in places:
                seq_idx_BT[row, place:] += 1
        match(self.scan(seq_idx_BT), oracle(seq_idx_BT), inputs(41, torch.float32, sizes=(1, 4, 5)), 1e-5)

    def test_views_of_a_projection(self, match: Any) -> None:
        """C is a slice of in_proj's output, B an expanded view, x has its channels apart."""
        J, M, N = 2, 4, 5
        values = inputs(9, torch.float32, sizes=(J, M, N))
        values["B"] = values["B"][:, :, :1]
        values["C"] = torch.randn(2, 9, J * N + 3)

        def viewed(function: Any) -> Any:
            def run(x: Tensor, B: Tensor, C: Tensor, **rest: Tensor) -> Any:
                apart, several = x.mT.contiguous().mT, B.expand(-1, -1, J, -1)
                return function(x=apart, B=several, C=C[..., 2 : 2 + J * N].unflatten(-1, (J, N)), **rest)

            return run

        match(viewed(self.scan()), viewed(oracle()), values, 1e-5)

    def test_without_skip_and_without_initial_state(self, match: Any) -> None:
        values = inputs(9, torch.float32, batch=1)
        given = {name: values[name] for name in ("x", "dt", "A", "B", "C")}
        match(self.scan(), zeros_for_absent(oracle(), values), given, 1e-5)

    @pytest.mark.parametrize("used", [0, 1], ids=["y", "state"])
    def test_gradient_of_one_output_alone(self, used: int, match: Any) -> None:
        values = inputs(9, torch.float32, batch=1)
        constant = {} if used == 0 else {name: values.pop(name) for name in ("C", "D")}  # no part in the state

        def one(function: Any) -> Any:
            def run(**given: Tensor) -> Any:
                return function(**given, **{k: v.to(given["x"].dtype) for k, v in constant.items()})[used : used + 1]

            return run

        match(one(self.scan()), one(oracle()), values, 1e-5)

    @pytest.mark.parametrize("rate", [0.0, -1e30])
    def test_extreme_decays(self, rate: float, match: Any) -> None:
        seq_idx_BT = torch.arange(14).div(9, rounding_mode="floor")[None]
        values = inputs(14, torch.float32, batch=1, sizes=(2, 4, 5))
        values["A"][:, 0] = rate
        given = {name: v.clone().requires_grad_() for name, v in values.items()}
        y, state = self.scan(seq_idx_BT)(**given)
        (y.sum() + state.sum()).backward()
        assert y.isfinite().all() and state.isfinite().all()
        assert all(v.grad is not None and v.grad.isfinite().all() for v in given.values())
        if rate > -1e30:
            match(self.scan(seq_idx_BT), oracle(seq_idx_BT), values, 1e-5)

    def test_states_are_saved_only_for_a_backward_pass(self) -> None:
        values = {name: v.requires_grad_() for name, v in inputs(65, torch.float32, 1, (1, 4, 5)).items()}
        saved: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.no_grad():
                self.scan()(**values)
            assert not saved
            self.scan()(**values)
        states = -(-65 // kernels.SAVED_EVERY) * 4 * 5
        assert sum(saved) == sum(v.numel() for name, v in values.items() if name != "S") + states

    def test_refuses_what_it_does_not_take(self) -> None:
        for values in inputs(2), inputs(2, torch.float32, sizes=(1, 1, 257)):
            with pytest.raises(InvalidOptionError, match="no backend 'triton' here"):
                self.scan()(**values)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 9, 64])
def test_chunk_sizes(chunk_size: int, match: Any) -> None:
    match(scan(chunk_size=chunk_size), oracle(), inputs(19, batch=1), 1e-11)


def test_expanded_sub_heads_get_summed_gradients(match: Any) -> None:
    """Grouped-query callers pass an expanded view of x and B; autograd sums over the copies."""
    values = inputs(12)
    values["x"], values["B"] = values["x"][:, :, :1], values["B"][:, :, :1]

    def grouped(function: Any) -> Any:
        def run(x: Tensor, B: Tensor, **rest: Tensor) -> Any:
            return function(x=x.expand(-1, -1, 3, -1), B=B.expand(-1, -1, 3, -1), **rest)

        return run

    match(grouped(scan(chunk_size=5)), grouped(oracle()), values, 1e-11)


def test_without_skip_and_without_initial_state(match: Any) -> None:
    values = inputs(20)
    given = {name: values[name] for name in ("x", "dt", "A", "B", "C")}
    match(scan(chunk_size=8), zeros_for_absent(oracle(), values), given, 1e-11)


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


@pytest.mark.parametrize("split", [1, 7, 8, 9, 19])
def test_split_with_state_carried_is_the_whole(split: int, match: Any) -> None:
    def halves(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, S: Tensor) -> Any:
        ys = []
        for part in (slice(0, split), slice(split, None)):
            y, S = scan(chunk_size=8)(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, S)
            ys.append(y)
        return torch.cat(ys, 1), S

    match(halves, oracle(), inputs(20), 1e-11)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_steps_are_the_scan(dtype: torch.dtype, match: Any) -> None:
    def steps(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, S: Tensor) -> Any:
        ys = []
        for t in range(x.shape[1]):
            y, S = selective_scan_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, S)
            ys.append(y)
        return torch.stack(ys, 1), S

    match(steps, oracle(), inputs(11, dtype=dtype), TOLERANCE[dtype])


def test_step_leaves_its_state_alone_and_keeps_its_dtype() -> None:
    v = inputs(1, dtype=torch.bfloat16)
    before = v["S"].clone()
    y, state = selective_scan_step(v["x"][:, 0], v["dt"][:, 0], v["A"], v["B"][:, 0], v["C"][:, 0], None, v["S"])
    assert torch.equal(v["S"], before) and not torch.equal(state, before)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32


@pytest.mark.parametrize("rate", [0.0, -1e-12, -50.0, -1e4, -1e30])
@pytest.mark.parametrize("packed", [False, True])
def test_extreme_decays(rate: float, packed: bool, match: Any) -> None:
    seq_idx_BT = torch.arange(40).div(13, rounding_mode="floor").expand(2, -1) if packed else None
    values = inputs(40, dtype=torch.float32)
    values["A"][:, 0] = rate
    given = {name: v.clone().requires_grad_() for name, v in values.items()}
    y, state = scan(seq_idx_BT)(**given)
    (y.sum() + state.sum()).backward()
    assert y.isfinite().all() and state.isfinite().all()
    assert all(v.grad is not None and v.grad.isfinite().all() for v in given.values())
    if rate > -1e30:
        match(scan(seq_idx_BT), oracle(seq_idx_BT), values, 1e-5)


def test_autocast_changes_nothing() -> None:
    values = inputs(40, dtype=torch.float32)
    y, state = scan()(**values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_cast, state_cast = scan()(**values)
    assert torch.equal(y, y_cast) and torch.equal(state, state_cast)


def test_dtypes() -> None:
    y, state = scan()(**inputs(5, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert y.is_contiguous()


def test_the_states_of_all_tokens_are_never_kept() -> None:
    """What is saved for the backward pass grows with T / chunk_size states, not with T."""
    values = {name: v.requires_grad_() for name, v in inputs(256, dtype=torch.float32).items()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scan(chunk_size=32)(**values)
    every_state = 2 * 256 * 3 * 4 * 5
    given = sum(v.numel() for v in values.values())
    assert sum(saved.values()) < 3 * given + every_state // 8
