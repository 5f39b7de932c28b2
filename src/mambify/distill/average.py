"""An exponential moving average of what a stage trains: often a better model than the last step's, at no compute."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mambify.distill.parallel import part


class WeightAverage:
    """average ← d · average + (1 − d) · weights after each step, in float32, each process its own part of a weight.

    d is ``decay``, but (1 + n) / (10 + n) after n steps while that is less: the first steps would else be a tenth of a
    short stage's average.

    Args:
        parameters: name → what is averaged.
        decay: between 0 and 1.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.average: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    def update(self, step: int) -> None:
        """Takes in the weights after the ``step``-th step, counted from 1."""
        keep = min(self.decay, (1 + step) / (10 + step))
        ours = [part(average) for average in self.average.values()]
        torch._foreach_lerp_(ours, [part(p.detach()).float() for p in self.parameters.values()], 1 - keep)

    @torch.no_grad()
    def put(self) -> None:
        """Makes the average the weights."""
        for name, parameter in self.parameters.items():
            part(parameter).copy_(part(self.average[name]))
