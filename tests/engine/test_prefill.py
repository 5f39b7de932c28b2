"""Prompts read in pieces leave in the slots what a reading in one piece leaves there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mambify.engine import Sampling, Speculator, prefill
from mambify.engine.prefill import read_prompts
from mambify.engine.tower import Tower
from mambify.families.load import LoadedModel
from mambify.mixers import RecurrentState, ReplayState
from mambify.mixers.attention import SlotKV, prefix_attention
from mambify.model import HybridForCausalLM
from speculating import feature_draft

Hybrid = Callable[..., HybridForCausalLM]
LAYERS = ["mamba2", "attention", "mamba1", "attention"]


def tower_of(model: HybridForCausalLM, slots: int, length: int, most_new: int = 3) -> Tower:
    active_S = torch.zeros(slots, dtype=torch.bool)
    return Tower(model, num_slots=slots, length=length, most_new=most_new, active_S=active_S)


@torch.inference_mode()
def contents(
    tower: Tower, slots: Sequence[int], prompts: Sequence[Sequence[int]], **settings: Any
) -> list[list[Tensor]]:
    """What each slot holds after reading: keys and values of the prompt's places, states, windows."""
    tower.begin(slots, [[] for _ in slots])
    read_prompts(tower.model, tower.states, slots, prompts, **settings)
    found: list[list[Tensor]] = []
    for slot, prompt in zip(slots, prompts, strict=True):
        held: list[Tensor] = []
        for state in tower.states:
            if isinstance(state, SlotKV):
                held += [part[slot, :, : len(prompt)] for part in (state.keys_SGLP, state.values_SGLP)]
            else:
                assert isinstance(state, ReplayState | RecurrentState)
                held += [state.conv[slot], state.ssm[slot]]
        found.append([part.clone() for part in held])
    return found


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 6}], ids=["full", "sliding"])
@pytest.mark.parametrize("most_new", [1, 3])
@pytest.mark.parametrize("piece", [1, 3, 7, 16])
def test_pieces_and_company_change_nothing(
    tiny_hybrid: Hybrid, changes: dict[str, Any], most_new: int, piece: int
) -> None:
    model = tiny_hybrid(LAYERS, **changes)
    prompts = prompts_of([29, 0, 12, 29, 1, 13])
    slots = [4, 0, 6, 3, 1, 5]
    together = contents(tower_of(model, 7, 40, most_new), slots, prompts, piece=piece)
    for slot, prompt, found in zip(slots, prompts, together, strict=True):
        (alone,) = contents(tower_of(model, 7, 40, most_new), [slot], [prompt], piece=2048)
        for part, wanted in zip(found, alone, strict=True):
            assert torch.allclose(part, wanted, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 6}], ids=["full", "sliding"])
def test_tokens_after_a_prompt_in_pieces(
    tiny_hybrid: Hybrid, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_hybrid(LAYERS, **changes)
    monkeypatch.setattr("mambify.engine.tower.read_prompts", partial(read_prompts, piece=5))
    prompts = prompts_of([33, 8, 20, 20])
    for draft in (None, "lookup"):
        decoder = Speculator(model, draft, num_slots=3, max_length=64, sampling=Sampling(0.0))
        answers: list[list[int]] = [[] for _ in prompts]
        for number, tokens in decoder.run(prompts, max_new_tokens=12):
            answers[number] += tokens
        for prompt, answer in zip(prompts, answers, strict=True):
            theirs = model.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            assert answer == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("window", [None, 1, 5, 9, 40])
@pytest.mark.parametrize("start", [0, 1, 8, 30])
def test_attention_behind_a_prefix(window: int | None, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    T, n = 10, start + 10
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, size, 8, generator=generator) for heads, size in ((4, T), (2, n), (2, n)))
    age_Tn = (torch.arange(T)[:, None] + start) - torch.arange(n)
    sees_Tn = (age_Tn >= 0) & (age_Tn < (window or n + 1))
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3).masked_fill(~sees_Tn, -torch.inf)
    wanted = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    for most in (2**24, 3 * n):  # in one go, and a few queries at a time
        monkeypatch.setattr("mambify.mixers.attention._SCORES", most)
        found = prefix_attention(q, k, v, scaling=0.3, window=window)
        assert torch.allclose(found, wanted, atol=1e-6)


def test_prompts_that_fit_are_read_together(tiny_hybrid: Hybrid, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_hybrid(LAYERS)
    shapes: list[tuple[int, ...]] = []
    read = prefill._read
    monkeypatch.setattr(prefill, "_read", lambda *given: (shapes.append(tuple(given[5].shape)), read(*given))[1])
    contents(tower_of(model, 4, 40), [0, 1, 2, 3], prompts_of([9, 9, 4, 9]), piece=100)
    assert shapes == [(4, 4), (3, 5)]
    shapes.clear()
    contents(tower_of(model, 4, 40), [0, 1, 2, 3], prompts_of([9, 9, 4, 30]), piece=20)
    assert shapes == [(1, 20), (1, 10), (2, 9), (1, 4)]


def test_the_real_teacher(smollm2: LoadedModel) -> None:
    model = smollm2.model
    prompt = torch.randint(5, 40_000, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    (whole,) = contents(tower_of(model, 1, 64), [0], [prompt])
    (pieces,) = contents(tower_of(model, 1, 64), [0], [prompt], piece=17)
    for found, wanted in zip(pieces, whole, strict=True):
        assert torch.allclose(found, wanted, atol=2e-3, rtol=1e-3)
    cache = model.model(input_ids=torch.tensor([prompt]), use_cache=True).past_key_values
    for layer in range(model.config.num_hidden_layers):
        assert torch.allclose(whole[2 * layer], cache.layers[layer].keys[0], atol=2e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_behind_a_prefix_on_a_gpu(dtype: torch.dtype) -> None:
    """The kernel that needs no mask written out, against the one that does."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 100), (2, 700), (2, 700))
    q, k, v = (torch.randn(2, heads, size, 64, generator=generator).cuda().to(dtype) for heads, size in shapes)
    found = prefix_attention(q, k, v, scaling=0.125, window=None)
    wanted = prefix_attention(*(x.float().cpu() for x in (q, k, v)), scaling=0.125, window=None)
    assert torch.allclose(found.float().cpu(), wanted, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("draft", [None, "lookup", "small", "reader"])
def test_recorded_rounds_on_a_gpu_give_the_same(tiny_hybrid: Hybrid, draft: Any) -> None:
    """Prompts read in pieces and a penalty, inside CUDA graphs: the tokens of a CPU."""
    prompts = prompts_of([33, 8, 20, 20, 1])
    sampling = Sampling(0.0, repetition_penalty=1.3)
    answers: list[list[list[int]]] = []
    for device in ("cpu", "cuda"):
        model = tiny_hybrid(LAYERS).to(device)
        small = tiny_hybrid(["attention", "mamba2"], seed=1).to(device)
        chosen = {"small": small, "reader": feature_draft(small)}.get(draft, draft)
        decoder = Speculator(model, chosen, num_slots=3, max_length=64, sampling=sampling)
        found: list[list[int]] = [[] for _ in prompts]
        for number, tokens in decoder.run(prompts, max_new_tokens=20):
            found[number] += tokens
        answers.append(found)
    assert answers[0] == answers[1]
