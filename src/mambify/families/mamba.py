"""Pure Mamba1: state-spaces/mamba-130m-hf … mamba-2.8b-hf, and what else is a ``MambaForCausalLM``."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mambify.families.base import Family
from mambify.families.stock_mamba import RENAMES, pure_mamba_facts


def _facts(config: PreTrainedConfig) -> dict[str, Any]:
    return pure_mamba_facts(config, mixer="stock_mamba1") | {"ssm_dt_rank": int(config.time_step_rank)}


FAMILY = Family("mamba", _facts, renames=RENAMES)
