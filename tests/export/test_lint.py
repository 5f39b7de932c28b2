"""Every rule of the lint finds its fault planted, and nothing in what is written as it should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

import mambify
from mambify import HybridForCausalLM
from mambify.errors import UnsupportedError
from mambify.export import lint
from mambify.export.check import check
from mambify.export.granite_config import granite_config, granite_layout
from mambify.export.lint import Finding, tensor_parallel_sizes

from .conftest import A, Hybrid, M

Config = dict[str, Any]


@pytest.fixture
def config(tiny_hybrid: Hybrid) -> Config:
    """One without any finding: eight heads of 16 are twice the hidden size."""
    hybrid = tiny_hybrid([M, M], num_attention_heads=8, num_key_value_heads=4, head_dim=16).config
    return granite_config(hybrid, granite_layout(hybrid), dtype="float32")


def test_what_is_written_well_has_no_finding(config: Config) -> None:
    assert lint(config) == []


@pytest.mark.parametrize(
    ("changes", "engine", "field", "severity"),
    [
        ({"mamba_expand": 1.5}, "transformers", "mamba_expand", "broken"),
        ({"mamba_expand": 1}, "transformers", "mamba_n_heads", "broken"),
        ({"mamba_expand": 1, "mamba_n_heads": 4, "mamba_n_groups": 4}, "llama.cpp", "mamba_expand", "broken"),
        ({"mamba_d_head": "auto"}, "SGLang", "mamba_d_head", "broken"),
        ({"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1}, "transformers", "mamba_n_heads", "limited"),
        ({"mamba_d_conv": 5}, "transformers", "mamba_d_conv", "limited"),
        ({"head_dim": 32}, "vLLM", "num_attention_heads", "broken"),
        ({"num_attention_heads": 5}, "SGLang", "num_attention_heads", "broken"),
        ({"layer_types": ...}, "SGLang", "layer_types", "broken"),
        ({"layer_types": ["linear_attention"] * 2 + ["full_attention"]}, "vLLM", "layer_types", "limited"),
        ({"layer_types": ["mamba"] * 3}, "transformers", "layer_types", "broken"),
        ({"transformers_version": "5.22.2"}, "transformers", "transformers_version", "broken"),
        ({"transformers_version": ...}, "transformers", "transformers_version", "broken"),
        ({"time_step_limit": [0.0, {"__float__": "Infinity"}]}, "vLLM", "time_step_limit", "limited"),
        ({"rope_theta": ...}, "SGLang", "rope_theta", "broken"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "vLLM", "rope_parameters", "broken"),
        ({"embedding_multiplier": ...}, "SGLang", "embedding_multiplier", "broken"),
        ({"tie_word_embeddings": ...}, "SGLang", "tie_word_embeddings", "broken"),
        ({"hidden_act": "gelu"}, "vLLM", "hidden_act", "broken"),
        ({"router_aux_loss_coef": 0.001}, "TRL", "router_aux_loss_coef", "broken"),
        ({"output_router_logits": True}, "TRL", "output_router_logits", "broken"),
    ],
)
def test_a_planted_fault(changes: Config, engine: str, field: str, severity: str, config: Config) -> None:
    spoilt = {name: value for name, value in (config | changes).items() if value is not ...}
    assert (engine, field, severity) in {(found.engine, found.field, found.severity) for found in lint(spoilt)}


def test_stock_code_fails_on_a_model_without_attention(config: Config) -> None:
    """The reason for the layer that does nothing: without it the stock cache has no length."""
    own = config | {"layer_types": ["mamba"] * 3}
    model = GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**own)).eval()
    with pytest.raises(ValueError, match="get_seq_length"):
        model.generate(max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize(
    ("heads", "keys", "groups", "expected"),
    [
        (8, 4, 8, [1, 2, 4, 8]),
        (9, 3, 9, [1, 3, 9]),
        (32, 8, 1, [1, 2, 4, 8, 16, 32]),
        (8, 1, 8, [1, 2, 4, 8]),
        (32, 8, 48, [1, 2, 4, 8, 16]),
    ],
)
def test_tensor_parallel_sizes(heads: int, keys: int, groups: int, expected: list[int]) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": keys, "shared_intermediate_size": 2304 * 32}
    assert (
        tensor_parallel_sizes(sizes | {"mamba_n_heads": groups if groups > 1 else heads, "mamba_n_groups": groups})
        == expected
    )


def test_another_architecture_has_no_rules() -> None:
    with pytest.raises(UnsupportedError, match="'llama': known: granitemoehybrid"):
        lint({"model_type": "llama"})


@pytest.mark.parametrize("save", [mambify.save, mambify.export_transformers])
def test_check_of_a_student_and_of_its_export(
    save: Callable[[HybridForCausalLM, Path], object], tiny_hybrid: Hybrid, tmp_path: Path
) -> None:
    save(tiny_hybrid([M, A]), tmp_path / "model")
    assert [(finding.engine, finding.field) for finding in check(tmp_path / "model")] == [
        ("llama.cpp", "mamba_expand"),
        ("transformers", "mamba_n_heads"),
    ]
    assert all(isinstance(finding, Finding) and finding.reason for finding in check(tmp_path / "model"))


def test_check_of_what_cannot_be_exported(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    mambify.save(tiny_hybrid(["mamba1", A]), tmp_path / "model")
    with pytest.raises(UnsupportedError, match="mamba1"):
        check(tmp_path / "model")
