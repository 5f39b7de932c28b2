"""From a Transformer to a hybrid: plan which layers, build the new mixers, keep the rest."""

from __future__ import annotations

from mambify.conversion.calibrate import calibrate
from mambify.conversion.convert import apply_plan, convert, require_text
from mambify.conversion.init import CALIBRATION_TOKENS, INITIALISATIONS, needs_text
from mambify.conversion.plan import ConversionPlan, count_parameters, plan, state_bytes

__all__ = [
    "CALIBRATION_TOKENS",
    "INITIALISATIONS",
    "ConversionPlan",
    "apply_plan",
    "calibrate",
    "convert",
    "count_parameters",
    "needs_text",
    "plan",
    "require_text",
    "state_bytes",
]
