"""How next tokens are drawn: one notion for everything that generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mambify.errors import InvalidOptionError
from mambify.ops.draw import settings_of

_APART = 1_000_003  # between the seeds of neighbouring rows
_MOST_SEED = 2**40  # so that all of them are int64


@dataclass(frozen=True)
class Sampling:
    """The distribution tokens are drawn from. Every default leaves the model's own as it is.

    Logits of tokens that occurred before are taken down first (``repetition_penalty``), then divided by the
    temperature; what remains of the softmax is cut to the ``top_k`` likeliest tokens, to the smallest set that holds
    ``top_p`` of what is left, and to tokens at least ``min_p`` times as likely as the likeliest: transformers' order,
    and its definitions. A ``generation_config`` that came with a model is not consulted.

    Attributes:
        temperature: 0 always takes the likeliest token.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        min_p: 0 keeps all.
        repetition_penalty: 1 penalises nothing; tokens of the prompt count as well (arXiv 1909.05858, section 4.1).
        seed: of the draws: one number, or one a row; ``None`` draws one from torch's global generator.

    Raises:
        InvalidOptionError: one of them is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise InvalidOptionError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise InvalidOptionError(f"top_k must be 0 (all) or more, not {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidOptionError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0.0 <= self.min_p <= 1.0:
            raise InvalidOptionError(f"min_p must be 0 to 1, not {self.min_p}")
        given = self.seed if isinstance(self.seed, Sequence) else [self.seed or 0]
        if any(not -_MOST_SEED <= seed <= _MOST_SEED for seed in given):
            raise InvalidOptionError(f"seeds must be between -2^40 and 2^40, not {self.seed}")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise InvalidOptionError(
                f"repetition_penalty must be above 0 (1 penalises nothing), not {self.repetition_penalty}"
            )

    def settings(self) -> dict[str, Any]:
        """As keyword arguments of :func:`mambify.ops.draw.draw_tokens` and :func:`mambify.ops.accept.accept_drafts`."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}

    def row_settings(self, rows: int, device: torch.device) -> dict[str, Any]:
        """As :meth:`settings`, as tensors of one number a row, which are then not made anew for every token."""
        return settings_of(**self.settings(), rows=rows, device=device).named()

    @property
    def penalises(self) -> bool:
        """Whether it matters which tokens occurred before."""
        return self.repetition_penalty != 1.0

    def seeds(self, rows: int) -> list[int]:
        """A seed for each row. A row of a batch with seeds of their own draws what it draws alone with that seed.

        Raises:
            InvalidOptionError: as many seeds as rows were not given.
        """
        if isinstance(self.seed, Sequence):
            if len(self.seed) != rows:
                raise InvalidOptionError(f"{len(self.seed)} seeds for {rows} rows: give one number, or one a row")
            return [seed * _APART for seed in self.seed]
        first = int(torch.randint(_MOST_SEED, ())) if self.seed is None else self.seed
        return [first * _APART + row for row in range(rows)]
