"""How good a model is: perplexity, distance to its teacher, and reports of both."""

from __future__ import annotations

from mambify.evaluate.blocks import cut_into_blocks, read_blocks
from mambify.evaluate.bootstrap import Estimate
from mambify.evaluate.compare import compare, comparison_table, side_by_side
from mambify.evaluate.perplexity import LanguageModelScore, evaluate_language_model
from mambify.evaluate.preferences import PreferenceScore, preference_accuracy, preference_table

__all__ = [
    "Estimate",
    "LanguageModelScore",
    "PreferenceScore",
    "compare",
    "comparison_table",
    "cut_into_blocks",
    "evaluate_language_model",
    "preference_accuracy",
    "preference_table",
    "read_blocks",
    "side_by_side",
]
