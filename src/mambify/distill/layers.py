"""Layers of teacher and student as units: what of their weights is in memory at once where weights are sharded.

A layer's norms and MLP are the same modules in teacher and student. A unit that holds both sides of a layer has them
once, and they are gathered once for both: teacher and student go up through the layers side by side.

Legend: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mambify.distill.trainer import Unit
from mambify.mixers import Mixer, MixerContext
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
    """One layer of the teacher and one of the student; where one of the two has no more layers, the other's alone."""

    def __init__(self, teacher: HybridBlock | None, student: HybridBlock | None) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student

    def forward(
        self,
        teacher_BTD: Tensor | None,
        student_BTD: Tensor,
        teacher_context: MixerContext | None,
        student_context: MixerContext | None,
    ) -> tuple[Tensor | None, Tensor]:
        """Both outputs, ``[B, T, D]`` of each one's own width; gradients are kept of the student's side only."""
        if self.teacher is not None:
            with torch.no_grad():
                teacher_BTD = self.teacher(teacher_BTD, teacher_context)
        if self.student is not None:
            student_BTD = self.student(student_BTD, student_context)
        return teacher_BTD, student_BTD

    def train(self, mode: bool = True) -> LayerPair:
        """Sets the student's side; the teacher is never in training mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        if self.student is not None:
            self.student.train(mode)
        return self


def student_units(block: HybridBlock, *, backward_follows: bool = False) -> Iterator[Unit]:
    """What of a student's layer trains, in units apart from what is frozen; a mixer's matrices each alone."""
    for child in (block.mixer, block.mlp, block.input_layernorm, block.post_attention_layernorm):
        if child is not None and any(p.requires_grad for p in child.parameters()):
            yield from mixer_units(child, backward_follows=backward_follows)


def mixer_units(mixer: nn.Module, *, backward_follows: bool = False) -> Iterator[Unit]:
    """A module and before it its own matrices, if it is a mixer: decays and biases are gathered in float32."""
    if isinstance(mixer, Mixer):
        yield from (Unit(child, backward_follows) for child in mixer.children() if isinstance(child, nn.Linear))
    yield Unit(mixer, backward_follows)
