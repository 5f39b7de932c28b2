"""Stage ``align``: every new mixer learns to give what the attention at its place gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mambify.distill.graphs import StepResult
from mambify.distill.layers import TeacherLayer, mixer_units
from mambify.distill.layerwise import Layerwise, each_then_next, token_errors
from mambify.distill.trainer import Unit
from mambify.mixers import Mixer, MixerContext
from mambify.model import HybridBlock, HybridForCausalLM, MixerTrace
from mambify.ops.squared_error import squared_error


class MixerAligner(Layerwise):
    """The new mixers of a student beside the teacher they learn from, up to the last layer that has one.

    Args:
        student, teacher: of the same layers.
        layers: those whose mixer is new.
        l2: the loss is the mean length of a token's error vector over √D, in place of the squared error of the mixer
            over the squared output of the attention.
    """

    def __init__(
        self, student: HybridForCausalLM, teacher: HybridForCausalLM, layers: list[int], *, l2: bool = False
    ) -> None:
        super().__init__()
        self.layers, self.l2 = layers, l2
        self.mixers = nn.ModuleDict({str(i): student.model.layers[i].mixer for i in layers})  # type: ignore[misc]
        self.embed_tokens = teacher.model.embed_tokens
        blocks = [block for block in teacher.model.layers[: max(layers) + 1] if isinstance(block, HybridBlock)]
        self.teacher_layers = nn.ModuleList(TeacherLayer(block) for block in blocks)
        self._teacher = [teacher.model]

    @property
    def outside(self) -> tuple[nn.Module, ...]:
        return tuple(self._teacher)

    def learner(self, layer: int) -> nn.Module:
        return self.mixers[str(layer)]

    def traces(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Iterator[MixerTrace]:
        """What the teacher's mixers at these layers read and gave, layer by layer."""
        x_BTD = self.embed_tokens(input_ids)
        contexts, seq_idx_BT = self._teacher[0].layer_contexts(x_BTD, position_ids)
        for index, layer in enumerate(self.teacher_layers):
            normed_BTD, y_BTD, x_BTD = layer(x_BTD, contexts[index])
            if index in self.layers:
                yield MixerTrace(index, normed_BTD, y_BTD, seq_idx_BT)

    def forward(self, trace: MixerTrace) -> tuple[Tensor, Tensor]:
        """One layer's error, and what it is to be divided by: what saying nothing would cost, or the tokens."""
        mixer = self.mixers[str(trace.layer_idx)]
        assert isinstance(mixer, Mixer)
        with torch.enable_grad():
            output_BTD, _ = mixer(trace.input_BTD, MixerContext(seq_idx_BT=trace.seq_idx_BT), None)
            if self.l2:
                return token_errors(output_BTD, trace.output_BTD)
            return squared_error(output_BTD, trace.output_BTD)

    def accumulate_gradients(
        self, forward: Callable[..., Any], batch: dict[str, Tensor], backward: Callable[[Tensor], None]
    ) -> StepResult:
        """Takes each layer's backward pass while the teacher is still on its way up: one layer's graph at a time."""
        sums = {}
        for trace in self.traces(batch["input_ids"], batch.get("position_ids")):
            error, scale = forward(trace)
            backward(error)
            name, row = self.row(trace.layer_idx, error, scale)
            sums[name] = row
        return StepResult(self.loss(sums), sums)

    def units(self) -> Iterator[Unit]:
        for layer in self.teacher_layers:
            yield Unit(layer)
        for mixer in self.mixers.values():
            yield from mixer_units(mixer, backward_follows=True)
        yield Unit(self.embed_tokens)

    def ahead(self) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
        further = {i: [unit.module for unit in mixer_units(self.mixers[str(i)])] for i in self.layers}
        yield from each_then_next(list(self.teacher_layers), further)
