"""Drafts that read their target's hidden states: what they read in a round is what they should."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mambify.conversion.cut import cut
from mambify.engine import Sampling, Speculator
from mambify.engine import speculate as speculate_module
from mambify.engine.prefill import read_prompts_ahead
from mambify.engine.tower import Tower
from mambify.errors import InvalidOptionError, UnsupportedError
from mambify.families.load import LoadedModel, load, save
from mambify.feature_input import shifted
from mambify.model import HybridForCausalLM
from mambify.ops.backends import HAS_TRITON
from speculating import (
    GREEDY,
    PROMPTS,
    TARGETS,
    VOCABULARY,
    EveryNumber,
    answers,
    converted,
    feature_draft,
    greedy,
    model,
)

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def stream_of(whole: HybridForCausalLM) -> Callable[..., Tensor]:
    """ids, features → hidden states before the final norm, in one pass over a whole text."""
    bare = copy.deepcopy(whole.model)
    bare.norm = nn.Identity()
    return lambda ids, **features: bare(input_ids=ids, use_cache=False, **features).last_hidden_state


class Watched(Speculator):
    """Compares all logits that a round drafts from with passes over whole texts."""

    def __init__(self, target: HybridForCausalLM, draft: HybridForCausalLM, **settings: Any) -> None:
        self.rounds, self.farthest, self._models = 0, 0.0, (target, draft)
        super().__init__(target, draft, **settings)

    def put_forward(self, K: int) -> tuple[Tensor | None, Tensor | None]:
        assert self.draft is not None
        logits_after, logits = self.draft.logits_after, list[Tensor]()

        def watched(*arguments: Any) -> Tensor:
            logits.append(logits_after(*arguments)[:, 0])
            return logits[-1][:, None]

        self.draft.logits_after = watched  # type: ignore[method-assign]
        result = super().put_forward(K)
        self.draft.logits_after = logits_after  # type: ignore[method-assign]
        logits_SKW, drafted_SK = torch.stack(logits, 1), self._read_ST[:, 1 : K + 1]
        for slot in self.active_S.nonzero()[:, 0].tolist():
            text = self._history_SL[slot, : self.target.length_S[slot] + 1].tolist()
            wanted_KW = wanted_logits(*self._models, text, drafted_SK[slot].tolist())
            self.farthest = max(
                self.farthest, float((logits_SKW[slot] - wanted_KW).abs().max() / wanted_KW.abs().max())
            )
            self.rounds += 1
        return result


def wanted_logits(target: HybridForCausalLM, draft: HybridForCausalLM, text: list[int], drafted: list[int]) -> Tensor:
    """The definition: of each token the hidden state before it, the target's in the text, the draft's own beyond."""
    stream, head = stream_of(draft), draft.lm_head
    features_1TD, found = shifted(stream_of(target)(torch.tensor([text]))), []
    for token in drafted:
        own_1TD = stream(torch.tensor([text]), features=features_1TD)
        logits_W = getattr(head, "known", head)(draft.model.norm(own_1TD[:, -1]))[0]
        found.append(logits_W)
        text, features_1TD = [*text, token], torch.cat([features_1TD, own_1TD[:, -1:]], 1)
    return torch.stack(found)


@pytest.mark.parametrize("backend", ["modules", "fused"])
@pytest.mark.parametrize(("mixer", "attention"), TARGETS)
def test_every_guess_reads_what_it_should(
    teacher: HybridForCausalLM, mixer: str, attention: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds of any K after each other, some tokens of which stand, in more prompts than slots, of one token too."""
    monkeypatch.setattr(speculate_module, "Pace", EveryNumber)
    target = teacher if attention == 1.0 else converted(teacher, mixer, attention)
    draft = cut(target, 4, features=True)  # knows its target, but for a little
    with torch.no_grad():
        assert draft.model.feature_input is not None
        draft.model.feature_input.feature_proj.weight += 0.005 * torch.randn(32, 32, generator=torch.Generator())
    speculator = Watched(
        target, draft, num_slots=3, max_length=64, sampling=GREEDY, num_draft_tokens=(1, 6), backend=backend
    )
    speculator.rounds, speculator.farthest = 0, 0.0  # rounds were timed, of no text
    found = answers(speculator, PROMPTS, max_new_tokens=20)
    assert found == [greedy(target, prompt, 20) for prompt in PROMPTS]
    assert speculator.rounds > 20 and speculator.farthest < 1e-4
    assert sum(count > 0 for count in speculator.statistics.accepted) > 3


