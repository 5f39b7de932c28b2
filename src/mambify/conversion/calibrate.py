"""Closed-form start: each new mixer's output projection by least squares on what the attention there gave.

A freshly converted mixer answers at a wrong scale (its error is many times that of saying nothing). The output
projection is linear, so the best one for the mixer as it stands is a ridge regression away: no gradient step needed.

Legend: M calibration tokens, I inner channels of a mixer (input of ``out_proj``), D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mambify.conversion.least_squares import RIDGE, NormalEquations
from mambify.mixers import Mixer, MixerContext
from mambify.model import HybridForCausalLM, MixerTrace


@dataclass
class _Layer:
    """One layer's sums: the normal equations, and the squared error of the mixer as it stands."""

    normal: NormalEquations
    error: Tensor


@torch.no_grad()
def calibrate(
    student: HybridForCausalLM,
    teacher: HybridForCausalLM,
    batches: Iterable[Tensor],
    *,
    layers: Sequence[int] | None = None,
    ridge: float = RIDGE,
) -> dict[int, tuple[float, float]]:
    """Sets ``out_proj`` of converted layers to the ridge solution on the teacher's own hidden states.

    Args:
        batches: ``input_ids [B, T]`` on the teacher's device; a few thousand tokens in all are enough.
        layers: those that are set; all converted ones by default.
        ridge: weight of the penalty, relative to the mean of the features' second moments.

    Returns:
        Layer → (error before, error after): squared error over the squared output of the attention.
    """
    layers = student.config.converted_layers if layers is None else layers
    sums: dict[int, _Layer] = {}
    for input_ids in batches:
        for trace in teacher.model.mixer_traces(input_ids, layers):
            mixer = student.model.layers[trace.layer_idx].mixer
            assert isinstance(mixer, Mixer)
            _accumulate(sums, mixer, trace)
    return {index: _solve(student.model.layers[index].mixer, sums[index], ridge) for index in layers}  # type: ignore[arg-type]


def _accumulate(sums: dict[int, _Layer], mixer: Mixer, trace: MixerTrace) -> None:
    features: list[Tensor] = []
    projection = mixer.out_proj
    assert isinstance(projection, nn.Linear)
    hook = projection.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    x_BTD = trace.input_BTD
    mixed = x_BTD.dtype != projection.weight.dtype  # float32 mixers beside a teacher in bfloat16
    try:
        with torch.autocast(x_BTD.device.type, dtype=x_BTD.dtype if mixed else None, enabled=mixed):
            output_BTD, _ = mixer(x_BTD, MixerContext(seq_idx_BT=trace.seq_idx_BT), None)
    finally:
        hook.remove()
    bias = 0.0 if projection.bias is None else projection.bias.float()
    f_MI = features[0].flatten(0, 1).float()
    y_MD = trace.output_BTD.flatten(0, 1).float()
    error = (output_BTD.flatten(0, 1).float() - y_MD).square().sum()
    y_MD = y_MD - bias
    layer = sums.setdefault(trace.layer_idx, _Layer(NormalEquations(), torch.zeros_like(error)))
    layer.normal.add(f_MI, y_MD)
    layer.error += error


def _solve(mixer: Mixer, layer: _Layer, ridge: float) -> tuple[float, float]:
    weight_ID, residual = layer.normal.solve(ridge)
    projection = mixer.out_proj
    assert isinstance(projection, nn.Linear) and layer.normal.yy is not None
    projection.weight.copy_(weight_ID.T)
    scale = layer.normal.yy.clamp(min=1e-12)
    return float(layer.error / scale), float(residual / scale)
