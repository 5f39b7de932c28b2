"""Bookkeeping between rounds in pure torch.

Letters: S slots, K drafted tokens, T = K + 1, E stops, L places, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.ring import RingPlace


def settle_round(
    token_ST: Tensor,
    kept_S: Tensor,
    next_S: Tensor,
    stops_E: Tensor,
    length_S: Tensor,
    active_S: Tensor,
    budget_S: Tensor,
    history_SL: Tensor,
    accepted_T: Tensor,
) -> tuple[Tensor, Tensor]:
    """See :func:`mambify.ops.rounds.settle_round`."""
    new_ST = torch.cat([token_ST[:, 1:], next_S[:, None]], 1).scatter_(1, kept_S[:, None], next_S[:, None])
    T = new_ST.shape[1]
    index_T = torch.arange(T, device=kept_S.device)
    stops_ST = (new_ST[..., None] == stops_E).any(-1) & (index_T <= kept_S[:, None])
    stop_S = torch.where(stops_ST.any(1), stops_ST.int().argmax(1), T)
    count_S = torch.minimum(torch.minimum(kept_S, stop_S) + 1, budget_S)
    goes_on_S = active_S & (count_S <= stop_S) & (count_S != budget_S)
    count_S = torch.where(active_S, count_S, 0)

    place_ST = length_S[:, None] + 1 + index_T
    stands_ST = index_T < count_S[:, None]
    history_SL.scatter_(1, place_ST, torch.where(stands_ST, new_ST, history_SL.gather(1, place_ST)))
    last_S = new_ST.gather(1, (count_S - 1).clamp(min=0)[:, None])[:, 0]
    token_S = token_ST[:, 0]
    token_S.copy_(torch.where(active_S, last_S, token_S))
    budget_S.sub_(count_S)
    accepted_T.index_add_(0, kept_S, active_S.long())
    return count_S, goes_on_S


def move_on(
    place: RingPlace,
    length_S: Tensor,
    count_S: Tensor | None,
    plus: int,
    folds_above: int,
    pends: bool,
    goes_on_S: Tensor | None,
) -> None:
    """See :func:`mambify.ops.rounds.move_on`."""
    taken_S = place.active_S.long() * (plus if count_S is None else count_S + plus)
    if pends:
        folded_S = place.active_S & (place.pending_S > folds_above)
        place.pending_S.masked_fill_(folded_S, 0).add_(taken_S)
    place.head_S.add_(taken_S).remainder_(place.capacity)
    length_S.add_(taken_S)
    if goes_on_S is not None:
        place.active_S.copy_(goes_on_S)


def tokens_behind(history_SL: Tensor, length_S: Tensor, first: int, count: int) -> Tensor:
    """See :func:`mambify.ops.rounds.tokens_behind`."""
    place_SC = length_S[:, None] + torch.arange(first, first + count, device=length_S.device)
    return history_SL.gather(1, place_SC.clamp(min=0))


def take_last(x_STD: Tensor, count_S: Tensor, out_SD: Tensor) -> None:
    """See :func:`mambify.ops.rounds.take_last`."""
    last_S11 = (count_S - 1).clamp(min=0)[:, None, None]
    out_SD.copy_(x_STD.gather(1, last_S11.expand(-1, 1, x_STD.shape[-1]))[:, 0])
