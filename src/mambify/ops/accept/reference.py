"""Accepting drafted tokens in pure torch. Letters: S rows, K drafted tokens, T = K + 1, V vocabulary, W words that the
draft knows."""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.draw.reference import quantiles, weights
from mambify.ops.draw.settings import Settings
from mambify.ops.ring import is_all_false


def accept_drafts(
    target_STV: Tensor,
    draft_SKW: Tensor | None,
    drafted_SK: Tensor,
    uniform_ST: Tensor,
    num_drafted_S: Tensor | None,
    columns_V: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """See :func:`mambify.ops.accept.accept_drafts`."""
    S, K = drafted_SK.shape
    if num_drafted_S is None:
        num_drafted_S = torch.full((S,), K, device=drafted_SK.device)
    counts_SK = torch.arange(K, device=num_drafted_S.device) < num_drafted_S[:, None]
    if is_all_false(settings.temperature_S > 0):  # nothing is drawn, so nothing needs to be weighed
        likeliest_ST = target_STV.argmax(-1)
        num_kept_S = (counts_SK & (drafted_SK == likeliest_ST[:, :K])).cumprod(1).sum(1)
        return num_kept_S, likeliest_ST.gather(1, num_kept_S[:, None])[:, 0]
    p_STV = _probabilities(target_STV, settings)
    if draft_SKW is None:
        q_SKV = torch.zeros_like(p_STV[:, :K]).scatter_(-1, drafted_SK[..., None], 1.0)
    else:
        q_SKV = _probabilities(draft_SKW, settings)
        if columns_V is not None:
            q_SKV = q_SKV[..., columns_V.clamp(min=0)].masked_fill(columns_V < 0, 0.0)
    p_SK, q_SK = (x.gather(-1, drafted_SK[..., None])[..., 0] for x in (p_STV[:, :K], q_SKV))
    kept_SK = counts_SK & (uniform_ST[:, :K].double() * q_SK < p_SK)
    num_kept_S = kept_SK.cumprod(1).sum(1)

    place_S11 = num_kept_S[:, None, None].expand(-1, 1, p_STV.shape[-1])
    p_SV = p_STV.gather(1, place_S11)[:, 0]
    nothing_SV = torch.zeros_like(p_SV)[:, None]
    q_SV = torch.cat([q_SKV, nothing_SV], 1).gather(1, place_S11)[:, 0]
    rejected_S1 = (num_kept_S < num_drafted_S)[:, None]
    over_SV = torch.where(rejected_S1, (p_SV - q_SV).clamp(min=0), p_SV)
    # p = q but for rounding, which alone can have refused the token: it is as good as any draw from p.
    empty_S = over_SV.sum(-1) <= 0
    refused_S = torch.nn.functional.pad(drafted_SK, (0, 1)).gather(1, num_kept_S[:, None])[:, 0]
    return num_kept_S, torch.where(empty_S, refused_S, quantiles(over_SV, uniform_ST[:, K]))


def _probabilities(logits_SXV: Tensor, settings: Settings) -> Tensor:
    """What tokens are drawn from at each position, float64."""
    S, X, V = logits_SXV.shape
    each = Settings(*(value.repeat_interleave(X) for value in settings))
    weight_NV = weights(logits_SXV.reshape(S * X, V), each)
    return (weight_NV / weight_NV.sum(-1, keepdim=True)).view(S, X, V)
