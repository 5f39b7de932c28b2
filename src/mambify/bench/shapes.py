"""Models of named sizes with random weights: what is measured where no checkpoint of that size is at hand.

A product costs the same whatever the weights are. They are drawn on the device and in the dtype they are used in: 8B in
float32, or drawn by one CPU thread, would be gigabytes and minutes for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mambify.config import HybridConfig
from mambify.conversion import plan
from mambify.errors import InvalidOptionError, did_you_mean
from mambify.model import HybridForCausalLM


@dataclass(frozen=True)
class Shape:
    """Sizes of a Transformer."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    tied: bool = True

    def config(self, *, attention: float = 1.0, mixer: str = "mamba2", **changes: Any) -> HybridConfig:
        """Its configuration, with ``mixer`` in all but a share ``attention`` of the layers."""
        facts: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        }
        config = HybridConfig(**facts | changes)
        return config if attention == 1.0 else plan(config, mixer=mixer, attention=attention).student


SHAPES = {
    "tiny": Shape(512, 64, 128, 4, 4, 2, 16),
    "135M": Shape(49_152, 576, 1536, 30, 9, 3, 64),  # SmolLM2-135M
    "1B": Shape(128_256, 2048, 8192, 16, 32, 8, 64),  # Llama 3.2 1B
    "3B": Shape(128_256, 3072, 8192, 28, 24, 8, 128),  # Llama 3.2 3B
    "8B": Shape(128_256, 4096, 14_336, 32, 32, 8, 128, tied=False),  # Llama 3 8B
}


def config_of_shape(name: str, *, attention: float = 1.0, mixer: str = "mamba2", **changes: Any) -> HybridConfig:
    """The configuration of the shape ``name``.

    Args:
        attention: share of the layers that keep attention.
        mixer: what the others have.
        changes: further fields of HybridConfig, or others than the shape's.

    Raises:
        InvalidOptionError: no shape of this name, a share or a mixer that there is not.
    """
    if name not in SHAPES:
        raise InvalidOptionError(f"no shape '{name}': {did_you_mean(name, SHAPES)}")
    return SHAPES[name].config(attention=attention, mixer=mixer, **changes)


def model_of_shape(
    name: str, device: torch.device | str, dtype: torch.dtype, *, seed: int | None = None, **config: Any
) -> HybridForCausalLM:
    """A model of that shape with random weights, in evaluation mode.

    Args:
        seed: of the weights; ``None`` goes on with torch's generators as they stand.
        config: as :func:`config_of_shape` takes it: ``attention=0.5`` …

    Raises:
        InvalidOptionError: as :func:`config_of_shape`.
    """
    return random_model(config_of_shape(name, **config), device, dtype, seed=seed)


def random_model(
    config: HybridConfig, device: torch.device | str, dtype: torch.dtype, *, seed: int | None = None
) -> HybridForCausalLM:
    """A model of this configuration with random weights, in evaluation mode; what a mixer keeps in float32 is that."""
    if seed is not None:
        torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: HybridForCausalLM = HybridForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return model
