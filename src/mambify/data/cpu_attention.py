"""Attention of one query a row on a CPU, as sampling needs it.

torch's CPU kernel for scaled-dot-product attention packs keys and values into tiles, which pays for itself over
many queries. For a single one it is the larger part of a sampling step: 64 rows at 200 tokens, 9 query and 3
key/value heads of 64, bfloat16, take it 9 ms a layer, and two plain matrix products 0.6 ms.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, R query heads of a key/value head, P head
dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "mambify_single_query"


def grouped_attention(
    module: torch.nn.Module,
    q_BHTP: Tensor,
    k_BGSP: Tensor,
    v_BGSP: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling · q kᵀ) v for one query, through torch's own kernel for more; returns ``[B, T, H, P]``.

    An attention function of transformers: ``attention_mask`` is boolean, true where a key may be seen.
    """
    B, H, T, P = q_BHTP.shape
    G = k_BGSP.shape[1]
    if T != 1:
        y_BTHP, _ = sdpa_attention_forward(module, q_BHTP, k_BGSP, v_BGSP, attention_mask, scaling=scaling, **kwargs)
        return y_BTHP, None
    scores_BGRS = q_BHTP.reshape(B, G, H // G, P) @ k_BGSP.transpose(-1, -2)
    scores_BGRS = scores_BGRS.float() * (P**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores_BGRS = scores_BGRS.masked_fill(~attention_mask, -torch.inf)
    y_BGRP = scores_BGRS.softmax(-1).to(v_BGSP.dtype) @ v_BGSP
    return y_BGRP.reshape(B, 1, H, P), None


AttentionInterface.register(_NAME, grouped_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def fast_single_queries(model: PreTrainedModel) -> Iterator[None]:
    """For the block, a model on a CPU that uses torch's attention uses :func:`grouped_attention`."""
    before = model.config._attn_implementation
    if model.device.type != "cpu" or before != "sdpa":
        yield
        return
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
