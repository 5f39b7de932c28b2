"""Speculation with models that were trained: what drafts for a target, how often it is right, what that is worth.

Prompts are answered one at a time. Each draft is tried with several K, and with "auto", on conversation and on code and
mathematics; the best K at each temperature then answers the other groups of questions. The clock runs from the first
look at the device to the last, so reading the prompt is left out on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mambify.bench.decode_steps import forget, pass_seconds
from mambify.bench.pace import pace_of
from mambify.bench.questions import CHAT, CODE_AND_MATH, read_questions
from mambify.conversion.plan import state_bytes
from mambify.decode.drafts import cut_if_named, is_made_of_target
from mambify.decode.text import stop_ids
from mambify.engine import Sampling, Speculator
from mambify.engine.speculate import Draft
from mambify.engine.statistics import Statistics
from mambify.families.load import load, require_tokenizer
from mambify.model import HybridForCausalLM

_SWEPT = (CHAT, CODE_AND_MATH)


@dataclass(frozen=True)
class Size:
    """How much is tried.

    Attributes:
        prompts: of each group.
        new: tokens of an answer, at most.
        drafted: every K.
        contexts: tokens before a plain step.
    """

    prompts: int
    new: int
    drafted: tuple[int, ...]
    contexts: tuple[int, ...]


SIZES = {
    "cpu": Size(3, 48, (2, 4, 8), (256, 2048, 8192)),
    "cuda": Size(8, 160, (2, 3, 4, 5, 6, 8), (1024, 4096, 16_384, 65_536)),
}
#: part of the benchmark → temperature
TEMPERATURES = {"temperature-0": 0.0, "temperature-1": 1.0}


@dataclass
class _Sum:
    """What the answers to one group of questions add up to."""

    tokens: int = 0
    seconds: float = 0.0
    counts: Statistics = field(default_factory=Statistics)
    answers: list[list[int]] = field(default_factory=list)


class Trials:
    """A target, the prompts it answers, and how fast it does by itself."""

    def __init__(self, device: str, target: str, files: Sequence[Path]) -> None:
        self._device, self._size = device, SIZES[torch.device(device).type]
        self._dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        loaded = load(target, dtype=self._dtype, device=device)
        tokenizer = require_tokenizer(loaded)
        self.target: HybridForCausalLM = loaded.model
        longest = int(self.target.config.max_position_embeddings) - self._size.new
        self._questions = {
            group: [ids for ids in prompts if len(ids) <= longest][: self._size.prompts]
            for group, prompts in read_questions(files, tokenizer).items()
        }
        self._stops = sorted(stop_ids(self.target, tokenizer))
        self._plain: dict[tuple[float, str], _Sum] = {}

    def measure(self, part: str, names: Sequence[str], say: Callable[[int, int], None]) -> list[dict[str, Any]]:
        """Rows of every draft, K and group at one temperature."""
        rows: list[dict[str, Any]] = []
        temperature = TEMPERATURES[part]
        for done, name in enumerate(names):
            say(done, len(names))
            draft = self._load_draft(name)
            tried: tuple[int | str, ...] = (*self._size.drafted, "auto")
            swept = {
                K: self._rows(name, draft, temperature, K, [g for g in self._questions if g in _SWEPT]) for K in tried
            }
            rows += [row for found in swept.values() for row in found]
            best = max(swept, key=lambda K: sum(row["ratio"] for row in swept[K]))
            rows += self._rows(name, draft, temperature, best, [g for g in self._questions if g not in _SWEPT])
            rows.append(self._assisted(name, draft, temperature))
        say(len(names), len(names))
        return [{"part": part} | row for row in rows]

    def _load_draft(self, name: str) -> Draft:
        if is_made_of_target(name):
            return cut_if_named(name, self.target)  # type: ignore[return-value]
        return load(name, dtype=self._dtype, device=self._device).model

    def _rows(
        self, name: str, draft: Draft, temperature: float, K: int | str, groups: Sequence[str]
    ) -> list[dict[str, Any]]:
        if not groups:
            return []
        if (temperature, groups[0]) not in self._plain:
            plain = self._answer(None, temperature, 1, groups)
            self._plain |= {(temperature, group): found for group, found in plain.items()}
        rows = []
        for group, found in self._answer(draft, temperature, K, groups).items():
            plain_sum = self._plain[temperature, group]
            speed, plain_speed = found.tokens / found.seconds, plain_sum.tokens / plain_sum.seconds
            same = [ours == theirs for ours, theirs in zip(found.answers, plain_sum.answers, strict=True)]
            rows.append(
                {
                    "draft": name,
                    "temperature": temperature,
                    "K": K,
                    "group": group,
                    "prompts": len(found.answers),
                    "tokens": found.counts.tokens,
                    "tokens_per_round": found.counts.tokens_per_round,
                    "mean_K": sum(k * n for k, n in found.counts.drafted.items()) / sum(found.counts.accepted),
                    "acceptance_by_position": found.counts.acceptance_by_position,
                    "tokens_per_second": speed,
                    "plain_tokens_per_second": plain_speed,
                    "ratio": speed / plain_speed,
                    "same_answers": sum(same) / len(same) if temperature == 0 else None,
                }
            )
        return rows

    def _answer(self, draft: Draft, temperature: float, K: int | str, groups: Sequence[str]) -> dict[str, _Sum]:
        """Answers the questions of some groups, one after another."""
        asked = {group: self._questions[group] for group in groups}
        longest = max(len(ids) for prompts in asked.values() for ids in prompts)
        decoder = Speculator(
            self.target, draft, num_slots=1, max_length=longest + self._size.new,
            sampling=Sampling(temperature=temperature), num_draft_tokens=K, stop_ids=self._stops,
        )  # fmt: skip
        sums: dict[str, _Sum] = {}
        for group, prompts in asked.items():
            total = sums.setdefault(group, _Sum())
            for seed, ids in enumerate(prompts):
                pace = pace_of(decoder, [ids], max_new_tokens=self._size.new, seeds=[seed])
                total.tokens += pace.tokens
                total.seconds += pace.seconds
                total.counts.include(decoder.statistics)
                total.answers += pace.answers
        del decoder
        forget(self._device)
        return sums

    def _assisted(self, name: str, draft: Draft, temperature: float) -> dict[str, Any]:
        """transformers' own assisted generation of the same models, where it runs."""
        facts = {"peer": "transformers", "draft": name, "temperature": temperature, "group": CHAT}
        helper = {"prompt_lookup_num_tokens": 4} if draft == "lookup" else {"assistant_model": draft}
        tokens, seconds = 0, 0.0
        try:
            for ids in next(iter(self._questions.values()))[:2]:
                given = torch.tensor([ids], device=self._device)
                start = time.perf_counter()
                out = self.target.generate(
                    input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=self._size.new,
                    do_sample=temperature > 0, eos_token_id=self._stops, pad_token_id=self._stops[0], **helper,
                )  # fmt: skip
                tokens += out.shape[1] - given.shape[1]
                seconds += time.perf_counter() - start
        except Exception as failure:  # theirs, whatever it is: it stands in the result in place of a speed
            return facts | {"failed": f"{type(failure).__name__}: {failure}"}
        return facts | {"tokens": tokens, "tokens_per_second": tokens / seconds}

    def contexts(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Plain steps after long contexts, of the target and of other models: tokens a second, and what one holds."""
        rows = []
        for name, model in [("target", self.target), *((name, self._load_draft(name)) for name in names)]:
            if not isinstance(model, HybridForCausalLM) or model.config.draft_features:  # nothing by itself
                continue
            for context in self._size.contexts:
                if context > int(model.config.max_position_embeddings):
                    continue
                seconds = pass_seconds(model, slots=1, new=1, context=context - 1)
                rows.append(
                    {
                        "part": "context",
                        "model": name,
                        "context": context,
                        "tokens_per_second": 1 / seconds,
                        "state_bytes": state_bytes(model.config, context),
                    }
                )
        return rows
