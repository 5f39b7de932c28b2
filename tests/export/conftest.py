"""Exports of tiny hybrids, and what stock transformers makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteMoeHybridForCausalLM
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated

from mambify import HybridForCausalLM
from mambify.export import export_transformers

M, A = "mamba2", "attention"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

#: name → (mixers, changes to the tiny configuration, arguments of the export)
HYBRIDS: dict[str, tuple[list[str], dict[str, Any], dict[str, Any]]] = {
    "half": ([M, A, M, A], {}, {}),
    "quarter": ([M, M, M, A], {}, {}),
    "eighth": ([M] * 7 + [A], {}, {}),
    "none": ([M, M], {}, {}),
    "all": ([A, A], {}, {}),
    "mqa": ([M, A], {"num_key_value_heads": 1}, {}),
    "mha": ([M, A], {"num_key_value_heads": 4}, {}),
    "tied": ([M, A], {"tie_word_embeddings": True}, {}),
    "qkv-bias": ([M, A], {"attention_bias": True}, {}),
    "output-bias": ([M, A], {"attention_output_bias": True}, {}),
    "all-biases": ([M, A], {"attention_bias": True, "attention_output_bias": True}, {}),
    "llama3": ([M, A], {"rope_parameters": LLAMA3}, {}),
    "yarn": ([M, A], {"rope_parameters": YARN}, {}),
    "small-heads": ([M, A], {"head_dim": 8}, {}),
    "small-heads-llama3": ([M, A], {"head_dim": 8, "rope_parameters": LLAMA3, "attention_bias": True}, {}),
    "padded": ([M, M], {"head_dim": 32, "num_attention_heads": 3, "num_key_value_heads": 1}, {}),
    "wide-heads-with-norms": ([M, M], {"head_dim": 32, "qk_norm": True, "attention_bias": True}, {}),
    "split": ([M, A], {}, {"split_heads": 4}),
    "split-padded": ([M, M], {"head_dim": 32, "num_attention_heads": 3, "num_key_value_heads": 3}, {"split_heads": 2}),
    "window-without-effect": (
        [M, A],
        {"sliding_window": 128, "layer_types": ["linear_attention", "sliding_attention"]},
        {},
    ),
}

# Before it had groups, the stock norm went over all heads at once: another function, whatever the weights.
needs_stock_group_norm = pytest.mark.skipif(
    "group_size" not in inspect.signature(GraniteMoeHybridRMSNormGated).parameters,
    reason="this version of transformers has no stock Mamba2 with a norm for each group",
)

Hybrid = Callable[..., HybridForCausalLM]


@pytest.fixture(scope="session", params=list(HYBRIDS))
def kind(request: pytest.FixtureRequest) -> str:
    """Runs a test once for every row of :data:`HYBRIDS`."""
    return str(request.param)


@pytest.fixture(scope="session")
def exported(
    kind: str, tiny_hybrid: Hybrid, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HybridForCausalLM, Path]:
    """A hybrid and the directory it was exported to."""
    mixers, changes, arguments = HYBRIDS[kind]
    model = tiny_hybrid(mixers, **changes)
    path = tmp_path_factory.mktemp("stock") / kind
    export_transformers(model, path, **arguments)
    return model, path


@pytest.fixture(scope="session")
def stock(exported: tuple[HybridForCausalLM, Path]) -> GraniteMoeHybridForCausalLM:
    """What transformers loads from the export: its own class, with a place for every weight."""
    model, report = AutoModelForCausalLM.from_pretrained(exported[1], output_loading_info=True)
    assert type(model) is GraniteMoeHybridForCausalLM
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


@pytest.fixture
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[2, 13]`` and a mask whose first row is padded on the left."""
    torch.manual_seed(0)
    tokens = torch.randint(3, 96, (2, 13))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    tokens[0, :5] = 0
    return tokens, mask
