"""Speculation on tiny models, and what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mambify.conversion import apply_plan, plan
from mambify.conversion.cut import cut
from mambify.engine import Sampling, Speculator
from mambify.engine.pace import Pace
from mambify.families.load import load
from mambify.model import HybridForCausalLM
from tiny import llama

VOCABULARY = 96
GREEDY = Sampling(temperature=0.0)
PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10, 3, 4, 5], [20, 21], [90, 3, 90, 3, 90], list(range(30, 60))]
#: mixers, and the share of attention beside them
TARGETS = [("mamba2", 1.0), ("mamba2", 0.5), ("mamba2", 0.0), ("mamba1", 0.5), ("mamba1", 0.0)]


def model(path: Path, *, vocabulary: int = VOCABULARY, **changes: Any) -> HybridForCausalLM:
    """A random Transformer, saved to ``path`` and read as ours."""
    llama(vocabulary, **changes).save_pretrained(path)
    loaded: HybridForCausalLM = load(path).model
    return loaded


def converted(teacher: HybridForCausalLM, mixer: str = "mamba2", attention: float = 0.5) -> HybridForCausalLM:
    """``teacher`` with ``mixer`` in all but a share ``attention`` of the layers."""
    return apply_plan(teacher, plan(teacher.config, mixer=mixer, attention=attention)).eval()


class EveryNumber(Pace):
    """Goes through all K in turn, whatever is accepted: each round has another one than the round before."""

    def choose(self) -> int:
        self._turn = getattr(self, "_turn", -1) + 1
        return sorted(self._seconds)[(self._turn * 5) % len(self._seconds)]


def feature_draft(target: HybridForCausalLM, layers: int = 2, **settings: Any) -> HybridForCausalLM:
    """A cut of ``target`` that heeds its hidden states, if to no purpose."""
    draft = cut(target, layers, features=True, **settings)
    start = draft.model.feature_input
    assert start is not None
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return draft


def answers(speculator: Speculator, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
    """All that a run gives, by prompt."""
    found: list[list[int]] = [[] for _ in prompts]
    for number, tokens in speculator.run(prompts, **settings):
        found[number] += tokens
    return found


def greedy(target: HybridForCausalLM, prompt: list[int], count: int) -> list[int]:
    """What transformers' own loop says after ``prompt``."""
    ids = torch.tensor([prompt])
    out = target.generate(input_ids=ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@cache
def target_and_tokens(
    teacher: HybridForCausalLM, mixer: str = "mamba2", attention: float = 0.5, *, new: int
) -> tuple[HybridForCausalLM, list[list[int]]]:
    """A row of :data:`TARGETS`, not to be changed by a test, and what it says after each of :data:`PROMPTS`."""
    target = teacher if attention == 1.0 else converted(teacher, mixer, attention)
    return target, [greedy(target, prompt, new) for prompt in PROMPTS]
