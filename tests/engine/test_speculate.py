"""Speculation: the target's own tokens, whoever drafts; tests/laws has their distribution and damaged states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mambify.conversion.cut import cut
from mambify.engine import Sampling, Speculator
from mambify.engine.lookup import look_up
from mambify.errors import InvalidOptionError
from mambify.families.load import load
from mambify.model import HybridForCausalLM
from speculating import (
    GREEDY,
    PROMPTS,
    TARGETS,
    VOCABULARY,
    answers,
    converted,
    feature_draft,
    greedy,
    model,
    target_and_tokens,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> HybridForCausalLM:
    return model(tmp_path_factory.mktemp("small"), seed=1, num_hidden_layers=2)


@pytest.mark.parametrize(("mixer", "attention"), TARGETS)
@pytest.mark.parametrize("kind", ["none", "lookup", "small", "hybrid", "reader", "target"])
def test_greedy_tokens_are_the_targets(
    teacher: HybridForCausalLM, small: HybridForCausalLM, mixer: str, attention: float, kind: str
) -> None:
    """More prompts than slots, of unlike length, with any mix of layers on either side."""
    target, wanted = target_and_tokens(teacher, mixer, attention, new=25)
    drafts: dict[str, Any] = {
        "none": None, "lookup": "lookup", "small": small, "hybrid": converted(small, mixer, 0.5), "target": target,
        "reader": feature_draft(target),
    }  # fmt: skip
    speculator = Speculator(target, drafts[kind], num_slots=4, max_length=64, sampling=GREEDY, num_draft_tokens=3)
    assert answers(speculator, PROMPTS, max_new_tokens=25) == wanted
    statistics = speculator.statistics
    assert statistics.tokens == 25 * len(PROMPTS)
    if kind == "target":  # everything it puts forward stands: 4 tokens a round, and one round for the last
        alone = sum(len(prompt) == 1 for prompt in PROMPTS)  # after one token nothing is put forward
        assert statistics.accepted == [alone, 0, 0, 7 * len(PROMPTS) - alone]
        assert statistics.acceptance_by_position[1:] == [1.0, 1.0]
    if kind == "none":
        assert statistics.tokens_per_round == 1.0


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 7, 16])
def test_any_number_of_drafted_tokens(teacher: HybridForCausalLM, num_draft_tokens: int) -> None:
    target = converted(teacher, "mamba2", 0.5)
    speculator = Speculator(
        target, target, num_slots=2, max_length=96, sampling=GREEDY, num_draft_tokens=num_draft_tokens
    )
    found = answers(speculator, PROMPTS[:3], max_new_tokens=40)
    assert found == [greedy(target, prompt, 40) for prompt in PROMPTS[:3]]


def test_a_sliding_window(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    target = converted(load(tmp_path).model, "mamba2", 0.5)
    speculator = Speculator(target, "lookup", num_slots=2, max_length=80, sampling=GREEDY)
    assert answers(speculator, PROMPTS[-2:], max_new_tokens=30) == [greedy(target, p, 30) for p in PROMPTS[-2:]]


@pytest.mark.parametrize("kind", ["target", "small", "lookup", "reader"])
def test_a_stop_within_the_accepted_run_ends_the_sequence(
    teacher: HybridForCausalLM, small: HybridForCausalLM, kind: str
) -> None:
    target = converted(teacher, "mamba2", 0.5)
    drafts: dict[str, Any] = {
        "target": target,
        "small": small,
        "lookup": "lookup",
        "reader": cut(target, 4, features=True),
    }
    whole = [greedy(target, prompt, 30) for prompt in PROMPTS]
    for stop in sorted({answer[place] for answer in whole for place in (1, 4, 9)})[:6]:
        speculator = Speculator(target, drafts[kind], num_slots=3, max_length=64, sampling=GREEDY, stop_ids=[stop])
        wanted = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in whole]
        assert answers(speculator, PROMPTS, max_new_tokens=30) == wanted


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_company(teacher: HybridForCausalLM) -> None:
    target, sampling = converted(teacher, "mamba2", 0.5), Sampling(temperature=1.0, top_k=40)
    runs = []
    for slots in (1, 3):
        speculator = Speculator(target, "lookup", num_slots=slots, max_length=64, sampling=sampling)
        runs.append(answers(speculator, PROMPTS, max_new_tokens=20, seeds=[11, 12, 13, 14, 15, 16]))
    assert runs[0] == runs[1]
    again = Speculator(target, "lookup", num_slots=3, max_length=64, sampling=sampling)
    assert answers(again, PROMPTS, max_new_tokens=20, seeds=[21, 22, 23, 24, 25, 26]) != runs[0]


def test_a_run_that_was_left_does_not_disturb_the_next(teacher: HybridForCausalLM) -> None:
    target = converted(teacher, "mamba2", 0.5)
    speculator = Speculator(target, "lookup", num_slots=2, max_length=64, sampling=GREEDY)
    next(iter(speculator.run(PROMPTS, max_new_tokens=30)))
    assert answers(speculator, PROMPTS[:1], max_new_tokens=20) == [greedy(target, PROMPTS[0], 20)]


def test_a_run_is_over_when_the_next_is_asked_for(teacher: HybridForCausalLM) -> None:
    """Both would read and write the same slots."""
    target = converted(teacher, "mamba2", 0.5)
    speculator = Speculator(target, "lookup", num_slots=1, max_length=64, sampling=GREEDY)
    first = speculator.run(PROMPTS[:1], max_new_tokens=30)
    next(first)
    second = speculator.run(PROMPTS[1:2], max_new_tokens=30)
    with pytest.raises(InvalidOptionError, match="another run has begun"):
        next(first)
    assert [token for _, piece in second for token in piece] == greedy(target, PROMPTS[1], 30)
    unheard = speculator.run(PROMPTS[:1], max_new_tokens=30)
    speculator.pretend(20)
    with pytest.raises(InvalidOptionError, match="another run has begun"):
        next(unheard)


def test_a_run_whose_tokens_have_all_come_ends_as_ever(teacher: HybridForCausalLM) -> None:
    speculator = Speculator(teacher, None, num_slots=1, max_length=64, sampling=GREEDY)
    first = speculator.run(PROMPTS[:1], max_new_tokens=1)
    next(first)
    found = answers(speculator, PROMPTS[1:2], max_new_tokens=5)
    counted = speculator.statistics.tokens
    assert list(first) == []
    assert found == [greedy(teacher, PROMPTS[1], 5)] and speculator.statistics.tokens == counted == 5


def test_statistics_are_known_when_nobody_listens_to_the_end(teacher: HybridForCausalLM) -> None:
    """As where an answer ends with a stop token: its reader stops there."""
    target = converted(teacher, "mamba2", 0.5)
    stop = greedy(target, PROMPTS[0], 1)[0]
    speculator = Speculator(target, target, num_slots=1, max_length=64, sampling=GREEDY, stop_ids=[stop])
    _, tokens = next(speculator.run(PROMPTS[:1], max_new_tokens=20))
    assert tokens == [stop]
    assert speculator.statistics.tokens == 1 and sum(speculator.statistics.accepted) == 1


def test_lookup_finds_the_latest_occurrence() -> None:
    history = torch.tensor([[1, 2, 7, 1, 2, 8, 9, 1, 2, 0, 0, 0], [1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0, 0]])
    drafted, found = look_up(history, torch.tensor([9, 6]), 4)
    assert found.tolist() == [4, 0]
    assert drafted[0].tolist() == [8, 9, 1, 2]
    drafted, found = look_up(torch.tensor([[4, 4, 4, 0, 0, 0]]), torch.tensor([3]), 4)
    assert found.tolist() == [1] and drafted[0, 0] == 4
    assert look_up(torch.tensor([[4, 0, 0]]), torch.tensor([1]), 2)[1].tolist() == [0]


def test_what_cannot_be_is_refused(teacher: HybridForCausalLM, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_slots": 1, "max_length": 20, "sampling": GREEDY}
    for count in (0, 17):
        with pytest.raises(InvalidOptionError, match="1 to 16"):
            Speculator(teacher, "lookup", **settings, num_draft_tokens=count)
    with pytest.raises(InvalidOptionError, match="same vocabulary"):
        Speculator(teacher, model(tmp_path, vocabulary=50), **settings)
    speculator = Speculator(teacher, "lookup", **settings)
    with pytest.raises(InvalidOptionError, match="do not fit"):
        speculator.run([[1] * 15], max_new_tokens=6)  # before the first token is asked for
    with pytest.raises(InvalidOptionError, match="empty"):
        speculator.run([[]], max_new_tokens=6)
    with pytest.raises(InvalidOptionError, match="1 seeds for 2 prompts"):
        speculator.run([[1], [2]], max_new_tokens=6, seeds=[1])
