"""How fast sequences grow, once their prompts have been read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mambify.engine import Speculator


@dataclass
class Pace:
    """Tokens that came while the clock ran.

    Attributes:
        tokens: all that came in that time.
        seconds: from the end of the first look at the device to the end of the last one.
        rounds: in that time.
        answers: everything that came, by prompt, the tokens before the clock ran too.
    """

    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0
    answers: list[list[int]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """0 where everything came at the first look."""
        return self.tokens / self.seconds if self.seconds else 0.0


def pace_of(
    decoder: Speculator, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, seeds: Sequence[int] | None = None
) -> Pace:
    """Decodes prompts that all sit in slots at once, from the first look on, until the first of them has ended.

    What comes later is waited for but not counted: the slots are not all busy then.
    """
    pace = Pace(answers=[[] for _ in prompts])
    count, start, rounds, since, together = len(prompts), 0.0, 0, 0, True
    pieces = decoder.run(prompts, max_new_tokens=max_new_tokens, seeds=seeds)
    for piece, (number, tokens) in enumerate(pieces):
        now = time.perf_counter()
        pace.answers[number] += tokens
        together = together and number == piece % count  # while all go on, a look gives a piece of each, in order
        if not together:
            continue
        if piece >= count:
            since += len(tokens)
        if number == count - 1:
            if not start:
                start, rounds = now, decoder.statistics.rounds
            pace.tokens, pace.seconds, pace.rounds = since, now - start, decoder.statistics.rounds - rounds
    return pace
