"""Bookkeeping between rounds as Triton kernels: a program a slot, or one for many slots.

Letters: S slots, K drafted tokens, T = K + 1, E stop tokens, L places of the history, R places of a ring, D hidden
size.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.ring import RingPlace

_SLOTS = 128  # a program of move_on
_WIDTH = 1024  # numbers of a hidden state that a program of take_last copies


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
    S, T = token_ST.shape
    count_S, goes_on_S = torch.empty_like(kept_S), torch.empty_like(active_S)
    _settle[(S,)](
        token_ST, kept_S, next_S, stops_E, length_S, active_S, budget_S, history_SL, accepted_T, count_S, goes_on_S,
        token_ST.stride(0), history_SL.shape[1], K=T - 1, E=len(stops_E), BLOCK_T=triton.next_power_of_2(T),
        BLOCK_E=triton.next_power_of_2(max(len(stops_E), 1)), num_warps=1,
    )  # fmt: skip
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
    slots = len(length_S)
    _move_on[(triton.cdiv(slots, _SLOTS),)](
        place.head_S, place.pending_S, place.active_S, length_S, count_S, goes_on_S, slots,
        PLUS=plus, LIMIT=folds_above, PENDS=pends, R=place.capacity, HAS_COUNT=count_S is not None,
        ENDS=goes_on_S is not None, BLOCK=_SLOTS, num_warps=4,
    )  # fmt: skip


def tokens_behind(history_SL: Tensor, length_S: Tensor, first: int, count: int) -> Tensor:
    """See :func:`mambify.ops.rounds.tokens_behind`."""
    slots, places = history_SL.shape
    token_SC = history_SL.new_empty(slots, count)
    block = triton.next_power_of_2(count)
    _tokens[(slots,)](history_SL, length_S, token_SC, places, FIRST=first, COUNT=count, BLOCK=block, num_warps=1)
    return token_SC


def take_last(x_STD: Tensor, count_S: Tensor, out_SD: Tensor) -> None:
    """See :func:`mambify.ops.rounds.take_last`."""
    slots, new, width = x_STD.shape
    _take[(triton.cdiv(width, _WIDTH), slots)](x_STD, count_S, out_SD, T=new, D=width, BLOCK=_WIDTH, num_warps=4)


@triton.jit
def _settle(
    token_ptr, kept_ptr, next_ptr, stops_ptr, length_ptr, active_ptr, budget_ptr, history_ptr, accepted_ptr,
    count_ptr, goes_on_ptr, token_s, L, K: tl.constexpr, E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    t, e = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    kept, following = tl.load(kept_ptr + s), tl.load(next_ptr + s)
    token = tl.load(token_ptr + s * token_s + 1 + t, mask=t < K, other=0)
    token = tl.where(t == kept, following, token)
    stops = tl.load(stops_ptr + e, mask=e < E, other=0)
    equal = (token[:, None] == stops[None, :]) & (e < E)[None, :] & (t <= kept)[:, None]
    stop = tl.min(tl.where(tl.max(equal.to(tl.int32), 1) > 0, t, K + 1), 0).to(tl.int64)
    active, budget = tl.load(active_ptr + s) != 0, tl.load(budget_ptr + s)
    count = tl.minimum(tl.minimum(kept, stop) + 1, budget)
    goes_on = active & (count <= stop) & (count != budget)
    count = tl.where(active, count, 0)
    tl.store(history_ptr + s * L + tl.load(length_ptr + s) + 1 + t, token, mask=t < count)
    last = tl.sum(tl.where(t == count - 1, token, 0), 0)
    tl.store(token_ptr + s * token_s, last, mask=count > 0)
    tl.store(budget_ptr + s, budget - count)
    tl.atomic_add(accepted_ptr + kept, tl.full([], 1, tl.int64), mask=active)
    tl.store(count_ptr + s, count)
    tl.store(goes_on_ptr + s, goes_on)


@triton.jit
def _move_on(
    head_ptr, pending_ptr, active_ptr, length_ptr, count_ptr, goes_on_ptr, slots, PLUS: tl.constexpr,
    LIMIT: tl.constexpr, PENDS: tl.constexpr, R: tl.constexpr, HAS_COUNT: tl.constexpr, ENDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = s < slots
    here = inside & (tl.load(active_ptr + s, mask=inside, other=0) != 0)
    count = tl.full([BLOCK], PLUS, tl.int64)
    if HAS_COUNT:
        count += tl.load(count_ptr + s, mask=here, other=0)
    if PENDS:
        pending = tl.load(pending_ptr + s, mask=here, other=0)
        tl.store(pending_ptr + s, tl.where(pending > LIMIT, 0, pending) + count, mask=here)
    tl.store(head_ptr + s, (tl.load(head_ptr + s, mask=here, other=0) + count) & (R - 1), mask=here)
    tl.store(length_ptr + s, tl.load(length_ptr + s, mask=here, other=0) + count, mask=here)
    if ENDS:
        tl.store(active_ptr + s, tl.load(goes_on_ptr + s, mask=inside, other=0), mask=inside)


@triton.jit
def _tokens(
    history_ptr, length_ptr, token_ptr, L, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    s, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    place = tl.maximum(tl.load(length_ptr + s) + FIRST + c, 0)
    token = tl.load(history_ptr + s * L + place, mask=c < COUNT, other=0)
    tl.store(token_ptr + s * COUNT + c, token, mask=c < COUNT)


@triton.jit
def _take(x_ptr, count_ptr, out_ptr, T: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    s, d = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    last = tl.maximum(tl.load(count_ptr + s) - 1, 0)
    tl.store(out_ptr + s * D + d, tl.load(x_ptr + (s * T + last) * D + d, mask=d < D, other=0.0), mask=d < D)