def test_prompts_in_pieces(teacher: HybridForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft reads what the target has just read, a place further on; rows end at different pieces."""
    monkeypatch.setattr("mambify.engine.tower.read_prompts_ahead", partial(read_prompts_ahead, piece=5))
    target = converted(teacher)
    speculator = Watched(target, feature_draft(target), num_slots=6, max_length=64, sampling=GREEDY)
    assert answers(speculator, PROMPTS, max_new_tokens=6) == [greedy(target, prompt, 6) for prompt in PROMPTS]
    assert speculator.farthest < 1e-4


def test_few_words(teacher: HybridForCausalLM) -> None:
    target = converted(teacher)
    draft = feature_draft(target, token_ids=torch.arange(0, VOCABULARY, 3))
    speculator = Watched(target, draft, num_slots=3, max_length=64, sampling=GREEDY)
    assert answers(speculator, PROMPTS, max_new_tokens=9) == [greedy(target, prompt, 9) for prompt in PROMPTS]
    assert speculator.farthest < 1e-4


def test_penalties_and_what_knows_everything(teacher: HybridForCausalLM) -> None:
    """A whole cut that heeds no features is the target, so all of it stands, from texts of one token on."""
    target = converted(teacher)
    settings: dict[str, Any] = {"num_slots": 3, "max_length": 64, "sampling": Sampling(0.0, repetition_penalty=1.5)}
    plain = answers(Speculator(target, None, **settings), PROMPTS, max_new_tokens=25)
    for K in (1, 4, 16):
        speculator = Speculator(target, cut(target, 4, features=True), num_draft_tokens=K, **settings)
        assert answers(speculator, PROMPTS, max_new_tokens=25) == plain
        assert set(speculator.statistics.acceptance_by_position) == {1.0}


@pytest.mark.parametrize("mix", ["mamba2", "mamba1"])
@pytest.mark.parametrize("by_kernels", [False, pytest.param(True, marks=needs_triton)])
def test_the_fused_step(
    teacher: HybridForCausalLM, mix: str, by_kernels: bool, products_by_kernels: Callable[[], None]
) -> None:
    """Hidden states in and out, by products of one kernel each, in Triton's interpreter too."""
    draft = feature_draft(converted(teacher, mix), [0, 1])
    if by_kernels:
        products_by_kernels()
    active_S = torch.ones(2, dtype=torch.bool)
    towers = [
        Tower(draft, num_slots=2, length=20, most_new=2, active_S=active_S, backend=backend)
        for backend in ("modules", "fused")
    ]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for T, stand in ((2, [1, 2]), (1, [1, 1])):
            token_ST = torch.randint(3, 90, (2, T), generator=generator)
            feature_STD = torch.randn(2, T, 32, generator=generator)
            found, wanted = (tower.stream(token_ST, feature_STD) for tower in towers[::-1])
            assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)
            found, wanted = (tower.logits(x) for tower, x in zip(towers[::-1], (found, wanted), strict=True))
            assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)
            for tower in towers:
                tower.keep(torch.tensor(stand), T)


def test_the_real_teacher_keeps_its_tokens(smollm2: LoadedModel) -> None:
    student = converted(smollm2.model)
    prompts = [[1, 4093, 198, 2683, 359], [504]]
    settings: dict[str, Any] = {"num_slots": 2, "max_length": 32, "sampling": GREEDY}
    plain = answers(Speculator(student, None, **settings), prompts, max_new_tokens=8)
    reader = feature_draft(student, token_ids=torch.arange(4096))
    assert answers(Speculator(student, reader, num_draft_tokens=2, **settings), prompts, max_new_tokens=8) == plain


def test_it_is_saved_and_loaded(teacher: HybridForCausalLM, tmp_path: Path) -> None:
    draft = feature_draft(converted(teacher))
    ids, features = torch.tensor([PROMPTS[2]]), torch.randn(1, len(PROMPTS[2]), 32)
    save(draft, tmp_path / "ours")
    draft.save_pretrained(tmp_path / "theirs")
    wanted = draft(input_ids=ids, features=features).logits
    for again in (load(tmp_path / "ours").model, AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")):
        assert torch.equal(again(input_ids=ids, features=features).logits, wanted)


def test_by_itself_and_with_strangers_it_is_refused(teacher: HybridForCausalLM, tmp_path: Path) -> None:
    draft, ids = cut(teacher, 2, features=True), torch.tensor([PROMPTS[0]])
    settings: dict[str, Any] = {"num_slots": 1, "max_length": 20, "sampling": GREEDY}
    with pytest.raises(UnsupportedError, match="run the target with --draft"):
        draft(input_ids=ids)
    with pytest.raises(InvalidOptionError, match="give that model"):
        Speculator(draft, None, **settings)
    wider = model(tmp_path, hidden_size=64)
    with pytest.raises(InvalidOptionError, match="states of 32 numbers and the target's have 64"):
        Speculator(wider, draft, **settings)
    with torch.no_grad():  # untrained it heeds nothing, and is the plain cut
        found = draft(input_ids=ids, features=torch.randn(1, 3, 32)).logits
        assert torch.equal(found, cut(teacher, 2)(input_ids=ids).logits)
