"""One forward and backward pass as a CUDA graph.

A training step of a small model is thousands of short kernels, and launching them takes the host longer than running
them takes the GPU. Shapes never change within a stage, so the step is recorded once and replayed.

Each of several processes with whole copies of the weights records and replays its own; their gradients are added up
after the replay. Where weights are sharded, gathering them is part of the step, and nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

_WARM_UP = 3

#: name → ``[2]``: a sum over what a step trains on, and what it is to be divided by
Sums = dict[str, Tensor]


def ratios(sums: Sums) -> dict[str, Tensor]:
    """What sums and counts come to: name → sum over count."""
    return {name: pair[0] / pair[1].clamp(min=1e-12) for name, pair in sums.items()}


class StepResult(NamedTuple):
    """What one micro-batch gave, beside the gradients in the parameters.

    Attributes:
        loss: what went into the backward pass.
        sums: what the figures of the log are made of.
    """

    loss: Tensor
    sums: Sums

    @property
    def metrics(self) -> dict[str, Tensor]:
        """The figures of this micro-batch alone."""
        return ratios(self.sums)


class GraphedStep:
    """Records ``step(batch)``, which adds gradients to ``parameters``, and replays it for batches of the same shape.

    Args:
        step: forward and backward; must not wait for the device, nor change any tensor but gradients.
        example: a batch on the GPU.
        accumulates: whether gradients of several replays are added up before the optimizer runs.
    """

    def __init__(
        self,
        step: Callable[[dict[str, Tensor]], StepResult],
        parameters: Sequence[nn.Parameter],
        example: dict[str, Tensor],
        *,
        accumulates: bool,
    ) -> None:
        self._parameters, self._accumulates = list(parameters), accumulates
        self._batch = {name: tensor.clone() for name, tensor in example.items()}
        held = [p.grad for p in self._parameters]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._forget_gradients()
                step(self._batch)
        torch.cuda.current_stream().wait_stream(side)
        self._forget_gradients()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = step(self._batch)
        self._gradients = [p.grad for p in self._parameters]
        for parameter, gradient in zip(self._parameters, held, strict=True):
            parameter.grad = gradient

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def fits(self, batch: dict[str, Tensor]) -> bool:
        """Whether ``batch`` has the shapes that were recorded."""
        return {k: v.shape for k, v in batch.items()} == {k: v.shape for k, v in self._batch.items()}

    def __call__(self, batch: dict[str, Tensor]) -> StepResult:
        """Replays the step on ``batch``."""
        for name, tensor in batch.items():
            self._batch[name].copy_(tensor, non_blocking=True)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is not None:
                parameter.grad.add_(gradient)
            else:
                parameter.grad = gradient.clone() if self._accumulates else gradient
        sums = {name: pair.clone() for name, pair in self._result.sums.items()}
        return StepResult(self._result.loss.clone(), sums)
