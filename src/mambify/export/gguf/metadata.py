"""The metadata of a GGUF file that is not the tokenizer: where the model comes from, and its sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mambify.config import ATTENTION, HybridConfig
from mambify.export.gguf.layout import MambaLayout, needs_idle_block
from mambify.model import HybridForCausalLM

if TYPE_CHECKING:
    from gguf import GGUFWriter

#: llama.cpp's name for a hybrid of attention and Mamba2, and for a model without a converted layer
HYBRID, TRANSFORMER = "granitehybrid", "llama"


def architecture(config: HybridConfig) -> str:
    """What llama.cpp calls a model of this configuration."""
    return HYBRID if config.converted_layers else TRANSFORMER


def write_origin(writer: GGUFWriter, config: HybridConfig, *, file_type: int, quantised: bool) -> None:
    """``general.*``: name, licence and place of the teacher as far as they are known."""
    from gguf.constants import GGML_QUANT_VERSION

    writer.add_type("model")
    teacher = config.teacher_hub_id.rpartition("/")[2] or Path(config.teacher).name
    name = teacher or "hybrid"
    if config.converted_layers:
        name += f" {len(config.attention_layers)}/{config.num_hidden_layers} attention, Mamba2"
    writer.add_name(name)
    licence = config.teacher_license or {}
    for key, add in (
        ("license", writer.add_license),
        ("license_name", writer.add_license_name),
        ("license_link", writer.add_license_link),
    ):
        if key in licence:
            add(licence[key])
    if config.teacher_hub_id:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, teacher)
        writer.add_base_model_organization(0, config.teacher_hub_id.partition("/")[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{config.teacher_hub_id}")
    writer.add_tags(["mambify", "text-generation"])
    writer.add_file_type(file_type)
    if quantised:
        writer.add_quantization_version(GGML_QUANT_VERSION)


def write_sizes(writer: GGUFWriter, model: HybridForCausalLM, layout: MambaLayout | None) -> None:
    """What llama.cpp builds its graph from.

    The multipliers that Granite has (embedding, residual, attention, logits) are left out: absent ones multiply by
    nothing, and attention is scaled by P^-0.5, which is ours.
    """
    config = model.config
    assert config.num_key_value_heads and config.head_dim
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    # llama.cpp tells recurrent layers from attention by this: they have no key/value heads
    kv_heads = [config.num_key_value_heads if mixer == ATTENTION else 0 for mixer in config.layer_mixers or ()]
    kv_heads += [1] if needs_idle_block(config) else []
    writer.add_block_count(len(kv_heads))
    writer.add_head_count_kv(kv_heads if config.converted_layers else config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base((config.rope_parameters or {}).get("rope_theta", 10000.0))
    attention_scaling = float(model.model.rotary_emb.attention_scaling)
    if attention_scaling != 1.0:  # of yarn
        writer.add_rope_scaling_attn_factors(attention_scaling)
    if layout is None:
        return
    writer.add_rope_scaling_finetuned(True)  # in this architecture the switch that turns RoPE on
    writer.add_ssm_conv_kernel(layout.conv_kernel)
    writer.add_ssm_inner_size(layout.inner)
    writer.add_ssm_state_size(layout.state)
    writer.add_ssm_time_step_rank(layout.heads)
    writer.add_ssm_group_count(layout.heads)
