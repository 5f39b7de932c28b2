"""A checkpoint on disk, whatever its form: its configuration as ours, and its weights one by one under our names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from mambify.config import HybridConfig
from mambify.errors import CheckpointError
from mambify.families import safetensors
from mambify.families.gguf import GgufFile
from mambify.families.registry import family_for, hybrid_config
from mambify.families.sources import Source
from mambify.io import read_json
from mambify.provenance import Provenance, read_provenance

_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, understood and not yet read.

    Attributes:
        config: with ``base`` set, ``read`` gives only the weights that its base has not.
        dtype: of the weights as they are stored.
        rename: a stored weight's name → ours; ``None`` for one that carries nothing.
        read: (whether a weight of this stored name is wanted) → (stored name, tensor) of those that are.
        provenance: how a model of ours came to be, where that is recorded.
    """

    config: HybridConfig
    dtype: torch.dtype
    rename: Callable[[str], str | None]
    read: Callable[[Callable[[str], bool]], Iterator[tuple[str, Tensor]]]
    provenance: Provenance | None = None

    def weights(self, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, Tensor]]:
        """(our name, tensor) of every weight that is ``wanted``; one is in memory at a time.

        Raises:
            CheckpointError: a file is missing, truncated, malformed, or not the one that was saved.
        """

        def is_read(stored: str) -> bool:
            name = self.rename(stored)
            return name is not None and wanted(name)

        for stored, tensor in self.read(is_read):
            name = self.rename(stored)
            assert name is not None
            yield name, tensor


def open_checkpoint(where: Source) -> Checkpoint:
    """Reads the configuration and finds the weights.

    Raises:
        UnsupportedError: the architecture is none of ours.
        CheckpointError: the configuration cannot be read.
    """
    if where.gguf is not None:
        file = GgufFile(where.directory / where.gguf)
        config = hybrid_config(file.config(), source=where.name)
        return Checkpoint(_with_origin(config, where, file.license()), torch.float32, file.family.rename, file.stream)
    hf_config = _read_config(where)
    dtype = hf_config.dtype or torch.float32

    def read(wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        return safetensors.stream(where.directory, wanted)

    if isinstance(hf_config, HybridConfig):
        return Checkpoint(hf_config, dtype, lambda name: name, read, read_provenance(where.directory))
    config = hybrid_config(hf_config, source=where.name)
    family = family_for(hf_config.model_type, source=where.name)
    if config.teacher == where.name:
        config = _with_origin(config, where, _license_of_card(where.directory))
    if family.adapt is None:
        return Checkpoint(config, dtype, family.rename, read)
    provenance = read_provenance(where.directory)
    return Checkpoint(config, dtype, lambda name: name, family.adapt(hf_config, config, read), provenance)


def _read_config(where: Source) -> PreTrainedConfig:
    """``config.json`` of a directory, of a family we know or of our own.

    Raises:
        UnsupportedError: its architecture is none of ours.
        CheckpointError: it cannot be read.
    """
    path = where.directory / "config.json"
    try:
        model_type = read_json(path)["model_type"]
        if model_type == HybridConfig.model_type:
            return HybridConfig.from_pretrained(where.directory)
        family_for(model_type, source=where.name)
        return AutoConfig.from_pretrained(where.directory)
    except (LookupError, OSError, StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is not a readable model configuration: {reason}") from error


def _with_origin(config: HybridConfig, where: Source, license: dict[str, str]) -> HybridConfig:
    """The configuration of a teacher, with what is known of where it comes from and how it is licensed."""
    config.teacher_hub_id = where.hub_id or ""
    config.teacher_license = license or None
    return config


def _license_of_card(directory: Path) -> dict[str, str]:
    """What the YAML header of a model card says of the licence; empty where there is no card or nothing in it."""
    card = directory / "README.md"
    if not card.is_file():
        return {}
    opening, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    header, end, _ = rest.partition("\n---")
    if opening.strip() or not end:
        return {}
    try:
        facts: Any = yaml.safe_load(header)
    except yaml.YAMLError:
        return {}  # someone else's page: that it cannot be read is no reason not to load the model
    if not isinstance(facts, dict):
        return {}
    return {key: facts[key] for key in _LICENSE_KEYS if isinstance(facts.get(key), str)}
