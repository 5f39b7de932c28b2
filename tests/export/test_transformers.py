"""A hybrid and its export are one model: logits, cached generation, padding, beams, precision, files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteMoeHybridForCausalLM

import mambify
from mambify import HybridForCausalLM
from mambify.errors import InvalidOptionError, OutputExistsError, OutputWriteError, UnsupportedError
from mambify.export import export_transformers, lint, upload_directory
from mambify.families.load import LoadedModel
from mambify.provenance import Provenance, read_provenance
from tiny import byte_tokenizer

from .conftest import A, Hybrid, M, needs_stock_group_norm

Exported = tuple[HybridForCausalLM, Path]


@needs_stock_group_norm
@torch.no_grad()
def test_logits(exported: Exported, stock: GraniteMoeHybridForCausalLM) -> None:
    torch.manual_seed(1)
    tokens = torch.randint(3, 96, (2, 41))
    assert (exported[0](tokens).logits - stock(tokens).logits).abs().max() <= 1e-4


@needs_stock_group_norm
@torch.no_grad()
def test_logits_with_left_padding(
    exported: Exported, stock: GraniteMoeHybridForCausalLM, prompts: tuple[Tensor, Tensor]
) -> None:
    tokens, mask = prompts
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ours, theirs = (m(tokens, attention_mask=mask, position_ids=positions).logits for m in (exported[0], stock))
    assert (ours - theirs)[mask.bool()].abs().max() <= 1e-4


@needs_stock_group_norm
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_with_a_cache(
    exported: Exported, stock: GraniteMoeHybridForCausalLM, prompts: tuple[Tensor, Tensor], how: dict[str, Any]
) -> None:
    tokens, mask = prompts
    asked = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **how}
    theirs = stock.generate(tokens, **asked)
    assert torch.equal(exported[0].generate(tokens, **asked), theirs)
    assert torch.equal(stock.generate(tokens, **asked, use_cache=False), theirs)


@needs_stock_group_norm
@torch.no_grad()
def test_bfloat16(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    """In bfloat16 both are off from float32, and stock code by no more than a little more than ours."""
    model = tiny_hybrid([M, A, M, A])
    exported = export_transformers(model, tmp_path / "half", dtype="bfloat16")
    assert exported.dtype == "bfloat16"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert stock.dtype == torch.bfloat16
    torch.manual_seed(1)
    tokens = torch.randint(3, 96, (2, 41))
    exact = model(tokens).logits
    rounded = mambify.load(tmp_path / "half").model
    ours, theirs = ((m(tokens).logits.float() - exact).abs().mean() for m in (rounded, stock))
    assert theirs <= 1.5 * ours
    assert ours <= 0.05 * exact.abs().mean()


def test_what_stays_float32(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    export_transformers(tiny_hybrid([M, A]), tmp_path / "half", dtype="float16")
    with safe_open(tmp_path / "half" / "model.safetensors", framework="pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    exact = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert exact == {f"model.layers.0.mamba.{name}" for name in ("A_log", "dt_bias", "D")}
    assert set(dtypes.values()) == {torch.float32, torch.float16}


@needs_stock_group_norm
def test_shards(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    model = tiny_hybrid([M, A])
    whole = export_transformers(model, tmp_path / "whole")
    cut = export_transformers(model, tmp_path / "cut", shard_bytes=20_000)
    assert cut.weight_bytes == whole.weight_bytes
    files = sorted(tmp_path.glob("cut/*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert not list(tmp_path.glob("cut/shard-*"))
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_stands_beside_the_weights(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    model = tiny_hybrid([M, A])
    model.generation_config.max_new_tokens = 77
    tokenizer = byte_tokenizer()
    export_transformers(model, tmp_path / "out", tokenizer=tokenizer)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["max_new_tokens"] == 77
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template
    assert again("How are you?").input_ids == tokenizer("How are you?").input_ids
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformers_version"] == "5.23.0"
    assert "auto_map" not in config
    assert not list((tmp_path / "out").glob("*.py"))


def test_the_card(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    model = tiny_hybrid([M, A])
    model.config.teacher_hub_id, model.config.teacher_license = "owner/teacher", {"license": "apache-2.0"}
    model.provenance = Provenance(stages=[{"stage": "01-kd", "tokens": 1234, "attention": 0.5}])
    export_transformers(model, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["base_model"] == "owner/teacher"
    assert header["license"] == "apache-2.0"
    for words in ("1,234", "MA\n", "5.23.0 or newer", "vllm serve", "Tensor parallel sizes: 1, 2, 4."):
        assert words in card
    assert "trust_remote_code" not in card
    assert read_provenance(tmp_path / "out") == model.provenance


def test_upload(tiny_hybrid: Hybrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def file_exists(self, *_: Any, **__: Any) -> bool:
            return True

        def upload_folder(self, *, folder_path: Path, **options: Any) -> str:
            seen.update(options, files={file.name for file in folder_path.iterdir()})
            return "https://hub/commit"

    monkeypatch.setattr("mambify.hub.HfApi", Api)
    export_transformers(tiny_hybrid([M, A]), tmp_path / "out")
    assert upload_directory(tmp_path / "out", "model", token="t") == "https://hub/commit"
    assert (seen["token"], seen["repo_id"], seen["ignore_patterns"]) == ("t", "me/model", ["README.md"])
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} == seen["files"]


def test_no_export_has_a_broken_field_for_an_engine_that_reads_it(exported: Exported) -> None:
    findings = lint(json.loads((exported[1] / "config.json").read_text()))
    assert {finding.engine for finding in findings if finding.severity == "broken"} <= {"llama.cpp"}


REFUSALS: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "mamba1": ([M, "mamba1", A], {}, "layers 1 are mamba1.*--mixer mamba2"),
    "norms of q and k": ([M, A], {"qk_norm": True}, "layers 1 keep attention with a norm on q and k.*--attention 0"),
    "large heads": ([M, A], {"head_dim": 32}, "layers 1 keep attention with heads of 32.*64 / 4.*--attention 0"),
    "odd heads": ([M, A], {"hidden_size": 60, "num_attention_heads": 4, "head_dim": 14}, "60 / 4"),
    "filled heads with yarn": (
        [M, A],
        {"head_dim": 8, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "'yarn' RoPE",
    ),
    "window": (
        [M, A],
        {"sliding_window": 7, "layer_types": ["linear_attention", "sliding_attention"]},
        "layers 1 keep attention with a window of 7.*max_position_embeddings",
    ),
    "MLP biases": ([M, A], {"mlp_bias": True}, "mlp_bias"),
    "activation": ([M, A], {"hidden_act": "gelu"}, "gelu"),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_what_cannot_be_represented(case: str, tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    mixers, changes, said = REFUSALS[case]
    with pytest.raises(UnsupportedError, match=said) as caught:
        export_transformers(tiny_hybrid(mixers, **changes), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_wrong_options(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    model = tiny_hybrid([M, A])
    with pytest.raises(InvalidOptionError, match="did you mean 'bfloat16'"):
        export_transformers(model, tmp_path / "out", dtype="bfloat")
    for split in (0, 3):
        with pytest.raises(InvalidOptionError, match="heads of 16"):
            export_transformers(model, tmp_path / "out", split_heads=split)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(OutputExistsError):
        export_transformers(model, tmp_path / "taken")
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "file"]


def test_a_disk_that_refuses_leaves_nothing(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    model = tiny_hybrid([M, A])
    model.generation_config.save_pretrained = refuse
    with pytest.raises(OutputWriteError, match="No space left"):
        export_transformers(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@needs_stock_group_norm
@torch.no_grad()
def test_smollm2(smollm2: LoadedModel, tmp_path: Path) -> None:
    """The real teacher at one half, freshly converted: nine heads, three key/value heads, tied, 576 wide."""
    student = mambify.convert(smollm2.model, attention=0.5)
    export_transformers(student, tmp_path / "half", tokenizer=smollm2.tokenizer)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert smollm2.tokenizer is not None
    tokens = smollm2.tokenizer("The capital of France is", return_tensors="pt").input_ids
    ours, theirs = student(tokens).logits, stock(tokens).logits
    # Thirty layers of a student that was not trained magnify rounding: float32 itself is 1e-3 off from float64.
    exact = copy.deepcopy(student).double()  # a copy, for it shares its weights with the teacher
    rounding = (ours - exact(tokens).logits).abs().max()
    assert rounding <= 5e-3
    assert (ours - theirs).abs().max() <= 2 * rounding
