"""How the next token is drawn from a model's logits.

Letters: B batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mambify.errors import InvalidOptionError


@dataclass(frozen=True)
class Sampling:
    """The distribution tokens are drawn from, and how many are.

    The model's own distribution at ``temperature``, cut to the ``top_k`` likeliest tokens and then to the smallest set
    that holds ``top_p`` of what is left, in transformers' order and with its warpers. A ``generation_config`` that
    came with a model is not consulted: nothing penalises a token that is not named here.

    Attributes:
        temperature: 0 always takes the likeliest token.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        max_new_tokens: the most tokens drawn for one prompt.

    Raises:
        InvalidOptionError: one of them is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise InvalidOptionError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise InvalidOptionError(f"top_k must be 0 (all) or more, not {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidOptionError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.max_new_tokens < 1:
            raise InvalidOptionError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """What tokens are drawn from, ``[B, V]`` in float32; at temperature 0 all of it on the likeliest token."""
        logits_BV = logits_BV.float()
        if self.temperature == 0.0:
            return torch.zeros_like(logits_BV).scatter_(-1, logits_BV.argmax(-1, keepdim=True), 1.0)
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        warped_BV: Tensor = warpers(None, logits_BV)  # none of them looks at the prompt
        return warped_BV.softmax(-1)

    def draw(self, logits_BV: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One token a row, ``[B]``; ``generator`` is torch's own of the device where none is given."""
        if self.temperature == 0.0:
            return logits_BV.float().argmax(-1)
        return torch.multinomial(self.probabilities(logits_BV), 1, generator=generator)[:, 0]
