"""Drawing a token in pure torch. Letters: S rows, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_tokens(logits_SV: Tensor, uniform_S: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """See :func:`mambify.ops.draw.draw_tokens`."""
    exact_SV = logits_SV.double()
    if top_k:
        least_S1 = exact_SV.topk(min(top_k, exact_SV.shape[-1])).values[:, -1:]
        exact_SV = exact_SV.masked_fill(exact_SV < least_S1, -torch.inf)
    weight_SV = ((exact_SV - exact_SV.amax(-1, keepdim=True)) / temperature).exp()
    if top_p < 1.0:
        ordered_SV = weight_SV.sort(-1, descending=True).values
        sum_SV = ordered_SV.cumsum(-1)
        # The last token that is needed: all likelier ones together fall short of the share asked for.
        short_S1 = (sum_SV < top_p * sum_SV[:, -1:]).sum(-1, keepdim=True).clamp(max=sum_SV.shape[-1] - 1)
        weight_SV = weight_SV.masked_fill(weight_SV < ordered_SV.gather(-1, short_S1), 0.0)
    upto_SV = weight_SV.cumsum(-1)
    target_S1 = uniform_S[:, None].double() * upto_SV[:, -1:]
    last_S1 = torch.searchsorted(upto_SV, upto_SV[:, -1:].contiguous())  # the last with weight
    return torch.searchsorted(upto_SV, target_S1, right=True).minimum(last_S1)[:, 0]
