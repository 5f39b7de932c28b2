"""How fast a model was, and how fast its device could have made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mambify.engine import Speculator, written_shares
from mambify.machine import memory_bandwidth


@dataclass(frozen=True)
class Speed:
    """Of one answer, prompt aside.

    Attributes:
        tokens: given out.
        seconds: in rounds, without the reading of prompts.
        tokens_per_round: 1 without a draft.
        acceptance_by_position: see :class:`~mambify.engine.Statistics`; empty without a draft.
        drafted: K → rounds that drafted K tokens.
        share_of_bandwidth: bytes that the rounds had to read (weights and what layers carry, of target and draft) a
            second, of the bytes a second that the device copies; ``None`` where that was not asked for.
    """

    tokens: int
    seconds: float
    tokens_per_round: float
    acceptance_by_position: list[float | None]
    drafted: dict[int, int]
    share_of_bandwidth: float | None = None

    @classmethod
    def of(cls, decoder: Speculator, *, prompt_tokens: int, with_bandwidth: bool = False) -> Speed:
        """What the decoder's last run was; of one prompt.

        Args:
            with_bandwidth: measures the device's bandwidth once, which takes a moment.
        """
        found = decoder.statistics
        share = None
        if with_bandwidth and found.seconds:
            length = prompt_tokens + found.tokens // 2
            bytes_read = sum(passes * decoder.read_bytes(length, K) for K, passes in found.passes.items())
            share = bytes_read / found.seconds / memory_bandwidth(str(decoder.device))
        acceptance = found.acceptance_by_position
        return cls(found.tokens, found.seconds, found.tokens_per_round, acceptance, found.drafted, share)

    @property
    def tokens_per_second(self) -> float:
        """Of decoding alone."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def line(self) -> str:
        """For people."""
        said = f"{self.tokens} tokens, {self.tokens_per_second:.1f} a second"
        if self.acceptance_by_position:
            shares = ", ".join(written_shares(self.acceptance_by_position))
            said += f", {self.tokens_per_round:.2f} a round; accepted by position: {shares}"
        if self.share_of_bandwidth is not None:
            said += f"; {self.share_of_bandwidth:.0%} of the memory bandwidth"
        return said

    def facts(self) -> dict[str, Any]:
        """For programs."""
        return {
            "decode_seconds": round(self.seconds, 4),
            "decode_tokens_per_second": round(self.tokens_per_second, 2),
            "share_of_bandwidth": None if self.share_of_bandwidth is None else round(self.share_of_bandwidth, 4),
        }
