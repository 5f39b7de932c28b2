"""The choice of K: what it expects, how it follows, what it refuses."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable

import pytest

from mambify.engine import Sampling, Speculator
from mambify.engine.pace import Pace, draft_counts
from mambify.errors import InvalidOptionError
from mambify.model import HybridForCausalLM


def rounds(K: int, chance: float, count: int, generator: random.Random) -> list[int]:
    accepted = [0] * 9
    for _ in range(count):
        accepted[sum(1 for _ in itertools.takewhile(lambda _: generator.random() < chance, range(K)))] += 1
    return accepted


def best(chance: float, seconds: dict[int, float]) -> int:
    return max(seconds, key=lambda K: sum(chance**k for k in range(K + 1)) / seconds[K])


@pytest.mark.parametrize("chance", [0.15, 0.4, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("step", [0.05, 0.3])
def test_it_comes_to_the_best_number(chance: float, step: float) -> None:
    """A round takes 1 and ``step`` for each drafted token; what is chosen costs at most 3% of the best's speed."""
    seconds = {K: 1.0 + step * K for K in range(1, 9)}
    pace, generator = Pace(seconds), random.Random(0)
    for _ in range(150):
        K = pace.choose()
        pace.observe(K, rounds(K, chance, 4, generator), seconds[K])

    def speed(K: int) -> float:
        return sum(chance**k for k in range(K + 1)) / seconds[K]

    assert speed(pace.choose()) > 0.97 * speed(best(chance, seconds))


def test_it_follows_when_the_text_changes() -> None:
    seconds = {K: 1.0 + 0.1 * K for K in range(1, 9)}
    pace, generator = Pace(seconds), random.Random(0)
    for chance in (0.9, 0.2, 0.9):
        for _ in range(300):
            K = pace.choose()
            pace.observe(K, rounds(K, chance, 4, generator))
        assert abs(pace.choose() - best(chance, seconds)) <= 2
        assert pace.chances()[0] == pytest.approx(chance, abs=0.1)


def test_what_longer_texts_cost_is_followed() -> None:
    """Where every round takes much longer than an empty one, whatever its K, longer drafts pay."""
    seconds = {K: 1.0 + 0.5 * K for K in range(1, 9)}
    generator = random.Random(0)
    chosen = []
    for longer in (0.0, 20.0):
        pace = Pace(seconds)
        for _ in range(200):
            K = pace.choose()
            pace.observe(K, rounds(K, 0.75, 4, generator), seconds[K] + longer)
        chosen.append(pace.choose())
    assert chosen[0] <= 3 and chosen[1] >= 6


def test_a_step_of_the_times_stays_where_it_is() -> None:
    """Seven tokens are twice as dear as six, as with another kernel: that says nothing of smaller numbers."""
    seconds = {K: (1.0 if K < 7 else 2.0) + 0.1 * K for K in range(1, 9)}
    pace, generator = Pace(seconds), random.Random(0)
    for _ in range(200):
        K = pace.choose()
        pace.observe(K, rounds(K, 0.75, 4, generator), seconds[K])
    assert abs(pace.choose() - best(0.75, seconds)) <= 1


def test_readings_that_fall_count_as_their_mean() -> None:
    """Three tokens in a third of the time of two is not believed: either reading may be the wrong one."""
    pace = Pace({1: 1.0, 2: 3.0, 3: 1.0})
    for _ in range(100):
        pace.observe(3, [4, 2, 1, 1])  # every other one is kept
    assert pace.choose() == 1


def test_one_number_is_not_chosen() -> None:
    assert Pace({4: 0.0}).choose() == 4
    assert Pace({0: 0.0}).choose() == 0


def test_what_may_be_asked_for() -> None:
    assert draft_counts(4) == (4,)
    assert draft_counts((2, 5)) == (2, 3, 4, 5)
    assert draft_counts("auto") == tuple(range(1, 9))
    for wrong in (0, 17, (0, 4), (5, 2), (3, 17)):
        with pytest.raises(InvalidOptionError, match="1 to 16"):
            draft_counts(wrong)
    for wrong in ("many", 4.0, (2, 6.0), (2, 4, 6), None):
        with pytest.raises(InvalidOptionError, match=re.escape(f"a number, a range or auto, not {wrong!r}")):
            draft_counts(wrong)


def test_rounds_are_timed_at_work(
    tiny_hybrid: Callable[..., HybridForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of idle slots kernels skip what takes time; and what a first round makes for all later ones is no part of it."""
    at_work: list[bool] = []
    steps: list[int] = []

    def looked_at(self: Speculator, K: int) -> None:
        at_work.append(bool(self.active_S.all()))
        steps.append(K)
        taken(self, K)

    taken = Speculator.step
    monkeypatch.setattr(Speculator, "step", looked_at)
    model = tiny_hybrid(["mamba2", "attention"])
    sampling = Sampling(temperature=0.0)
    speculator = Speculator(model, model, num_slots=2, max_length=20, sampling=sampling, num_draft_tokens=(2, 3))
    assert all(at_work) and steps[0] == 2 and steps.count(2) == steps.count(3) + 1
    assert not speculator.active_S.any() and set(speculator.round_seconds) == {2, 3}
