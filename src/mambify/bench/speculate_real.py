"""Speculation with models that were trained: what drafts for a target, how often it is right, what that is worth.

Prompts are answered one at a time. Each draft is tried with several K, and with "auto", on conversation and on code and
mathematics; the best K at each temperature then answers the other groups of questions. The clock runs from the first
look at the device to the last, so reading the prompt is left out on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mambify.bench.decode_steps import forget, pass_seconds
from mambify.bench.pace import pace_of
from mambify.bench.questions import CHAT, CODE_AND_MATH, read_questions
from mambify.bench.sheet import Row
from mambify.conversion.plan import state_bytes
from mambify.decode.drafts import cut_if_named, is_made_of_target, require_drafts
from mambify.engine import Sampling, Speculator
from mambify.engine.speculate import Draft
from mambify.engine.statistics import Statistics
from mambify.families.load import load, require_tokenizer
from mambify.language_model import stop_ids
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

    @property
    def tried(self) -> tuple[int | str, ...]:
        """What each draft is asked for."""
        return *self.drafted, "auto"


SIZES = {
    "cpu": Size(3, 48, (2, 4, 8), (256, 2048, 8192)),
    "cuda": Size(8, 160, (2, 3, 4, 5, 6, 8), (1024, 4096, 16_384, 65_536)),
}
#: part of the benchmark → temperature
TEMPERATURES = {"temperature-0": 0.0, "temperature-1": 1.0}
CONTEXT, TARGET = "context", "target"
#: in place of a K: the best one of those that were tried, and transformers' own assisted generation
BEST, ASSISTED = "best", "assisted"


@dataclass(frozen=True)
class Case:
    """What is measured in one go: one draft with one K, or plain steps of one model.

    Attributes:
        part: one of :data:`TEMPERATURES`, or :data:`CONTEXT`.
        model: what drafts, or in :data:`CONTEXT` what steps.
        K: drafted tokens, "auto", :data:`BEST` or :data:`ASSISTED`.
        context: tokens before a plain step.
    """

    part: str
    model: str
    K: int | str = 0
    context: int = 0

    def about(self) -> Row:
        """What a row says of it, measured or not."""
        if self.part == CONTEXT:
            return {"part": CONTEXT, "model": self.model, "context": self.context}
        drafted = {"draft": self.model, "temperature": TEMPERATURES[self.part]}
        if self.K == ASSISTED:
            return {"part": self.part, "peer": "transformers", **drafted, "group": CHAT}
        return {"part": self.part, **drafted, "K": self.K}


def cases_of(drafts: Sequence[str], kind: str) -> list[Case]:
    """Every draft with every K at every temperature, then plain steps; ``kind`` of device."""
    size = SIZES[kind]
    return [
        *(Case(part, name, K) for part in TEMPERATURES for name in drafts for K in (*size.tried, BEST, ASSISTED)),
        *(Case(CONTEXT, name, context=context) for name in (TARGET, *drafts) for context in size.contexts),
    ]


@dataclass
class _Sum:
    """What the answers to one group of questions add up to."""

    tokens: int = 0
    seconds: float = 0.0
    counts: Statistics = field(default_factory=Statistics)
    answers: list[list[int]] = field(default_factory=list)


class Trials:
    """A target, the prompts it answers, and how fast it does by itself."""

    def __init__(self, device: str, target: str, drafts: Sequence[str], files: Sequence[Path]) -> None:
        require_drafts(drafts)
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
        self._drafts: dict[str, Draft] = {}  # the last case's
        self._gained: dict[tuple[str, str, int | str], float] = {}  # part, draft, K → sum of ratios

    def measure(self, case: Case) -> Iterator[Row]:
        """Its rows: one for each group of questions."""
        if case.part == CONTEXT:
            return self._step(case)
        draft, temperature = self._draft_named(case.model), TEMPERATURES[case.part]
        if case.K == ASSISTED:
            return iter([self._assisted(draft, temperature)])
        if case.K == BEST:
            best = max(self._size.tried, key=lambda K: self._gained.get((case.part, case.model, K), 0.0))
            return self._rows(draft, temperature, best, [g for g in self._questions if g not in _SWEPT])
        return self._swept(case, draft, temperature)

    def _draft_named(self, name: str) -> Draft:
        if name not in self._drafts:
            self._drafts.clear()
            forget(self._device)
            self._drafts[name] = self._load_draft(name)
        return self._drafts[name]

    def _load_draft(self, name: str) -> Draft:
        if is_made_of_target(name):
            return cut_if_named(name, self.target)  # type: ignore[return-value]
        return load(name, dtype=self._dtype, device=self._device).model

    def _swept(self, case: Case, draft: Draft, temperature: float) -> Iterator[Row]:
        key = case.part, case.model, case.K
        for row in self._rows(draft, temperature, case.K, [g for g in self._questions if g in _SWEPT]):
            self._gained[key] = self._gained.get(key, 0.0) + row["ratio"]
            yield row

    def _rows(self, draft: Draft, temperature: float, K: int | str, groups: Sequence[str]) -> Iterator[Row]:
        """A row for each group, as soon as its questions are answered."""
        if not groups:
            return
        for group, plain in self._answer(
            None, temperature, 1, [g for g in groups if (temperature, g) not in self._plain]
        ):
            self._plain[temperature, group] = plain
        for group, found in self._answer(draft, temperature, K, groups):
            plain = self._plain[temperature, group]
            speed, plain_speed = found.tokens / found.seconds, plain.tokens / plain.seconds
            same = [ours == theirs for ours, theirs in zip(found.answers, plain.answers, strict=True)]
            yield {
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

    def _answer(
        self, draft: Draft, temperature: float, K: int | str, groups: Sequence[str]
    ) -> Iterator[tuple[str, _Sum]]:
        """Answers the questions of some groups, one after another, all in one decoder."""
        if not groups:
            return
        asked = {group: self._questions[group] for group in groups}
        longest = max(len(ids) for prompts in asked.values() for ids in prompts)
        decoder = Speculator(
            self.target, draft, num_slots=1, max_length=longest + self._size.new,
            sampling=Sampling(temperature=temperature), num_draft_tokens=K, stop_ids=self._stops,
        )  # fmt: skip
        for group, prompts in asked.items():
            total = _Sum()
            for seed, ids in enumerate(prompts):
                pace = pace_of(decoder, [ids], max_new_tokens=self._size.new, seeds=[seed])
                total.tokens += pace.tokens
                total.seconds += pace.seconds
                total.counts.include(decoder.statistics)
                total.answers += pace.answers
            yield group, total
        del decoder
        forget(self._device)

    def _assisted(self, draft: Draft, temperature: float) -> Row:
        """transformers' own assisted generation of the same models, where it runs."""
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
            return {"failed": f"{type(failure).__name__}: {failure}"}
        return {"tokens": tokens, "tokens_per_second": tokens / seconds}

    def _step(self, case: Case) -> Iterator[Row]:
        """A plain step after a long context, of the target or another model: tokens a second, and what one holds."""
        if case.model == TARGET:
            self._drafts.clear()  # long contexts need the memory
            forget(self._device)
        model = self.target if case.model == TARGET else self._draft_named(case.model)
        if not isinstance(model, HybridForCausalLM) or model.config.draft_features:  # nothing by itself
            return
        if case.context > int(model.config.max_position_embeddings):
            return
        seconds = pass_seconds(model, slots=1, new=1, context=case.context - 1)
        yield {"tokens_per_second": 1 / seconds, "state_bytes": state_bytes(model.config, case.context)}
