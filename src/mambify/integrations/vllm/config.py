"""The configuration of a saved hybrid with what vLLM reads beside it; and what the plugin does not serve."""

from __future__ import annotations

from dataclasses import replace

from mambify.config import ATTENTION, HybridConfig
from mambify.errors import UnsupportedError
from mambify.families.granite_layout import GraniteLayout
from mambify.layer_map import ranges

_EXPORT = "`mambify export` writes one that vLLM serves by itself"


class ServedConfig(HybridConfig):
    """HybridConfig and the chunk length of vLLM's Mamba2 kernels, which it looks for in the model's configuration."""

    mamba_chunk_size: int = 256


def served_layout(config: HybridConfig) -> GraniteLayout:
    """The mixers' sizes in vLLM: key/value heads repeated, nothing filled up, for its mixer has a width of its own.

    Raises:
        UnsupportedError: the plugin does not serve such a model; says what does.
    """
    if config.draft_vocabulary is not None or config.draft_features:
        kind = (
            "that reads its target's hidden states" if config.draft_features else "whose head knows part of the words"
        )
        raise UnsupportedError(f"a draft {kind} is not served by the vLLM plugin: `mambify generate --draft` takes it")
    mixers = config.layer_mixers or []
    others = [i for i, mixer in enumerate(mixers) if mixer not in (ATTENTION, "mamba2")]
    if others:
        raise UnsupportedError(
            f"layers {ranges(others)} are {mixers[others[0]]}, which the vLLM plugin does not serve: "
            "`mambify generate` does"
        )
    if not config.attention_layers:
        raise UnsupportedError(f"a model without any attention layer is not served by the vLLM plugin: {_EXPORT}")
    windowed = [i for i in config.attention_layers if (config.layer_types or [])[i] == "sliding_attention"]
    if windowed and (config.sliding_window or 0) < config.max_position_embeddings:
        raise UnsupportedError(
            f"layers {ranges(windowed)} keep attention with a window, which the vLLM plugin does not serve: "
            "`mambify generate` does"
        )
    if config.base is not None:
        raise UnsupportedError("a directory of mixers only is not served: save the whole model with mambify.save")
    return replace(GraniteLayout.of(config), stock_heads=config.num_attention_heads)
