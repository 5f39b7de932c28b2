"""Layers of teacher and student as units: what of their weights is in memory at once where weights are sharded.

A layer's norms and MLP are the same modules in teacher and student. A unit that holds both sides of a layer has them
once, and they are gathered once for both: teacher and student go up through the layers side by side.

Legend: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambify.mixers import MixerContext
from mambify.model import HybridBlock


class TeacherLayer(nn.Module):
    """One layer of the teacher, which also says what its mixer read and gave."""

    def __init__(self, block: HybridBlock) -> None:
        super().__init__()
        self.block = block

    @torch.no_grad()
    def forward(self, x_BTD: Tensor, context: MixerContext) -> tuple[Tensor, Tensor, Tensor]:
        """The mixer's input, its output, and the layer's output, each ``[B, T, D]``."""
        normed_BTD = self.block.input_layernorm(x_BTD)
        y_BTD, _ = self.block.mixer(normed_BTD, context, None)
        return normed_BTD, y_BTD, self.block.feed_forward(x_BTD + y_BTD)

    def train(self, mode: bool = True) -> TeacherLayer:
        """The teacher is never in training mode."""
        return super().train(False)


class LayerPair(nn.Module):
    """One layer of the teacher and the student's layer in its place."""

    def __init__(self, teacher: HybridBlock, student: HybridBlock) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student

    def forward(
        self, teacher_BTD: Tensor, student_BTD: Tensor, teacher_context: MixerContext, student_context: MixerContext
    ) -> tuple[Tensor, Tensor]:
        """Both outputs, ``[B, T, D]``; gradients are kept of the student's side only."""
        with torch.no_grad():
            teacher_BTD = self.teacher(teacher_BTD, teacher_context)
        return teacher_BTD, self.student(student_BTD, student_context)

    def train(self, mode: bool = True) -> LayerPair:
        """Sets the student's side; the teacher is never in training mode."""
        super().train(mode)
        self.teacher.eval()
        self.student.train(mode)
        return self
