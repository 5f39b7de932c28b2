"""Llama 2 and 3.x (``llama3`` rope scaling), SmolLM2, and everything else of the Llama architecture."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mambify.families.base import Family


def _facts(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILY = Family("llama", _facts, gguf_name="llama", gguf_permuted=True)
