"""Prompts as users give them, as lists of token ids; and the limits they must keep.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mambify.errors import InvalidOptionError
from mambify.language_model import position_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rows_of(input_ids: Tensor | Sequence[Sequence[int]], mask_BT: Tensor | None = None) -> list[list[int]]:
    """The prompts without padding.

    Args:
        input_ids: ``[B, T]``, or lists of any length.
        mask_BT: 0 where a row of a tensor is padded, on the left.

    Raises:
        InvalidOptionError: no prompt, an empty one, text, padding on the right, or a mask of another shape.
    """
    given: object = input_ids
    if isinstance(given, str) or (isinstance(given, Sequence) and any(isinstance(row, str) for row in given)):
        raise InvalidOptionError(
            "input_ids are token ids and not text: give [tokenizer.encode(text)], or let "
            "mambify.stream(model, tokenizer, text) do it"
        )
    if not isinstance(input_ids, Tensor):
        if mask_BT is not None:
            raise InvalidOptionError("lists of token ids need no attention_mask: give one with a tensor")
        if not input_ids or any(isinstance(row, int) or not len(row) for row in input_ids):
            raise InvalidOptionError("input_ids must be lists of token ids, one a prompt, and none of them empty")
        return [list(map(int, row)) for row in input_ids]
    if input_ids.dim() != 2 or not input_ids.numel():
        raise InvalidOptionError(f"input_ids must be [B, T] and not empty, got shape {list(input_ids.shape)}")
    if mask_BT is None:
        rows: list[list[int]] = input_ids.tolist()
        return rows
    if mask_BT.shape != input_ids.shape:
        raise InvalidOptionError(f"attention_mask has shape {list(mask_BT.shape)}, input_ids {list(input_ids.shape)}")
    mask_BT = mask_BT.long()
    if not bool(mask_BT[:, -1].all()) or bool((mask_BT.diff(dim=-1) < 0).any()):
        raise InvalidOptionError("prompts of different lengths must be padded on the left: attention_mask 0…0 1…1")
    return [ids_T[real_T.bool()].tolist() for ids_T, real_T in zip(input_ids, mask_BT, strict=True)]


def require_count(max_new_tokens: int) -> None:
    """Raises InvalidOptionError unless there is a token to draw."""
    if max_new_tokens < 1:
        raise InvalidOptionError(f"max_new_tokens must be at least 1, not {max_new_tokens}")


def require_positions(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuses what would pass the model's positions; see :func:`mambify.language_model.position_limit`.

    Raises:
        InvalidOptionError: the prompt and what follows it may pass the model's positions.
    """
    limit = position_limit(model.config)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise InvalidOptionError(
            f"a prompt of {prompt_tokens} tokens and {max_new_tokens} new ones pass the {limit} positions that the "
            f"model's attention knows: at most {max(limit - prompt_tokens, 0)} new tokens fit (whoever wants more all "
            "the same sets model.config.max_position_embeddings)"
        )
