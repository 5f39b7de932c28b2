"""The bookkeeping between two rounds of speculation, each part of it one launch: on a GPU dozens of kernels for a few
numbers take as long as a small model's layers.

Letters: S slots, K drafted tokens, T = K + 1, E stop tokens, L places of the history, R places of a ring, D hidden
size.
"""

from __future__ import annotations

from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.ring import RingPlace
from mambify.ops.rounds import reference

if HAS_TRITON:
    from mambify.ops.rounds import triton as kernels

__all__ = ["move_on", "settle_round", "take_last", "tokens_behind"]


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
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What a round gave: the kept tokens and the one after them, up to a stop token or the end of the budget.

    In active slots they are written into the history behind place ``length``, the last one becomes the slot's token,
    the budget shrinks, and the round is counted under the number of tokens that were kept. All integers are int64.

    Args:
        token_ST: what the target read: each slot's token, in place of which the last one is written, and the K tokens
            put forward. Rows may lie apart.
        kept_S: how many of the K stand.
        next_S: the token after these.
        stops_E: tokens that end a sequence.
        length_S: tokens read before the round; only read.
        active_S: only read: what is to be done with the layers' states goes by it.
        budget_S, history_SL, accepted_T: changed in place; ``L > length + T``.
        backend: "auto", "reference" or "triton".

    Returns:
        How many tokens stand, ``[S]``, and which slots go on, ``[S]`` of bool.

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    S, T = token_ST.shape
    each = {"kept_S": kept_S, "next_S": next_S, "length_S": length_S, "active_S": active_S, "budget_S": budget_S}
    for name, value in each.items():
        check_shape("settle_round", name, value, (S,))
    if len(accepted_T) < T:
        raise ValueError(f"settle_round: accepted_T has {len(accepted_T)} places, and {T - 1} tokens may be kept")
    parts = kept_S, next_S, stops_E, length_S, active_S, budget_S, history_SL, accepted_T
    supported = all(part.is_contiguous() for part in parts) and token_ST.stride(1) == 1
    chosen = pick_backend("settle_round", backend, backends_on(kept_S.device, supported=supported))
    run = reference.settle_round if chosen == "reference" else kernels.settle_round
    return run(token_ST, *parts)


def move_on(
    place: RingPlace,
    length_S: Tensor,
    count_S: Tensor | None,
    *,
    plus: int = 0,
    folds_above: int | None = None,
    pends: bool = True,
    goes_on_S: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Moves active slots on by ``count + plus`` tokens, or back where that is negative, in rings and in their length.

    Args:
        place: changed in place.
        length_S: tokens of each slot, changed in place.
        count_S: ``None`` for 0 in all slots.
        folds_above: slots in which more was pending than this have had it folded (:meth:`RingPlace.folds_above`);
            ``None`` where nothing was.
        pends: the tokens are not in the states yet.
        goes_on_S: which slots are active from then on, written into ``place``; ``None`` for the same.
        backend: "auto", "reference" or "triton".

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    each = {"length_S": length_S, "count_S": count_S, "goes_on_S": goes_on_S}
    for name, value in each.items():
        check_shape("move_on", name, value, tuple(place.head_S.shape))
    given = place.head_S, place.pending_S, place.active_S, *each.values()
    supported = all(part is None or part.is_contiguous() for part in given)
    chosen = pick_backend("move_on", backend, backends_on(length_S.device, supported=supported))
    limit = place.capacity if folds_above is None else folds_above
    run = reference.move_on if chosen == "reference" else kernels.move_on
    run(place, length_S, count_S, plus, limit, pends, goes_on_S)


def tokens_behind(history_SL: Tensor, length_S: Tensor, first: int, count: int, *, backend: str = "auto") -> Tensor:
    """Tokens ``[S, count]`` of texts from place ``length + first`` on; for places before the text its first token.

    Args:
        history_SL: tokens by position; ``L ≥ length + first + count``.
        backend: "auto", "reference" or "triton".

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    check_shape("tokens_behind", "length_S", length_S, (len(history_SL),))
    supported = history_SL.is_contiguous() and length_S.is_contiguous()
    chosen = pick_backend("tokens_behind", backend, backends_on(length_S.device, supported=supported))
    run = reference.tokens_behind if chosen == "reference" else kernels.tokens_behind
    return run(history_SL, length_S, first, count)


def take_last(x_STD: Tensor, count_S: Tensor, out_SD: Tensor, *, backend: str = "auto") -> None:
    """Writes into ``out`` what each slot has at the last of ``count`` places; at the first where that is 0.

    Args:
        x_STD, out_SD: of one dtype.
        backend: "auto", "reference" or "triton".

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    slots, _, width = x_STD.shape
    check_shape("take_last", "count_S", count_S, (slots,))
    check_shape("take_last", "out_SD", out_SD, (slots, width))
    supported = all(part.is_contiguous() for part in (x_STD, count_S, out_SD)) and x_STD.dtype == out_SD.dtype
    chosen = pick_backend("take_last", backend, backends_on(x_STD.device, supported=supported))
    run = reference.take_last if chosen == "reference" else kernels.take_last
    run(x_STD, count_S, out_SD)
