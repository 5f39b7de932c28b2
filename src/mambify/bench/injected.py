"""Speculation whose acceptance is stated instead of found, for models whose weights are random.

Random models agree about nothing, so a round of theirs says what it costs and not what it gives. Here everything is
done as in any round, the comparison of target and draft too; only how many drafted tokens stand is then drawn from
stated probabilities. Results that come from this say ``injected``.

Letters: S slots, K drafted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambify.engine import Speculator
from mambify.engine.speculate import NUMBERS, Draft
from mambify.errors import InvalidOptionError
from mambify.model import HybridForCausalLM
from mambify.ops.draw import uniforms


class InjectedSpeculator(Speculator):
    """A :class:`Speculator` that accepts the k-th drafted token, where those before it stand, with ``rates[k]``.

    Args:
        rates: as many probabilities as a round may draft tokens.
        settings: as :class:`Speculator` takes them; by default every round drafts as many tokens as there are rates.
    """

    def __init__(self, target: HybridForCausalLM, draft: Draft, *, rates: Sequence[float], **settings: Any) -> None:
        self._rates_K = torch.tensor(list(rates), dtype=torch.float32, device=target.device)
        super().__init__(target, draft, **{"num_draft_tokens": len(rates)} | settings)

    def _accept(
        self, logits_STV: Tensor, draft_SKW: Tensor | None, num_drafted_S: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        _, next_S = super()._accept(logits_STV, draft_SKW, num_drafted_S)
        K = logits_STV.shape[1] - 1
        # The numbers of the tests: they decide nothing else.
        number_SN = uniforms(self._seed_S, self.target.length_S, 2 * K, apart=NUMBERS)
        stands_SK = number_SN[:, K:] < self._rates_K[:K]
        kept_S = stands_SK.long().cumprod(1).sum(1)
        return kept_S if num_drafted_S is None else torch.minimum(kept_S, num_drafted_S), next_S


def rates_for(tokens_per_round: float, num_draft_tokens: int) -> list[float]:
    """The one probability at every position that gives so many tokens a round, 1 + a + a² + … + a^K.

    Raises:
        InvalidOptionError: fewer than one token a round, or more than K + 1.
    """
    if not 1 <= tokens_per_round <= num_draft_tokens + 1:
        raise InvalidOptionError(
            f"{num_draft_tokens} drafted tokens give 1 to {num_draft_tokens + 1} tokens a round, not {tokens_per_round}"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        enough = sum(middle**k for k in range(num_draft_tokens + 1)) >= tokens_per_round
        low, high = (low, middle) if enough else (middle, high)
    return [high] * num_draft_tokens
