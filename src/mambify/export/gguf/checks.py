"""What a model has that llama.cpp's ``granitehybrid`` has no place for, said before anything is written."""

from __future__ import annotations

from collections.abc import Iterator

from mambify.config import ATTENTION, HybridConfig
from mambify.errors import UnsupportedError
from mambify.export.gguf.layout import mamba_layout
from mambify.layer_map import ranges
from mambify.mixers.mamba2 import Mamba2Mixer
from mambify.model import HybridForCausalLM

#: RoPE scalings that do not depend on the length of the text
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def require_representable(config: HybridConfig) -> None:
    """Checks that llama.cpp can compute what a model of this configuration does.

    Raises:
        UnsupportedError: it cannot; the message says what is in the way and what to do instead.
    """
    for reason in _reasons(config):
        raise UnsupportedError(f"GGUF cannot carry this model: {reason}")
    if config.converted_layers:
        mamba_layout(config)


def require_no_output_bias(model: HybridForCausalLM) -> None:
    """Checks the weights for the one thing that the configuration does not tell.

    Raises:
        UnsupportedError: a Mamba2 layer's output projection has a bias that is not zero.
    """
    for index, layer in enumerate(model.model.layers):
        if isinstance(layer.mixer, Mamba2Mixer):
            bias = layer.mixer.out_proj.bias
            if bias is not None and bool(bias.detach().any()):
                raise UnsupportedError(
                    f"GGUF cannot carry this model: the output projection of layer {index} has a bias, which a Mamba2 "
                    "layer of llama.cpp lacks"
                )


def _reasons(config: HybridConfig) -> Iterator[str]:
    if config.stock_layers:
        yield "it is a pure Mamba model; llama.cpp's own converter reads it as it is published"
    if config.draft_vocabulary is not None:
        yield f"its head knows {config.draft_vocabulary} words of {config.vocab_size}: train it without --vocabulary"
    if config.draft_features:
        yield "it is a draft that reads its target's hidden states: train it without --features"
    others = sorted(set(config.layer_mixers or ()) - {ATTENTION, "mamba2"})
    if others:
        layers = [i for i, mixer in enumerate(config.layer_mixers or ()) if mixer == others[0]]
        yield f"layers {ranges(layers)} are {others[0]}, and granitehybrid has mamba2: convert with --mixer mamba2"
    if config.qk_norm and config.attention_layers:
        yield (
            f"layers {ranges(config.attention_layers)} keep attention with norms on q and k, which granitehybrid "
            "lacks: convert with --attention 0"
        )
    yield from _sliding(config)
    if config.hidden_act != "silu":
        yield f"its MLPs use {config.hidden_act}, and granitehybrid's use silu"
    yield from _rope(config)


def _sliding(config: HybridConfig) -> Iterator[str]:
    layers = [i for i, kind in enumerate(config.layer_types or ()) if kind == "sliding_attention"]
    window = config.sliding_window
    if layers and window is not None and window < config.max_position_embeddings:
        yield (
            f"layers {ranges(layers)} attend within a window of {window} of {config.max_position_embeddings} positions,"
            " which granitehybrid lacks: convert them, or set max_position_embeddings to the window in config.json"
        )


def _rope(config: HybridConfig) -> Iterator[str]:
    if not config.attention_layers:
        return
    parameters = config.rope_parameters or {}
    kind = parameters.get("rope_type", "default")
    if kind not in _STATIC_ROPE:
        yield f"its RoPE scaling '{kind}' changes with the length of the text: supported are {', '.join(_STATIC_ROPE)}"
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        yield "RoPE turns only a part of each head"
