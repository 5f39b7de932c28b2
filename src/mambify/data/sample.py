"""Sampling continuations from a causal language model: the inner loop of synthesis.

Kept apart so that a faster engine can take its place: it takes token ids and gives token ids, draws from
torch's global generator (the caller seeds it), and knows nothing of templates or documents.

Letters: B rows still being written, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

# Rows that have ended are dropped from the batch once they are this share of it: copying the cache costs
# about one step, and every later step is cheaper by the rows dropped.
_COMPACT_AT = 0.125


def sample_continuations(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> list[list[int]]:
    """One sampled continuation a prompt, in order; it ends with the stop token that ended it, if one did.

    The distribution is the model's own (softmax of the logits over ``temperature``, cut by ``top_k`` and
    ``top_p`` when given): a ``generation_config`` that came with the model is not consulted, as its penalties
    would make the text differ from what the model is later asked to imitate.

    Args:
        model: A causal language model that takes ``past_key_values`` and ``logits_to_keep``.
        prompts: Non-empty lists of token ids; shorter ones are padded on the left and masked.
        max_new_tokens: Rows that have not ended by then are returned as they are.
        stop_ids: Token ids that end a row.
        temperature: Above 0.
        top_p: Keeps the smallest set of tokens with at least this probability; 1 keeps all.
        top_k: Keeps this many of the likeliest tokens; 0 keeps all.
    """
    device = model.device
    width = max(len(prompt) for prompt in prompts)
    shortest = min(len(prompt) for prompt in prompts)
    tokens_BT = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    # Without padding no mask is needed, and attention takes its faster path.
    mask_BT = None
    if shortest < width:
        mask_BT = (torch.arange(width, device=device) >= width - lengths_B[:, None]).long()
    positions_BT = (torch.arange(width, device=device) - (width - lengths_B[:, None])).clamp(min=0)
    stops = torch.tensor(sorted(stop_ids), device=device, dtype=torch.long)
    rows_B = torch.arange(len(prompts), device=device)  # which prompt each row of the batch continues
    out_BT = torch.full((len(prompts), max_new_tokens), -1, device=device)
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache: Cache | None = None  # the model makes the kind it needs
    with torch.inference_mode():
        for step in range(max_new_tokens):
            output = model(
                input_ids=tokens_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = cast("Cache", output.past_key_values)
            next_B = _draw(output.logits[:, -1].float(), temperature=temperature, top_p=top_p, top_k=top_k)
            alive_B = ~ended_B
            out_BT[rows_B[alive_B], step] = next_B[alive_B]
            ended_B = ended_B | torch.isin(next_B, stops)
            num_ended = int(ended_B.sum())
            if num_ended == len(ended_B):
                break
            tokens_BT = next_B[:, None]
            positions_BT = positions_BT[:, -1:] + 1
            if mask_BT is not None:
                mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=1)
            if num_ended > _COMPACT_AT * len(ended_B):
                keep_B = (~ended_B).nonzero()[:, 0]
                cache.reorder_cache(cast(torch.LongTensor, keep_B))
                tokens_BT, positions_BT, rows_B = tokens_BT[keep_B], positions_BT[keep_B], rows_B[keep_B]
                mask_BT = None if mask_BT is None else mask_BT[keep_B]
                ended_B = ended_B[keep_B]
    return [[token for token in row if token >= 0] for row in out_BT.tolist()]


def _draw(logits_BV: Tensor, *, temperature: float, top_p: float, top_k: int) -> Tensor:
    if temperature != 1.0:
        logits_BV = logits_BV / temperature
    # Tokens as likely as the last one that is kept are kept too, as ops.draw does it.
    if top_k:
        last_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < last_B1, -torch.inf)
    if top_p < 1.0:
        ordered_BV = logits_BV.sort(descending=True).values
        short_BV = ordered_BV.softmax(-1).cumsum(-1) < top_p  # with all likelier ones: more are needed
        last_B1 = ordered_BV.gather(1, short_BV.sum(-1, keepdim=True).clamp(max=logits_BV.shape[-1] - 1))
        logits_BV = logits_BV.masked_fill(logits_BV < last_B1, -torch.inf)
    return _invert_distribution(logits_BV)


def _invert_distribution(logits_BV: Tensor) -> Tensor:
    """One token a row from softmax(logits), by inverting the cumulative distribution at one uniform number.

    ``torch.multinomial`` draws a random number for every entry, which on a CPU takes longer than the model.
    Two levels, a group of tokens and then one in it, keep the sums short and exact. Overwrites the logits.
    """
    num_rows, num_tokens = logits_BV.shape
    width = _group_width(num_tokens)
    weights_BV = logits_BV.sub_(logits_BV.amax(-1, keepdim=True)).exp_()
    if num_tokens % width:
        weights_BV = torch.nn.functional.pad(weights_BV, (0, -num_tokens % width))
    weights_BGW = weights_BV.view(num_rows, -1, width)
    upto_BG = weights_BGW.sum(-1).double().cumsum(-1)
    target_B1 = torch.rand(num_rows, 1, dtype=torch.float64, device=logits_BV.device) * upto_BG[:, -1:]
    group_B1 = _first_above(upto_BG, target_B1)
    before_B1 = torch.nn.functional.pad(upto_BG, (1, 0)).gather(1, group_B1)
    chosen_BW = weights_BGW.gather(1, group_B1[:, :, None].expand(-1, -1, width))[:, 0].double().cumsum(-1)
    token_B1 = _first_above(chosen_BW, target_B1 - before_B1)
    return (group_B1 * width + token_B1)[:, 0]


def _group_width(num_tokens: int) -> int:
    """About the square root of ``num_tokens``; a divisor of it if one is near, so that nothing is padded."""
    root = math.isqrt(num_tokens) + 1
    return next((width for width in range(root, 4 * root) if num_tokens % width == 0), root)


def _first_above(cumulative_BN: Tensor, target_B1: Tensor) -> Tensor:
    """Index of the first entry above the target, ``[B, 1]``; entries of weight zero are never it."""
    last_B1 = torch.searchsorted(cumulative_BN, cumulative_BN[:, -1:].contiguous())  # the last with weight
    return torch.searchsorted(cumulative_BN, target_B1.contiguous(), right=True).minimum(last_B1)
