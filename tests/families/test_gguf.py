"""GGUF files: written here as llama.cpp's converter writes them, read back as the model they came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import mambify
from mambify.errors import CheckpointError, UnsupportedError
from mambify.families.gguf_format import open_gguf

Teacher = Callable[..., PreTrainedModel]

_NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "self_attn.q_norm.": "attn_q_norm.",
    "self_attn.k_norm.": "attn_k_norm.",
    "self_attn.q_proj.": "attn_q.",
    "self_attn.k_proj.": "attn_k.",
    "self_attn.v_proj.": "attn_v.",
    "self_attn.o_proj.": "attn_output.",
    "mlp.gate_proj.": "ffn_gate.",
    "mlp.up_proj.": "ffn_up.",
    "mlp.down_proj.": "ffn_down.",
    "model.layers.": "blk.",
}


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """What convert_hf_to_gguf does to q and k of a Llama: the two rotary halves of a head interleaved."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write(
    path: Path,
    model: PreTrainedModel,
    *,
    architecture: str = "llama",
    quantised: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    skip: tuple[str, ...] = (),
    rope_freqs: Tensor | None = None,
    rope: Mapping[str, Any] | None = None,
    context: bool = True,
) -> Path:
    config: Any = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    if context:
        writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_token_list(["a word", "an other"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for key, value in (rope or {}).items():
        kind = {str: "add_string", int: "add_uint32", float: "add_float32", bool: "add_bool"}[type(value)]
        getattr(writer, kind)(f"{architecture}.rope.{key}", value)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.numpy())
    for name, parameter in model.named_parameters():
        stored, value = name, parameter.detach().numpy()
        for theirs, ours in _NAMES.items():
            stored = stored.replace(theirs, ours)
        if stored in skip:
            continue
        if architecture == "llama" and "attn_q." in stored:
            value = permuted(value, config.num_attention_heads)
        if architecture == "llama" and "attn_k." in stored:
            value = permuted(value, config.num_key_value_heads)
        kind = quantised if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(stored, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("llama2", "llama"),
        ("smollm2-like", "llama"),
        ("llama-linear-rope", "llama"),
        ("qwen2", "qwen2"),
        ("qwen2-tied", "qwen2"),
        ("qwen3", "qwen3"),
    ],
)
def test_reads_what_was_written(kind: str, architecture: str, tiny_teacher: Teacher, tmp_path: Path) -> None:
    theirs = tiny_teacher(kind, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    loaded = mambify.load(write(tmp_path / "tiny.gguf", theirs, architecture=architecture))
    assert loaded.tokenizer is None
    assert loaded.family == architecture
    ids = torch.randint(3, 96, (2, 40))
    assert (loaded.model(ids).logits - theirs(ids).logits).abs().max() <= 1e-4
    assert loaded.model.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    assert loaded.model.config.eos_token_id == loaded.model.generation_config.eos_token_id == 2


@torch.no_grad()
def test_biased_llama(tiny_teacher: Teacher, tmp_path: Path) -> None:
    """Biases of q and k are permuted like their rows."""
    theirs = tiny_teacher("llama-biased")
    ours = mambify.load(write(tmp_path / "tiny.gguf", theirs)).model
    ids = torch.randint(3, 96, (2, 40))
    assert (ours(ids).logits - theirs(ids).logits).abs().max() <= 1e-4


@torch.no_grad()
def test_llama3_rope_factors(tiny_teacher: Teacher, tmp_path: Path) -> None:
    """GGUF has the stretched wavelengths as a tensor; the parameters behind it are recovered."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs = tiny_teacher("llama3", rope_parameters=rope, max_position_embeddings=131072)
    plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = plain / theirs.model.rotary_emb.inv_freq
    assert factors.max() > 30
    ours = mambify.load(write(tmp_path / "tiny.gguf", theirs, rope_freqs=factors)).model
    ids = torch.randint(3, 96, (1, 120))
    assert (ours(ids).logits - theirs(ids).logits).abs().max() <= 1e-4
    assert torch.allclose(ours.model.rotary_emb.inv_freq, theirs.model.rotary_emb.inv_freq, rtol=1e-5)
    with pytest.raises(UnsupportedError, match="not Llama-3's"):
        mambify.load(write(tmp_path / "odd.gguf", theirs, rope_freqs=factors.flip(0)))


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"scaling.type": "linear", "scaling.factor": 4.0, "dimension_count": 16}, LINEAR),
    "linear without a type": ({"scaling.factor": 4.0}, LINEAR),
    "linear by its former name": ({"scale_linear": 4.0}, LINEAR),
    "none": ({"scaling.type": "none", "scaling.factor": 4.0}, {"rope_type": "default", "rope_theta": 10000.0}),
    "a factor of 0": ({"scaling.factor": 0.0}, {"rope_type": "default", "rope_theta": 10000.0}),
    "yarn": ({"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 32}, YARN),
    "yarn of the whole context": (
        {"scaling.type": "yarn", "scaling.factor": 4.0},
        YARN | {"original_max_position_embeddings": 128},
    ),
    "yarn with all there is": (
        {
            "scaling.type": "yarn",
            "scaling.factor": 4.0,
            "scaling.original_context_length": 32,
            "scaling.finetuned": True,
            "scaling.attn_factor": 1.5,
            "scaling.yarn_ext_factor": 1.0,
            "scaling.yarn_beta_fast": 4.0,
            "scaling.yarn_beta_slow": 0.5,
        },
        YARN | {"attention_factor": 1.5 * (1 + 0.1 * math.log(4)), "beta_fast": 4.0, "beta_slow": 0.5},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize(("stored", "rope"), SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize(("kind", "architecture"), [("llama2", "llama"), ("qwen2", "qwen2")])
def test_rope_scaling(
    kind: str,
    architecture: str,
    stored: dict[str, Any],
    rope: dict[str, Any],
    tiny_teacher: Teacher,
    tmp_path: Path,
) -> None:
    theirs = tiny_teacher(kind, rope_parameters=rope)
    ours = mambify.load(write(tmp_path / "tiny.gguf", theirs, architecture=architecture, rope=stored)).model
    ids = torch.randint(3, 96, (1, 120))
    assert (ours(ids).logits - theirs(ids).logits).abs().max() <= 1e-4
    if rope["rope_type"] != "default":
        plain = tiny_teacher(kind)
        assert (theirs(ids).logits - plain(ids).logits).abs().max() > 1e-2, "the scaling is seen"


@pytest.mark.parametrize(
    ("rope", "error", "said"),
    [
        ({"dimension_count": 8}, UnsupportedError, "rotates 8 of the 16 channels"),
        ({"scaling.type": "longrope"}, UnsupportedError, "RoPE scaling 'longrope'"),
        ({"scaling.alpha": 2.0}, UnsupportedError, r"not understood: scaling\.alpha"),
        ({"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.yarn_ext_factor": 0.5}, UnsupportedError, "by 0.5"),
        ({"scaling.factor": 4.0, "scaling.attn_factor": 1.5}, UnsupportedError, "another kind of scaling"),
        ({"scaling.factor": -4.0}, CheckpointError, "factor of -4.0: it has to be at least 1"),
        ({"scaling.factor": float("nan")}, CheckpointError, "factor of nan"),
    ],
)
def test_rope_that_the_model_has_not(
    rope: dict[str, Any], error: type[Exception], said: str, tiny_teacher: Teacher, tmp_path: Path
) -> None:
    with pytest.raises(error, match=rf"tiny\.gguf.*{said}"):
        mambify.load(write(tmp_path / "tiny.gguf", tiny_teacher("llama2"), rope=rope))


@torch.no_grad()
def test_rope_factors_of_one_change_nothing(tiny_teacher: Teacher, tmp_path: Path) -> None:
    theirs = tiny_teacher("llama2")
    ones = torch.ones(8)
    ours = mambify.load(write(tmp_path / "tiny.gguf", theirs, rope_freqs=ones)).model
    ids = torch.randint(3, 96, (1, 120))
    assert (ours(ids).logits - theirs(ids).logits).abs().max() <= 1e-4
    with pytest.raises(UnsupportedError, match="factors and linear scaling"):
        mambify.load(write(tmp_path / "both.gguf", theirs, rope_freqs=ones, rope={"scaling.factor": 2.0}))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantised_rows(kind: str, tiny_teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a few rows at a time, each format gives what ``gguf`` itself makes of the whole tensor."""
    monkeypatch.setattr("mambify.families.gguf_format._ELEMENTS_AT_ONCE", 7 * 64)
    path = write(
        tmp_path / "tiny.gguf",
        tiny_teacher("llama2", intermediate_size=96),
        quantised=gguf.GGMLQuantizationType[kind],
    )
    container, reader = open_gguf(path), gguf.GGUFReader(path)
    assert set(container.tensors) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(container.read(tensor.name).numpy(), expected), tensor.name
    stored = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert stored.pop("tokenizer.ggml.tokens") == ["a word", "an other"]
    assert {k: v for k, v in container.metadata.items() if k != "tokenizer.ggml.tokens"} == stored
    mambify.load(path)


def test_unknown_architecture_lists_the_known_ones(tiny_teacher: Teacher, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", tiny_teacher("llama2"), architecture="rwkv7")
    with pytest.raises(UnsupportedError, match=r"'rwkv7'.*llama, qwen2, qwen3.*one file.*docs/families\.md"):
        mambify.load(path)


def test_damaged_files(tiny_teacher: Teacher, tmp_path: Path) -> None:
    whole = write(tmp_path / "tiny.gguf", tiny_teacher("llama2")).read_bytes()
    damaged = tmp_path / "damaged.gguf"
    lengths = [0, 3, 10, 30, 200, 1000, len(whole) // 2, len(whole) - 1000]
    for content in [*(whole[:n] for n in lengths), b"GGML" + whole[4:], whole[:4] + b"\x09" + whole[5:]]:
        damaged.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"damaged\.gguf"):
            mambify.load(damaged)


def test_no_flipped_header_byte_escapes(tiny_teacher: Teacher, tmp_path: Path) -> None:
    """Whatever one byte of the header becomes, the file loads or the error is one of ours, in no time."""
    whole = bytearray(write(tmp_path / "tiny.gguf", tiny_teacher("llama2", num_hidden_layers=1)).read_bytes())
    damaged, refused = tmp_path / "damaged.gguf", 0
    for position in range(0, 1500, 11):
        for flip in (0x01, 0xFF):
            content = bytearray(whole)
            content[position] ^= flip
            damaged.write_bytes(content)
            try:
                mambify.load(damaged)
            except mambify.MambifyError:
                refused += 1
    assert refused > 50


def test_missing_facts_are_named(tiny_teacher: Teacher, tmp_path: Path) -> None:
    teacher = tiny_teacher("llama2")
    with pytest.raises(CheckpointError, match=r"'llama\.context_length'"):
        mambify.load(write(tmp_path / "one.gguf", teacher, context=False))
    with pytest.raises(CheckpointError, match=r"1 weights are missing, first 'model\.layers\.2\.mlp"):
        mambify.load(write(tmp_path / "two.gguf", teacher, skip=("blk.2.ffn_up.weight",)))
    with pytest.raises(CheckpointError, match=r"'token_embd\.weight'"):
        mambify.load(write(tmp_path / "three.gguf", teacher, skip=("token_embd.weight",)))
