"""Decoding many sequences at once in fixed buffers."""

from __future__ import annotations

from mambify.engine.drafting import require_suitable_draft
from mambify.engine.engine import DecodeEngine, Turn
from mambify.engine.pace import DraftCount
from mambify.engine.sampling import Sampling
from mambify.engine.speculate import Speculator
from mambify.engine.statistics import Statistics, rounded_shares, written_shares

__all__ = [
    "DecodeEngine",
    "DraftCount",
    "Sampling",
    "Speculator",
    "Statistics",
    "Turn",
    "require_suitable_draft",
    "rounded_shares",
    "written_shares",
]
