"""Stage ``hidden``: every block with a new mixer learns to give what the teacher's block gave (arXiv 2408.10189)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mambify.distill.graphs import StepResult
from mambify.distill.layers import LayerPair, student_units
from mambify.distill.layerwise import Layerwise, each_then_next, token_errors
from mambify.distill.trainer import Unit
from mambify.mixers import MixerContext
from mambify.model import HybridForCausalLM


class HiddenAligner(Layerwise):
    """The student's blocks beside the teacher's, up to the last one with a new mixer; arguments as in the align stage.

    A block's loss is the mean length of a token's error vector over √D, after norm and MLP, which stay frozen.
    """

    def __init__(self, student: HybridForCausalLM, teacher: HybridForCausalLM, layers: list[int]) -> None:
        super().__init__()
        self.layers = layers
        self.embed_tokens = teacher.model.embed_tokens
        self.pairs = nn.ModuleList(
            LayerPair(teacher.model.layers[i], student.model.layers[i] if i in layers else None)  # type: ignore[arg-type]
            for i in range(max(layers) + 1)
        )
        self._models = [teacher.model, student.model]

    @property
    def outside(self) -> tuple[nn.Module, ...]:
        return tuple(self._models)

    def learner(self, layer: int) -> nn.Module:
        return self.pairs[layer]

    def forward(
        self, layer: int, x_BTD: Tensor, their_context: MixerContext, our_context: MixerContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's output ``[B, T, D]``, the student's error against it, and the number of tokens."""
        with torch.enable_grad():
            target_BTD, output_BTD = self.pairs[layer](x_BTD, x_BTD, their_context, our_context)
            return target_BTD, *token_errors(output_BTD, target_BTD)

    def accumulate_gradients(
        self, forward: Callable[..., Any], batch: dict[str, Tensor], backward: Callable[[Tensor], None]
    ) -> StepResult:
        """Takes each layer's backward pass while the teacher is still on its way up: one layer's graph at a time."""
        sums = {}
        x_BTD = self.embed_tokens(batch["input_ids"])
        theirs, ours = (model.layer_contexts(x_BTD, batch.get("position_ids"))[0] for model in self._models)
        for layer, contexts in enumerate(zip(theirs, ours, strict=True)):
            if layer == len(self.pairs):
                break
            x_BTD, error, count = forward(layer, x_BTD, *contexts)
            if layer in self.layers:
                backward(error)
                name, row = self.row(layer, error, count)
                sums[name] = row
        return StepResult(self.loss(sums), sums)

    def units(self) -> Iterator[Unit]:
        for pair in self.pairs:
            assert isinstance(pair, LayerPair)
            if pair.student is not None:
                yield from student_units(pair.student, backward_follows=True)
            yield Unit(pair, pair.student is not None)
        yield Unit(self.embed_tokens)

    def ahead(self) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
        yield from each_then_next(list(self.pairs), {})
