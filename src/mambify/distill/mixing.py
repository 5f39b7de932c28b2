"""Stage ``mixing``: every new mixer's matrix of who reads from whom learns the attention's (arXiv 2408.10189)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mambify.distill.graphs import StepResult
from mambify.distill.layers import TeacherLayer, mixer_units
from mambify.distill.layerwise import Layerwise, each_then_next
from mambify.distill.trainer import Unit
from mambify.errors import UnsupportedError
from mambify.mixers import AttentionMixer, MixerContext
from mambify.mixers.mamba2 import Mamba2Mixer
from mambify.mixers.matrices import attention_matrix, ssd_matrix
from mambify.model import HybridBlock, HybridForCausalLM


class MatrixAligner(Layerwise):
    """The new mixers' matrices beside those of the attention they replace; arguments as in the align stage.

    A layer's loss is the Frobenius norm of the difference of two ``[T, T]`` matrices, averaged over heads and rows.
    What comes after the matrix (gate, norm, output projection) has no part in it and stays as it is.

    Raises:
        UnsupportedError: a mixer that is no such matrix for each head of the attention.
    """

    def __init__(self, student: HybridForCausalLM, teacher: HybridForCausalLM, layers: list[int]) -> None:
        super().__init__()
        self.layers = layers
        blocks: list[HybridBlock] = list(student.model.layers)  # type: ignore[arg-type]
        self.matrices = nn.ModuleDict({str(i): _SsdMatrix(blocks[i].mixer, i) for i in layers})
        self.embed_tokens = teacher.model.embed_tokens
        self.teacher_layers = nn.ModuleList(
            _LayerWithMatrix(block, i in layers)
            for i, block in enumerate(teacher.model.layers[: max(layers) + 1])
            if isinstance(block, HybridBlock)
        )
        self._teacher = [teacher.model]

    @property
    def outside(self) -> tuple[nn.Module, ...]:
        return tuple(self._teacher)

    def learner(self, layer: int) -> nn.Module:
        return self.matrices[str(layer)]

    def forward(self, layer: int, normed_BTD: Tensor, target_BHTT: Tensor) -> tuple[Tensor, Tensor]:
        """Σ over rows and heads of ‖matrix − target‖_F, and how many there are."""
        with torch.enable_grad():
            error_BHTT = self.matrices[str(layer)](normed_BTD) - target_BHTT
            norm_BH = torch.linalg.vector_norm(error_BHTT, dim=(-2, -1))
            return norm_BH.sum(), torch.ones_like(norm_BH, requires_grad=False).sum()

    def accumulate_gradients(
        self, forward: Callable[..., Any], batch: dict[str, Tensor], backward: Callable[[Tensor], None]
    ) -> StepResult:
        """Takes each layer's backward pass while the teacher is still on its way up: one layer's graph at a time."""
        sums = {}
        x_BTD = self.embed_tokens(batch["input_ids"])
        contexts, _ = self._teacher[0].layer_contexts(x_BTD)
        for layer, (module, context) in enumerate(zip(self.teacher_layers, contexts, strict=False)):
            normed_BTD, target_BHTT, x_BTD = module(x_BTD, context)
            if target_BHTT is not None:
                error, count = forward(layer, normed_BTD, target_BHTT)
                backward(error)
                name, row = self.row(layer, error, count)
                sums[name] = row
        return StepResult(self.loss(sums), sums)

    def units(self) -> Iterator[Unit]:
        for layer in self.teacher_layers:
            yield Unit(layer)
        for matrix in self.matrices.values():
            assert isinstance(matrix, _SsdMatrix)
            *projections, _ = mixer_units(matrix.mixer, backward_follows=True)
            yield from projections
            yield Unit(matrix, True)
        yield Unit(self.embed_tokens)

    def ahead(self) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
        yield from each_then_next(list(self.teacher_layers), {i: [self.matrices[str(i)]] for i in self.layers})


class _SsdMatrix(nn.Module):
    """A new mixer, called for its matrix."""

    def __init__(self, mixer: nn.Module, layer: int) -> None:
        super().__init__()
        if not isinstance(mixer, Mamba2Mixer):
            raise UnsupportedError(
                f"stage mixing: the mixer of layer {layer} has no one matrix for each head, as mamba2 has: "
                "choose mixer mamba2, or stage align or hidden"
            )
        self.mixer = mixer

    def forward(self, x_BTD: Tensor) -> Tensor:
        """``[B, T, D]`` → ``[B, H, T, T]``."""
        return ssd_matrix(self.mixer, x_BTD)


class _LayerWithMatrix(TeacherLayer):
    """A layer of the teacher, which also says what matrix its attention was, where that is asked for."""

    def __init__(self, block: HybridBlock, wanted: bool) -> None:
        super().__init__(block)
        self.wanted = wanted

    @torch.no_grad()
    def forward(self, x_BTD: Tensor, context: MixerContext) -> tuple[Tensor, Tensor | None, Tensor]:  # type: ignore[override]
        """The mixer's input, its matrix ``[B, H, T, T]``, and the layer's output."""
        normed_BTD, _, out_BTD = super().forward(x_BTD, context)
        mixer = self.block.mixer
        if not self.wanted:
            return normed_BTD, None, out_BTD
        assert isinstance(mixer, AttentionMixer)
        return normed_BTD, attention_matrix(mixer, normed_BTD, context), out_BTD
