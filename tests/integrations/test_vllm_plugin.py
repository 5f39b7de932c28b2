"""The plugin for vLLM: how it is found, what it refuses, and the model it builds, of stand-ins for vLLM's layers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import mambify
from mambify import HybridConfig, HybridForCausalLM
from mambify.errors import CheckpointError, MissingDependencyError, UnsupportedError
from mambify.integrations import vllm as plugin
from mambify.integrations.vllm.config import ServedConfig, served_layout

from . import fake_vllm

REPOSITORY = Path(__file__).resolve().parents[2]
Hybrid = Callable[..., HybridForCausalLM]
M, A = "mamba2", "attention"


@pytest.fixture(autouse=True)
def own_config() -> Iterator[None]:
    """The plugin puts its configuration in the place of ours: other tests get theirs back."""
    yield
    AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> fake_vllm.Registry:
    return fake_vllm.install(monkeypatch)


def test_the_entry_point_names_the_plugin() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["mambify"].partition(":")
    assert getattr(importlib.import_module(module), function) is plugin.register


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm() -> None:
    assert "mambify.integrations.vllm.model" not in sys.modules
    with pytest.raises(MissingDependencyError, match="pip install vllm"):
        plugin.register()
    assert CONFIG_MAPPING["mambify"] is HybridConfig


def test_register(registry: fake_vllm.Registry, tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    plugin.register()
    plugin.register()  # vLLM may, in any of its processes
    assert registry.models == {"HybridForCausalLM": "mambify.integrations.vllm.model:HybridForCausalLM"}
    mambify.save(tiny_hybrid([M, A]), tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert config.mamba_chunk_size == 256
    assert config.layer_types == ["linear_attention", "full_attention"]
    assert config.architectures == list(registry.models)


HYBRIDS: dict[str, dict[str, Any]] = {
    "norms and wide heads": {"qk_norm": True, "head_dim": 32},
    "norms, wide heads, tied": {"qk_norm": True, "head_dim": 32, "tie_word_embeddings": True},
    "one key/value head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
}


@pytest.mark.skipif(not fake_vllm.HAS_GROUP_NORM, reason="this version of transformers norms all heads at once")
@pytest.mark.parametrize("kind", list(HYBRIDS))
@torch.no_grad()
def test_the_model_is_ours(registry: fake_vllm.Registry, kind: str, tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    ours = tiny_hybrid([M, A, M], **HYBRIDS[kind])
    mambify.save(ours, tmp_path / "model")
    plugin.register()
    config = AutoConfig.from_pretrained(tmp_path / "model")
    module, _, name = registry.models["HybridForCausalLM"].partition(":")
    served = getattr(importlib.import_module(module), name)(vllm_config=fake_vllm.vllm_config(config)).eval()
    filled = served.load_weights(load_file(tmp_path / "model" / "model.safetensors").items())
    assert filled == {name for name, _ in served.named_parameters()}
    torch.manual_seed(1)
    tokens = torch.randint(3, 96, (29,))
    logits = served.compute_logits(served(tokens, torch.arange(29)))
    assert (logits - ours(tokens[None]).logits[0]).abs().max() <= 1e-4


def test_state_sizes(registry: fake_vllm.Registry, tiny_hybrid: Hybrid) -> None:
    config = tiny_hybrid([M, A], head_dim=32).config
    model = importlib.import_module("mambify.integrations.vllm.model").HybridForCausalLM
    sizes = model.get_mamba_state_shape_from_config(fake_vllm.vllm_config(config, (2, 3)))
    assert sizes == {
        "tp_world_size": 2, "intermediate_size": 128, "n_groups": 4, "num_heads": 4, "head_dim": 32,
        "state_size": 32, "conv_kernel": 4, "num_spec": 3,
    }  # fmt: skip


def test_a_weight_without_a_place(registry: fake_vllm.Registry, tiny_hybrid: Hybrid) -> None:
    config = tiny_hybrid([M, A]).config
    module = importlib.import_module("mambify.integrations.vllm.model")
    served = module.HybridForCausalLM(vllm_config=fake_vllm.vllm_config(config))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mixer\.other\.weight' has no place"):
        served.load_weights([("model.layers.1.mixer.other.weight", torch.zeros(1))])


@pytest.mark.parametrize(
    ("mixers", "changes", "said"),
    [
        ([M, "mamba1", A], {}, "layers 1 are mamba1.*mambify generate"),
        ([M, M], {}, "without any attention.*mambify export"),
        ([M, A], {"sliding_window": 7, "layer_types": ["linear_attention", "sliding_attention"]}, "with a window"),
        ([M, A], {"base": {"name": "x", "fingerprint": "y"}}, "mixers only"),
    ],
)
def test_what_it_does_not_serve(mixers: list[str], changes: dict[str, Any], said: str) -> None:
    config = ServedConfig(
        num_hidden_layers=len(mixers), layer_mixers=mixers, hidden_size=64, num_attention_heads=4, **changes
    )
    with pytest.raises(UnsupportedError, match=said) as caught:
        served_layout(config)
    assert "\n" not in str(caught.value)
