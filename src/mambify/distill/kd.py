"""Stages ``kd`` and ``on_policy``: the whole student learns the teacher's next-token distribution.

On a given text (arXiv 2408.15237, section 3), or on what the student itself has written (arXiv 2306.13649).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.distill.graphs import StepResult, Sums, ratios
from mambify.distill.losses import IGNORE, next_token_labels
from mambify.distill.towers import Towers
from mambify.distill.trainer import scale_gradients
from mambify.model import HybridForCausalLM
from mambify.ops.linear_kl import linear_kl


class KnowledgeDistiller(Towers):
    """The weighted sum of KL(teacher ‖ student), KL(student ‖ teacher), cross-entropy and total variation.

    Args:
        tv_weight: of 1 − Σ_v min(student, teacher), the chance that what the student drafts is refused.
        temperature: both distributions are softened by it in all but the cross-entropy.
    """

    def __init__(
        self,
        student: HybridForCausalLM,
        teacher: HybridForCausalLM,
        *,
        kl_weight: float = 1.0,
        reverse_kl_weight: float = 0.0,
        ce_weight: float = 0.0,
        tv_weight: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(student, teacher)
        self.weights = {"kl": kl_weight, "reverse_kl": reverse_kl_weight, "ce": ce_weight, "tv": tv_weight}
        self.temperature = temperature

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        num_items: Tensor | None = None,
    ) -> StepResult:
        """The loss summed over the tokens of one micro-batch, and its figures.

        Args:
            input_ids, labels: ``[B, T]``.
            position_ids: ``[B, T]`` of packed documents.
            num_items: the loss is divided by it, where that cannot wait until the step's gradients are in.
        """
        student_BTD, teacher_BTE = self.hidden_states(input_ids, position_ids)
        assert teacher_BTE is not None
        total, sums = self.compare(student_BTD, teacher_BTE, labels)
        return StepResult(total if num_items is None else total / num_items.clamp(min=1), sums)

    def compare(self, student_BTD: Tensor, teacher_BTE: Tensor, labels: Tensor) -> StepResult:
        """The summed loss of hidden states after the final norms, and its figures."""
        parts = linear_kl(
            student_BTD.flatten(0, 1),
            self.lm_head.weight,
            teacher_BTE.flatten(0, 1),
            self.teacher_lm_head.weight,
            next_token_labels(labels),
            kl_weight=self.weights["kl"],
            reverse_kl_weight=self.weights["reverse_kl"],
            ce_weight=self.weights["ce"],
            tv_weight=self.weights["tv"],
            temperature=self.temperature,
            ignore_index=IGNORE,
        )
        count = parts.num_positions
        figures = {"kl": parts.kl, "reverse_kl": parts.reverse_kl, "ce": parts.ce, "tv": parts.tv}
        # KL is always told: it is what one student is compared with another by
        sums = {name: torch.stack([x, count]) for name, x in figures.items() if name == "kl" or self.weights[name]}
        sums["top1_agreement"] = torch.stack([parts.agreement, count])
        return StepResult(parts.total, sums)

    def finish_gradients(self, sums: Sums) -> None:
        scale_gradients(self.parameters(), sums["kl"][1].clamp(min=1).reciprocal())

    def loss(self, sums: Sums) -> Tensor:
        means = ratios(sums)
        return torch.stack([weight * means[name] for name, weight in self.weights.items() if weight]).sum()
