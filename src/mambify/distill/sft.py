"""Stage ``sft``: the student learns the answers of conversations, as text alone."""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.distill.graphs import StepResult, Sums, ratios
from mambify.distill.losses import IGNORE, next_token_labels
from mambify.distill.towers import Towers
from mambify.distill.trainer import scale_gradients
from mambify.model import HybridForCausalLM
from mambify.ops.linear_logprob import linear_logprob


class SupervisedTuner(Towers):
    """Cross-entropy on the labelled tokens; there is no teacher in memory beside the student."""

    def __init__(self, student: HybridForCausalLM) -> None:
        super().__init__(student, None)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        num_items: Tensor | None = None,
    ) -> StepResult:
        """The loss summed over the labelled tokens of one micro-batch; arguments as in the kd stage."""
        student_BTD, _ = self.hidden_states(input_ids, position_ids)
        labels_N = next_token_labels(labels)
        logp_N = linear_logprob(student_BTD.flatten(0, 1), self.lm_head.weight, labels_N, ignore_index=IGNORE)
        loss, count = -logp_N.sum(), (labels_N != IGNORE).sum().float()
        return StepResult(
            loss if num_items is None else loss / num_items.clamp(min=1), {"ce": torch.stack([loss, count])}
        )

    def finish_gradients(self, sums: Sums) -> None:
        scale_gradients(self.parameters(), sums["ce"][1].clamp(min=1).reciprocal())

    def loss(self, sums: Sums) -> Tensor:
        return ratios(sums)["ce"]
