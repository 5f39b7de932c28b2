"""Finds the family files of this folder: each module that defines ``FAMILY`` is one."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from transformers import PreTrainedConfig

from mambify import families
from mambify.config import HybridConfig
from mambify.errors import UnsupportedError
from mambify.families.base import SHARED_FACTS, Family


@cache
def known_families() -> dict[str, Family]:
    """``model_type`` → family, for every file in ``mambify/families`` that defines one."""
    found = {}
    for module in pkgutil.iter_modules(families.__path__):
        family = getattr(importlib.import_module(f"mambify.families.{module.name}"), "FAMILY", None)
        if family is not None:
            found[family.model_type] = family
    return found


def family_for(model_type: str, *, source: str) -> Family:
    """The family of a ``model_type``.

    Raises:
        UnsupportedError: none of ours; lists those that are, and says how one is added.
    """
    known = known_families()
    if model_type not in known:
        raise UnsupportedError(
            f"{source} is of architecture '{model_type}', which is not supported (supported: "
            f"{', '.join(sorted(known))}). A family is one file in mambify/families: see docs/families.md"
        )
    return known[model_type]


def hybrid_config(config: PreTrainedConfig, *, source: str) -> HybridConfig:
    """The HybridConfig of a Hugging Face model: attention in every layer, unless its family is a hybrid itself."""
    family = family_for(config.model_type, source=source)
    shared = {name: getattr(config, name) for name in SHARED_FACTS if hasattr(config, name)}
    origin = {"teacher_family": family.model_type, "teacher": source}
    return HybridConfig(**origin | shared | dict(family.facts(config)))
