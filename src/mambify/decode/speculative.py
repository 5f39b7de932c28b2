"""Speculative decoding of prompts: what users give, put into the terms of :class:`mambify.engine.Speculator`.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from mambify.conversion.cut import cut
from mambify.decode.sampling import Sampling
from mambify.engine import Drawing, Speculator
from mambify.errors import InvalidOptionError, UnsupportedError
from mambify.model import HybridForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Draft: TypeAlias = PreTrainedModel | str

CUT, LOOKUP = "cut:", "lookup"


def speculator(
    target: PreTrainedModel,
    draft: Draft,
    sampling: Sampling,
    *,
    max_length: int,
    stop_ids: Sequence[int],
    num_draft_tokens: int | tuple[int, int] | str = 4,
    num_slots: int = 1,
) -> Speculator:
    """Buffers and, on a GPU, recorded rounds for ``num_slots`` sequences; to be kept where many prompts follow.

    Args:
        draft: a smaller model of the same vocabulary; ``"lookup"``: what followed the last tokens earlier on;
            ``"cut:2"``: two layers of the target itself, the first and the last.
        num_draft_tokens: 1 to 16, a range of such numbers, or ``"auto"``: see :class:`mambify.engine.Speculator`.
        max_length: the most tokens of a sequence, prompt included.

    Raises:
        InvalidOptionError: a number of draft tokens out of range, or a draft of another vocabulary.
        UnsupportedError: target or draft is not one of this package's models.
    """
    for role, model in (("target", target), ("draft", draft)):
        if not isinstance(model, HybridForCausalLM) and not (role == "draft" and is_made_of_target(model)):
            raise UnsupportedError(
                f"speculation needs a {role} of this package, not a {type(model).__name__}: load it with mambify.load"
            )
    assert isinstance(target, HybridForCausalLM)
    return Speculator(
        target,
        _cut_draft(target, draft) if isinstance(draft, str) and draft.startswith(CUT) else draft,  # type: ignore[arg-type]
        num_slots=num_slots,
        max_length=max_length,
        drawing=Drawing(sampling.temperature, sampling.top_k, sampling.top_p),
        num_draft_tokens=num_draft_tokens,
        stop_ids=stop_ids,
    )


def is_made_of_target(draft: object) -> bool:
    """Whether a draft is no model to be loaded: ``"lookup"`` or ``"cut:2"``."""
    return isinstance(draft, str) and (draft == LOOKUP or draft.startswith(CUT))


def _cut_draft(target: HybridForCausalLM, name: str) -> HybridForCausalLM:
    count = name.removeprefix(CUT)
    if not count.isdecimal():
        raise InvalidOptionError(f"'{name}' does not say how many layers of the target draft: write it like cut:2")
    return cut(target, int(count))


def share_with_target(draft: HybridForCausalLM, target: HybridForCausalLM) -> None:
    """Gives a draft the target's embeddings and head where its own are the same: they are then in memory once."""
    ours, theirs = draft.model.embed_tokens, target.model.embed_tokens
    if _equal(ours.weight, theirs.weight):
        draft.model.embed_tokens = theirs
    if type(draft.lm_head) is type(target.lm_head) and _equal(draft.lm_head.weight, target.lm_head.weight):
        draft.lm_head = target.lm_head


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


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
    num_draft_tokens: int | tuple[int, int] | str = 4,
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
