"""Saved and loaded again: by us, by transformers' auto classes, and in processes that never heard of mambify."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mambify
from mambify import HybridConfig, HybridForCausalLM

Hybrid = Callable[..., HybridForCausalLM]


def same(one: HybridForCausalLM, other: HybridForCausalLM) -> None:
    before, after = one.state_dict(), other.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("load", ["from_pretrained", "auto", "mambify"])
def test_round_trip_is_bit_exact(
    tiny_hybrid: Hybrid, tmp_path: Path, dtype: torch.dtype, tied: bool, load: str
) -> None:
    model = tiny_hybrid(tie_word_embeddings=tied, attention_bias=True).to(dtype)
    assert model.model.layers[0].mixer.A_log.dtype == torch.float32
    model.save_pretrained(tmp_path)
    again = {
        "from_pretrained": HybridForCausalLM.from_pretrained,
        "auto": AutoModelForCausalLM.from_pretrained,
        "mambify": lambda path: mambify.load(path).model,
    }[load](tmp_path)
    assert type(again) is HybridForCausalLM
    assert not again.training
    same(model, again)
    assert again.dtype == dtype
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("load", [HybridForCausalLM.from_pretrained, lambda path, **kw: mambify.load(path, **kw).model])
def test_another_dtype_on_loading(tiny_hybrid: Hybrid, tmp_path: Path, load: Callable[..., HybridForCausalLM]) -> None:
    model = tiny_hybrid()
    model.save_pretrained(tmp_path)
    same(model.bfloat16(), load(tmp_path, dtype=torch.bfloat16))


def test_sharded(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    model = tiny_hybrid()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    same(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    same(model, mambify.load(tmp_path).model)


def test_config_round_trip(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    model = tiny_hybrid(sliding_window=6, teacher="someone/something")
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is HybridConfig
    assert config.layer_mixers == ["mamba2", "attention", "mamba1", "attention"]
    assert config.layer_types == ["linear_attention", "sliding_attention"] * 2
    assert config.attention_layers == [1, 3]
    assert config.converted_layers == [0, 2]
    assert config.teacher == "someone/something"
    ours, theirs = model.config.to_dict(), config.to_dict()
    assert {key for key, value in theirs.items() if ours.get(key, value) != value} <= {"_name_or_path"}


def test_loading_says_nothing_is_missing(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    tiny_hybrid(tie_word_embeddings=True).save_pretrained(tmp_path)
    _, report = HybridForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


def test_fresh_models_are_initialised(tiny_hybrid: Hybrid) -> None:
    """``from_config`` gives finite, sensible parameters also where transformers' defaults know nothing."""
    config = tiny_hybrid(attention_bias=True).config
    torch.use_deterministic_algorithms(True)  # what is never written is NaN
    try:
        model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    delta = torch.nn.functional.softplus(model.model.layers[0].mixer.dt_bias)
    assert ((delta > 0.9e-3) & (delta < 0.11)).all()


def run(code: str, directory: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(directory)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
assert not any(name.split(".")[0] == "mambify" for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__module__, type(model).__name__)
print(repr(model(torch.arange(3, 20)[None]).logits.double().sum().item()))
model.save_pretrained(sys.argv[1] + "-again")
"""

WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mambify":
            raise ModuleNotFoundError("No module named 'mambify'", name="mambify")

sys.meta_path.insert(0, Blocker())
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


def test_trust_remote_code_in_a_process_without_the_import(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    model = tiny_hybrid()
    directory = mambify.save(model, tmp_path / "student")
    done = run(LOAD, directory, tmp_path)
    assert done.returncode == 0, done.stderr
    kind, total = done.stdout.split("\n")[:2]
    assert kind == "mambify.model HybridForCausalLM"
    with torch.no_grad():
        assert float(total) == pytest.approx(model(torch.arange(3, 20)[None]).logits.double().sum().item(), abs=1e-3)
    same(model, mambify.load(tmp_path / "student-again").model)


def test_trust_remote_code_where_mambify_is_not_installed(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    done = run(WITHOUT, mambify.save(tiny_hybrid(), tmp_path / "student"), tmp_path)
    assert done.returncode != 0
    assert "ImportError" in done.stderr.splitlines()[-1] or "pip install mambify" in done.stderr
    assert "mambify" in done.stderr.splitlines()[-1]


def test_shim_is_small_and_says_what_to_install(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    tiny_hybrid().save_pretrained(tmp_path)
    shim = (tmp_path / "modeling_mambify.py").read_text()
    assert "pip install mambify" in shim
    assert len(shim.splitlines()) < 12
    compile(shim, "modeling_mambify.py", "exec")
    assert not (tmp_path / "model.py").exists()
