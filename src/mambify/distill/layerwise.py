"""What the stages have in common that teach each new mixer by itself, on the teacher's own hidden states.

One pass of the teacher serves all layers; no error adds up from layer to layer and no gradient crosses one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mambify.distill.graphs import Sums
from mambify.distill.trainer import DistillationStage, scale_gradients


class Layerwise(DistillationStage):
    """A loss for each layer: its error over what it is divided by, both summed over the whole step.

    Each layer's loss counts fully, for they share no parameter; the mean is reported.

    Attributes:
        layers: those whose mixer is new.
    """

    layers: list[int]

    def learner(self, layer: int) -> nn.Module:
        """What trains at this layer, and at no other."""
        raise NotImplementedError

    def finish_gradients(self, sums: Sums) -> None:
        scales = torch.stack([sums[_name(layer)][1] for layer in self.layers])
        for layer, factor in zip(self.layers, scales.clamp(min=1e-12).reciprocal().unbind(), strict=True):
            scale_gradients(self.learner(layer).parameters(), factor)

    def loss(self, sums: Sums) -> Tensor:
        pairs = torch.stack(list(sums.values()))
        return (pairs[:, 0] / pairs[:, 1].clamp(min=1e-12)).mean()

    @staticmethod
    def row(layer: int, error: Tensor, scale: Tensor) -> tuple[str, Tensor]:
        """What a layer adds to the step's sums, under its name."""
        return _name(layer), torch.stack([error.detach(), scale.detach()])


def _name(layer: int) -> str:
    return f"layer_{layer:02d}"


def token_errors(output_BTD: Tensor, target_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over tokens of ‖output − target‖₂ / √D, and the number of tokens."""
    error_BT = torch.linalg.vector_norm((output_BTD - target_BTD).float(), dim=-1)
    count = torch.ones_like(error_BT, requires_grad=False).sum()
    return error_BT.sum() * output_BTD.shape[-1] ** -0.5, count


def each_then_next(
    units: list[nn.Module], further: dict[int, list[nn.Module]]
) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Each unit, and what to begin gathering while it runs: the next one, and what is further needed at its layer.

    Layers are called one by one, each with a backward pass of its own: FSDP does not see what comes next.
    """
    for index, unit in enumerate(units):
        yield unit, [*units[index + 1 : index + 2], *further.get(index, [])]
