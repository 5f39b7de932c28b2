"""The decoding loop itself: prefill once, then one token a step, each yielded as soon as it is known.

Letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambify.decode.sampling import Sampling
from mambify.errors import InvalidOptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def decode_steps(
    model: PreTrainedModel,
    input_ids_BT: Tensor,
    sampling: Sampling,
    *,
    attention_mask_BT: Tensor | None = None,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every row, ``[B]``, ``sampling.max_new_tokens`` times unless the caller stops before.

    Knows nothing of ends: a row goes on after its end token, and whoever reads it ignores that. The forward pass of a
    token runs when the one after it is asked for, so stopping early costs nothing.

    Args:
        model: a causal language model of transformers' kind.
        attention_mask_BT: 0 where a row is padded, on the left.
        seed: of the draws; torch's global generator where ``None``.

    Raises:
        InvalidOptionError: an empty prompt, or padding on the right.
    """
    mask_BT, position_ids = left_padding(input_ids_BT, attention_mask_BT)
    generator = None if seed is None else torch.Generator(input_ids_BT.device).manual_seed(seed)
    tokens_BT, cache = input_ids_BT, None  # the model makes the kind of cache it needs
    for step in range(sampling.max_new_tokens):
        if step and mask_BT is not None and position_ids is not None:
            mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=1)
            position_ids = position_ids[:, -1:] + 1
        output = model(
            input_ids=tokens_BT,
            attention_mask=mask_BT,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        next_B = sampling.draw(output.logits[:, -1], generator)
        yield next_B
        tokens_BT = next_B[:, None]


def left_padding(input_ids_BT: Tensor, mask_BT: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask, and positions that count from each row's first token; both None where nothing is padded."""
    if input_ids_BT.dim() != 2 or not input_ids_BT.numel():
        raise InvalidOptionError(f"input_ids must be [B, T] and not empty, got shape {list(input_ids_BT.shape)}")
    if mask_BT is None:
        return None, None
    if mask_BT.shape != input_ids_BT.shape:
        raise InvalidOptionError(
            f"attention_mask has shape {list(mask_BT.shape)}, input_ids {list(input_ids_BT.shape)}"
        )
    mask_BT = mask_BT.long()
    if bool(mask_BT.all()):
        return None, None
    if not bool(mask_BT[:, -1].all()) or bool((mask_BT.diff(dim=-1) < 0).any()):
        raise InvalidOptionError("prompts of different lengths must be padded on the left: attention_mask 0…0 1…1")
    return mask_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0)
