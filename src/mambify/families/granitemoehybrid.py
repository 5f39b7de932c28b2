"""GraniteMoeHybrid without experts: what mambify exports, and others' models as far as our Mamba2 mixer covers them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mambify.config import HybridConfig
from mambify.families.base import Family, ReadWeights
from mambify.families.stock_hybrid import StockNames, hybrid_facts, read_as_ours, require_values

_NAMES = StockNames(
    renames=(
        (r"\.shared_mlp\.input_linear\.", ".mlp.gate_up."),
        (r"\.shared_mlp\.output_linear\.", ".mlp.down_proj."),
    )
)


def _facts(config: PreTrainedConfig) -> dict[str, Any]:
    require_values(
        config,
        num_local_experts=(0, None),
        embedding_multiplier=(1.0,),
        residual_multiplier=(1.0,),
        logits_scaling=(1.0,),
    )
    if "full_attention" in config.layer_types:
        require_values(config, position_embedding_type=("rope",))
    return hybrid_facts(config, attention_scale=config.attention_multiplier) | {
        "intermediate_size": config.shared_intermediate_size
    }


def _read(config: PreTrainedConfig, own: HybridConfig, read: ReadWeights) -> ReadWeights:
    return read_as_ours(config, own, read, _NAMES)


FAMILY = Family("granitemoehybrid", _facts, adapt=_read)
