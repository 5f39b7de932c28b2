"""Decoding many sequences at once in fixed buffers."""

from __future__ import annotations

from mambify.engine.engine import DecodeEngine, Turn
from mambify.engine.sampling import Sampling
from mambify.engine.speculate import Speculator, Statistics, require_drafted, require_same_vocabulary

__all__ = ["DecodeEngine", "Sampling", "Speculator", "Statistics", "Turn", "require_drafted", "require_same_vocabulary"]
