"""Pure Mamba2: AntonV/mamba2-130m-hf … mamba2-2.7b-hf, Codestral Mamba, and what else is a ``Mamba2ForCausalLM``."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

from mambify.families.base import Family
from mambify.families.stock_mamba import RENAMES, pure_mamba_facts


def _facts(config: PreTrainedConfig) -> dict[str, Any]:
    low, high = config.time_step_limit
    return pure_mamba_facts(config, mixer="stock_mamba2") | {
        "ssm_num_heads": config.num_heads,
        "ssm_num_groups": config.n_groups,
        "ssm_dt_min": float(low),
        "ssm_dt_max": None if math.isinf(high) else float(high),
    }


FAMILY = Family("mamba2", _facts, renames=RENAMES)
