"""Stage ``align``: every new mixer learns to give what the attention at its place gave.

One pass of the teacher serves all layers; each mixer sees the teacher's own hidden states, so no error adds up from
layer to layer and no gradient crosses one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambify.distill.losses import normalized_mse
from mambify.distill.trainer import StageTrainer
from mambify.mixers import Mixer, MixerContext
from mambify.model import HybridForCausalLM, MixerTrace


class MixerAligner(nn.Module):
    """The new mixers of a student beside the teacher they learn from.

    The teacher is held outside the module tree: it is neither trained, saved nor wrapped.
    """

    def __init__(self, student: HybridForCausalLM, teacher: HybridForCausalLM, layers: list[int]) -> None:
        super().__init__()
        self.layers = layers
        self.mixers = nn.ModuleDict({str(i): student.model.layers[i].mixer for i in layers})  # type: ignore[misc]
        self._teacher = [teacher]

    def traces(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Any:
        """What the teacher's mixers at these layers read and gave, layer by layer."""
        return self._teacher[0].model.mixer_traces(input_ids, self.layers, position_ids)

    def layer_loss(self, trace: MixerTrace) -> Tensor:
        """Normalised squared error of one layer's mixer: 0 is exact, 1 is what saying nothing costs."""
        mixer = self.mixers[str(trace.layer_idx)]
        assert isinstance(mixer, Mixer)
        output_BTD, _ = mixer(trace.input_BTD, MixerContext(seq_idx_BT=trace.seq_idx_BT), None)
        return normalized_mse(output_BTD, trace.output_BTD)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **_: Any) -> dict[str, Any]:
        """Mean loss over the layers, and each layer's own."""
        losses = {trace.layer_idx: self.layer_loss(trace) for trace in self.traces(input_ids, position_ids)}
        return {
            "loss": torch.stack(list(losses.values())).mean(),
            "metrics": {f"layer_{i:02d}": loss for i, loss in losses.items()},
        }


class AlignTrainer(StageTrainer):
    """Takes each layer's backward pass at once, while the teacher is still on its way up: one layer's graph at a time.

    Each layer's loss counts fully (they share no parameter); the mean is reported.
    """

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        aligner = self.accelerator.unwrap_model(model)
        inputs = self._prepare_inputs(inputs)
        losses = {}
        with self.compute_loss_context_manager():
            for trace in aligner.traces(inputs["input_ids"], inputs.get("position_ids")):
                with torch.enable_grad():
                    loss = aligner.layer_loss(trace)
                    self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
                losses[trace.layer_idx] = loss.detach()
        self.add_metrics({f"layer_{i:02d}": loss for i, loss in losses.items()})
        mean = torch.stack(list(losses.values())).mean()
        return self.watch(mean / self.current_gradient_accumulation_steps)
