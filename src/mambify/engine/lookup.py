"""Drafting without a model: what followed the last time the present tokens occurred (prompt lookup).

Letters: S slots, L places of the history, K drafted tokens, W tokens that must agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WIDTH = 2  # W


def look_up(history_SL: Tensor, length_S: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The tokens that followed the latest earlier occurrence of each slot's last two tokens.

    Args:
        history_SL: tokens by position.
        length_S: how many of them count.

    Returns:
        ``[S, K]`` int64, and how many of them were found, ``[S]``: 0 where the last tokens are new.
    """
    S, L = history_SL.shape
    row_S1 = torch.arange(S, device=history_SL.device)[:, None]
    place_W = torch.arange(-_WIDTH, 0, device=history_SL.device)
    tail_SW = history_SL[row_S1, (length_S[:, None] + place_W).clamp(min=0)]
    windows_SEW = history_SL.unfold(1, _WIDTH, 1)
    end_E = torch.arange(_WIDTH, L + 1, device=history_SL.device)  # the place after each window
    agrees_SE = (windows_SEW == tail_SW[:, None]).all(-1) & (end_E < length_S[:, None])
    end_S = (agrees_SE * end_E).amax(-1)
    place_SK = end_S[:, None] + torch.arange(num_tokens, device=history_SL.device)
    drafted_SK = history_SL[row_S1, place_SK.clamp(max=L - 1)].long()
    found_S = (length_S - end_S).clamp(min=0, max=num_tokens).masked_fill(end_S == 0, 0)
    return drafted_SK, found_S
