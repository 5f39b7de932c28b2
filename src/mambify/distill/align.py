"""Stage ``align``: every new mixer learns to give what the attention at its place gave.

One pass of the teacher serves all layers; each mixer sees the teacher's own hidden states, so no error adds up from
layer to layer and no gradient crosses one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mambify.distill.graphs import StepResult, Sums
from mambify.distill.layers import TeacherLayer
from mambify.distill.trainer import DistillationStage, Unit, scale_gradients
from mambify.mixers import Mixer, MixerContext
from mambify.model import HybridBlock, HybridForCausalLM, MixerTrace
from mambify.ops.squared_error import squared_error


class MixerAligner(DistillationStage):
    """The new mixers of a student beside the teacher they learn from, up to the last layer that has one.

    A layer's loss is the squared error of its mixer over the squared output of the attention there, both summed over
    the tokens of the whole step.
    """

    def __init__(self, student: HybridForCausalLM, teacher: HybridForCausalLM, layers: list[int]) -> None:
        super().__init__()
        self.layers = layers
        self.mixers = nn.ModuleDict({str(i): student.model.layers[i].mixer for i in layers})  # type: ignore[misc]
        self.embed_tokens = teacher.model.embed_tokens
        blocks = [block for block in teacher.model.layers[: max(layers) + 1] if isinstance(block, HybridBlock)]
        self.teacher_layers = nn.ModuleList(TeacherLayer(block) for block in blocks)
        self._teacher = [teacher.model]

    @property
    def outside(self) -> tuple[nn.Module, ...]:
        return tuple(self._teacher)

    def traces(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Iterator[MixerTrace]:
        """What the teacher's mixers at these layers read and gave, layer by layer."""
        x_BTD = self.embed_tokens(input_ids)
        contexts, seq_idx_BT = self._teacher[0].layer_contexts(x_BTD, position_ids)
        for index, layer in enumerate(self.teacher_layers):
            normed_BTD, y_BTD, x_BTD = layer(x_BTD, contexts[index])
            if index in self.layers:
                yield MixerTrace(index, normed_BTD, y_BTD, seq_idx_BT)

    def forward(self, trace: MixerTrace) -> tuple[Tensor, Tensor]:
        """Squared error of one layer's mixer, and what saying nothing would cost: their ratio is the loss."""
        mixer = self.mixers[str(trace.layer_idx)]
        assert isinstance(mixer, Mixer)
        with torch.enable_grad():
            output_BTD, _ = mixer(trace.input_BTD, MixerContext(seq_idx_BT=trace.seq_idx_BT), None)
            return squared_error(output_BTD, trace.output_BTD)

    def accumulate_gradients(
        self, forward: Callable[..., Any], batch: dict[str, Tensor], backward: Callable[[Tensor], None]
    ) -> StepResult:
        """Takes each layer's backward pass while the teacher is still on its way up: one layer's graph at a time.

        Each layer's loss counts fully, for they share no parameter; the mean is reported.
        """
        sums = {}
        for trace in self.traces(batch["input_ids"], batch.get("position_ids")):
            error, energy = forward(trace)
            backward(error)
            sums[f"layer_{trace.layer_idx:02d}"] = torch.stack([error.detach(), energy])
        return StepResult(self.loss(sums), sums)

    def finish_gradients(self, sums: Sums) -> None:
        energies = torch.stack([sums[f"layer_{index:02d}"][1] for index in self.layers])
        for index, factor in zip(self.layers, energies.clamp(min=1e-12).reciprocal().unbind(), strict=True):
            scale_gradients(self.mixers[str(index)].parameters(), factor)

    def loss(self, sums: Sums) -> Tensor:
        pairs = torch.stack(list(sums.values()))
        return (pairs[:, 0] / pairs[:, 1].clamp(min=1e-12)).mean()

    def units(self) -> Iterator[Unit]:
        for layer in self.teacher_layers:
            yield Unit(layer)
        for mixer in self.mixers.values():
            yield from (Unit(child, True) for child in mixer.children() if isinstance(child, nn.Linear))
            yield Unit(mixer, True)
        yield Unit(self.embed_tokens)

    def ahead(self) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
        """Layers are called one by one, each with a backward pass of its own: FSDP does not see what comes next."""
        for index, layer in enumerate(self.teacher_layers):
            following: list[nn.Module] = list(self.teacher_layers[index + 1 : index + 2])
            if index in self.layers:
                mixer = self.mixers[str(index)]
                following += [mixer, *(child for child in mixer.children() if isinstance(child, nn.Linear))]
            yield layer, following
