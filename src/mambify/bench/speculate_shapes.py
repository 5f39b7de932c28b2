"""Speculation at the sizes of large models, random weights, acceptance injected (:mod:`mambify.bench.injected`).

A round is held against our own plain decoding of the same target in the same engine, and against the bound: the bytes
of all weights that a round reads, the target's once and the draft's K times, at the bandwidth at which linear
layers read them here. Where acceptance is drawn, a few hundred rounds miss its mean by some per cent; so what is timed
is the round, and tokens a second are those that the stated mean gives. The published
shapes of pure Mamba models are run at the tokens a round of the paper's table 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mambify.bench.clock import seconds_of
from mambify.bench.decode_steps import drawn_model, forget, read_bandwidth, read_weight_bytes
from mambify.bench.injected import InjectedSpeculator, rates_for
from mambify.bench.pace import pace_of
from mambify.bench.sheet import Row
from mambify.engine import Sampling, Speculator
from mambify.engine.pace import AUTO
from mambify.engine.recording import recorded
from mambify.model import HybridForCausalLM


@dataclass(frozen=True)
class Sizes:
    """One model.

    Attributes:
        shape: its name in :data:`mambify.bench.shapes.SHAPES` or ``MAMBA_SHAPES``.
        attention: share of a Transformer's layers that keep attention; ``None`` for pure Mamba.
        layers: how many; the shape's own number where ``None``.
        words: tokens its head knows; all where ``None``.
    """

    shape: str
    attention: float | None = 0.5
    mixer: str = "mamba2"
    layers: int | None = None
    words: int | None = None

    def __str__(self) -> str:
        parts = [self.shape]
        if self.attention is not None:
            parts.append(f"{self.attention:.0%} attention")
            if self.attention < 1:
                parts.append(self.mixer)
        if self.layers is not None:
            parts.append(f"{self.layers} layers")
        if self.words is not None:
            parts.append(f"{self.words} words")
        return ", ".join(parts)

    def model(self, device: str) -> HybridForCausalLM:
        """With random weights."""
        changes = {} if self.layers is None else {"num_hidden_layers": self.layers}
        return drawn_model(self.shape, device, attention=self.attention, mixer=self.mixer, words=self.words, **changes)


@dataclass(frozen=True)
class Case:
    """One target and draft.

    Attributes:
        part: what ``only`` chooses by.
        K: drafted tokens.
        tokens_per_round: to be injected.
        adaptive: rounds draft what gives the most tokens a second, 1 to 8, instead; every token is then accepted as
            often as gives ``tokens_per_round`` with K.
        published: what others report for it: tokens a second on an H100.
    """

    part: str
    target: Sizes
    draft: Sizes
    K: int
    tokens_per_round: float
    batch: int = 1
    context: int = 512
    new: int = 384
    published: float | None = None
    adaptive: bool = False

    def rates(self) -> list[float]:
        """How often each drafted token is accepted, if those before it were."""
        rates = rates_for(self.tokens_per_round, self.K)
        return rates[:1] * AUTO[1] if self.adaptive else rates


def _with_rate_of(case: Case, K: int) -> Case:
    """Another K with the same acceptance at every position."""
    (rate, *_) = rates_for(case.tokens_per_round, case.K)
    return replace(case, part="K", K=K, tokens_per_round=_expected(rate, K))


def _expected(rate: float, K: int) -> float:
    """Tokens a round of K drafted ones, each accepted with this probability."""
    return sum(rate**k for k in range(K + 1))


_TINY = Sizes("tiny")
_8B, _CUT = Sizes("8B"), Sizes("8B", 1.0, layers=2, words=32_768)
#: K and tokens a round of the paper's table 1 on an H100, and its tokens a second
_PAPER = {
    ("mamba-2.8b", "mamba-130m"): ((3, 4.0, 389.0), (4, 3.9, 421.0)),  # it says 4.04 of K = 3, more than there can be
    ("mamba-7b", "mamba-1.4b"): ((3, 3.28, 271.0), (4, 3.6, 272.0)),
}
_BASE = Case("8B", _8B, _CUT, 4, 3.6)
CASES: dict[str, list[Case]] = {
    "cpu": [
        Case("8B", _TINY, Sizes("tiny", 1.0, layers=1), 4, 3.3, context=20, new=60),
        Case("batch", _TINY, Sizes("tiny", 0.0, layers=2, words=128), 2, 2.0, batch=3, context=20, new=40),
        Case("paper", Sizes("mamba-tiny", None), Sizes("mamba-tiny", None), 3, 4.0, context=20, new=40),
        Case("K", _TINY, Sizes("tiny", 1.0, layers=1), 4, 3.3, context=20, new=60, adaptive=True),
    ],
    "cuda": [
        *(
            replace(_BASE, draft=draft, tokens_per_round=tokens)
            for draft in (_CUT, replace(_CUT, words=None), replace(_CUT, attention=0.0))
            for tokens in (3.3, 3.6)
        ),
        *(_with_rate_of(_BASE, K) for K in (2, 3, 6, 8)),
        replace(_BASE, part="K", adaptive=True),
        *(replace(_BASE, part="batch", batch=batch) for batch in (4, 16, 64)),
        *(
            Case("paper", Sizes(target, None), Sizes(draft, None), K, tokens, published=published)
            for (target, draft), rows in _PAPER.items()
            for K, tokens, published in rows
        ),
        *(
            Case("paper", Sizes(target, None), Sizes(draft, None), K, tokens, adaptive=True)
            for (target, draft), (_, (K, tokens, _)) in _PAPER.items()
        ),
    ],
}


def about(case: Case) -> Row:
    """What a row says of its case, measured or not."""
    named = {"K": "auto" if case.adaptive else case.K, "target": str(case.target), "draft": str(case.draft)}
    return asdict(case) | named


class Bench:
    """Measures cases one after another; a target and its plain decoding are kept for those that share them."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.bandwidth = read_bandwidth(device)
        self._sizes: Sizes | None = None
        self._target: Any = None
        self._plain: dict[tuple[int, int], float] = {}

    def measure(self, case: Case) -> Row:
        """Tokens a second beside plain decoding's, share of the bound, and what a round spends its time on."""
        if case.target != self._sizes:
            self._target = None
            forget(self._device)
            self._target, self._sizes, self._plain = case.target.model(self._device), case.target, {}
        target = self._target
        vocabulary = target.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(vocabulary, (case.batch, case.context), generator=generator).tolist()
        settings: dict[str, Any] = {
            "num_slots": case.batch, "max_length": case.context + case.new + 1, "sampling": Sampling(temperature=1.0)
        }  # fmt: skip
        kept = case.batch, case.context
        if kept not in self._plain:
            decoder = Speculator(target, None, **settings)
            self._plain[kept] = pace_of(decoder, prompts, max_new_tokens=case.new).tokens_per_second
            del decoder
        draft = case.draft.model(self._device)
        rates = case.rates()
        if case.adaptive:
            settings["num_draft_tokens"] = AUTO
        decoder = InjectedSpeculator(target, draft, rates=rates, **settings)
        pace = pace_of(decoder, prompts, max_new_tokens=case.new)
        round_seconds = pace.seconds / pace.rounds
        passes = decoder.statistics.passes
        tokens_per_round, K = case.tokens_per_round, float(case.K)
        if case.adaptive:
            tokens_per_round = sum(n * _expected(rates[0], k) for k, n in passes.items()) / sum(passes.values())
            K = sum(n * k for k, n in passes.items()) / sum(passes.values())
        speed = case.batch * tokens_per_round / round_seconds
        # Of adaptive rounds, the parts of those with the K that was chosen most often.
        drafting, reading = _parts_of_a_round(decoder, max(passes, key=lambda k: passes[k]), self._device)
        read = read_weight_bytes(target) + K * read_weight_bytes(draft)
        return {
            "mean_K": K,
            "tokens_per_round": tokens_per_round,
            "acceptance": "injected",
            "drawn_tokens_per_round": decoder.statistics.tokens_per_round,
            "drawn_tokens_per_second": pace.tokens_per_second,
            "tokens_per_second": speed,
            "plain_tokens_per_second": self._plain[kept],
            "ratio": speed / self._plain[kept],
            "of_bound": read / self.bandwidth / round_seconds,
            "plain_of_bound": read_weight_bytes(target) / self.bandwidth * self._plain[kept] / case.batch,
            "round_ms": 1e3 * round_seconds,
            "draft_ms": 1e3 * drafting,
            "verify_ms": 1e3 * reading,
            "rest_ms": 1e3 * (round_seconds - drafting - reading),
        }


@torch.inference_mode()
def _parts_of_a_round(decoder: Speculator, K: int, device: str) -> tuple[float, float]:
    """Seconds of drafting, and of the target's pass, each by itself, all slots taking part; sequences have ended."""
    assert decoder.draft is not None
    draft, target = decoder.draft, decoder.target
    decoder.active_S.fill_(True)
    token_ST = torch.zeros(target.num_slots, K + 1, dtype=torch.long, device=device)

    @torch.inference_mode()
    def put_forward() -> None:
        decoder.put_forward(K)
        draft.take_back(K)

    drafting = seconds_of(recorded(put_forward, device), device)
    reading = seconds_of(recorded(torch.inference_mode()(lambda: target.read(token_ST)), device), device)
    decoder.active_S.zero_()
    return drafting, reading
