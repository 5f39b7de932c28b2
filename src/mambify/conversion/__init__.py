"""From a Transformer to a hybrid: plan which layers, build the new mixers, keep the rest."""

from __future__ import annotations

from mambify.conversion.calibrate import calibrate
from mambify.conversion.convert import apply_plan, convert
from mambify.conversion.plan import ConversionPlan, count_parameters, plan, state_bytes

__all__ = ["ConversionPlan", "apply_plan", "calibrate", "convert", "count_parameters", "plan", "state_bytes"]
