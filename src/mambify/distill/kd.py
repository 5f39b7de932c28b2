"""Stage ``kd``: the whole student learns the teacher's next-token distribution (arXiv 2408.15237, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mambify.distill.graphs import StepResult, Sums, ratios
from mambify.distill.layers import LayerPair
from mambify.distill.losses import IGNORE, next_token_labels
from mambify.distill.trainer import DistillationStage, Unit, scale_gradients
from mambify.model import HybridForCausalLM
from mambify.ops.linear_kl import linear_kl


class KnowledgeDistiller(DistillationStage):
    """The student beside its teacher, layer by layer; what they share is there once."""

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
        self.embed_tokens, self.norm, self.lm_head = student.model.embed_tokens, student.model.norm, student.lm_head
        self.teacher_embed_tokens, self.teacher_norm = teacher.model.embed_tokens, teacher.model.norm
        self.teacher_lm_head = teacher.lm_head
        self.pairs = nn.ModuleList(
            LayerPair(theirs, ours)  # type: ignore[arg-type]
            for theirs, ours in zip(teacher.model.layers, student.model.layers, strict=True)
        )
        self._models = [teacher.model, student.model]
        self.weights: dict[str, Any] = {"kl_weight": kl_weight, "ce_weight": ce_weight, "temperature": temperature}

    @property
    def outside(self) -> tuple[nn.Module, ...]:
        return tuple(self._models)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        num_items: Tensor | None = None,
    ) -> StepResult:
        """kl_weight · KL + ce_weight · cross-entropy, summed over the tokens of one micro-batch; and its figures.

        Args:
            input_ids, labels: ``[B, T]``.
            position_ids: ``[B, T]`` of packed documents.
            num_items: the loss is divided by it, where that cannot wait until the step's gradients are in.
        """
        teacher_BTD = student_BTD = self.embed_tokens(input_ids)
        if self.teacher_embed_tokens is not self.embed_tokens:
            teacher_BTD = self.teacher_embed_tokens(input_ids)
        theirs, ours = (model.layer_contexts(student_BTD, position_ids)[0] for model in self._models)
        for pair, their_context, our_context in zip(self.pairs, theirs, ours, strict=True):
            teacher_BTD, student_BTD = pair(teacher_BTD, student_BTD, their_context, our_context)
        with torch.no_grad():
            teacher_BTD = self.teacher_norm(teacher_BTD)
        parts = linear_kl(
            self.norm(student_BTD).flatten(0, 1),
            self.lm_head.weight,
            teacher_BTD.flatten(0, 1),
            self.teacher_lm_head.weight,
            next_token_labels(labels),
            ignore_index=IGNORE,
            **self.weights,
        )
        count = parts.num_positions
        sums = {"kl": torch.stack([parts.kl, count]), "top1_agreement": torch.stack([parts.agreement, count])}
        if self.weights["ce_weight"]:
            sums["ce"] = torch.stack([parts.ce, count])
        return StepResult(parts.total if num_items is None else parts.total / num_items.clamp(min=1), sums)

    def accumulate_gradients(
        self, forward: Callable[..., Any], batch: dict[str, Tensor], backward: Callable[[Tensor], None]
    ) -> StepResult:
        known = ("input_ids", "labels", "position_ids", "num_items")
        result: StepResult = forward(**{name: batch[name] for name in known if name in batch})
        backward(result.loss)
        return StepResult(result.loss.detach(), {name: pair.detach() for name, pair in result.sums.items()})

    def finish_gradients(self, sums: Sums) -> None:
        scale_gradients(self.parameters(), sums["kl"][1].clamp(min=1).reciprocal())

    def loss(self, sums: Sums) -> Tensor:
        means = ratios(sums)
        loss: Tensor = self.weights["kl_weight"] * means["kl"]
        return loss + self.weights["ce_weight"] * means["ce"] if "ce" in means else loss

    def units(self) -> Iterator[Unit]:
        for pair in self.pairs:
            assert isinstance(pair, LayerPair)
            for trained in (pair.student.mixer, pair.student.mlp):
                if any(p.requires_grad for p in trained.parameters()):
                    if trained is pair.student.mixer:
                        yield from (Unit(child) for child in trained.children() if isinstance(child, nn.Linear))
                    yield Unit(trained)
            yield Unit(pair)
        if self.embed_tokens.weight is not self.lm_head.weight:
            yield Unit(self.embed_tokens)
        yield Unit(self)


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks blocks; the first label of a row is never predicted, so it is not counted either."""
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    if "labels" in batch:
        batch["labels"][:, 0] = IGNORE
    return batch
