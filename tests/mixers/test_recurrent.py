"""The Mamba mixers: one computation, whether at once, in parts, in batches, padded or packed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambify.mixers import Mixer, MixerContext, RecurrentState

T = 11
NewMixer = Callable[..., Mixer]
Loop = Callable[[Mixer, Tensor], Tensor]

pytestmark = [
    pytest.mark.parametrize("heads", ["gqa", "mqa", "mha"]),
    pytest.mark.parametrize("name", ["mamba2", "mamba1"]),
]


@pytest.fixture
def mixer(name: str, heads: str, new_mixer: NewMixer) -> Mixer:
    return new_mixer(name, heads)


def inputs(batch: int = 2, length: int = T) -> Tensor:
    return torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(3))


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert actual.shape == expected.shape
    scale = expected.abs().max().clamp(min=1.0)
    assert (actual.double() - expected.double()).abs().max() <= tolerance * scale


def run(
    mixer: Mixer, x: Tensor, state: RecurrentState | None = None, **context: Tensor
) -> tuple[Tensor, RecurrentState]:
    y, state = mixer(x, MixerContext(**context), state)
    assert isinstance(state, RecurrentState)
    return y, state


def test_values_and_gradients_against_a_loop(mixer: Mixer, loop: Loop) -> None:
    x = inputs().requires_grad_()
    y, _ = run(mixer, x)
    expected = torch.stack([loop(mixer, row) for row in x])
    close(y, expected)
    cotangent = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    names, parameters = zip(("input", x), *mixer.named_parameters(), strict=True)
    actual = torch.autograd.grad(y, parameters, cotangent.float())
    wanted = torch.autograd.grad(expected, parameters, cotangent)
    for parameter_name, gradient, reference in zip(names, actual, wanted, strict=True):
        assert gradient.isfinite().all()
        assert reference.abs().max() > 0, f"no gradient reaches {parameter_name}"
        close(gradient / reference.abs().max(), reference / reference.abs().max(), 1e-4)


@torch.no_grad()
def test_prefill_equals_steps_at_every_split(mixer: Mixer) -> None:
    x = inputs()
    expected, last = run(mixer, x)
    for split in range(1, T):
        first, state = run(mixer, x[:, :split])
        at_once, after = run(mixer, x[:, split:], state)
        close(torch.cat([first, at_once], 1), expected)
        parts = [first]
        for t in range(split, T):
            y, state = run(mixer, x[:, t : t + 1], state)
            parts.append(y)
        close(torch.cat(parts, 1), expected)
        for end in (after, state):
            close(end.conv, last.conv)
            close(end.ssm, last.ssm)


@torch.no_grad()
def test_steps_from_the_first_token(mixer: Mixer) -> None:
    x, state, parts = inputs(), None, []
    for t in range(T):
        y, state = run(mixer, x[:, t : t + 1], state)
        parts.append(y)
    close(torch.cat(parts, 1), run(mixer, x)[0])


@torch.no_grad()
def test_states_are_values(mixer: Mixer) -> None:
    """Going on from a state twice gives the same twice: a call does not write into the state it was given."""
    x = inputs()
    _, state = run(mixer, x[:, :5])
    kept = RecurrentState(state.conv.clone(), state.ssm.clone())
    once, _ = run(mixer, x[:, 5:6], state)
    run(mixer, x[:, 5:], state)
    again, _ = run(mixer, x[:, 5:6], state)
    assert torch.equal(once, again)
    assert torch.equal(state.conv, kept.conv) and torch.equal(state.ssm, kept.ssm)
    assert state.ssm.dtype == torch.float32


@torch.no_grad()
def test_rows_are_independent(mixer: Mixer) -> None:
    x = inputs(3)
    whole, _ = run(mixer, x)
    for row in range(3):
        close(whole[row : row + 1], run(mixer, x[row : row + 1])[0])


@torch.no_grad()
@pytest.mark.parametrize("padding", [1, 2, 3, 4, 7])
def test_left_padding(mixer: Mixer, padding: int) -> None:
    """A row padded on the left equals the same row alone, in its outputs and in the state it leaves."""
    x = inputs(2)
    padded = torch.cat([torch.full((2, padding, 24), 9.0), x], 1)
    padded[1] = torch.cat([x[1], torch.zeros(padding, 24)])  # the other row has its padding nowhere: one longer text
    mask = torch.ones(2, T + padding, dtype=torch.long)
    mask[0, :padding] = 0
    y, state = run(mixer, padded, padding_mask_BT=mask)
    expected, alone = run(mixer, x[:1])
    close(y[:1, padding:], expected)
    close(state.conv[:1], alone.conv)
    close(state.ssm[:1], alone.ssm)
    close(y[1:], run(mixer, padded[1:])[0])


@torch.no_grad()
def test_right_padding_leaves_the_state_alone(mixer: Mixer) -> None:
    x = inputs(1)
    padded = torch.cat([x, torch.full((1, 5, 24), 9.0)], 1)
    mask = (torch.arange(T + 5) < T).long()[None]
    y, state = run(mixer, padded, padding_mask_BT=mask)
    expected, alone = run(mixer, x)
    close(y[:, :T], expected)
    close(state.ssm, alone.ssm)


@torch.no_grad()
def test_padding_inside_a_continued_row(mixer: Mixer) -> None:
    """Chunked prefill of a padded batch: the padding may lie in any chunk."""
    x, padding = inputs(1), 6
    padded = torch.cat([torch.full((1, padding, 24), 9.0), x], 1)
    mask = (torch.arange(T + padding) >= padding).long()[None]
    expected, _ = run(mixer, x)
    for split in (2, 6, 8):
        _, state = run(mixer, padded[:, :split], padding_mask_BT=mask[:, :split])
        y, _ = run(mixer, padded[:, split:], state, padding_mask_BT=mask[:, split:])
        close(y[:, -T + max(0, split - padding) :], expected[:, max(0, split - padding) :])


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_packed_documents(name: str, heads: str, new_mixer: NewMixer, lengths: list[int]) -> None:
    """Documents in one row, told apart by ``seq_idx``, equal the documents alone; so does the state at the end."""
    mixer, documents = new_mixer(name, heads), inputs(1, sum(lengths))[0].split(lengths)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    with torch.no_grad():
        y, state = run(mixer, torch.cat(documents)[None], seq_idx_BT=seq_idx)
        alone = [run(mixer, document[None]) for document in documents]
    close(y, torch.cat([output for output, _ in alone], 1))
    close(state.conv, alone[-1][1].conv)
    close(state.ssm, alone[-1][1].ssm)


@torch.no_grad()
def test_half_precision_keeps_float32_parameters(mixer: Mixer) -> None:
    before = {parameter: getattr(mixer, parameter).clone() for parameter in mixer.float32_parameters}
    assert "A_log" in before and "D" in before
    x = inputs()
    expected = run(mixer, x)[0]
    for cast in (torch.nn.Module.bfloat16, torch.nn.Module.half, lambda m: m.to(torch.bfloat16)):
        cast(mixer)
        assert mixer.in_proj.weight.dtype in (torch.bfloat16, torch.float16)
        for parameter, value in before.items():
            assert torch.equal(getattr(mixer, parameter), value)
            assert getattr(mixer, parameter).dtype == torch.float32
    y, state = run(mixer, x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert state.conv.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    assert (y.float() - expected).norm() < 0.03 * expected.norm()
    step, stepped = run(mixer, x[:, :1].bfloat16(), state)
    assert step.dtype == torch.bfloat16
    assert stepped.conv.dtype == torch.bfloat16
