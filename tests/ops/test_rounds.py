"""Bookkeeping between rounds: by example, and the kernels as the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mambify.ops.backends import HAS_TRITON
from mambify.ops.ring import RingPlace
from mambify.ops.rounds import move_on, settle_round, take_last, tokens_behind

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]


def example(**changes: Any) -> dict[str, Tensor]:
    """Four slots: two tokens stand; a stop among them; the budget ends; nobody there."""
    rows = {
        "token_ST": [[1, 11, 12, 13], [2, 21, 99, 23], [3, 31, 32, 33], [4, 41, 42, 43]],
        "kept_S": [1, 3, 2, 3],
        "next_S": [15, 25, 35, 45],
        "stops_E": [98, 99],
        "length_S": [4, 5, 6, 7],
        "budget_S": [9, 9, 2, 9],
        "accepted_T": [0, 5, 0, 1],
    }
    tensors = {name: torch.tensor(value) for name, value in (rows | changes).items()}
    return tensors | {"active_S": torch.tensor([True, True, True, False]), "history_SL": torch.zeros(4, 16).long()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_round_is_settled(backend: str) -> None:
    given = example()
    count_S, goes_on_S = settle_round(**given, backend=backend)
    assert count_S.tolist() == [2, 2, 2, 0]
    assert goes_on_S.tolist() == [True, False, False, False]
    assert given["token_ST"][:, 0].tolist() == [15, 99, 32, 4]
    assert given["budget_S"].tolist() == [7, 7, 0, 9]
    assert given["accepted_T"].tolist() == [0, 6, 1, 2]  # counted as they were kept, though a stop cuts them off
    written = [row[row > 0].tolist() for row in given["history_SL"]]
    assert written == [[11, 15], [21, 99], [31, 32], []]
    assert given["history_SL"][0, 5] == 11 and given["length_S"].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stop_after_the_kept_tokens_ends_nothing(backend: str) -> None:
    given = example(token_ST=[[1, 11, 99, 13]] * 4, kept_S=[0, 1, 2, 0])
    count_S, goes_on_S = settle_round(**given, backend=backend)
    assert count_S.tolist() == [1, 2, 2, 0]
    assert goes_on_S.tolist() == [True, True, False, False]


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(("K", "E"), [(0, 0), (0, 1), (4, 0), (5, 3), (16, 1)])
def test_the_kernel_gives_what_the_reference_gives(K: int, E: int) -> None:
    generator = torch.Generator().manual_seed(K + E)

    def drawn(high: int, *sizes: int) -> Tensor:
        return torch.randint(high, sizes, generator=generator)

    S = 37
    given = {
        "token_ST": drawn(9, S, K + 3)[:, : K + 1], "kept_S": drawn(K + 1, S), "next_S": drawn(9, S),
        "stops_E": drawn(9, E), "length_S": drawn(20, S), "active_S": drawn(3, S) > 0, "budget_S": 1 + drawn(12, S),
        "history_SL": drawn(9, S, 40), "accepted_T": drawn(9, K + 3),
    }  # fmt: skip
    results = []
    for backend in ("reference", "triton"):
        own = {name: value.clone() for name, value in given.items()}
        results.append([*settle_round(**own, backend=backend), *own.values()])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moving_on_and_back(backend: str) -> None:
    place = RingPlace.empty(150, 5, device="cpu", capacity=16)
    place.active_S[1:] = True
    place.head_S.fill_(14)
    place.pending_S.copy_(torch.arange(150) % 9)
    before, length_S = place.pending_S.clone(), torch.full((150,), 30)
    move_on(place, length_S, torch.full((150,), 3), folds_above=place.folds_above(5), backend=backend)
    assert place.head_S.tolist() == [14] + [1] * 149
    assert length_S.tolist() == [30] + [33] * 149
    kept = torch.where(before > 6, 0, before) + 3
    assert torch.equal(place.pending_S[1:], kept[1:]) and place.pending_S[0] == 0
    move_on(place, length_S, torch.full((150,), -2), backend=backend)
    assert place.head_S.tolist() == [14] + [15] * 149
    assert torch.equal(place.pending_S[1:], kept[1:] - 2) and length_S[1] == 31


@pytest.mark.parametrize("backend", BACKENDS)
def test_moving_by_one_number_for_all_as_slots_end(backend: str) -> None:
    place = RingPlace.empty(3, 1, device="cpu", capacity=16)
    place.active_S[1:] = True
    goes_on_S, length_S = torch.tensor([True, False, True]), torch.tensor([7, 8, 9])
    move_on(place, length_S, None, plus=1, pends=False, goes_on_S=goes_on_S, backend=backend)
    assert place.head_S.tolist() == [0, 1, 1] and place.pending_S.tolist() == [0, 0, 0]
    assert length_S.tolist() == [7, 9, 10] and torch.equal(place.active_S, goes_on_S)
    move_on(place, length_S, torch.tensor([2, 2, 2]), plus=-5, backend=backend)
    assert place.head_S.tolist() == [13, 1, 14] and length_S.tolist() == [4, 9, 7]


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_by_their_places(backend: str) -> None:
    history_SL, length_S = torch.arange(40).view(2, 20), torch.tensor([0, 9])
    found = [tokens_behind(history_SL, length_S, *places, backend=backend).tolist() for places in ((-1, 2), (1, 3))]
    assert found == [[[0, 0], [28, 29]], [[1, 2, 3], [30, 31, 32]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_of_what_stands_is_taken(backend: str) -> None:
    x_STD, out_SD = torch.randn(3, 4, 1030), torch.zeros(3, 1030)
    take_last(x_STD, torch.tensor([0, 1, 4]), out_SD, backend=backend)
    assert torch.equal(out_SD, x_STD[torch.arange(3), torch.tensor([0, 0, 3])])


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens may be kept"):
        settle_round(**example(accepted_T=[0, 0, 0]))
    with pytest.raises(ValueError, match="kept_S must have shape"):
        settle_round(**example(kept_S=[1, 2]))
    with pytest.raises(ValueError, match="count_S must have shape"):
        move_on(RingPlace.empty(2, 1, device="cpu"), torch.zeros(2), torch.zeros(3))
