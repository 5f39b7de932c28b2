"""HybridConfig → the config.json of GraniteMoeHybrid; refuses what that architecture cannot carry."""

from __future__ import annotations

import math
from typing import Any

from mambify.config import ATTENTION, HybridConfig
from mambify.errors import InvalidOptionError, UnsupportedError
from mambify.families.granite_layout import GraniteLayout
from mambify.families.stock_hybrid import OWN, own_facts
from mambify.layer_map import ranges

#: the first version whose stock mixer norms each head by itself, as ours does
MINIMUM_TRANSFORMERS = "5.23.0"
_PLAIN_ROPE = ("default", "linear", "llama3")  # each frequency is scaled by itself, whatever the head dimension
_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
)


def granite_layout(config: HybridConfig, *, split: int = 1) -> GraniteLayout:
    """The sizes of ``config`` in the stock architecture.

    Args:
        split: into how many heads of the stock mixer each of ours is cut.

    Raises:
        InvalidOptionError: heads cannot be cut like that.
        UnsupportedError: it cannot be represented exactly; says why, and what can be done instead.
    """
    _require_mixers(config)
    _require_attention(config)
    if split < 1 or (config.head_dim or 0) % split:
        raise InvalidOptionError(f"heads of {config.head_dim} cannot be cut into {split}: choose a divisor")
    return GraniteLayout.of(config, split=split)


def _require_mixers(config: HybridConfig) -> None:
    if config.stock_layers:
        raise UnsupportedError(
            "this is a pure Mamba model, which stock transformers reads as it is published: there is nothing to export"
        )
    if config.draft_vocabulary is not None:
        raise UnsupportedError(
            f"the head knows {config.draft_vocabulary} of {config.vocab_size} words, and GraniteMoeHybrid's knows all: "
            "train a draft without --vocabulary to export it"
        )
    if config.draft_features:
        raise UnsupportedError(
            "this draft reads its target's hidden states, which GraniteMoeHybrid does not: train a draft without "
            "--features to export it"
        )
    others = [i for i, mixer in enumerate(config.layer_mixers or ()) if mixer not in (ATTENTION, "mamba2")]
    if others:
        name = (config.layer_mixers or [])[others[0]]
        raise UnsupportedError(
            f"layers {ranges(others)} are {name}, which GraniteMoeHybrid has not: convert with --mixer mamba2 to export"
        )
    kept = config.attention_layers
    if kept and config.qk_norm:
        raise UnsupportedError(
            f"layers {ranges(kept)} keep attention with a norm on q and k, which GraniteMoeHybrid has not: "
            "convert every layer (--attention 0) to export"
        )
    windowed = [i for i in kept if (config.layer_types or [])[i] == "sliding_attention"]
    window = config.sliding_window
    if windowed and window is not None and window < config.max_position_embeddings:
        raise UnsupportedError(
            f"layers {ranges(windowed)} keep attention with a window of {window} tokens, which GraniteMoeHybrid has "
            f"not: convert these layers, or set max_position_embeddings in config.json to {window}, where the window "
            "makes no difference"
        )
    if config.mlp_bias:
        raise UnsupportedError("the MLPs have biases (mlp_bias), which GraniteMoeHybrid has not")
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedError(
            f"the MLPs' activation is {config.hidden_act}; GraniteMoeHybrid has one activation for MLPs and mixers, "
            "and that of the mixers is silu"
        )


def _require_attention(config: HybridConfig) -> None:
    """Engines read hidden size over heads as the head dimension, whatever config.json says."""
    assert config.head_dim
    D, H, P = config.hidden_size, config.num_attention_heads, config.head_dim
    if not config.attention_layers or H * P == D:
        return
    if P > D // H or D % (2 * H):
        raise UnsupportedError(
            f"layers {ranges(config.attention_layers)} keep attention with heads of {P}; engines read {D} / {H} as the "
            "head dimension of GraniteMoeHybrid, and only smaller heads can be filled up with zeros: convert every "
            "layer (--attention 0) to export"
        )
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind not in _PLAIN_ROPE:
        raise UnsupportedError(
            f"heads of {P} have to be filled up to {D // H} for GraniteMoeHybrid, and the frequencies of '{kind}' RoPE "
            f"would then be others (possible with {', '.join(_PLAIN_ROPE)})"
        )


def granite_config(config: HybridConfig, layout: GraniteLayout, *, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    assert config.head_dim
    rope = _rope(config, layout)
    layer_types = ["attention" if mixer == ATTENTION else "mamba" for mixer in config.layer_mixers or ()]
    layer_types += ["attention"] * layout.inert_layers
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "dtype": dtype,
        "transformers_version": MINIMUM_TRANSFORMERS,
        **{name: getattr(config, name) for name in _SAME_FIELDS},
        "num_hidden_layers": len(layer_types),
        "num_attention_heads": layout.attention_heads,
        "num_key_value_heads": layout.attention_groups,
        "shared_intermediate_size": config.intermediate_size,
        "position_embedding_type": "rope",
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "attention_bias": layout.attention_bias,
        "attention_multiplier": config.head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "layer_types": layer_types,
        "mamba_n_heads": layout.stock_heads * layout.split,
        "mamba_n_groups": layout.stock_heads,
        "mamba_d_head": config.head_dim // layout.split,
        "mamba_d_state": config.head_dim,
        "mamba_d_conv": config.conv_kernel,
        "mamba_expand": layout.stock_heads * config.head_dim // config.hidden_size,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": layout.mixer_bias,
        OWN: own_facts(config, layout),
    }


def _rope(config: HybridConfig, layout: GraniteLayout) -> dict[str, Any]:
    """RoPE whose frequency i at head dimension Q is ours at P: θ^(-2i/P) = (θ^(Q/P))^(-2i/Q)."""
    assert config.head_dim
    rope = dict(config.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0})
    if config.attention_layers and layout.attention_dim != config.head_dim:
        rope["rope_theta"] = math.pow(rope["rope_theta"], layout.attention_dim / config.head_dim)
    return rope
