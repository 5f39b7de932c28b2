"""``mambify bench laws``: speculation changes how fast tokens come and nothing else, tried on many of them.

Greedy: in float32 every token is the one that plain decoding gives, and the likeliest after a pass over the whole text;
in bfloat16 rounding decides between tokens that are nearly as likely, so it is counted how often that happens and how
near they were. Distribution: tokens drawn by the hundred thousand from a vocabulary so small that the exact probability
of every answer can be added up. Each law is also tried on a state that is damaged on purpose, which it must notice.

Letters: N prefixes, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from mambify.bench.questions import read_questions
from mambify.bench.shapes import model_of_shape
from mambify.bench.sheet import Row, Sheet, failure
from mambify.decode.drafts import cut_if_named, is_made_of_target, require_drafts
from mambify.engine import Sampling, Speculator
from mambify.engine.speculate import Draft
from mambify.families.load import load, require_tokenizer
from mambify.mixers import ReplayState
from mambify.model import HybridForCausalLM
from mambify.ops.draw import settings_of
from mambify.ops.draw.reference import weights

_FURTHEST = 0.01  # total variation that passes
_WORDS, _STOP = 5, 4  # the small vocabulary


@dataclass(frozen=True)
class Size:
    """How much is tried.

    Attributes:
        prompts: of the greedy law.
        new: tokens of each answer.
        samples: answers of the law of distributions.
        slots: sequences worked on at once.
    """

    prompts: int
    new: int
    samples: int
    slots: int


SIZES = {"cpu": Size(24, 24, 4000, 1000), "cuda": Size(512, 96, 240_000, 20_000)}
_K, _ANSWER = 4, 6  # drafted tokens; tokens of an answer of the law of distributions


class Damaged(Speculator):
    """A :class:`Speculator` one of whose pending ring entries is changed before every round."""

    def step(self, K: int) -> None:
        place = self.target.place
        row_S = torch.arange(len(place.head_S), device=place.head_S.device)
        for state in self.target.states:
            if isinstance(state, ReplayState):
                state.ring.x[row_S, (place.head_S - 1) % place.capacity] *= -3.0
        super().step(K)


class Trial(NamedTuple):
    """One row: what is tried, and trying it."""

    facts: Row
    run: Callable[[], Row]


def run(
    device: str,
    sheet: Sheet,
    only: str | None = None,
    *,
    target: str | None = None,
    draft: Sequence[str] = (),
    prompts: Sequence[Path] = (),
    limit: int | None = None,
    max_new_tokens: int | None = None,
    samples: int | None = None,
) -> None:
    """Tries every law, or one of them.

    Args:
        only: ``greedy`` or ``distribution``.
        target: model of the greedy law; a small one with random weights by default.
        draft: what drafts for it: models, ``lookup``, or ``cut:2``.
        prompts: files of questions for it; random tokens by default.
        limit, max_new_tokens: prompts of the greedy law, spread over the files, and tokens of each answer.
        samples: answers of the law of distributions. Where these three are not given, :data:`SIZES` has them.
    """
    require_drafts(draft)
    asked = {"prompts": limit, "new": max_new_tokens, "samples": samples}
    size = replace(SIZES[torch.device(device).type], **{name: n for name, n in asked.items() if n is not None})
    trials: list[Trial] = []
    if only in (None, "greedy"):
        trials += greedy_trials(device, size, target, draft, prompts)
    if only in (None, "distribution"):
        trials += distribution_trials(device, size)
    sheet.fill(trials, lambda trial: trial.run(), about=lambda trial: trial.facts)


# ---- the likeliest tokens --------------------------------------------------------------------------------------------


def greedy_trials(
    device: str, size: Size, target: str | None, drafts: Sequence[str], files: Sequence[Path]
) -> list[Trial]:
    """One for each dtype and draft, and a damaged one."""
    named = list(drafts) or ["lookup"]
    trials: list[Trial] = []
    for dtype in (torch.float32, torch.bfloat16):

        def whole(dtype: torch.dtype = dtype) -> tuple[HybridForCausalLM, list[list[int]]]:
            if target is None:
                generator = torch.Generator().manual_seed(0)
                lengths = torch.randint(1, 64, (size.prompts,), generator=generator).tolist()
                return _small(device, dtype, 512), [
                    torch.randint(3, 512, (length,), generator=generator).tolist() for length in lengths
                ]
            loaded = load(target, dtype=dtype, device=device)
            questions = read_questions(files, require_tokenizer(loaded))
            return loaded.model, _spread(list(itertools.chain(*questions.values())), size.prompts)

        for name in named:

            def trial(name: str = name, dtype: torch.dtype = dtype, whole: Any = whole) -> Row:
                model, prompts = whole()
                other: Any = cut_if_named(name, model)
                if not is_made_of_target(name):
                    other = load(name, dtype=dtype, device=device).model
                return greedy(model, other, prompts, new=size.new) | {"draft": name}

            trials.append(Trial(_greedy_facts(dtype, name), trial))

    def damaged() -> Row:
        return greedy(_small(device, torch.float32, 512, 0.0), "lookup", [[5, 6, 7], [9, 8]], new=48, damaged=True)

    return [*trials, Trial(_greedy_facts(torch.float32, "lookup", damaged=True), damaged)]


def _spread(items: list[list[int]], count: int) -> list[list[int]]:
    """``count`` of the items from all over the list, or all of them."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _greedy_facts(dtype: torch.dtype, draft: str, *, damaged: bool = False) -> Row:
    return {"law": "greedy", "dtype": str(dtype).removeprefix("torch."), "draft": draft, "damaged": damaged}


