"""Speculative decoding of prompts: what users give, put into the terms of :class:`mambify.engine.Speculator`.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from mambify.decode.sampling import Sampling
from mambify.engine import Drawing, Speculator
from mambify.errors import UnsupportedError
from mambify.model import HybridForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Draft: TypeAlias = PreTrainedModel | Literal["lookup"]


def speculator(
    target: PreTrainedModel,
    draft: Draft,
    sampling: Sampling,
    *,
    max_length: int,
    stop_ids: Sequence[int],
    num_draft_tokens: int = 4,
    num_slots: int = 1,
) -> Speculator:
    """Buffers and, on a GPU, recorded rounds for ``num_slots`` sequences; to be kept where many prompts follow.

    Args:
        draft: a smaller model of the same vocabulary, or ``"lookup"``: what followed the last tokens earlier on.
        max_length: the most tokens of a sequence, prompt included.

    Raises:
        InvalidOptionError: a number of draft tokens out of range, or a draft of another vocabulary.
        UnsupportedError: target or draft is not one of this package's models.
    """
    for role, model in (("target", target), ("draft", draft)):
        if not isinstance(model, HybridForCausalLM) and model != "lookup":
            raise UnsupportedError(
                f"speculation needs a {role} of this package, not a {type(model).__name__}: load it with mambify.load"
            )
    return Speculator(
        target,
        draft,
        num_slots=num_slots,
        max_length=max_length,
        drawing=Drawing(sampling.temperature, sampling.top_k, sampling.top_p),
        num_draft_tokens=num_draft_tokens,
        stop_ids=stop_ids,
    )


def seed_or_drawn(seed: int | None) -> int:
    """``seed``, or one from torch's global generator."""
    return int(torch.randint(2**40, ())) if seed is None else seed


def generate_speculatively(
    target: PreTrainedModel,
    input_ids_BT: Tensor,
    draft: Draft,
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    padding_id: int,
    num_draft_tokens: int = 4,
    mask_BT: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """As :func:`mambify.generate` without a draft: the same tokens at temperature 0, the same distribution above.

    Args:
        mask_BT: 0 where a row is padded, on the left.
        seed: of the draws; drawn from torch's global generator where ``None``.
    """
    real_BT = torch.ones_like(input_ids_BT) if mask_BT is None else mask_BT
    rows = [ids_T[real_T.bool()].tolist() for ids_T, real_T in zip(input_ids_BT, real_BT, strict=True)]
    decoder = speculator(
        target,
        draft,
        sampling,
        max_length=max(map(len, rows), default=0) + sampling.max_new_tokens,
        stop_ids=stop_ids,
        num_draft_tokens=num_draft_tokens,
        num_slots=len(rows),
    )
    first = seed_or_drawn(seed)
    answers: list[list[int]] = [[] for _ in rows]
    seeds = [first * 1_000_003 + number for number in range(len(rows))]
    for number, tokens in decoder.run(rows, max_new_tokens=sampling.max_new_tokens, seeds=seeds):
        answers[number] += tokens
    width = max(map(len, answers))
    padded = [answer + [padding_id] * (width - len(answer)) for answer in answers]
    return torch.cat([input_ids_BT, torch.tensor(padded, device=input_ids_BT.device)], dim=1)
