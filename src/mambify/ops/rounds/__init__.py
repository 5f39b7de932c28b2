"""The bookkeeping between two rounds of speculation, each part of it one launch: on a GPU dozens of kernels for a few
numbers take as long as a small model's layers.

Letters: S slots, K drafted tokens, T = K + 1, E stop tokens, L places of the history, R places of a ring.
"""

from __future__ import annotations

from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.ring import RingPlace
from mambify.ops.rounds import reference

if HAS_TRITON:
    from mambify.ops.rounds import triton as kernels

__all__ = ["move_on", "settle_round"]


def settle_round(
    drafted_SK: Tensor,
    kept_S: Tensor,
    next_S: Tensor,
    stops_E: Tensor,
    length_S: Tensor,
    active_S: Tensor,
    token_S: Tensor,
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
        drafted_SK: the tokens put forward.
        kept_S: how many of them stand, 0 to K.
        next_S: the token after these.
        stops_E: tokens that end a sequence.
        length_S: tokens read before the round; only read.
        active_S: only read: what is to be done with the layers' states goes by it.
        token_S, budget_S, history_SL, accepted_T: changed in place; ``L > length + T``.
        backend: "auto", "reference" or "triton".

    Returns:
        How many tokens stand, ``[S]``, and which slots go on, ``[S]`` of bool.

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    S, K = drafted_SK.shape
    each = {"kept_S": kept_S, "next_S": next_S, "length_S": length_S, "active_S": active_S}
    for name, value in (each | {"token_S": token_S, "budget_S": budget_S}).items():
        check_shape("settle_round", name, value, (S,))
    if len(accepted_T) <= K:
        raise ValueError(f"settle_round: accepted_T has {len(accepted_T)} places, and {K} tokens may be kept")
    parts = drafted_SK, kept_S, next_S, stops_E, length_S, active_S, token_S, budget_S, history_SL, accepted_T
    supported = all(part.is_contiguous() for part in parts)
    chosen = pick_backend("settle_round", backend, backends_on(kept_S.device, supported=supported))
    run = reference.settle_round if chosen == "reference" else kernels.settle_round
    return run(*parts)


def move_on(
    place: RingPlace, length_S: Tensor, count_S: Tensor, *, folds_above: int | None = None, backend: str = "auto"
) -> None:
    """Moves active slots on by ``count`` tokens, or back where that is negative, in rings and in their length.

    Args:
        place: changed in place.
        length_S: tokens of each slot, changed in place.
        folds_above: slots in which more was pending than this have had it folded (:meth:`RingPlace.folds_above`);
            ``None`` where nothing was.
        backend: "auto", "reference" or "triton".

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    check_shape("move_on", "length_S", length_S, tuple(place.head_S.shape))
    check_shape("move_on", "count_S", count_S, tuple(place.head_S.shape))
    supported = all(part.is_contiguous() for part in (place.head_S, place.pending_S, length_S, count_S))
    chosen = pick_backend("move_on", backend, backends_on(length_S.device, supported=supported))
    limit = place.capacity if folds_above is None else folds_above
    run = reference.move_on if chosen == "reference" else kernels.move_on
    run(place, length_S, count_S, limit)
