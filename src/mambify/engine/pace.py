"""How many tokens to draft: what gives the most tokens a second, by acceptance so far and the time of a round.

A round that drafts K tokens gives 1 + a_1 + a_1·a_2 + … + a_1⋯a_K of them, where a_k is the chance that the k-th is
kept if all before it were. The chances are counted in the rounds themselves, older ones fading away. A place that was
seldom reached is taken to be like the one before it: so a longer draft is tried as soon as shorter ones are kept well,
without rounds being spent on trials. The time of a round is measured once for each K, before the first text. A larger K
takes no less time, so readings that say otherwise count as their mean; steps are left, for another kernel may begin at
some K. What rounds take longer than that as the texts grow is taken to be the same for every K, and followed as they
are seen.

All this happens on the host, between rounds, from counts that it has fetched anyway.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TypeAlias

from mambify.errors import InvalidOptionError

#: what may be asked for: a number, the least and the most, or ``"auto"``
DraftCount: TypeAlias = int | tuple[int, int] | str
#: the most tokens that a round may draft
MOST_DRAFTED = 16
#: K where it is chosen as the text goes on
AUTO = (1, 8)

_PRIOR, _PRIOR_WEIGHT = 0.7, 4.0
_FADES = 256  # rounds of a slot after which a count weighs 1/e
_FOLLOWS = 0.2  # weight of the newest reading of what rounds take longer


def draft_counts(num_draft_tokens: DraftCount) -> tuple[int, ...]:
    """The K that a run may choose from: of ``4`` itself, of ``(2, 6)`` 2 to 6, of ``"auto"`` 1 to 8.

    Raises:
        InvalidOptionError: anything else, or a number out of range.
    """
    if num_draft_tokens == "auto":
        num_draft_tokens = AUTO
    ends = (num_draft_tokens, num_draft_tokens) if isinstance(num_draft_tokens, int) else num_draft_tokens
    if not isinstance(ends, tuple) or len(ends) != 2 or not all(isinstance(end, int) for end in ends):
        raise InvalidOptionError(f"num_draft_tokens must be a number, a range or auto, not {num_draft_tokens!r}")
    low, high = ends
    if not 1 <= low <= high <= MOST_DRAFTED:
        shown = low if low == high else f"{low} to {high}"
        raise InvalidOptionError(f"num_draft_tokens must be 1 to {MOST_DRAFTED}, not {shown}")
    return tuple(range(low, high + 1))


def _never_falling(seconds: Mapping[int, float]) -> dict[int, float]:
    """The readings by K, moved as little as makes none smaller than one before it (isotonic regression)."""
    pools: list[list[float]] = []
    for K in sorted(seconds):
        pools.append([seconds[K]])
        while len(pools) > 1 and fmean(pools[-2]) >= fmean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return dict(zip(sorted(seconds), (fmean(pool) for pool in pools for _ in pool), strict=True))


class Pace:
    """Chooses K.

    Args:
        seconds: K → how long a round takes while hardly anything is in the slots.
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        most = max(seconds)
        self._seconds, self._longer = _never_falling(seconds), 0.0
        self._tried, self._kept = [0.0] * most, [0.0] * most

    def chances(self) -> list[float]:
        """a_1, a_2, … up to the largest K."""
        found, before = [], _PRIOR
        for tried, kept in zip(self._tried, self._kept, strict=True):
            before = (kept + _PRIOR_WEIGHT * before) / (tried + _PRIOR_WEIGHT)
            found.append(before)
        return found

    def choose(self) -> int:
        """The K of the next rounds."""
        if len(self._seconds) == 1:
            return next(iter(self._seconds))
        expected = list(itertools.accumulate(itertools.accumulate(self.chances(), lambda a, b: a * b), initial=1.0))
        return max(self._seconds, key=lambda k: expected[k] / max(self._seconds[k] + self._longer, 1e-9))

    def observe(self, num_drafted: int, accepted: Sequence[int], seconds: float | None = None) -> None:
        """Takes note of rounds with this K.

        Args:
            accepted: in how many of them, counted by slot, 0, 1, … tokens were kept.
            seconds: what one of them took; ``None`` where that says nothing of rounds alone.
        """
        fade = 2.718281828 ** (-sum(accepted) / _FADES)
        self._tried, self._kept = ([x * fade for x in counts] for counts in (self._tried, self._kept))
        for k in range(num_drafted):
            self._tried[k] += sum(accepted[k:])
            self._kept[k] += sum(accepted[k + 1 :])
        if seconds is not None:
            self._longer += _FOLLOWS * (seconds - self._seconds[num_drafted] - self._longer)
