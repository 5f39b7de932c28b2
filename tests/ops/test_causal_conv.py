"""The causal convolution against a loop over tokens and taps in float64.

Letters: B batch, T tokens, C channels, K width, L = K − 1.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambify.errors import InvalidOptionError
from mambify.ops.backends import HAS_TRITON
from mambify.ops.causal_conv import causal_conv, causal_conv_step

if HAS_TRITON:
    from mambify.ops.causal_conv import triton as kernels

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = [
    pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"),
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),  # the mode that gives NaN in allocations
]


def run_of(backend: str, dtype: torch.dtype) -> Any:
    return pytest.param(backend, dtype, marks=TRITON if backend == "triton" else [], id=f"{backend}-{dtype}")


EXACT = [run_of("reference", torch.float64), run_of("triton", torch.float32)]
EVERY = [*EXACT, run_of("reference", torch.float32), run_of("reference", torch.bfloat16)]


def oracle(seq_idx_BT: Tensor | None = None, silu: bool = True) -> Any:
    def run(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Any:
        tokens, width = x.shape[1], weight.shape[1]
        # Every input beside the row of flags "of the same document as token t".
        history = [state[..., i] for i in range(width - 1)] + [x[:, t] for t in range(tokens)]
        documents = [0] * len(x)
        owners = [list(documents) for _ in range(width - 1)]
        for t in range(tokens):
            if seq_idx_BT is not None and t:
                changed = (seq_idx_BT[:, t] != seq_idx_BT[:, t - 1]).tolist()
                documents = [d + c for d, c in zip(documents, changed, strict=True)]
            owners.append(list(documents))

        def seen(place: int, token: int) -> Tensor:
            same = [a == b for a, b in zip(owners[place], owners[token + width - 1], strict=True)]
            return history[place] * torch.tensor(same)[:, None]

        ys = []
        for t in range(tokens):
            y = bias + sum(weight[:, k] * seen(t + k, t) for k in range(width))
            ys.append(y * torch.sigmoid(y) if silu else y)
        final = [seen(tokens + i, tokens - 1) for i in range(width - 1)]
        return torch.stack(ys, 1), torch.stack(final, -1) if final else state

    return run


def conv(seq_idx_BT: Tensor | None = None, activation: Any = "silu", backend: str = "reference") -> Any:
    """The operation on the device of its backend; inputs and results are on the CPU."""
    device = DEVICE if backend == "triton" else "cpu"

    def run(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Any:
        y, final = causal_conv(
            x.to(device),
            weight.to(device),
            bias.to(device),
            activation=activation,
            initial_state_BCL=state.to(device),
            seq_idx_BT=None if seq_idx_BT is None else seq_idx_BT.to(device),
            backend=backend,
        )
        return y.cpu(), final.cpu()

    return run


def inputs(tokens: int, width: int = 4, dtype: torch.dtype = torch.float64, *, channels: int = 5) -> dict[str, Tensor]:
    batch = 2
    return {
        "x": torch.randn(batch, tokens, channels).to(dtype),
        "weight": torch.randn(channels, width).to(dtype),
        "bias": torch.randn(channels).to(dtype),
        "state": torch.randn(batch, channels, width - 1).to(dtype),
    }


@pytest.mark.parametrize(("backend", "dtype"), EVERY)
@pytest.mark.parametrize("tokens", [1, 2, 4, 17, 63])
def test_values_and_gradients(tokens: int, backend: str, dtype: torch.dtype, match: Any) -> None:
    match(conv(backend=backend), oracle(), inputs(tokens, 4, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
@pytest.mark.parametrize("tokens", [5, 130])
def test_without_activation(tokens: int, backend: str, dtype: torch.dtype, match: Any) -> None:
    match(conv(activation=None, backend=backend), oracle(silu=False), inputs(tokens, 4, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
@pytest.mark.parametrize("width", [2, 3, 8])
def test_widths(width: int, backend: str, dtype: torch.dtype, match: Any) -> None:
    match(conv(backend=backend), oracle(), inputs(12, width, dtype), TOLERANCE[dtype])


def test_width_one_carries_nothing() -> None:
    values = inputs(6, 1)
    y, state = causal_conv(values["x"], values["weight"], values["bias"])
    torch.testing.assert_close(y, torch.nn.functional.silu(values["x"] * values["weight"][:, 0] + values["bias"]))
    assert state.shape == (2, 5, 0)


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
@pytest.mark.parametrize(
    "seq_idx",
    [
        [[0, 0, 0, 1, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0, 1, 1]],
        [[0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 3, 3, 3, 3, 3, 3, 3, 3]],
        [[0, 0, 1, 0, 0, 1, 1, 0, 0], [5, 5, 5, 5, 5, 5, 9, 9, 5]],
    ],
    ids=["packed", "every", "returning"],
)
def test_documents(seq_idx: list[list[int]], backend: str, dtype: torch.dtype, match: Any) -> None:
    ids = torch.tensor(seq_idx)
    match(conv(ids, backend=backend), oracle(ids), inputs(9, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
@pytest.mark.parametrize("stretch", [16, 64])
def test_documents_across_stretches(stretch: int, match: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernels, that go over 16 to 128 tokens at a time: documents begin at, before and after such places."""
    monkeypatch.setattr(kernels, "_tiles", lambda *_, backward: kernels._Tiles(4, max(stretch, 32 * backward), 64))
    ids = torch.zeros(2, 70, dtype=torch.int32)
    for row, places in enumerate(((15, 16, 31, 33, 64), (2, 30, 32, 47, 49, 67, 68))):
        for place in places:
            ids[row, place:] += 1
    match(conv(ids, backend="triton"), oracle(ids), inputs(70, dtype=torch.float32), 1e-5)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
