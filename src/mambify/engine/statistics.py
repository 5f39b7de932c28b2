"""What a run of speculation did."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest


def rounded_shares(shares: Iterable[float | None]) -> list[float | None]:
    """Acceptance by position for programs; ``None`` where a position was never tried."""
    return [None if share is None else round(share, 4) for share in shares]


def written_shares(shares: Iterable[float | None]) -> list[str]:
    """The same in percent, for people."""
    return ["–" if share is None else f"{share:.0%}" for share in shares]


@dataclass
class Statistics:
    """What a run did. A round of a slot is a pass of the target in which the slot took part; K may differ by pass.

    Attributes:
        tokens: given out in all.
        seconds: that passes took; the reading of prompts is left out.
        passes: K → passes of the target over K drafted tokens, whatever number of slots took part in each.
        drafted: K → rounds of a slot that drafted K tokens.
        accepted: in how many rounds of a slot 0, 1, … drafted tokens were accepted.
        whole: in how many of these that was all that the round drafted.
    """

    tokens: int = 0
    seconds: float = 0.0
    passes: dict[int, int] = field(default_factory=dict)
    drafted: dict[int, int] = field(default_factory=dict)
    accepted: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)

    def add(self, num_drafted: int, accepted: Sequence[int], *, passes: int, seconds: float) -> None:
        """Counts passes with this K, of whose rounds ``accepted`` says how many kept 0, 1, … tokens."""
        missing = len(accepted) - len(self.accepted)
        self.accepted, self.whole = self.accepted + [0] * missing, self.whole + [0] * missing
        self.accepted = [a + b for a, b in zip(self.accepted, accepted, strict=True)]
        self.whole[num_drafted] += accepted[num_drafted]
        self.drafted[num_drafted] = self.drafted.get(num_drafted, 0) + sum(accepted)
        self.passes[num_drafted] = self.passes.get(num_drafted, 0) + passes
        self.seconds += seconds

    def include(self, other: Statistics) -> None:
        """Counts what another run did as well."""
        self.tokens, self.seconds = self.tokens + other.tokens, self.seconds + other.seconds
        for mine, theirs in ((self.passes, other.passes), (self.drafted, other.drafted)):
            mine |= {K: mine.get(K, 0) + count for K, count in theirs.items()}
        both = (self.accepted, other.accepted), (self.whole, other.whole)
        self.accepted, self.whole = ([sum(pair) for pair in zip_longest(*lists, fillvalue=0)] for lists in both)

    @property
    def rounds(self) -> int:
        """Passes of the target."""
        return sum(self.passes.values())

    @property
    def tokens_per_round(self) -> float:
        """Of one slot."""
        return self.tokens / max(sum(self.accepted), 1)

    @property
    def acceptance_by_position(self) -> list[float | None]:
        """Of the rounds that drafted k tokens and kept all before the k-th, the share that kept it as well.

        ``None`` where there was no such round.
        """
        shares: list[float | None] = []
        for k in range(1, len(self.accepted)):
            tried, kept = sum(self.accepted[k - 1 :]) - self.whole[k - 1], sum(self.accepted[k:])
            shares.append(kept / tried if tried else None)
        return shares
