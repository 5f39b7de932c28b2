"""What stands in a GGUF file, read back without llama.cpp: metadata, names, shapes, and every weight of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from torch import Tensor

import mambify
from mambify import HybridForCausalLM
from mambify.export.gguf import export_gguf
from mambify.export.gguf.layout import MambaLayout, mamba_layout
from mambify.mixers.attention import AttentionMixer
from mambify.mixers.mamba2 import Mamba2Mixer
from tiny import byte_tokenizer

Make = Callable[..., HybridForCausalLM]
MIXED = ("mamba2", "attention", "mamba2", "attention")


class File:
    """A GGUF file as dictionaries of plain values."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
        self.tensors: dict[str, Tensor] = {
            tensor.name: torch.from_numpy(
                np.array(dequantize(tensor.data, tensor.tensor_type)).reshape(tuple(reversed(tensor.shape.tolist())))
            )
            for tensor in reader.tensors
        }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., File]:
    def call(model: HybridForCausalLM, **options: Any) -> File:
        path = tmp_path / "model.gguf"
        export_gguf(model, byte_tokenizer(), path, **options)
        return File(path)

    return call


def test_metadata(tiny_hybrid: Make, write: Callable[..., File]) -> None:
    model = tiny_hybrid(
        MIXED,
        vocab_size=320,
        teacher="org/Some-Teacher",
        teacher_hub_id="org/Some-Teacher",
        teacher_license={"license": "other", "license_name": "some-licence", "license_link": "https://some.where"},
    )
    fields = write(model).fields
    said = {
        "general.architecture": "granitehybrid",
        "general.name": "Some-Teacher 2/4 attention, Mamba2",
        "general.license": "other",
        "general.license.name": "some-licence",
        "general.license.link": "https://some.where",
        "general.base_model.0.name": "Some-Teacher",
        "general.base_model.0.organization": "org",
        "general.base_model.0.repo_url": "https://huggingface.co/org/Some-Teacher",
        "granitehybrid.block_count": 4,
        "granitehybrid.embedding_length": 64,
        "granitehybrid.feed_forward_length": 80,
        "granitehybrid.context_length": 128,
        "granitehybrid.attention.head_count": 4,
        "granitehybrid.attention.head_count_kv": [0, 2, 0, 2],
        "granitehybrid.attention.key_length": 16,
        "granitehybrid.rope.scaling.finetuned": True,
        "granitehybrid.ssm.inner_size": 128,
        "granitehybrid.ssm.state_size": 16,
        "granitehybrid.ssm.group_count": 4,
        "granitehybrid.ssm.time_step_rank": 4,
        "granitehybrid.ssm.conv_kernel": 4,
    }
    assert {key: fields[key] for key in said} == said
    scales = ("logit_scale", "residual_scale", "embedding_scale", "attention.scale", "expert_count")
    assert not [scale for scale in scales if f"granitehybrid.{scale}" in fields]


def test_what_is_not_known_is_left_out(tiny_hybrid: Make, write: Callable[..., File]) -> None:
    fields = write(tiny_hybrid(("mamba2", "attention"), vocab_size=320)).fields
    assert not [key for key in fields if "license" in key or "base_model" in key]


def test_tokenizer(tiny_hybrid: Make, write: Callable[..., File]) -> None:
    tokenizer = byte_tokenizer()
    fields = write(tiny_hybrid(("mamba2", "attention"), vocab_size=320)).fields
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[-1] == "[PAD319]" and len(tokens) == 320
    assert types == [3] * 3 + [1] * (len(tokenizer) - 3) + [5] * (320 - len(tokenizer))
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert fields["tokenizer.ggml.add_bos_token"] is False


