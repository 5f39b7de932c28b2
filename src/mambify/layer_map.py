"""A model's layers as people read them: one name, or one letter, a layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from mambify.config import HybridConfig

_ROW, _GROUP = 32, 8
_LETTERS = {"attention": "A", "sliding": "S", "mamba2": "M", "mamba1": "m", "stock_mamba2": "M", "stock_mamba1": "m"}
_NAMES = {
    "attention": "attention",
    "sliding": "sliding-window attention",
    "mamba2": "Mamba2",
    "mamba1": "Mamba1",
    "stock_mamba2": "Mamba2",
    "stock_mamba1": "Mamba1",
}


def kinds_of_layers(config: HybridConfig) -> list[str]:
    """One name a layer: ``attention``, ``sliding`` (attention with a window), ``mamba2`` …"""
    return [
        "sliding" if kind == "sliding_attention" else mixer
        for mixer, kind in zip(config.layer_mixers or (), config.layer_types or (), strict=True)
    ]


def letter(kind: str) -> str:
    """The letter of a layer of this kind."""
    return _LETTERS.get(kind, kind[0])


def name(kind: str) -> str:
    """What people call this kind."""
    return _NAMES.get(kind, kind)


def gap_before(index: int) -> str:
    """What stands between layer ``index`` and the one before: nothing, a space after eight, a new line after 32."""
    if not index or index % _GROUP:
        return ""
    return "\n" if index % _ROW == 0 else " "


def legend(kinds: Sequence[str]) -> str:
    """``A attention ×15, M Mamba2 ×15``."""
    counts = {kind: list(kinds).count(kind) for kind in dict.fromkeys(kinds)}
    return ", ".join(f"{letter(kind)} {name(kind)} ×{count}" for kind, count in counts.items())


def plain_map(kinds: Sequence[str]) -> str:
    """The letters of all layers, eight to a group."""
    return "".join(gap_before(index) + letter(kind) for index, kind in enumerate(kinds))


def ranges(layers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` → ``0-2, 5``."""
    if not layers:
        return "none"
    starts = [layers[0], *(b for a, b in pairwise(layers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(layers) if b != a + 1), layers[-1]]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