def _small(
    device: str, dtype: torch.dtype, vocabulary: int, attention: float = 0.5, **changes: Any
) -> HybridForCausalLM:
    """Random weights, wide enough apart that tokens are not all alike."""
    settings: dict[str, Any] = {"seed": 0, "initializer_range": 0.3} | changes
    return model_of_shape("tiny", device, dtype, vocab_size=vocabulary, attention=attention, **settings)


@torch.inference_mode()
def greedy(
    target: HybridForCausalLM, draft: Draft, prompts: Sequence[Sequence[int]], *, new: int, damaged: bool = False
) -> Row:
    """Tokens with the draft beside those without, and both beside passes over whole texts."""
    slots = min(len(prompts), 64)
    settings: dict[str, Any] = {
        "num_slots": slots, "max_length": max(map(len, prompts)) + new, "sampling": Sampling(temperature=0.0)
    }  # fmt: skip
    plain = _answers(Speculator(target, None, **settings), prompts, new)
    kind = Damaged if damaged else Speculator
    decoder = kind(target, draft, num_draft_tokens=_K, **settings)
    found = _answers(decoder, prompts, new)
    gaps, unlikely, farthest = [], 0, 0.0
    for prompt, answer, other in zip(prompts, plain, found, strict=True):
        text = [*prompt, *answer]
        logits_TV = target(input_ids=torch.tensor([text], device=target.device)).logits[0, len(prompt) - 1 : -1].float()
        given_T = torch.tensor(answer, device=target.device)
        short_T = logits_TV.amax(-1) - logits_TV.gather(1, given_T[:, None])[:, 0]
        unlikely += int((short_T > 0).sum())
        farthest = max(farthest, float(short_T.max()))
        if answer != other:
            at = next(place for place, pair in enumerate(zip(answer, other, strict=True)) if pair[0] != pair[1])
            gaps.append(float((logits_TV[at, answer[at]] - logits_TV[at, other[at]]).abs()))
    exact = target.dtype == torch.float32
    return {
        **_greedy_facts(target.dtype, draft if isinstance(draft, str) else "model", damaged=damaged),
        "prompts": len(prompts),
        "tokens": sum(map(len, plain)),
        "tokens_per_round": decoder.statistics.tokens_per_round,
        "differing_prompts": len(gaps),
        "logit_gap_median": sorted(gaps)[len(gaps) // 2] if gaps else None,
        "logit_gap_most": max(gaps, default=None),
        "not_likeliest_in_one_pass": unlikely,
        "not_likeliest_by_most": farthest,
        "passes": bool(gaps) == damaged if exact else True,
    }


def _answers(decoder: Speculator, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    for number, tokens in decoder.run(prompts, max_new_tokens=new):
        answers[number] += tokens
    return answers


# ---- what is drawn ---------------------------------------------------------------------------------------------------

_PLAIN, _CUT, _TWO = Sampling(), Sampling(temperature=0.7, top_k=4, top_p=0.9), Sampling(top_k=2)
#: what is tried → how tokens are drawn, which draft there is, whether a token ends the answer
TRIALS: dict[str, tuple[Sampling, str, bool]] = {
    "another model drafts": (_PLAIN, "other", False),
    "with top-k and top-p": (_CUT, "other", False),
    "ends within accepted runs": (_PLAIN, "other", True),
    "rounds without drafts": (_PLAIN, "lookup", True),
    "all accepted": (_PLAIN, "itself", True),
    "none accepted": (_TWO, "opposite", False),
    "Mamba1": (_PLAIN, "other", True),
    "hidden states are read": (_PLAIN, "reader", True),
    "damaged": (_PLAIN, "other", False),
}


def distribution_trials(device: str, size: Size) -> list[Trial]:
    """Every row of :data:`TRIALS`."""
    return [Trial({"law": "distribution", "trial": name}, partial(distribution, name, device, size)) for name in TRIALS]


@torch.inference_mode()
def distribution(name: str, device: str, size: Size) -> Row:
    """Draws answers and compares every pair of neighbouring tokens in them with its exact probability."""
    sampling, kind, stops = TRIALS[name]
    mixer = "mamba1" if name == "Mamba1" else "mamba2"
    target = _small(device, torch.float32, _WORDS, mixer=mixer)
    draft: Draft = "lookup"
    if kind == "itself":
        draft = target
    elif kind != "lookup":
        reads = {"draft_features": True} if kind == "reader" else {}
        draft = _small(device, torch.float32, _WORDS, seed=1, num_hidden_layers=2, **reads)
    if kind == "opposite":
        draft = _small(device, torch.float32, _WORDS, mixer=mixer, tie_word_embeddings=False)
        draft.load_state_dict(target.state_dict())
        draft.lm_head.weight.neg_()
    stop_ids = [_STOP] if stops else []
    decoder = (Damaged if name == "damaged" else Speculator)(
        target, draft, num_slots=size.slots, max_length=_ANSWER + 1, sampling=sampling, num_draft_tokens=_K,
        stop_ids=stop_ids,
    )  # fmt: skip
    answers = Counter(map(tuple, _answers(decoder, [[1]] * size.samples, _ANSWER)))
    exact = exact_probabilities(target, sampling, stop_ids)
    found = {answer: count / size.samples for answer, count in answers.items()}
    farthest, chance = 0.0, 0.0
    for place in range(_ANSWER - 1):
        p, q = (_pairs(probabilities, place) for probabilities in (exact, found))
        farthest = max(farthest, sum(abs(p[pair] - q[pair]) for pair in p.keys() | q.keys()) / 2)
        # What the mean distance of that many draws from their own distribution is.
        chance = max(chance, sum(math.sqrt(2 * s * (1 - s) / math.pi / size.samples) for s in p.values()) / 2)
    near = farthest <= max(_FURTHEST, 2 * chance)
    return {
        "law": "distribution",
        "trial": name,
        "samples": size.samples,
        "tokens_per_round": decoder.statistics.tokens_per_round,
        "accepted": decoder.statistics.accepted,
        "total_variation": farthest,
        "by_chance": chance,
        "impossible": sum(count for answer, count in answers.items() if answer not in exact),
        "damaged": name == "damaged",
        "passes": near != (name == "damaged"),
    }


def exact_probabilities(
    target: HybridForCausalLM, sampling: Sampling, stop_ids: Sequence[int]
) -> dict[tuple[int, ...], float]:
    """Of every answer to the prompt ``[1]`` that can be, by passes over whole texts."""
    going_on: dict[tuple[int, ...], float] = {(): 1.0}
    ended: dict[tuple[int, ...], float] = {}
    for _ in range(_ANSWER):
        prefixes = torch.tensor([[1, *prefix] for prefix in going_on], device=target.device)
        logits_NV = torch.cat([target(input_ids=part).logits[:, -1] for part in prefixes.split(1024)])
        settings = settings_of(**sampling.settings(), rows=len(logits_NV), device=logits_NV.device)
        p_NV: Tensor = weights(logits_NV, settings)
        p_NV = (p_NV / p_NV.sum(-1, keepdim=True)).cpu()
        following = {
            (*prefix, token): before * p
            for (prefix, before), row in zip(going_on.items(), p_NV.tolist(), strict=True)
            for token, p in enumerate(row)
            if p > 0
        }
        ended |= {answer: p for answer, p in following.items() if answer[-1] in stop_ids}
        going_on = {answer: p for answer, p in following.items() if answer[-1] not in stop_ids}
    return ended | going_on


def _pairs(probabilities: dict[tuple[int, ...], float], place: int) -> Counter[tuple[int, ...]]:
    """Probabilities of the tokens at ``place`` and after it; shorter where an answer ends before."""
    pairs: Counter[tuple[int, ...]] = Counter()
    for answer, p in probabilities.items():
        pairs[answer[place : place + 2]] += p  # type: ignore[assignment]
    return pairs


def table(result: dict[str, Any]) -> Table:
    """The rows of :func:`run` for people."""
    shown = Table(title=result["machine"]["device"], title_justify="left", box=SIMPLE, pad_edge=False)
    for heading in ("law", "tried", "found", "tokens/round", ""):
        shown.add_column(heading)
    for row in result["results"]:
        if "error" in row:
            tried = row["trial"] if "trial" in row else f"{row['dtype']}, {row['draft']}"
            shown.add_row(row["law"], tried, failure(row))
            continue
        if row["law"] == "greedy":
            tried = f"{row['dtype']}, {row['draft']}{', damaged' if row['damaged'] else ''}: {row['prompts']} prompts"
            found = f"{row['differing_prompts']} of them differ"
            if row["differing_prompts"]:
                found += f", by logits {row['logit_gap_median']:.3g} apart, at most {row['logit_gap_most']:.3g}"
        else:
            tried = f"{row['trial']}: {row['samples']:,} samples"
            found = f"total variation {row['total_variation']:.4f} (by chance {row['by_chance']:.4f})"
        shown.add_row(
            row["law"], tried, found, f"{row['tokens_per_round']:.2f}", "holds" if row["passes"] else "DOES NOT HOLD"
        )
    return shown