LAYOUTS: dict[str, dict[str, Any]] = {
    "two copies": {},
    "one kv head": {"num_key_value_heads": 1},
    "no padding": {"head_dim": 32},
    "copies and zero heads": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("pad_state", [False, True], ids=["", "padded-state"])
def test_every_weight_comes_back(
    tiny_hybrid: Make, write: Callable[..., File], changes: dict[str, Any], pad_state: bool
) -> None:
    model = tiny_hybrid(MIXED, vocab_size=320, **changes)
    tensors = dict(write(model, pad_state=pad_state).tensors)
    layout = mamba_layout(model.config, pad_state=pad_state)
    assert layout.inner == 2 * model.config.hidden_size
    read = dict(read_back(model, layout, tensors))
    expected = dict(model.named_parameters())
    assert read.keys() == expected.keys()
    for name, value in read.items():
        assert torch.equal(value, expected[name].detach()), name
    assert not tensors, "tensors that are nobody's"


def read_back(
    model: HybridForCausalLM, layout: MambaLayout, tensors: dict[str, Tensor]
) -> Sequence[tuple[str, Tensor]]:
    """Our weights from the file's, each taken out of ``tensors``; padding has to be zero, copies have to be equal."""
    H, G, P = layout.num_heads, layout.num_kv_heads, layout.head_dim
    found = [("model.embed_tokens.weight", tensors.pop("token_embd.weight"))]
    found.append(("model.norm.weight", tensors.pop("output_norm.weight")))
    if not model.config.tie_word_embeddings:
        found.append(("lm_head.weight", tensors.pop("output.weight")))

    def take(name: str) -> Tensor:
        return tensors.pop(f"blk.{index}.{name}")

    def halves(rows: Tensor, heads: int) -> Tensor:
        return torch.cat([rows.unflatten(0, (heads, -1))[:, part::2] for part in (0, 1)], dim=1).reshape(rows.shape)

    def heads_of(values: Tensor, fill: float = 0.0) -> Tensor:
        assert bool((values[H:] == fill).all())
        return values[:H]

    def channels(rows: Tensor) -> Tensor:
        copies = heads_of(rows.unflatten(0, (layout.heads, layout.copies, P)))
        assert bool((copies == copies[:, :1]).all())
        return copies[:, 0].flatten(0, 1)

    def states(rows: Tensor) -> Tensor:
        values = heads_of(rows.unflatten(0, (layout.heads, layout.state)))
        assert not values[:, P:].any()
        return values[:, :P]

    def shared(heads: Tensor) -> Tensor:
        groups = heads.unflatten(0, (G, H // G))
        assert bool((groups == groups[:, :1]).all())
        return groups[:, 0].flatten(0, 1)

    def conv(rows: Tensor) -> Tensor:
        x, B, C = rows.split([layout.inner, layout.heads * layout.state, layout.heads * layout.state])
        return torch.cat([shared(channels(x).unflatten(0, (H, P))), shared(states(B)), states(C).flatten(0, 1)])

    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}"
        found += [
            (f"{prefix}.input_layernorm.weight", take("attn_norm.weight")),
            (f"{prefix}.post_attention_layernorm.weight", take("ffn_norm.weight")),
        ]
        kinds = ("weight", "bias") if model.config.mlp_bias else ("weight",)
        found += [(f"{prefix}.mlp.{n}_proj.{k}", take(f"ffn_{n}.{k}")) for n in ("gate", "up", "down") for k in kinds]
        prefix += ".mixer"
        if isinstance(layer.mixer, AttentionMixer):
            for kind in ("weight", "bias") if model.config.attention_bias else ("weight",):
                found.append((f"{prefix}.q_proj.{kind}", halves(take(f"attn_q.{kind}"), H)))
                found.append((f"{prefix}.k_proj.{kind}", halves(take(f"attn_k.{kind}"), G)))
                found.append((f"{prefix}.v_proj.{kind}", take(f"attn_v.{kind}")))
            found.append((f"{prefix}.o_proj.weight", take("attn_output.weight")))
            continue
        assert isinstance(layer.mixer, Mamba2Mixer)
        z, xBC, dt = take("ssm_in.weight").split(
            [layout.inner, layout.inner + 2 * layout.heads * layout.state, layout.heads]
        )
        found.append((f"{prefix}.in_proj.weight", torch.cat([channels(z), conv(xBC), heads_of(dt)])))
        found.append((f"{prefix}.conv1d.weight", conv(take("ssm_conv1d.weight"))[:, None]))
        found.append((f"{prefix}.conv1d.bias", conv(take("ssm_conv1d.bias"))))
        found.append((f"{prefix}.dt_bias", heads_of(take("ssm_dt.bias"))))
        decay = heads_of(take("ssm_a"), fill=-1.0)[:, 0]
        assert torch.equal(decay, -layer.mixer.A_log.detach().exp())
        found.append((f"{prefix}.A_log", layer.mixer.A_log.detach()))
        found.append((f"{prefix}.D", heads_of(take("ssm_d"))[:, 0]))
        found.append((f"{prefix}.norm.weight", channels(take("ssm_norm.weight").flatten())))
        columns = take("ssm_out.weight").unflatten(1, (layout.heads, layout.copies, P))
        assert not columns[:, H:].any() and not columns[:, :, 1:].any()
        found.append((f"{prefix}.out_proj.weight", columns[:, :H, 0].flatten(1)))
    return found


def test_llama3_rope_has_its_factors(tiny_hybrid: Make, write: Callable[..., File]) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    factors = write(tiny_hybrid(MIXED, vocab_size=320, rope_parameters=rope)).tensors["rope_freqs.weight"]
    assert factors.shape == (8,)
    assert factors[0] == pytest.approx(1, rel=1e-5) and factors[-1] == pytest.approx(8, rel=1e-5)


def test_without_attention_a_block_that_adds_zero_follows(tiny_hybrid: Make, write: Callable[..., File]) -> None:
    file = write(tiny_hybrid(("mamba2", "mamba2"), vocab_size=320))
    assert file.fields["granitehybrid.attention.head_count_kv"] == [0, 0, 1]
    assert file.fields["granitehybrid.block_count"] == 3
    for name in ("attn_output", "ffn_down"):
        assert not file.tensors[f"blk.2.{name}.weight"].any()


def test_without_a_converted_layer_it_is_a_llama_that_reads_back(tiny_hybrid: Make, tmp_path: Path) -> None:
    model = tiny_hybrid(("attention", "attention"), vocab_size=320)
    export_gguf(model, byte_tokenizer(), tmp_path / "teacher.gguf")
    again = mambify.load(tmp_path / "teacher.gguf").model
    expected = dict(model.named_parameters())
    for name, value in again.named_parameters():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q5_1", "q4_0"])
def test_matrices_are_stored_as_asked_and_the_rest_in_float32(
    tiny_hybrid: Make, write: Callable[..., File], dtype: str
) -> None:
    file = write(tiny_hybrid(MIXED, vocab_size=320, intermediate_size=96), dtype=dtype)
    wanted = GGMLQuantizationType[dtype.upper()]
    tables = GGMLQuantizationType.Q8_0 if dtype in ("q5_1", "q4_0") else wanted
    for name, kind in file.kinds.items():
        kept = "norm" in name or name.endswith(("bias", "ssm_a", "ssm_d", "ssm_conv1d.weight"))
        table = name in ("token_embd.weight", "output.weight")
        assert kind == (GGMLQuantizationType.F32 if kept else tables if table else wanted), name


def test_rows_that_fill_no_block_are_float16(tiny_hybrid: Make, write: Callable[..., File], tmp_path: Path) -> None:
    exported = export_gguf(
        tiny_hybrid(MIXED, vocab_size=320, intermediate_size=80), byte_tokenizer(), tmp_path / "a.gguf", dtype="q8_0"
    )
    file = File(tmp_path / "a.gguf")
    assert file.kinds["blk.0.ffn_down.weight"] == GGMLQuantizationType.F16
    assert file.kinds["blk.0.ffn_up.weight"] == GGMLQuantizationType.Q8_0
    assert any(note.startswith("4 matrices are stored in f16") for note in exported.notes)


def test_auto_stores_what_the_model_has(tiny_hybrid: Make, write: Callable[..., File]) -> None:
    model = tiny_hybrid(MIXED, vocab_size=320).to(torch.bfloat16)
    file = write(model)
    assert file.kinds["blk.0.ssm_in.weight"] == GGMLQuantizationType.BF16
    assert torch.equal(file.tensors["blk.1.attn_v.weight"], model.model.layers[1].mixer.v_proj.weight.float())


@pytest.mark.parametrize("changes", list(LAYOUTS.values())[:4], ids=list(LAYOUTS)[:4])
def test_what_the_padding_costs(tiny_hybrid: Make, write: Callable[..., File], changes: dict[str, Any]) -> None:
    model = tiny_hybrid(MIXED, vocab_size=320, **changes)
    layout, file = mamba_layout(model.config), write(model)
    ours, stored = layout.weights
    matrices = ("in_proj.weight", "conv1d.weight", "out_proj.weight")
    assert ours == sum(p.numel() for n, p in model.model.layers[0].mixer.named_parameters() if n in matrices)
    assert stored == sum(file.tensors[f"blk.0.ssm_{n}.weight"].numel() for n in ("in", "conv1d", "out"))
    assert layout.operations == (2 * ours + 5 * layout.state_elements[0], 2 * stored + 5 * layout.state_elements[1])
