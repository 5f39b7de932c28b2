"""Which layers are converted, and what that changes: the plan behind ``mambify convert --dry-run`` and ``info``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mambify.config import ATTENTION, HybridConfig
from mambify.conversion.init import INITIALISATIONS
from mambify.errors import InvalidOptionError, UnsupportedError, did_you_mean
from mambify.families.load import empty_model
from mambify.mixers import MIXERS, Mixer

CONTEXTS = (2048, 32768, 131072)


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion does, known before any weight is read.

    Attributes:
        teacher: the configuration before.
        student: the configuration after.
        converted: layers converted by this plan (not those that were Mamba already).
        init: name of the initialisation.
    """

    teacher: HybridConfig
    student: HybridConfig
    converted: tuple[int, ...]
    init: str


def uniform_attention_layers(num_layers: int, attention: float) -> list[int]:
    """The layers that keep attention at a share of ``attention``, spread evenly.

    1/2 keeps 1,3,5,…; 1/4 keeps 3,7,…; 1/8 keeps 7,15,… (the last of each period, as in the paper); 0 none, 1 all.
    Above 1/2 it is the converted layers that are spread: 3/4 converts 2,6,10,…, 7/8 converts 6,14,…. Every step of a
    schedule 3/4, 1/2, 1/4, 1/8, 0 therefore converts further layers and takes none back, and the first layer, whose
    output most of the residual stream starts from, comes late.

    Raises:
        InvalidOptionError: not within [0, 1].
    """
    if not 0.0 <= attention <= 1.0:
        raise InvalidOptionError(f"attention {attention} is out of range: give a share from 0 to 1, such as 0.5")

    def completes(count: int, share: float) -> bool:
        """Whether the ``count``-th layer is the one with which another whole layer of this share is due."""
        return int(count * share + 1e-9) > int((count - 1) * share + 1e-9)

    if attention > 0.5:
        return [i for i in range(num_layers) if not completes(i + 2, 1 - attention)]
    return [i for i in range(num_layers) if completes(i + 1, attention)]


def plan(
    config: HybridConfig,
    *,
    mixer: str = "mamba2",
    attention: float = 0.5,
    attention_layers: Sequence[int] | None = None,
    init: str = "identity",
) -> ConversionPlan:
    """Plans a conversion of the model that ``config`` describes.

    Args:
        attention: share of layers that keep attention, spread evenly.
        attention_layers: the layers that keep attention, instead of a share.
        mixer: what replaces the attention of the others.
        init: how the mixer starts from the attention weights.

    Layers that are converted already stay as they are, so a hybrid can be converted further.

    Raises:
        InvalidOptionError: a ratio or layer out of range, an unknown mixer or initialisation.
        UnsupportedError: attention is to be replaced in a pure Mamba model.
    """
    if len(config.stock_layers) == config.num_hidden_layers and (attention_layers is not None or attention < 1.0):
        raise UnsupportedError(
            f"{config.teacher or 'this model'} is a pure Mamba model: it has no attention that could be replaced"
        )
    choices = {name: cls for name, cls in MIXERS.items() if cls.starts}
    if mixer not in choices:
        raise InvalidOptionError(f"unknown mixer '{mixer}': {did_you_mean(mixer, choices)}")
    if init not in INITIALISATIONS:
        raise InvalidOptionError(f"unknown initialisation '{init}': {did_you_mean(init, INITIALISATIONS)}")
    count = config.num_hidden_layers
    if attention_layers is None:
        kept = set(uniform_attention_layers(count, attention))
    else:
        outside = [i for i in attention_layers if not 0 <= i < count]
        if outside:
            raise InvalidOptionError(f"layer {outside[0]} is out of range: this model has layers 0 to {count - 1}")
        kept = set(attention_layers)
    before = list(config.layer_mixers or ())
    missing = [i for i in sorted(kept) if before[i] != ATTENTION]
    if attention_layers is not None and missing:
        raise InvalidOptionError(f"layer {missing[0]} is {before[missing[0]]} already and cannot keep attention")
    converted = tuple(i for i in range(count) if i not in kept and before[i] == ATTENTION)
    student = copy.deepcopy(config)
    student.layer_mixers = [mixer if i in converted else name for i, name in enumerate(before)]
    student.layer_types = [
        "linear_attention" if i in converted else kind for i, kind in enumerate(config.layer_types or ())
    ]
    for index in converted[:1]:  # a mixer that cannot take this shape says so before any weight is read
        with torch.device("meta"):
            MIXERS[mixer](student, index)
    return ConversionPlan(config, student, converted, init)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a planned student.

    Attributes:
        total: all of them.
        new: those of the new mixers.
        kept: those shared with the teacher.
    """

    total: int
    new: int
    kept: int


def count_parameters(planned: ConversionPlan) -> ParameterCount:
    """Counts without reading a weight; tied embeddings count once."""
    model = empty_model(planned.student)
    if planned.student.tie_word_embeddings:
        model.tie_weights()
    total = sum(p.numel() for p in model.parameters())
    new = 0
    for index in planned.converted:
        mixer = model.model.layers[index].mixer
        assert isinstance(mixer, Mixer)
        new += sum(p.numel() for p in mixer.parameters())
    return ParameterCount(total, new, total - new)


def state_bytes(config: HybridConfig, num_tokens: int) -> int:
    """Bytes of keys, values and recurrent states that one sequence of ``num_tokens`` holds, in the model's dtype."""
    size = (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32).itemsize
    return sum(
        MIXERS[name].state_bytes(config, num_tokens, size)
        if name != ATTENTION
        else _kv_bytes(config, kind, num_tokens, size)
        for name, kind in zip(config.layer_mixers or (), config.layer_types or (), strict=True)
    )


def _kv_bytes(config: HybridConfig, kind: str, num_tokens: int, size: int) -> int:
    if kind == "sliding_attention" and config.sliding_window:
        num_tokens = min(num_tokens, config.sliding_window - 1)  # the window counts the token that asks
    return MIXERS[ATTENTION].state_bytes(config, num_tokens, size)
