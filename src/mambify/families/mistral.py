"""Mistral and Zephyr: Llama blocks with a sliding window."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mambify.families.base import Family


def _facts(config: PreTrainedConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


FAMILY = Family("mistral", _facts)
