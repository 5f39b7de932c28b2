"""One-query attention in pure torch. Letters: S rows, H = G·R query heads, G key/value heads, P head dimension, L
length."""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.backends import accumulation_dtype


def decode_attention(
    q_SHP: Tensor, keys_SGLP: Tensor, values_SGLP: Tensor, lengths_S: Tensor, scaling: float, window: int | None
) -> Tensor:
    """See :func:`mambify.ops.decode_attention.decode_attention`."""
    exact = accumulation_dtype(q_SHP, keys_SGLP)
    S, G, L, P = keys_SGLP.shape
    scores_SGRL = (q_SHP.view(S, G, -1, P) @ keys_SGLP.transpose(-1, -2)).to(exact) * scaling
    place_L = torch.arange(L, device=q_SHP.device)
    seen_SL = place_L < lengths_S[:, None]
    if window is not None:
        seen_SL &= place_L >= lengths_S[:, None] - window
    weights_SGRL = scores_SGRL.masked_fill(~seen_SL[:, None, None], -torch.inf).softmax(-1)
    # What a buffer holds beyond a row's length is anything, NaN too: a weight of zero would not silence it.
    known_SGLP = values_SGLP.masked_fill(~seen_SL[:, None, :, None], 0.0)
    return (weights_SGRL.to(values_SGLP.dtype) @ known_SGLP).reshape(S, -1, P).to(q_SHP.dtype)
