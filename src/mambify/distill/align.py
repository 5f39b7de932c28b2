"""Stage ``align``: every new mixer learns to give what the attention at its place gave.

One pass of the teacher serves all layers; each mixer sees the teacher's own hidden states, so no error adds up from
layer to layer and no gradient crosses one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mambify.distill.graphs import StepResult
from mambify.distill.losses import normalized_mse
from mambify.distill.trainer import DistillationStage
from mambify.mixers import Mixer, MixerContext
from mambify.model import HybridForCausalLM, MixerTrace


class MixerAligner(DistillationStage):
    """The new mixers of a student beside the teacher they learn from.

    The teacher is held outside the module tree: it is neither trained, saved nor wrapped.
    """

    def __init__(self, student: HybridForCausalLM, teacher: HybridForCausalLM, layers: list[int]) -> None:
        super().__init__()
        self.layers = layers
        self.mixers = nn.ModuleDict({str(i): student.model.layers[i].mixer for i in layers})  # type: ignore[misc]
        self._teacher = [teacher]

    def traces(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Iterator[MixerTrace]:
        """What the teacher's mixers at these layers read and gave, layer by layer."""
        return self._teacher[0].model.mixer_traces(input_ids, self.layers, position_ids)

    def forward(self, trace: MixerTrace) -> Tensor:
        """Normalised squared error of one layer's mixer: 0 is exact, 1 is what saying nothing costs."""
        mixer = self.mixers[str(trace.layer_idx)]
        assert isinstance(mixer, Mixer)
        with torch.enable_grad():
            output_BTD, _ = mixer(trace.input_BTD, MixerContext(seq_idx_BT=trace.seq_idx_BT), None)
            return normalized_mse(output_BTD, trace.output_BTD)

    def accumulate_gradients(
        self, forward: Callable[..., Any], batch: dict[str, Tensor], backward: Callable[[Tensor], None]
    ) -> StepResult:
        """Takes each layer's backward pass while the teacher is still on its way up: one layer's graph at a time.

        Each layer's loss counts fully, for they share no parameter; the mean is reported.
        """
        losses = {}
        for trace in self.traces(batch["input_ids"], batch.get("position_ids")):
            loss: Tensor = forward(trace)
            backward(loss * batch["scale"])
            losses[trace.layer_idx] = loss.detach()
        mean = torch.stack(list(losses.values())).mean()
        return StepResult(mean * batch["scale"], {f"layer_{i:02d}": loss for i, loss in losses.items()})
