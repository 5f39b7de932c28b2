"""How much of what a draft puts forward its target accepts: expected from the probabilities of a text, and measured.

A drafted token is accepted with probability Σ_v min(p(v), q(v)), where p is the target's distribution and q the
draft's. That k of them in a row are accepted has, over texts x that the target itself has written, the expectation

    E_x [ min(1, q/p)(x_1) · … · min(1, q/p)(x_{k−1}) · Σ_v min(p_k(v), q_k(v)) ],

because x is accepted with min(p, q)(x) = p(x) · min(1, q/p)(x). One pass over a text gives it for every place and every
k at once. On a text of another origin, and at temperature 0, it is an approximation: then the measured figures count.

Letters: N blocks, T tokens, V vocabulary, C positions of a chunk, K drafted tokens.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambify.engine import Sampling, Speculator, rounded_shares
from mambify.errors import InvalidOptionError
from mambify.feature_input import shifted
from mambify.model import HybridForCausalLM
from mambify.trimmed_head import TrimmedHead

_CHUNK = 512
_IGNORED = -100


class Expected(NamedTuple):
    """What the probabilities of a text let one expect.

    Attributes:
        positions: places of the text that were counted as the beginning of a round.
        acceptance_by_position: the k-th drafted token's chance, where all before it were accepted; ``None`` where they
            never are.
        tokens_per_round: 1 and the chances that k drafted tokens are accepted, for k up to K.
        known_probability: what the target gives to the words that the draft's head knows: no draft with these words
            can do better at the first position. 1 where it knows all.
    """

    positions: int
    acceptance_by_position: tuple[float | None, ...]
    tokens_per_round: float
    known_probability: float


@torch.inference_mode()
def expected_acceptance(
    target: HybridForCausalLM,
    draft: HybridForCausalLM,
    input_ids: Tensor,
    labels: Tensor,
    *,
    num_draft_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 4,
) -> Expected:
    """The expectation over a text that both models read.

    Args:
        input_ids, labels: ``[N, T]``; a round may begin where K labels in a row are not -100.
        num_draft_tokens: K; 1 of a draft that reads its target's hidden states, for it guesses what follows from its
            own, which no pass over a text has.
        temperature: of both distributions; at 0 a token is accepted where both have the same likeliest one.

    Raises:
        InvalidOptionError: blocks too short for K tokens, none of their tokens counted, or such a draft and another K.
    """
    K = num_draft_tokens
    if draft.config.draft_features and K != 1:
        raise InvalidOptionError(
            f"of a draft that reads hidden states a text tells about the first token of a round, not about {K}: take "
            "num_draft_tokens=1, or measured_acceptance"
        )
    if input_ids.shape[1] <= K:
        raise InvalidOptionError(f"blocks of {input_ids.shape[1]} tokens are too short for {K} drafted tokens")
    reached_K = torch.zeros(K, dtype=torch.float64)
    count, known, seen = 0, 0.0, 0
    for ids_BT, labels_BT in zip(input_ids.split(batch_size), labels.split(batch_size), strict=True):
        ids_BT = ids_BT.to(target.device)
        overlap_BT, ratio_BT, known_BT = _compared(target, draft, ids_BT, temperature)
        counts_BT = labels_BT[:, 1:] != _IGNORED
        whole_BT = counts_BT.unfold(1, K, 1).all(-1)
        run_BTK = ratio_BT.unfold(1, K, 1).cumprod(-1)
        before_BTK = torch.nn.functional.pad(run_BTK[..., :-1], (1, 0), value=1.0)
        accepted_BTK = before_BTK * overlap_BT.unfold(1, K, 1)
        reached_K += accepted_BTK[whole_BT].sum(0)
        count += int(whole_BT.sum())
        known += float(known_BT[counts_BT].sum())
        seen += int(counts_BT.sum())
    if not count:
        raise InvalidOptionError(f"no {K} tokens in a row of this text are counted: give longer answers, or more text")
    chances = [1.0, *(reached_K / count).tolist()]
    by_position = tuple(after / before if before else None for before, after in itertools.pairwise(chances))
    return Expected(count, by_position, sum(chances), known / seen)


def _compared(
    target: HybridForCausalLM, draft: HybridForCausalLM, ids_BT: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token but the first: Σ min(p, q), min(1, q/p) of the token itself, Σ p over known words; float64."""
    theirs_BTD = target.model.stream(ids_BT)
    features_BTD = shifted(theirs_BTD) if draft.config.draft_features else None
    states = ((target, theirs_BTD), (draft, draft.model.stream(ids_BT, features_BTD)))
    target_MD, draft_MD = (model.model.norm(x_BTD[:, :-1]).flatten(0, 1) for model, x_BTD in states)
    known_W = draft.lm_head.token_ids if isinstance(draft.lm_head, TrimmedHead) else None
    columns: list[Tensor] = []
    for target_CD, draft_CD, token_C in zip(
        target_MD.split(_CHUNK), draft_MD.split(_CHUNK), ids_BT[:, 1:].flatten().split(_CHUNK), strict=True
    ):
        p_CV = _distribution(target.lm_head(target_CD), temperature)
        q_CV = _distribution(draft.lm_head(draft_CD), temperature)
        p_C, q_C = (x.gather(1, token_C[:, None])[:, 0] for x in (p_CV, q_CV))
        known_C = torch.ones_like(p_C) if known_W is None else p_CV[:, known_W].sum(-1)
        overlap_C = torch.minimum(p_CV, q_CV).sum(-1)
        # At temperature 0 a text that is not the likeliest one has p = 0: what counts is whether the two agree.
        ratio_C = (q_C / p_C).clamp(max=1.0) if temperature else overlap_C
        columns.append(torch.stack([overlap_C, ratio_C, known_C]).double().cpu())
    overlap_BT, ratio_BT, known_BT = torch.cat(columns, 1).view(3, len(ids_BT), -1)
    return overlap_BT, ratio_BT, known_BT


def _distribution(logits_CV: Tensor, temperature: float) -> Tensor:
    logits_CV = logits_CV.float()
    if not temperature:
        return torch.zeros_like(logits_CV).scatter_(-1, logits_CV.argmax(-1, keepdim=True), 1.0)
    return (logits_CV / temperature).softmax(-1)


def measured_acceptance(
    target: HybridForCausalLM,
    draft: HybridForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    num_draft_tokens: int,
    temperature: float,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    num_slots: int = 1,
) -> dict[str, Any]:
    """What speculation does on ``prompts``: tokens per round, acceptance by position, tokens a second.

    Raises:
        InvalidOptionError: see :class:`mambify.engine.Speculator`.
    """
    decoder = Speculator(
        target,
        draft,
        num_slots=min(num_slots, len(prompts)),
        max_length=max(map(len, prompts)) + max_new_tokens,
        sampling=Sampling(temperature=temperature, seed=0),
        num_draft_tokens=num_draft_tokens,
        stop_ids=stop_ids,
    )
    start = time.perf_counter()
    for _ in decoder.run(prompts, max_new_tokens=max_new_tokens):
        pass
    seconds = time.perf_counter() - start
    found = decoder.statistics
    return {
        "temperature": temperature,
        "num_draft_tokens": num_draft_tokens,
        "num_prompts": len(prompts),
        "num_tokens": found.tokens,
        "tokens_per_round": round(found.tokens_per_round, 4),
        "acceptance_by_position": rounded_shares(found.acceptance_by_position),
        "tokens_per_second": round(found.tokens / seconds, 2),
    }
