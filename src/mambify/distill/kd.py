"""Stage ``kd``: the whole student learns the teacher's next-token distribution (arXiv 2408.15237, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambify.distill.losses import IGNORE, head_loss, next_token_labels
from mambify.model import HybridForCausalLM


class KnowledgeDistiller(nn.Module):
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
        self.weights = {"kl_weight": kl_weight, "ce_weight": ce_weight, "temperature": temperature}

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Loss a token and its parts. ``num_items_in_batch`` counts the labels of all micro-batches of a step."""
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
            next_token_labels(input_ids if labels is None else labels),
            **self.weights,
        )
        count = parts.count.clamp(min=1)
        metrics = {"kl": parts.kl / count, "top1_agreement": parts.agreement / count}
        if self.weights["ce_weight"]:
            metrics["ce"] = parts.ce / count
        return {"loss": parts.total / (count if num_items_in_batch is None else num_items_in_batch), "metrics": metrics}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks blocks; the first label of a row is never predicted, so it is not counted either."""
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    if "labels" in batch:
        batch["labels"][:, 0] = IGNORE
    return batch
