"""What a model of transformers is expected to work with: LoRA, torch.compile, resized embeddings, its Trainer."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from mambify import HybridForCausalLM

Hybrid = Callable[..., HybridForCausalLM]


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(1))


# PEFT asks transformers by a name that transformers gives up.
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_lora_trains_and_merges(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    base = tiny_hybrid()
    ids = tokens()
    untouched = copy.deepcopy(base.state_dict())
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", target_modules=["in_proj", "q_proj", "o_proj"])
    )
    adapted = {name for name, _ in model.named_modules() if name.endswith("lora_A.default")}
    assert len(adapted) == 2 + 2 + 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(again(input_ids=ids).logits, expected)
        merged = model.merge_and_unload()
        assert type(merged) is HybridForCausalLM
        assert (merged(ids).logits - expected).abs().max() <= 1e-4
        assert (base(ids).logits - expected).abs().max() > 0.1
    assert all(torch.equal(value, untouched[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layers", [["mamba2", "attention"], ["mamba1", "attention"]], ids=["mamba2", "mamba1"])
def test_compiled_equals_eager(tiny_hybrid: Hybrid, backend: str, layers: list[str]) -> None:
    """Forward and gradients of a training step; the whole model is one graph."""
    model, ids = tiny_hybrid(layers), tokens()
    expected = model(ids, labels=ids, use_cache=False)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about itself
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        output = compiled(ids, labels=ids, use_cache=False)
        output.loss.backward()
    assert (output.logits - expected.logits).abs().max() <= 1e-4
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-4 * max(1.0, gradients[name].abs().max()), name


@torch.no_grad()
@pytest.mark.parametrize("layers", [["mamba2", "attention"], ["mamba1", "mamba2"]], ids=["hybrid", "recurrent"])
def test_compiled_decoding_step(tiny_hybrid: Hybrid, layers: list[str]) -> None:
    """One token at a time through a compiled step, the cache made by an eager prefill."""
    model, ids = tiny_hybrid(layers), tokens()
    expected = model(ids).logits
    cache = model(ids[:, :8], use_cache=True).past_key_values
    torch._dynamo.reset()
    step = torch.compile(model, backend="eager", dynamic=True)
    for t in range(8, 12):
        logits = step(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
        assert (logits[:, 0] - expected[:, t]).abs().max() <= 1e-4


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_resized_embeddings(tiny_hybrid: Hybrid, tied: bool, tmp_path: Path) -> None:
    model, ids = tiny_hybrid(tie_word_embeddings=tied), tokens()
    expected = model(ids).logits
    model.resize_token_embeddings(100, mean_resizing=False)
    assert model.config.vocab_size == 100
    logits = model(ids).logits
    assert logits.shape[-1] == 100
    assert (logits[..., :96] - expected).abs().max() <= 1e-5
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    assert torch.equal(HybridForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)


def test_trainer_of_transformers(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    """Plain fine-tuning, with activation checkpointing and a saved checkpoint."""
    model = tiny_hybrid()
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens(16)]
    names = inspect.signature(TrainingArguments).parameters
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        logging_steps=1,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{checkpointing: True},
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1
    again = HybridForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-6")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_embeddings_and_head_are_found(tiny_hybrid: Hybrid) -> None:
    model = tiny_hybrid()
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert model.num_converted == 2
    assert set(model._no_split_modules) == {"HybridBlock"}
