"""Which layers keep attention: what each is worth, measured, and the best choice within a budget."""

from __future__ import annotations

from mambify.selection.budget import best_within, budgeted_layers, count_for_share, top_layers
from mambify.selection.selectors import METHODS, Candidates, Scores
from mambify.selection.swaps import Swapped, swapped_divergences

__all__ = [
    "METHODS",
    "Candidates",
    "Scores",
    "Swapped",
    "best_within",
    "budgeted_layers",
    "count_for_share",
    "swapped_divergences",
    "top_layers",
]
