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


@dataclass(frozen=True)
class MambaShape:
    """Sizes of a pure Mamba model; with ``head_dim`` it is Mamba2, without it Mamba1."""

    vocabulary: int
    hidden: int
    layers: int
    state: int = 16
    head_dim: int | None = None
    groups: int = 1
    tied: bool = True

    @property
    def rank(self) -> int:
        """Of Δ, in Mamba1."""
        return -(-self.hidden // 16)

    def config(self, **changes: Any) -> HybridConfig:
        """Its configuration; what every published model of the kind has in common is set here."""
        inner = 2 * self.hidden
        facts: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": 0,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 1,
            "head_dim": self.hidden,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": self.tied,
            "residual_in_fp32": True,
            "ssm_inner_size": inner,
            "ssm_state_size": self.state,
        }
        if self.head_dim is None:
            facts |= {"layer_mixers": ["stock_mamba1"] * self.layers, "ssm_dt_rank": self.rank}
        else:
            facts |= {
                "layer_mixers": ["stock_mamba2"] * self.layers,
                "ssm_num_heads": inner // self.head_dim,
                "ssm_num_groups": self.groups,
            }
        return HybridConfig(**facts | changes)


SHAPES = {
    "tiny": Shape(512, 64, 128, 4, 4, 2, 16),
    "135M": Shape(49_152, 576, 1536, 30, 9, 3, 64),  # SmolLM2-135M
    "1B": Shape(128_256, 2048, 8192, 16, 32, 8, 64),  # Llama 3.2 1B
    "3B": Shape(128_256, 3072, 8192, 28, 24, 8, 128),  # Llama 3.2 3B
    "8B": Shape(128_256, 4096, 14_336, 32, 32, 8, 128, tied=False),  # Llama 3 8B
}

MAMBA_SHAPES = {
    "mamba-tiny": MambaShape(512, 64, 4),
    "mamba2-tiny": MambaShape(512, 64, 4, state=16, head_dim=16, groups=2),
    "mamba-130m": MambaShape(50_280, 768, 24),  # state-spaces/mamba-130m, the draft of the paper's 2.8B
    "mamba-1.4b": MambaShape(50_280, 2048, 48),  # state-spaces/mamba-1.4b
    "mamba-2.8b": MambaShape(50_280, 2560, 64),  # state-spaces/mamba-2.8b
    "mamba-7b": MambaShape(50_280, 4096, 64, tied=False),  # as TRI's Mamba-7B, with the vocabulary of its drafts
    "mamba2-130m": MambaShape(50_288, 768, 24, state=128, head_dim=64),  # state-spaces/mamba2-130m
    "mamba2-2.7b": MambaShape(50_288, 2560, 64, state=128, head_dim=64),  # state-spaces/mamba2-2.7b
    "mamba2-7b": MambaShape(32_768, 4096, 64, state=128, head_dim=64, groups=8, tied=False),  # Codestral Mamba
}


def config_of_shape(
    name: str, *, attention: float | None = None, mixer: str = "mamba2", **changes: Any
) -> HybridConfig:
    """The configuration of the shape ``name``, a row of :data:`SHAPES` or :data:`MAMBA_SHAPES`.

    Args:
        attention: share of a Transformer's layers that keep attention; all by default.
        mixer: what the others have.
        changes: further fields of HybridConfig, or others than the shape's.

    Raises:
        InvalidOptionError: no shape of this name, a share or a mixer that there is not, or a share of what has none.
    """
    if name in MAMBA_SHAPES:
        if attention:
            raise InvalidOptionError(f"'{name}' is pure Mamba: no share of its layers has attention")
        return MAMBA_SHAPES[name].config(**changes)
    if name not in SHAPES:
        raise InvalidOptionError(f"no shape '{name}': {did_you_mean(name, [*SHAPES, *MAMBA_SHAPES])}")
    return SHAPES[name].config(attention=1.0 if attention is None else attention, mixer=mixer, **changes)


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
    model.config.dtype = dtype
    return model
