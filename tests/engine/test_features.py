"""Drafts that read their target's hidden states: what they read in a round is what they should."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambify.conversion.cut import cut
from mambify.engine import Speculator
from mambify.engine import speculate as speculate_module
from mambify.feature_input import shifted
from mambify.model import HybridForCausalLM
from speculating import GREEDY, PROMPTS, TARGETS, EveryNumber, answers, converted, greedy, model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> HybridForCausalLM:
    return model(tmp_path_factory.mktemp("teacher"))


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

    def _put_forward(self, K: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        drafted_SK, logits_SKW, num_drafted_S = super()._put_forward(K)
        assert logits_SKW is not None
        for slot in self._active_S.nonzero()[:, 0].tolist():
            text = self._history_SL[slot, : self._target.length_S[slot] + 1].tolist()
            wanted_KW = wanted_logits(*self._models, text, drafted_SK[slot].tolist())
            self.farthest = max(
                self.farthest, float((logits_SKW[slot] - wanted_KW).abs().max() / wanted_KW.abs().max())
            )
            self.rounds += 1
        return drafted_SK, logits_SKW, num_drafted_S


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
    found = answers(speculator, PROMPTS, max_new_tokens=20)
    assert found == [greedy(target, prompt, 20) for prompt in PROMPTS]
    assert speculator.rounds > 20 and speculator.farthest < 1e-4
    assert sum(count > 0 for count in speculator.statistics.accepted) > 3
