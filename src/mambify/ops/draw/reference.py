"""Drawing a token in pure torch. Letters: S rows, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.draw.settings import Settings
from mambify.ops.ring import is_all_false


def draw_tokens(logits_SV: Tensor, uniform_S: Tensor, settings: Settings) -> Tensor:
    """See :func:`mambify.ops.draw.draw_tokens`."""
    if is_all_false(settings.temperature_S > 0):  # nothing is drawn, so nothing needs to be weighed
        return logits_SV.argmax(-1)
    return quantiles(weights(logits_SV, settings), uniform_S)


def weights(logits_SV: Tensor, settings: Settings) -> Tensor:
    """What each token weighs, float64: the likeliest 1, those that are cut off 0."""
    exact_SV = logits_SV.double()
    temperature_S1, top_k_S1, top_p_S1, min_p_S1 = (value[:, None] for value in settings)
    vocabulary = exact_SV.shape[-1]
    if not is_all_false(top_k_S1 > 0):
        ordered_SV = exact_SV.sort(-1, descending=True).values
        kth_S1 = ordered_SV.gather(-1, (top_k_S1.long() - 1).clamp(0, vocabulary - 1))
        exact_SV = exact_SV.masked_fill((top_k_S1 > 0) & (exact_SV < kth_S1), -torch.inf)
    softened_S1 = temperature_S1.double().masked_fill(temperature_S1 == 0, 1.0)
    weight_SV = ((exact_SV - exact_SV.amax(-1, keepdim=True)) / softened_S1).exp()

    if not is_all_false(top_p_S1 < 1.0):
        ordered_SV = weight_SV.sort(-1, descending=True).values
        sum_SV = ordered_SV.cumsum(-1)
        # The last token that is needed: all likelier ones together fall short of the share asked for.
        short_S1 = (sum_SV < top_p_S1 * sum_SV[:, -1:]).sum(-1, keepdim=True).clamp(max=vocabulary - 1)
        weight_SV = weight_SV.masked_fill((top_p_S1 < 1.0) & (weight_SV < ordered_SV.gather(-1, short_S1)), 0.0)
    weight_SV = weight_SV.masked_fill(weight_SV < min_p_S1, 0.0)
    likeliest_SV = torch.zeros_like(weight_SV).scatter_(-1, logits_SV.argmax(-1, keepdim=True), 1.0)
    return torch.where(temperature_S1 == 0, likeliest_SV, weight_SV)


def quantiles(weight_SV: Tensor, uniform_S: Tensor) -> Tensor:
    """The token at which the running sum of the weights passes the row's share of their sum, ``[S]``; the last of all
    where weights are no numbers."""
    upto_SV = weight_SV.cumsum(-1)
    target_S1 = uniform_S[:, None].double() * upto_SV[:, -1:]
    last_S1 = torch.searchsorted(upto_SV, upto_SV[:, -1:].contiguous())  # the last with weight
    found_S1 = torch.searchsorted(upto_SV, target_S1, right=True).minimum(last_S1)
    return found_S1.clamp(max=upto_SV.shape[-1] - 1)[:, 0]
