"""Initialisations by name: how a mixer starts from the attention it replaces.

Each is a start (what the mixer makes of the attention's weights alone) and steps that are fitted to what that attention
did on calibration text. All of them stay within the stock layout: they choose values, never add a parameter.

Legend: M tokens, D hidden size, H query heads, P head dimension, I = H·P.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambify.conversion.least_squares import RIDGE, NormalEquations
from mambify.conversion.sample import AttentionSample
from mambify.mixers import MixerContext
from mambify.mixers.base import RecurrentMixer
from mambify.mixers.mamba2 import Mamba2Mixer

Step = Callable[[RecurrentMixer, AttentionSample], None]

_LEAST_KEPT, _MOST_KEPT = 0.05, 0.9995
_GATE_RIDGE = 1e-3
#: root mean squares of what enters SiLU: of values, near enough to 0 for a straight line; of keys and queries less so,
#: for there the bend does what softmax does, and lifts what agrees over what does not
_VALUES, _KEYS = 0.2, 1.0
#: root mean square of what enters the norm, in units of √eps: at 1 the norm has begun to bend
_BELOW_EPS = 1.0
_ROWS = 8

#: of text, for what is measured before training; more changes little
CALIBRATION_TOKENS = 16_384


@dataclass(frozen=True)
class Initialisation:
    """One row of :data:`INITIALISATIONS`.

    Attributes:
        start: of the mixer, from weights alone: one of its ``starts``.
        steps: fitted to calibration text, in this order.
    """

    start: str
    steps: tuple[Step, ...] = ()


def match_distances(mixer: RecurrentMixer, sample: AttentionSample) -> None:
    """Decay: half of a head's memory is as old as half of its attention; the step size starts out constant."""
    kept_H = 0.5 ** (1.0 / sample.half_distance_H)
    mixer.set_decay(kept_H.clamp(_LEAST_KEPT, _MOST_KEPT))


def turn_queries(mixer: RecurrentMixer, sample: AttentionSample) -> None:
    """Position: RoPE's turn between query and key, averaged over the lags that a head attends to.

    The mean of cos and sin over lags turns each pair of a query by its mean angle and shrinks the pairs that turn so
    fast that, without positions, they say nothing.
    """
    mixer.turn_queries(sample.lags_HL @ sample.cos_LJ, sample.lags_HL @ sample.sin_LJ)


def open_gate(mixer: RecurrentMixer, sample: AttentionSample) -> None:
    """Gate: the row that gives 1 on every hidden state, as nearly as least squares can (the layout has no bias)."""
    x_MD = sample.input_BTD.flatten(0, 1)
    normal = NormalEquations()
    normal.add(x_MD, x_MD.new_ones(len(x_MD), 1))
    row_D = normal.solve(_GATE_RIDGE)[0][:, 0].float()
    mixer.set_gate(row_D / (x_MD @ row_D).mean())


def calm_activations(mixer: RecurrentMixer, sample: AttentionSample) -> None:
    """SiLU: values enter it where it is nearly a straight line, keys and queries where it is a gentle bend."""
    mixer.scale_activations(sample.input_BTD, values=_VALUES, keys=_KEYS)


def soften_norm(mixer: RecurrentMixer, sample: AttentionSample) -> None:
    """Norm: heads enter it at √eps, so that it holds back what is large and lets be small what is small.

    A norm that acts fully gives every token the same length, and attention says much at some tokens and little at
    most. The step sizes make the heads small; A makes the decay what it was. Mamba1 has no norm.
    """
    if not isinstance(mixer, Mamba2Mixer):
        return
    squares_H = torch.zeros(mixer.num_heads, device=sample.input_BTD.device)
    with _recorded(mixer.norm) as seen:
        for _ in _run(mixer, sample):
            y_BTHP, z_BTHP = seen.pop()
            squares_H += (y_BTHP * F.silu(z_BTHP)).square().mean(-1).sum((0, 1))
    rms_H = (squares_H / sample.input_BTD[..., 0].numel()).sqrt().clamp(min=1e-12)
    mixer.scale_memory(_BELOW_EPS * math.sqrt(mixer.norm.eps) / rms_H)


def scale_heads(mixer: RecurrentMixer, sample: AttentionSample) -> None:
    """Scale: each head's part of the output projection times the factor that brings the head nearest to attention's."""
    with _recorded(mixer.out_proj) as seen:
        f_BTI = torch.cat([seen.pop()[0] for _ in _run(mixer, sample)])
    f_BTHP = f_BTI.unflatten(-1, (mixer.num_heads, mixer.head_dim))
    factor_H = (f_BTHP * sample.heads_BTHP).sum((0, 1, 3)) / f_BTHP.square().sum((0, 1, 3)).clamp(min=1e-12)
    mixer.out_proj.weight.mul_(factor_H.repeat_interleave(mixer.head_dim))


def fit_output(mixer: RecurrentMixer, sample: AttentionSample) -> None:
    """Output: the whole output projection by least squares on what the attention layer gave."""
    bias = 0.0 if mixer.out_proj.bias is None else mixer.out_proj.bias
    normal, first = NormalEquations(), 0
    with _recorded(mixer.out_proj) as seen:
        for count in _run(mixer, sample):
            wanted_BTD = sample.output_BTD[first : first + count] - bias
            normal.add(seen.pop()[0].flatten(0, 1), wanted_BTD.flatten(0, 1))
            first += count
    mixer.out_proj.weight.copy_(normal.solve(RIDGE)[0].T)


#: name → what it is; a new one is a row here
INITIALISATIONS: dict[str, Initialisation] = {
    "random": Initialisation("random"),
    "paper": Initialisation("paper"),
    "identity": Initialisation("identity"),
    "distance": Initialisation("identity", (match_distances,)),
    "rotation": Initialisation("identity", (turn_queries,)),
    "open-gate": Initialisation("identity", (open_gate,)),
    "near-linear": Initialisation("identity", (calm_activations,)),
    "scale": Initialisation("identity", (scale_heads,)),
    "least-squares": Initialisation("identity", (fit_output,)),
    "measured": Initialisation(
        "identity", (match_distances, turn_queries, open_gate, calm_activations, soften_norm, fit_output)
    ),
}


def needs_text(init: str) -> bool:
    """Whether this initialisation is fitted to calibration text."""
    return bool(INITIALISATIONS[init].steps)


@torch.no_grad()
def fit_to_attention(mixer: RecurrentMixer, init: str, sample: AttentionSample) -> None:
    """Takes the measured steps of ``init``; the mixer is in float32, where the sample is, and has had its start."""
    for step in INITIALISATIONS[init].steps:
        step(mixer, sample)


@contextmanager
def _recorded(module: nn.Module) -> Iterator[list[tuple[Tensor, ...]]]:
    """While open, the inputs of every call of ``module`` are appended to the list."""
    calls: list[tuple[Tensor, ...]] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    try:
        yield calls
    finally:
        hook.remove()


def _run(mixer: RecurrentMixer, sample: AttentionSample) -> Iterator[int]:
    """Runs the mixer over the sample's input, some rows at a time; yields how many."""
    for rows_BTD in sample.input_BTD.split(_ROWS):
        mixer(rows_BTD, MixerContext(), None)
        yield len(rows_BTD)
