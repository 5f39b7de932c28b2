"""Attention of a few queries a row in pure torch. Letters: S rows, T queries, H = G·R query heads, G key/value heads, P
head dimension, L length."""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.backends import accumulation_dtype


def decode_attention(
    q_STHP: Tensor,
    keys_SGLP: Tensor,
    values_SGLP: Tensor,
    lengths_S: Tensor,
    scaling: float,
    window: int | None,
    more: int,
) -> Tensor:
    """See :func:`mambify.ops.decode_attention.decode_attention`."""
    exact = accumulation_dtype(q_STHP, keys_SGLP)
    S, G, L, P = keys_SGLP.shape
    T = q_STHP.shape[1]
    q_SGNP = q_STHP.unflatten(2, (G, -1)).transpose(1, 2).flatten(2, 3)  # N = T·R queries of a key/value head
    scores_SGTRL = (q_SGNP @ keys_SGLP.transpose(-1, -2)).to(exact).unflatten(2, (T, -1)) * scaling
    place_L = torch.arange(L, device=q_STHP.device)
    end_ST1 = (lengths_S[:, None] + more - T + 1 + torch.arange(T, device=q_STHP.device))[..., None]
    seen_STL = place_L < end_ST1
    if window is not None:
        seen_STL &= place_L >= end_ST1 - window
    weights_SGTRL = scores_SGTRL.masked_fill(~seen_STL[:, None, :, None], -torch.inf).softmax(-1)
    # What a buffer holds beyond a row's length is anything, NaN too: a weight of zero would not silence it.
    known_SGLP = values_SGLP.masked_fill(~seen_STL.any(1)[:, None, :, None], 0.0)
    y_SGNP = weights_SGTRL.flatten(2, 3).to(values_SGLP.dtype) @ known_SGLP
    y_STHP: Tensor = y_SGNP.unflatten(2, (T, -1)).transpose(1, 2).reshape(S, T, -1, P)
    return y_STHP.to(q_STHP.dtype)
