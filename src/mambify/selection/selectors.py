"""Selectors: each gives every layer a score, what keeping its attention is worth. One interface, a row a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mambify.mixers import Mixer
from mambify.model import HybridBlock, HybridForCausalLM
from mambify.selection.swaps import Progress, swapped_divergences


@dataclass(frozen=True)
class Candidates:
    """What selectors choose among: a teacher, and for every layer the mixer that would take its attention's place.

    Attributes:
        teacher: attention everywhere.
        mixers: layer → its mixer, calibrated and where asked for aligned; in the teacher's dtype, on its device.
        errors: layer → the mixer's squared error over the squared output of the attention, on the teacher's states.
        blocks_NT: text to measure on, disjoint from what the mixers learned on.
        spread: the layers that keep attention in the even spread, the control; others choose as many.
    """

    teacher: HybridForCausalLM
    mixers: Mapping[int, Mixer]
    errors: Mapping[int, float]
    blocks_NT: Tensor
    spread: tuple[int, ...]
    batch_size: int = 8


@dataclass(frozen=True)
class Scores:
    """One selector's answer.

    Attributes:
        worth: layer → what keeping attention there is worth; only the order and the differences count.
        measured: what the worth was made of, for the report.
    """

    worth: dict[int, float]
    measured: dict[str, float] = field(default_factory=dict)


Selector = Callable[[Candidates, Progress | None], Scores]


def uniform(candidates: Candidates, progress: Progress | None = None) -> Scores:
    """The control: 1 for every layer of the even spread, 0 for the others. Nothing is measured."""
    return Scores({index: float(index in candidates.spread) for index in candidates.mixers})


def leave_one_out(candidates: Candidates, progress: Progress | None = None) -> Scores:
    """KL of the teacher with this one layer's attention replaced: what its loss costs while all others are there."""
    found = swapped_divergences(
        candidates.teacher, {}, candidates.mixers, candidates.blocks_NT,
        batch_size=candidates.batch_size, progress=progress,
    )  # fmt: skip
    return Scores(found.by_layer)


def restore_one(candidates: Candidates, progress: Progress | None = None) -> Scores:
    """KL that the student without any attention loses when it gets this one layer's back."""
    return _gains(candidates, dict(candidates.mixers), progress)


def trial(candidates: Candidates, progress: Progress | None = None) -> Scores:
    """What the mixer could not learn of its attention: the error that is left after calibration and alignment."""
    return Scores(dict(candidates.errors))


def greedy(candidates: Candidates, progress: Progress | None = None) -> Scores:
    """Restores the layer that gains most, and again beside it, up to the number kept; worth is the order."""
    num_kept = len(candidates.spread)
    base, worth = dict(candidates.mixers), dict.fromkeys(candidates.mixers, 0.0)
    for rank in range(num_kept):
        gains = _gains(candidates, base, None).worth
        best = max(gains, key=lambda index: gains[index])
        worth[best] = float(num_kept - rank)
        del base[best]
        if progress is not None:
            progress(rank + 1, num_kept)
    return Scores(worth)


def _gains(candidates: Candidates, base: dict[int, Mixer], progress: Progress | None) -> Scores:
    attention = {index: _attention(candidates.teacher, index) for index in base}
    found = swapped_divergences(
        candidates.teacher, base, attention, candidates.blocks_NT,
        batch_size=candidates.batch_size, progress=progress,
    )  # fmt: skip
    gains = {index: found.base - divergence for index, divergence in found.by_layer.items()}
    return Scores(gains, {"kl_without_attention": found.base})


def _attention(model: HybridForCausalLM, index: int) -> Mixer:
    block = model.model.layers[index]
    assert isinstance(block, HybridBlock)
    return block.mixer


#: name → selector, the control first; a new one is a function and a row here
METHODS: dict[str, Selector] = {
    "uniform": uniform,
    "leave-one-out": leave_one_out,
    "restore-one": restore_one,
    "trial": trial,
    "greedy": greedy,
}
