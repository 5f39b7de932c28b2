"""Qwen3: RMS norm over each head of q and k, and a head dimension of its own (≠ hidden size / heads)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mambify.families.base import Family, sliding_layers


def _facts(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "qk_norm": True,
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
    } | sliding_layers(config)


FAMILY = Family("qwen3", _facts, gguf_name="qwen3")
