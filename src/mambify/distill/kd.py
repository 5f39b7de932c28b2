"""Stage ``kd``: the whole student learns the teacher's next-token distribution (arXiv 2408.15237, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambify.distill.graphs import StepResult
from mambify.distill.losses import IGNORE, head_loss, next_token_labels
from mambify.distill.trainer import DistillationStage
from mambify.model import HybridForCausalLM


class KnowledgeDistiller(DistillationStage):
    """The student beside its teacher; ``forward`` gives kl_weight · KL + ce_weight · cross-entropy a token.

    The teacher is held outside the module tree: it is neither trained, saved nor wrapped. What is frozen it shares
    with the student.
    """

    def __init__(
        self,
        student: HybridForCausalLM,
        teacher: HybridForCausalLM,
        *,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.student = student
        self._teacher = [teacher]
        self.weights: dict[str, Any] = {"kl_weight": kl_weight, "ce_weight": ce_weight, "temperature": temperature}

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_items: Tensor, position_ids: Tensor | None = None
    ) -> StepResult:
        """Loss and figures of one micro-batch; the loss is divided by ``num_items``, the labels of the whole step."""
        teacher = self._teacher[0]
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        with torch.no_grad():
            teacher_BTD = teacher.model(**inputs).last_hidden_state
        student_BTD = self.student.model(**inputs).last_hidden_state
        parts = head_loss(
            student_BTD.flatten(0, 1),
            self.student.lm_head.weight,
            teacher_BTD.flatten(0, 1),
            teacher.lm_head.weight,
            next_token_labels(labels),
            **self.weights,
        )
        count = parts.num_positions.clamp(min=1)
        metrics = {"kl": parts.kl / count, "top1_agreement": parts.agreement / count}
        if self.weights["ce_weight"]:
            metrics["ce"] = parts.ce / count
        return StepResult(parts.total / num_items.clamp(min=1), metrics)

    def accumulate_gradients(
        self, forward: Callable[..., Any], batch: dict[str, Tensor], backward: Callable[[Tensor], None]
    ) -> StepResult:
        result: StepResult = forward(**{name: tensor for name, tensor in batch.items() if name != "scale"})
        backward(result.loss)
        return StepResult(result.loss.detach(), result.metrics)


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks blocks; the first label of a row is never predicted, so it is not counted either."""
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    if "labels" in batch:
        batch["labels"][:, 0] = IGNORE
    return batch
