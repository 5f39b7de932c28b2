"""What a Transformer family is to mambify: how its Hugging Face config and weight names become ours.

To add one, put a file beside this that defines ``FAMILY``; nothing else changes (see docs/families.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from mambify.config import HybridConfig

#: (whether a weight of this name is wanted) → (name, tensor) of those that are; one is in memory at a time
ReadWeights = Callable[[Callable[[str], bool]], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Family:
    """One supported architecture.

    Attributes:
        model_type: ``model_type`` of the Hugging Face config.
        facts: Hugging Face config → the keyword arguments of HybridConfig that are special to this family.
            What all families share (:data:`SHARED_FACTS`) is copied by name.
        gguf_name: ``general.architecture`` of its GGUF files, or ``None``.
        gguf_permuted: whether GGUF stores q and k with the rotary halves interleaved (llama.cpp's NORM rope).
        renames: regular expressions, Hugging Face weight name → ours, applied in order.
        ignored: weights that carry nothing (recomputed buffers).
        adapt: of a family whose tensors are cut otherwise than ours: (its config, ours, reader of its weights by its
            names) → reader of ours by our names. ``renames`` and ``ignored`` are not looked at then.
    """

    model_type: str
    facts: Callable[[PreTrainedConfig], Mapping[str, Any]]
    gguf_name: str | None = None
    gguf_permuted: bool = False
    renames: tuple[tuple[str, str], ...] = ((r"\.self_attn\.", ".mixer."),)
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)
    adapt: Callable[[PreTrainedConfig, HybridConfig, ReadWeights], ReadWeights] | None = None

    def rename(self, name: str) -> str | None:
        """Our name of a Hugging Face weight; ``None`` for one that is ignored."""
        if any(re.search(pattern, name) for pattern in self.ignored):
            return None
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


#: fields with one name and one meaning in every family
SHARED_FACTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)


def sliding_layers(config: PreTrainedConfig) -> dict[str, Any]:
    """``sliding_window`` and ``layer_types`` of a config that may mix full and sliding attention."""
    layer_types = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    window = config.sliding_window if "sliding_attention" in layer_types else None
    return {"sliding_window": window, "layer_types": layer_types}
