"""Stage ``kd`` of a draft that reads its target's hidden states: what it is to guess with, it is trained with.

Legend: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambify.distill.graphs import StepResult, Sums, ratios
from mambify.distill.kd import KnowledgeDistiller
from mambify.feature_input import shifted
from mambify.model import HybridForCausalLM


class FeatureDistiller(KnowledgeDistiller):
    """The draft goes over the text several times, and each time it is compared with the target as any student is.

    The first time its features are the target's hidden states, then its own of the time before (as in EAGLE-3, arXiv
    2503.01840), gradients passing through. So the k-th time it has features as for the k-th token of a round.

    In decoding only the last tokens are read with the draft's own states, and attention and recurrent layers look back
    at tokens that were read with the target's. Here a pass has one kind of feature throughout: the k-th one looks back
    at tokens read as the k-th as well. That is harder, not easier, than what it is for, and each time is one ordinary
    pass over whole rows.

    Args:
        unroll: how many times.
        decay: what the loss of each time counts, as a share of the one before.
        options: as :class:`KnowledgeDistiller` takes them.
    """

    def __init__(
        self, student: HybridForCausalLM, teacher: HybridForCausalLM, *, unroll: int, decay: float, **options: Any
    ) -> None:
        super().__init__(student, teacher, **options)
        self.feature_input = student.model.feature_input  # in the tree, for it trains
        self.shares = [decay**number for number in range(unroll)]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        num_items: Tensor | None = None,
    ) -> StepResult:
        """As :meth:`KnowledgeDistiller.forward`; figures of the k-th time end in ``_k``, but for the first."""
        with torch.no_grad():
            states_BTD = self._teacher[0].stream(input_ids, position_ids=position_ids)
            teacher_BTD = self.teacher_norm(states_BTD)
        total, sums = torch.zeros((), device=input_ids.device), Sums()
        for number, share in enumerate(self.shares, start=1):
            features_BTD = shifted(states_BTD)
            if position_ids is not None:  # no token is before the first of a document
                features_BTD = features_BTD.masked_fill((position_ids == 0)[..., None], 0)
            states_BTD = self._student[0].stream(input_ids, features_BTD, position_ids=position_ids)
            part, figures = self.compare(self.norm(states_BTD), teacher_BTD, labels)
            total = total + share * part
            sums |= {f"{name}{_suffix(number)}": pair for name, pair in figures.items()}
        return StepResult(total if num_items is None else total / num_items.clamp(min=1), sums)

    def loss(self, sums: Sums) -> Tensor:
        means = ratios(sums)
        parts = [
            share * weight * means[f"{name}{_suffix(number)}"]
            for number, share in enumerate(self.shares, start=1)
            for name, weight in self.weights.items()
            if weight
        ]
        return torch.stack(parts).sum()


def _suffix(number: int) -> str:
    return "" if number == 1 else f"_{number}"
