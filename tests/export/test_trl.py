"""Trainers of others run on an export, of a tiny hybrid and of the distilled one: TRL's, and PEFT's adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import mambify
from mambify.errors import MissingDependencyError
from mambify.export import export_transformers
from tiny import byte_tokenizer

from .conftest import A, Hybrid, M, needs_stock_group_norm

trl = pytest.importorskip("trl", reason="TRL is not installed (extra: train)")
peft = pytest.importorskip("peft", reason="PEFT is not installed (extra: train)")
datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra: train)")

# Other people's libraries warn about their own future.
pytestmark = [needs_stock_group_norm, pytest.mark.filterwarnings("ignore")]

PROMPT = [{"role": "user", "content": "How are you?"}]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("I am well, and the weather is good.", "Go."))
COMMON: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture(params=["tiny", pytest.param("smollm2-hybrid", marks=pytest.mark.slow)])
def exported(
    request: pytest.FixtureRequest, tiny_hybrid: Hybrid, tmp_path: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = byte_tokenizer()
    if request.param == "tiny":
        export_transformers(tiny_hybrid([M, A], vocab_size=len(tokenizer)), tmp_path / "stock", tokenizer=tokenizer)
    else:
        try:
            distilled = mambify.load(request.param, dtype="float32")
        except MissingDependencyError as error:
            pytest.skip(str(error))
        export_transformers(distilled.model, tmp_path / "stock", tokenizer=distilled.tokenizer)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    return stock, AutoTokenizer.from_pretrained(tmp_path / "stock")


def changed(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def copy(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_sft(exported: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path) -> None:
    model, tokenizer = exported
    before = copy(model)
    rows = datasets.Dataset.from_list([{"prompt": PROMPT, "completion": GOOD}] * 4)
    arguments = trl.SFTConfig(output_dir=str(tmp_path / "run"), **COMMON)
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train().global_step == 2
    assert {name for name in before if name.endswith(("mamba.in_proj.weight", "q_proj.weight"))} <= changed(
        model, before
    )
    trainer.save_model(str(tmp_path / "trained"))
    saved = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert saved["model_type"] == "granitemoehybrid"
    AutoModelForCausalLM.from_pretrained(tmp_path / "trained")


def test_dpo(exported: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path) -> None:
    model, tokenizer = exported
    before = copy(model)
    rows = datasets.Dataset.from_list([{"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}] * 4)
    arguments = trl.DPOConfig(output_dir=str(tmp_path / "run"), **COMMON)
    trainer = trl.DPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train().global_step == 2
    assert {name for name in before if name.endswith("mamba.in_proj.weight")} <= changed(model, before)


def test_lora(exported: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path) -> None:
    model, tokenizer = exported
    before = copy(model)
    rows = datasets.Dataset.from_list([{"prompt": PROMPT, "completion": GOOD}] * 4)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path / "run"), **COMMON),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "in_proj"], task_type="CAUSAL_LM"),
    )
    assert trainer.train().global_step == 2
    adapters = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapters} == {"q_proj", "v_proj", "in_proj"}
    assert all(value.abs().sum() > 0 for name, value in adapters.items() if "lora_B" in name)
    merged = trainer.model.merge_and_unload()
    adapted = {name for name in before if name.endswith(("in_proj.weight", "q_proj.weight", "v_proj.weight"))}
    assert changed(merged, before) == adapted
