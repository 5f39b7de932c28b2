"""What may draft for a model, by the names that users give."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from mambify.conversion.cut import cut
from mambify.errors import InvalidOptionError
from mambify.families.load import load_config
from mambify.model import HybridForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Draft: TypeAlias = PreTrainedModel | str | None

CUT, LOOKUP = "cut:", "lookup"


def is_made_of_target(draft: object) -> bool:
    """Whether a draft is no model to be loaded: ``"lookup"`` or ``"cut:2"``."""
    return isinstance(draft, str) and (draft == LOOKUP or draft.startswith(CUT))


def cut_if_named(draft: Draft, target: HybridForCausalLM) -> Draft:
    """Of ``"cut:2"`` two layers of the target, which share its weights; any other draft as it is.

    Raises:
        InvalidOptionError: the name says no number of layers, or one that the target does not have.
    """
    if not (isinstance(draft, str) and draft.startswith(CUT)):
        return draft
    count = draft.removeprefix(CUT)
    if not count.isdecimal():
        raise InvalidOptionError(f"'{draft}' does not say how many layers of the target draft: write it like cut:2")
    return cut(target, int(count))


def require_drafts(names: Iterable[str]) -> None:
    """Checks that every draft that is a model is there, before work goes into others.

    Raises:
        UnknownSourceError, UnsupportedError: as :func:`mambify.families.load.load`.
    """
    for name in names:
        if not is_made_of_target(name):
            load_config(name)


def share_with_target(draft: HybridForCausalLM, target: HybridForCausalLM) -> None:
    """Gives a draft the target's embeddings and head where its own are the same: they are then in memory once."""
    ours, theirs = draft.model.embed_tokens, target.model.embed_tokens
    if _equal(ours.weight, theirs.weight):
        draft.model.embed_tokens = theirs
    if type(draft.lm_head) is type(target.lm_head) and _equal(draft.lm_head.weight, target.lm_head.weight):
        draft.lm_head = target.lm_head


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
