"""What the pure Mamba architectures of transformers share: blocks of a norm and a mixer, and the names of weights."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mambify.families.stock_hybrid import require_values

#: inside of the mixers the names are ours; old checkpoints say ``embedding``
RENAMES = (
    (r"^backbone\.embeddings?\.", "model.embed_tokens."),
    (r"^(backbone\.layers\.\d+)\.norm\.", r"\1.input_layernorm."),
    (r"^backbone\.norm_f\.", "model.norm."),
    (r"^backbone\.", "model."),
)


def pure_mamba_facts(config: PreTrainedConfig, *, mixer: str) -> dict[str, Any]:
    """The fields of HybridConfig that both architectures have; one attention head, which no layer asks for.

    Raises:
        UnsupportedError: another activation than SiLU.
    """
    require_values(config, hidden_act=("silu", "swish"))
    return {
        "intermediate_size": 0,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": config.hidden_size,
        "rms_norm_eps": config.layer_norm_epsilon,
        "residual_in_fp32": config.residual_in_fp32,
        "layer_mixers": [mixer] * config.num_hidden_layers,
        "conv_kernel": config.conv_kernel,
        "ssm_inner_size": int(config.expand * config.hidden_size),
        "ssm_state_size": config.state_size,
        "ssm_proj_bias": config.use_bias,
        "ssm_conv_bias": config.use_conv_bias,
    }
