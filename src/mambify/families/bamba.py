"""Bamba, as far as our Mamba2 mixer covers it: one state-space group a head, rotary embeddings over whole heads."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mambify.config import HybridConfig
from mambify.families.base import Family, ReadWeights
from mambify.families.stock_hybrid import StockNames, hybrid_facts, read_as_ours

_NAMES = StockNames(
    renames=(
        (r"\.feed_forward\.", ".mlp."),
        (r"\.pre_ff_layernorm\.", ".post_attention_layernorm."),
        (r"^model\.final_layernorm\.", "model.norm."),
    )
)


def _facts(config: PreTrainedConfig) -> dict[str, Any]:
    return hybrid_facts(config, attention_scale=None) | {"mlp_bias": False}


def _read(config: PreTrainedConfig, own: HybridConfig, read: ReadWeights) -> ReadWeights:
    return read_as_ours(config, own, read, _NAMES)


FAMILY = Family("bamba", _facts, adapt=_read)
