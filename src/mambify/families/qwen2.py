"""Qwen2 and Qwen2.5: biases on q, k and v; sliding windows on the upper layers where enabled."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mambify.families.base import Family, sliding_layers


def _facts(config: PreTrainedConfig) -> dict[str, Any]:
    return {"attention_bias": True, "attention_output_bias": False} | sliding_layers(config)


FAMILY = Family("qwen2", _facts, gguf_name="qwen2")
