"""Teacher and student over the same tokens, layer by layer; what they share is there once.

Legend: B batch, T tokens, D hidden size of the student, E of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn

from mambify.distill.graphs import StepResult
from mambify.distill.layers import LayerPair, student_units
from mambify.distill.trainer import DistillationStage, Unit
from mambify.mixers import MixerContext
from mambify.model import HybridBlock, HybridForCausalLM, HybridModel
from mambify.trimmed_head import TrimmedHead


class Towers(DistillationStage):
    """Base of the stages that train a whole student: it goes up through its layers, and its teacher beside it.

    The two may differ in width and number of layers; where the student was made from the teacher, each pair of layers
    shares what was kept.

    Args:
        student: of which some parameters train.
        teacher: of the same vocabulary; ``None`` where the stage needs none.
    """

    def __init__(self, student: HybridForCausalLM, teacher: HybridForCausalLM | None) -> None:
        super().__init__()
        self.embed_tokens, self.norm, self.lm_head = student.model.embed_tokens, student.model.norm, student.lm_head
        theirs: list[HybridBlock] = []
        if teacher is not None:
            self.teacher_embed_tokens, self.teacher_norm = teacher.model.embed_tokens, teacher.model.norm
            self.teacher_lm_head = teacher.lm_head
            if isinstance(student.lm_head, TrimmedHead):  # both distributions are over the words that the student knows
                self.teacher_lm_head = student.lm_head.rows_of(teacher.lm_head)
            theirs = list(teacher.model.layers)  # type: ignore[arg-type]
        ours: list[HybridBlock] = list(student.model.layers)  # type: ignore[arg-type]
        self.pairs = nn.ModuleList(LayerPair(*pair) for pair in zip_longest(theirs, ours))
        self._student = [student.model]
        self._teacher = [] if teacher is None else [teacher.model]

    @property
    def outside(self) -> tuple[nn.Module, ...]:
        return (*self._teacher, *self._student)

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """After the final norms: the student's ``[B, T, D]``, and the teacher's ``[B, T, E]`` where there is one.

        Args:
            input_ids: ``[B, T]``.
            position_ids: ``[B, T]`` of packed documents.
        """
        student_BTD: Tensor = self.embed_tokens(input_ids)
        teacher_BTE: Tensor | None = None
        theirs: list[MixerContext] = []
        if self._teacher:
            shared = self.teacher_embed_tokens is self.embed_tokens
            teacher_BTE = student_BTD if shared else self.teacher_embed_tokens(input_ids).detach()
            theirs = _contexts(self._teacher[0], teacher_BTE, position_ids)
        ours = _contexts(self._student[0], student_BTD, position_ids)
        for pair, their_context, our_context in zip_longest(self.pairs, theirs, ours):
            teacher_BTE, student_BTD = pair(teacher_BTE, student_BTD, their_context, our_context)
        if teacher_BTE is not None:
            teacher_BTE = self.teacher_norm(teacher_BTE).detach()
        return self.norm(student_BTD), teacher_BTE

    def accumulate_gradients(
        self, forward: Callable[..., Any], batch: dict[str, Tensor], backward: Callable[[Tensor], None]
    ) -> StepResult:
        result: StepResult = forward(**batch)
        backward(result.loss)
        return StepResult(result.loss.detach(), {name: pair.detach() for name, pair in result.sums.items()})

    def units(self) -> Iterator[Unit]:
        for pair in self.pairs:
            assert isinstance(pair, LayerPair)
            if pair.student is not None:
                yield from student_units(pair.student)
            yield Unit(pair)
        if any(p.requires_grad for p in self.norm.parameters()):
            yield Unit(self.norm)
        if self.embed_tokens.weight is not self.lm_head.weight:
            yield Unit(self.embed_tokens)
        yield Unit(self)


def _contexts(model: HybridModel, x_BTD: Tensor, position_ids: Tensor | None) -> list[MixerContext]:
    return model.layer_contexts(x_BTD, position_ids)[0]