@pytest.mark.parametrize("packed", [False, True])
def test_whole_programs(packed: bool, match: Any) -> None:
    """Where every program has all of its tokens and channels the kernels work without masks."""
    tokens, channels = 256, 128
    for backward in (False, True):
        tiles = kernels._tiles(2, tokens, channels, backward=backward)
        assert tiles.whole(tokens, channels) and not tiles.whole(tokens, channels + 1)
        assert not tiles.whole(tokens + 1, channels)
    ids = (torch.arange(tokens).expand(2, -1) // 50).int() if packed else None
    match(conv(ids, backend="triton"), oracle(ids), inputs(tokens, dtype=torch.float32, channels=channels), 1e-5)


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
@pytest.mark.parametrize("split", [1, 11])
def test_split_with_state_carried_is_the_whole(split: int, backend: str, dtype: torch.dtype, match: Any) -> None:
    def halves(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Any:
        first, state = conv(backend=backend)(x[:, :split], weight, bias, state)
        second, state = conv(backend=backend)(x[:, split:], weight, bias, state)
        return torch.cat([first, second], 1), state

    match(halves, oracle(), inputs(12, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
@pytest.mark.parametrize(("order", "channels"), [("view of a projection", 67), ("channels before tokens", 5)])
def test_any_strides(order: str, channels: int, backend: str, dtype: torch.dtype, match: Any) -> None:
    batch, tokens = 2, 9
    values = {
        "x": torch.randn(batch, tokens, channels + 6, dtype=dtype),
        "weight": torch.randn(channels, 8, dtype=dtype),
        "bias": torch.randn(channels, dtype=dtype),
        "state": torch.randn(batch, 3, channels, dtype=dtype),
    }
    seq_idx_BT = torch.arange(tokens).div(4, rounding_mode="floor").expand(batch, -1)

    def strided(function: Any) -> Any:
        def run(x: Tensor, weight: Tensor, state: Tensor, bias: Tensor) -> Any:
            x = x[..., 2 : 2 + channels] if order == "view of a projection" else x[..., :channels].mT.contiguous().mT
            return function(x=x, weight=weight[:, ::2], bias=bias, state=state.mT)

        return run

    match(strided(conv(seq_idx_BT, backend=backend)), strided(oracle(seq_idx_BT)), values, TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_gradient_of_y_alone(backend: str, dtype: torch.dtype, match: Any) -> None:
    def y_alone(function: Any) -> Any:
        return lambda **values: function(**values)[:1]

    match(y_alone(conv(backend=backend)), y_alone(oracle()), inputs(7, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_gradient_of_the_state_alone(backend: str, dtype: torch.dtype, match: Any) -> None:
    """Two tokens: the last L = 3 inputs are they and one of the state before, unless a document begins between."""
    seq_idx_BT = torch.tensor([[0, 0], [0, 1]])
    values = inputs(2, dtype=dtype)
    weights = {name: values.pop(name) for name in ("weight", "bias")}

    def state_alone(function: Any) -> Any:
        def run(x: Tensor, state: Tensor) -> Any:
            return (function(x=x, state=state, **{k: v.to(x.dtype) for k, v in weights.items()})[1],)

        return run

    match(state_alone(conv(seq_idx_BT, backend=backend)), state_alone(oracle(seq_idx_BT)), values, TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_frozen_weights(backend: str, dtype: torch.dtype, match: Any) -> None:
    values = inputs(7, dtype=dtype)
    frozen = {name: values.pop(name) for name in ("weight", "bias")}

    def without(function: Any) -> Any:
        def run(x: Tensor, state: Tensor) -> Any:
            return function(x=x, state=state, **{k: v.to(x.dtype) for k, v in frozen.items()})

        return run

    match(without(conv(backend=backend)), without(oracle()), values, TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ["silu", None])
def test_steps_are_the_whole(activation: Any, match: Any) -> None:
    def steps(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Any:
        ys = []
        for t in range(x.shape[1]):
            y, state = causal_conv_step(x[:, t], weight, bias, state, activation)
            ys.append(y)
        return torch.stack(ys, 1), state

    match(steps, oracle(silu=bool(activation)), inputs(7), 1e-11)


def test_taps_are_ordered_as_in_conv1d() -> None:
    layer = nn.Conv1d(5, 5, 4, groups=5, padding=3, dtype=torch.float64)
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    wanted = layer(x.mT)[..., :9].mT
    y, _ = causal_conv(x, layer.weight[:, 0], layer.bias, activation=None)
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_without_bias_and_without_state(backend: str, dtype: torch.dtype) -> None:
    values = inputs(8, dtype=dtype)
    zero = {"bias": torch.zeros(5, dtype=dtype), "state": torch.zeros(2, 5, 3, dtype=dtype)}
    wanted = oracle()(values["x"], values["weight"], **zero)
    device = DEVICE if backend == "triton" else "cpu"
    y, state = causal_conv(values["x"].to(device), values["weight"].to(device), backend=backend)
    torch.testing.assert_close(y.cpu(), wanted[0])
    torch.testing.assert_close(state.cpu(), wanted[1])


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=TRITON)])
def test_each_dtype_is_kept(backend: str, match: Any) -> None:
    """Wider weights and a wider state beside bfloat16 inputs: as in training with float32 parameters."""
    values = inputs(7, dtype=torch.bfloat16)
    for name in ("weight", "bias", "state"):
        values[name] = values[name].float()
    match(conv(backend=backend), oracle(), values, 1e-2)  # gradients come in the dtype of their input


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_kernels_refuse_what_they_do_not_take() -> None:
    values = {name: v.to(DEVICE) for name, v in inputs(4, width=9).items()}
    for x, weight in (values["x"], values["weight"][:, :4]), (values["x"].float(), values["weight"].float()):
        with pytest.raises(InvalidOptionError, match="no backend 'triton' here"):
            causal_conv(x, weight, backend="triton")


def test_step_leaves_its_state_alone_and_keeps_its_dtype() -> None:
    values = inputs(1, dtype=torch.bfloat16)
    state = values["state"].float()
    before = state.clone()
    y, new = causal_conv_step(values["x"][:, 0], values["weight"], values["bias"], state)
    assert torch.equal(state, before)
    assert y.dtype == torch.bfloat16 and new.dtype == torch.float32
    assert torch.equal(new, torch.cat([before[..., 1:], values["x"].mT.float()], -1))


def test_output_follows_x_where_weights_are_wider() -> None:
    values = inputs(6, dtype=torch.float32)
    y, state = causal_conv(values["x"].bfloat16(), values["weight"], values["bias"], initial_state_BCL=values["state"])
    assert y.dtype == state.dtype == torch.bfloat16


def test_unknown_activation() -> None:
    values = inputs(3)
    with pytest.raises(InvalidOptionError, match="no activation 'relu'; known: 'silu', None"):
        causal_conv(values["x"], values["weight"], activation="relu")  # type: ignore[arg-type]
