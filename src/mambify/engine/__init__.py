"""Decoding many sequences at once in fixed buffers."""

from __future__ import annotations

from mambify.engine.engine import DecodeEngine, Turn
from mambify.engine.slots import Drawing
from mambify.engine.speculate import Speculator, Statistics

__all__ = ["DecodeEngine", "Drawing", "Speculator", "Statistics", "Turn"]
