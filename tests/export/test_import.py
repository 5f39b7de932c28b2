"""What was exported reads back to the bit; what others made is read as far as our mixers cover it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BambaConfig, BambaForCausalLM, GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

import mambify
from conftest import randomise
from mambify import HybridForCausalLM
from mambify.errors import CheckpointError, UnsupportedError
from mambify.export import export_transformers
from mambify.provenance import Provenance

from .conftest import A, Hybrid, M, needs_stock_group_norm

Exported = tuple[HybridForCausalLM, Path]


def test_there_and_back(exported: Exported) -> None:
    model, path = exported
    again = mambify.load(path).model
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name
    mine, yours = model.config.to_dict(), again.config.to_dict()
    different = {name for name in mine if mine[name] != yours.get(name)}
    # A window that makes no difference is not kept.
    assert different <= {"dtype", "sliding_window", "layer_types"}
    assert again.config.layer_mixers == model.config.layer_mixers


def test_in_bfloat16_too(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    model = tiny_hybrid([M, A]).to(torch.bfloat16)
    export_transformers(model, tmp_path / "out")
    again = mambify.load(tmp_path / "out").model
    assert again.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_origin_and_provenance_come_back(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    model = tiny_hybrid([M, A])
    model.config.teacher, model.config.teacher_hub_id = "smollm2", "owner/teacher"
    model.config.teacher_license = {"license": "apache-2.0"}
    model.provenance = Provenance(stages=({"stage": "01-kd", "tokens": 1234, "attention": 0.5},))
    export_transformers(model, tmp_path / "out")
    again = mambify.load(tmp_path / "out").model
    assert (again.config.teacher, again.config.teacher_hub_id) == ("smollm2", "owner/teacher")
    assert again.config.teacher_license == {"license": "apache-2.0"}
    assert again.provenance is not None
    assert again.provenance.tokens == 1234


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize(
    ("weight", "index", "said"),
    [
        ("model.layers.0.mamba.in_proj.weight", 64, "heads that would share one of 2"),
        ("model.layers.0.mamba.conv1d.bias", 16, "heads that would share one of 2"),
        ("model.layers.0.mamba.A_log", 1, "heads of one group differ"),
    ],
)
def test_weights_that_were_trained_apart(
    weight: str, index: int, said: str, tiny_hybrid: Hybrid, tmp_path: Path
) -> None:
    """After the export, somebody trained the copies of one head into different ones."""
    export_transformers(tiny_hybrid([M, A]), tmp_path / "out", split_heads=2)
    file = tmp_path / "out" / "model.safetensors"
    weights = load_file(file)
    weights[weight][index] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"'{weight}': .*{said}"):
        mambify.load(tmp_path / "out")


def test_filling_that_is_not_zero(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    export_transformers(tiny_hybrid([M, A], head_dim=8), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    for name, place in (
        ("model.layers.0.mamba.norm.weight", -1),
        ("model.layers.1.self_attn.q_proj.weight", 7),
        ("model.layers.1.self_attn.v_proj.weight", -1),
    ):
        weights = load_file(file)
        kept = weights[name].clone()
        weights[name][place] += 1
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"'{name}'.*should be zero"):
            mambify.load(tmp_path / "out")
        weights[name] = kept
        save_file(weights, file, metadata={"format": "pt"})
    mambify.load(tmp_path / "out")


def test_the_inert_layer_has_to_be_inert(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    export_transformers(tiny_hybrid([M, M]), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.2.self_attn.o_proj.weight"][3, 4] = 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="layer 2 that does nothing"):
        mambify.load(tmp_path / "out")


@pytest.mark.parametrize("own", [{"head_dim": 16}, {"head_dim": "x", "rope_parameters": {}, "inert_layers": 0}])
def test_a_field_of_ours_that_cannot_be(own: Any, tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    export_transformers(tiny_hybrid([M, A]), tmp_path / "out")
    edit_config(tmp_path / "out", mambify=own)
    with pytest.raises(CheckpointError, match=r"'mambify' of config\.json"):
        mambify.load(tmp_path / "out")


@pytest.mark.parametrize("own", ["words", ...], ids=["somebody else's", "absent"])
def test_without_our_field_it_is_anybodys(own: Any, tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    model = tiny_hybrid([M, A])
    export_transformers(model, tmp_path / "out")
    edit_config(tmp_path / "out", mambify=own)
    again = mambify.load(tmp_path / "out").model
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert again.config.teacher_family == "granitemoehybrid"


def granite(**changes: Any) -> GraniteMoeHybridForCausalLM:
    facts: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 80,
        "shared_intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_local_experts": 0,
        "attention_multiplier": 0.25,
        "position_embedding_type": "rope",
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_n_heads": 4,
        "mamba_n_groups": 4,
        "mamba_d_state": 16,
        "mamba_expand": 1,
        "initializer_range": 0.1,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**facts | changes)).eval()
    randomise(model)
    return model


def bamba(**changes: Any) -> BambaForCausalLM:
    facts: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "attn_layer_indices": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        "mamba_n_heads": 4,
        "mamba_n_groups": 4,
        "mamba_d_state": 16,
        "mamba_expand": 1,
        "initializer_range": 0.1,
    }
    torch.manual_seed(0)
    model = BambaForCausalLM(BambaConfig(**facts | changes)).eval()
    randomise(model)
    return model


@needs_stock_group_norm
@pytest.mark.parametrize(
    "make",
    [
        granite,
        lambda: granite(tie_word_embeddings=True, mamba_conv_bias=False),
        lambda: granite(attention_bias=True),
        lambda: granite(layer_types=["linear_attention"] * 3, num_key_value_heads=2, mamba_expand=2, mamba_n_heads=8,
                        mamba_n_groups=8),
        lambda: granite(layer_types=["full_attention"] * 3, num_key_value_heads=2, mamba_n_groups=1),
        bamba,
        lambda: bamba(tie_word_embeddings=True, attention_bias=True),
    ],
    ids=["granite", "tied-no-conv-bias", "biased", "no-attention", "only-attention", "bamba", "bamba-tied-biased"],
)  # fmt: skip
@torch.no_grad()
def test_models_of_others(make: Callable[[], Any], tmp_path: Path) -> None:
    theirs = make()
    theirs.save_pretrained(tmp_path / "stock")
    ours = mambify.load(tmp_path / "stock").model
    assert ours.config.layer_mixers == [A if kind == "full_attention" else M for kind in theirs.config.layer_types]
    torch.manual_seed(1)
    tokens = torch.randint(3, 96, (2, 41))
    assert (ours(tokens).logits - theirs(tokens, use_cache=False).logits).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: granite(num_local_experts=4), "num_local_experts is 4"),
        (lambda: granite(embedding_multiplier=12.0), "embedding_multiplier is 12.0"),
        (lambda: granite(residual_multiplier=0.22), "residual_multiplier is 0.22"),
        (lambda: granite(logits_scaling=8.0), "logits_scaling is 8.0"),
        (lambda: granite(attention_multiplier=0.5), "attention_multiplier is 0.5.*0.25 only"),
        (lambda: granite(position_embedding_type=None), "position_embedding_type is None.*rope only"),
        (lambda: granite(time_step_limit=(0.1, 1.0)), "time_step_limit"),
        (lambda: granite(mamba_n_groups=1), "mamba_n_groups is 1.*64 channels"),
        (lambda: granite(mamba_d_state=32), "mamba_n_groups is 4.*state of 32"),
        (lambda: granite(mamba_n_heads=8, mamba_n_groups=8, mamba_expand=2), "mamba_n_groups is 8"),
        (lambda: bamba(rope_parameters=None), "partial_rotary_factor is 0.5"),
    ],
)
def test_what_our_mixers_do_not_cover(make: Callable[[], Any], said: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "stock")
    with pytest.raises(UnsupportedError, match=said) as caught:
        mambify.load(tmp_path / "stock")
    assert "\n" not in str(caught.value)


def test_a_bias_that_ours_has_not(tmp_path: Path) -> None:
    granite(mamba_proj_bias=True).save_pretrained(tmp_path / "stock")
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mamba\.in_proj\.bias': a bias of the mixer"):
        mambify.load(tmp_path / "stock")
