"""llama.cpp computes what we do: logits of tiny random models, tokens of texts, greedy text of the real student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mambify
from mambify import HybridForCausalLM
from mambify.bench.llama_cpp import LlamaCpp
from mambify.export.gguf import export_gguf
from tiny import PRE_TOKENIZERS, TEXT, byte_tokenizer, sentencepiece_tokenizer

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python (extra: llama-cpp)")

Make = Callable[..., HybridForCausalLM]
MIXED = ("mamba2", "attention", "mamba2", "attention")
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def logits_of_both(
    model: HybridForCausalLM, path: Path, tokens: Sequence[int], **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Ours and llama.cpp's, ``[T, V]``; llama.cpp reads all but the last five tokens at once, then one by one."""
    tokenizer = byte_tokenizer()
    export_gguf(model, tokenizer, path, **options)
    with LlamaCpp(path, context_length=64) as llama:
        theirs = np.concatenate([llama.logits(tokens[:-5]), *(llama.logits([token]) for token in tokens[-5:])])
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([tokens])).logits[0].float().numpy()
    return ours, theirs


@pytest.mark.parametrize(
    ("mixers", "changes"),
    [
        pytest.param(MIXED, {}, id="grouped-queries"),
        pytest.param(MIXED, {"num_key_value_heads": 1}, id="one-kv-head"),
        pytest.param(MIXED, {"num_key_value_heads": 4}, id="all-heads"),
        pytest.param(MIXED, {"tie_word_embeddings": True}, id="tied"),
        pytest.param(("mamba2",) * 3, {}, id="no-attention"),
        pytest.param(("attention",) * 3, {}, id="attention-only"),
        pytest.param(MIXED, {"head_dim": 32}, id="no-padding"),
        pytest.param(MIXED, {"head_dim": 8}, id="four-copies"),
        pytest.param(MIXED, {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}, id="zero-heads"),
        pytest.param(MIXED, {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}, id="six-heads"),
        pytest.param(MIXED, {"attention_bias": True, "mlp_bias": True}, id="biases"),
        pytest.param(MIXED, {"conv_kernel": 3}, id="conv-of-three"),
        pytest.param(MIXED, {"rope_parameters": _LLAMA3}, id="rope-llama3"),
        pytest.param(MIXED, {"rope_parameters": _LINEAR}, id="rope-linear"),
        pytest.param(MIXED, {"rope_parameters": _YARN}, id="rope-yarn"),
        pytest.param(("attention",) * 2, {"rope_parameters": _YARN}, id="rope-yarn-attention-only"),
        pytest.param(("mamba2",) * 2, {"qk_norm": True}, id="qk-norm-all-converted"),
    ],
)
def test_logits(tiny_hybrid: Make, tmp_path: Path, mixers: Sequence[str], changes: dict[str, Any]) -> None:
    model = tiny_hybrid(mixers, vocab_size=320, **changes)
    tokens = torch.randint(3, 299, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    ours, theirs = logits_of_both(model, tmp_path / "model.gguf", tokens)
    assert np.abs(ours).max() > 0.5
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)


def test_logits_with_padded_states(tiny_hybrid: Make, tmp_path: Path) -> None:
    model = tiny_hybrid(MIXED, vocab_size=320)
    tokens = torch.randint(3, 299, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    ours, theirs = logits_of_both(model, tmp_path / "model.gguf", tokens, pad_state=True)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("f16", 0.02), ("bf16", 0.15), ("q8_0", 0.3), ("q4_0", 3.0), ("q6_k", 0.6)]
)
def test_narrower_types_are_near(tiny_hybrid: Make, tmp_path: Path, dtype: str, tolerance: float) -> None:
    model = tiny_hybrid(MIXED, vocab_size=320, intermediate_size=96)
    tokens = torch.randint(3, 299, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    ours, theirs = logits_of_both(model, tmp_path / "model.gguf", tokens, dtype=dtype)
    assert 0 < np.abs(ours - theirs).max() < tolerance


_TEXTS = (
    TEXT[:200],
    "It's 1234567 o'clock;  two spaces,\ttabs\n\n  and 12.5% \n",
    "Übergrößenträger 東京都の天気 Быстрая лисица 🙂🙂 naïve",
    "<|im_start|>user\nHello<|im_end|>\n",
    " leading and trailing ",
    "",
)


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
def test_byte_level_tokens(tiny_hybrid: Make, tmp_path: Path, pre_tokenizer: str) -> None:
    tokenizer = byte_tokenizer(pre_tokenizer=pre_tokenizer)
    export_gguf(tiny_hybrid(("mamba2",), vocab_size=320), tokenizer, tmp_path / "model.gguf")
    with LlamaCpp(tmp_path / "model.gguf", context_length=8) as llama:
        for text in _TEXTS:
            assert llama.tokenize(text, add_special=True) == tokenizer(text).input_ids, text


def test_sentencepiece_tokens(tiny_hybrid: Make, tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    export_gguf(tiny_hybrid(("mamba2",), vocab_size=len(tokenizer)), tokenizer, tmp_path / "model.gguf")
    with LlamaCpp(tmp_path / "model.gguf", context_length=8) as llama:
        for text in (*_TEXTS[:3], " leading"):
            assert llama.tokenize(text, add_special=True) == tokenizer(text).input_ids, text


def test_real_teacher_converted(smollm2: Any, tmp_path: Path) -> None:
    student = mambify.convert(smollm2.model, attention=0.25)
    export_gguf(student, smollm2.tokenizer, tmp_path / "quarter.gguf")
    tokens = smollm2.tokenizer("The capital of France is a city with 12 bridges; it's").input_ids
    with LlamaCpp(tmp_path / "quarter.gguf", context_length=32) as llama:
        assert llama.tokenize("The capital of France is a city with 12 bridges; it's") == tokens
        theirs = llama.logits(tokens)
    with torch.no_grad():
        ours = student(input_ids=torch.tensor([tokens])).logits[0].numpy()
    # A mixer that was not trained norms outputs near zero, which magnifies rounding: our own are 2e-4 off float64's.
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-3)
