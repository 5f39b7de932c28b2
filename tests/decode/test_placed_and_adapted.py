"""Models in other hands: spread by accelerate, wrapped by PEFT. What is said is what their own ``generate`` says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import PreTrainedModel

import mambify
from mambify.engine import DecodeEngine, Sampling, Speculator
from mambify.engine.fused import can_fuse
from mambify.errors import UnsupportedError
from mambify.model import HybridForCausalLM

from .conftest import VOCAB, make_hybrid

IDS = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
REST = {"model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


def spread(path: Path, layers: list[str], *places: str, embeddings: str = "cpu") -> HybridForCausalLM:
    make_hybrid(layers).save_pretrained(path / "model")
    device_map = REST | {f"model.layers.{layer}": place for layer, place in enumerate(places)}
    model: HybridForCausalLM = HybridForCausalLM.from_pretrained(
        path / "model", device_map=device_map | {"model.embed_tokens": embeddings}, offload_folder=path / "offload"
    )
    return model.eval()


@pytest.mark.parametrize("embeddings", ["cpu", "disk"])
def test_attention_that_is_offloaded(tmp_path: Path, embeddings: str, caplog: pytest.LogCaptureFixture) -> None:
    layers = ["mamba2", "attention", "attention"]
    model, whole = spread(tmp_path, layers, "cpu", "disk", "disk", embeddings=embeddings), make_hybrid(layers)
    with caplog.at_level(logging.WARNING):
        found = mambify.generate(model, IDS, max_new_tokens=12, eos_token_id=[])
    assert torch.equal(found, whole.generate(IDS, **GREEDY))
    assert "step by step, not in the engine" in caplog.text
    assert torch.equal(found, model.generate(IDS, custom_generate=mambify.custom_generate, **GREEDY))
    sampled = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3, "eos_token_id": []}
    assert torch.equal(mambify.generate(model, IDS, **sampled), mambify.generate(whole, IDS, **sampled))


def test_what_needs_all_weights_at_hand_says_so(tmp_path: Path) -> None:
    model = spread(tmp_path, ["attention", "attention"], "cpu", "disk")
    for draft in ("lookup", "cut:1", make_hybrid(["attention"])):
        with pytest.raises(UnsupportedError, match=r"spread by a device_map.*load it with mambify\.load"):
            mambify.generate(model, IDS, draft=draft)
    with pytest.raises(UnsupportedError, match="spread by a device_map"):
        mambify.generate(make_hybrid(["attention"]), IDS, draft=model)
    settings: dict[str, Any] = {"num_slots": 1, "max_length": 20, "sampling": Sampling(0.0)}
    with pytest.raises(UnsupportedError, match="spread by a device_map"):
        Speculator(model, None, **settings)
    with pytest.raises(UnsupportedError, match="spread by a device_map"):
        DecodeEngine(model, stop_ids=[], **settings)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_recurrent_layers_that_are_offloaded_are_refused(tmp_path: Path, mixer: str) -> None:
    with pytest.raises(UnsupportedError, match="recurrent layers cannot be offloaded"):
        mambify.generate(spread(tmp_path, ["attention", mixer], "cpu", "disk"), IDS)


def test_what_takes_the_place_of_forward_has_a_say() -> None:
    """On one device, and changing what a layer does."""
    model = make_hybrid(["mamba2", "attention", "mamba1"])
    before = model.generate(IDS, **GREEDY)
    assert can_fuse(model)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert not can_fuse(model)
    assert torch.equal(mambify.generate(model, IDS, max_new_tokens=12, eos_token_id=[]), before)


PEFT_ASKS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(model: HybridForCausalLM, **settings: Any) -> Any:
    """``model`` with adapters that matter, which it holds from then on."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra: train)")
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **settings)
    wrapped = peft.get_peft_model(model, adapter).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return wrapped


@PEFT_ASKS
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "in_proj"]},
        {"target_modules": ["down_proj", "out_proj", "o_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]},
        {"target_modules": ["dt_proj", "gate_proj"], "use_dora": True},
    ],
    ids=lambda settings: "-".join(settings["target_modules"]),
)
def test_lora(settings: dict[str, Any]) -> None:
    """Plain, with drafts, and in the fused step, which must leave no adapter out."""
    layers = ["mamba2", "attention", "mamba1"]
    wrapped = adapted(make_hybrid(layers), **settings)
    wanted = wrapped.generate(input_ids=IDS, **GREEDY)
    assert not torch.equal(wanted, make_hybrid(layers).generate(IDS, **GREEDY))
    for draft in (None, "lookup", "cut:1", make_hybrid(layers), wrapped):
        assert torch.equal(mambify.generate(wrapped, IDS, max_new_tokens=12, eos_token_id=[], draft=draft), wanted)
    inner = wrapped.base_model.model
    assert inner.training is False
    fused = Speculator(inner, None, num_slots=2, max_length=20, sampling=Sampling(0.0), backend="fused")
    answers: list[list[int]] = [[], []]
    for number, tokens in fused.run(IDS.tolist(), max_new_tokens=12):
        answers[number] += tokens
    assert answers == wanted[:, 6:].tolist()
    with wrapped.disable_adapter():
        without = mambify.generate(wrapped, IDS, max_new_tokens=12, eos_token_id=[], draft="lookup")
        assert torch.equal(without, wrapped.generate(input_ids=IDS, **GREEDY))
    assert not torch.equal(without, wanted)


@PEFT_ASKS
def test_a_wrapper_whose_own_forward_matters_is_not_taken_off() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra: train)")
    prompts = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=1, token_dim=32, num_attention_heads=2
    )
    wrapped: PreTrainedModel = peft.get_peft_model(make_hybrid(["attention", "attention"]), prompts)
    with pytest.raises(UnsupportedError, match="PeftModelForCausalLM"):
        mambify.generate(wrapped, IDS, draft="lookup")
