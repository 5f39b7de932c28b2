"""The modules that mix tokens: attention, and what may replace it."""

from __future__ import annotations

from mambify.mixers.attention import AttentionMixer
from mambify.mixers.base import (
    AttentionWeights,
    Mixer,
    MixerContext,
    RecurrentMixer,
    RecurrentState,
    ReplayState,
)
from mambify.mixers.mamba1 import Mamba1Mixer
from mambify.mixers.mamba2 import Mamba2Mixer
from mambify.mixers.stock_mamba1 import StockMamba1Mixer
from mambify.mixers.stock_mamba2 import StockMamba2Mixer

#: name in HybridConfig.layer_mixers → module; a new mixer is one file and one row here
MIXERS: dict[str, type[Mixer]] = {
    "attention": AttentionMixer,
    "mamba2": Mamba2Mixer,
    "mamba1": Mamba1Mixer,
    "stock_mamba1": StockMamba1Mixer,
    "stock_mamba2": StockMamba2Mixer,
}

__all__ = [
    "MIXERS",
    "AttentionMixer",
    "AttentionWeights",
    "Mixer",
    "MixerContext",
    "RecurrentMixer",
    "RecurrentState",
    "ReplayState",
]
