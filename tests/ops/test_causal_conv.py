"""The causal convolution against a loop over tokens and taps in float64.

Letters: B batch, T tokens, C channels, K width, L = K − 1.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambify.errors import InvalidOptionError
from mambify.ops.causal_conv import causal_conv, causal_conv_step

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}


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


def conv(seq_idx_BT: Tensor | None = None, activation: Any = "silu") -> Any:
    def run(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Any:
        return causal_conv(x, weight, bias, activation=activation, initial_state_BCL=state, seq_idx_BT=seq_idx_BT)

    return run


def inputs(tokens: int, width: int = 4, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    batch, channels = 2, 5
    return {
        "x": torch.randn(batch, tokens, channels).to(dtype),
        "weight": torch.randn(channels, width).to(dtype),
        "bias": torch.randn(channels).to(dtype),
        "state": torch.randn(batch, channels, width - 1).to(dtype),
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 65])
@pytest.mark.parametrize("activation", ["silu", None])
def test_values_and_gradients(tokens: int, dtype: torch.dtype, activation: Any, match: Any) -> None:
    match(conv(activation=activation), oracle(silu=bool(activation)), inputs(tokens, 4, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("width", [2, 3, 7])
def test_widths(width: int, match: Any) -> None:
    match(conv(), oracle(), inputs(9, width), 1e-11)


def test_width_one_carries_nothing() -> None:
    values = inputs(6, 1)
    y, state = causal_conv(values["x"], values["weight"], values["bias"])
    torch.testing.assert_close(y, torch.nn.functional.silu(values["x"] * values["weight"][:, 0] + values["bias"]))
    assert state.shape == (2, 5, 0)


@pytest.mark.parametrize(
    "seq_idx",
    [
        [[0, 0, 0, 1, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0, 1, 1]],
        [[0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 3, 3, 3, 3, 3, 3, 3, 3]],
        [[0, 0, 1, 0, 0, 1, 1, 0, 0], [5, 5, 5, 5, 5, 5, 9, 9, 5]],
    ],
    ids=["packed", "every", "returning"],
)
def test_documents(seq_idx: list[list[int]], match: Any) -> None:
    ids = torch.tensor(seq_idx)
    match(conv(ids), oracle(ids), inputs(9), 1e-11)


@pytest.mark.parametrize("split", [1, 2, 3, 6, 11])
def test_split_with_state_carried_is_the_whole(split: int, match: Any) -> None:
    def halves(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Any:
        first, state = conv()(x[:, :split], weight, bias, state)
        second, state = conv()(x[:, split:], weight, bias, state)
        return torch.cat([first, second], 1), state

    match(halves, oracle(), inputs(12), 1e-11)


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


def test_without_bias_and_without_state() -> None:
    values = inputs(8)
    zero = {"bias": torch.zeros(5, dtype=torch.float64), "state": torch.zeros(2, 5, 3, dtype=torch.float64)}
    wanted = oracle()(values["x"], values["weight"], **zero)
    y, state = causal_conv(values["x"], values["weight"])
    torch.testing.assert_close(y, wanted[0])
    torch.testing.assert_close(state, wanted[1])


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
