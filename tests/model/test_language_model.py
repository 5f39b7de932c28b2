"""What is asked of any causal language model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import LlamaForCausalLM, MambaConfig

from mambify.language_model import evaluating, position_limit, stop_ids
from mambify.model import HybridForCausalLM
from tiny import byte_tokenizer, llama


@pytest.mark.parametrize(
    ("layers", "limit"), [(["mamba2", "attention"], 64), (["attention"], 64), (["mamba2", "mamba1"], None)]
)
def test_only_attention_has_a_limit(
    tiny_hybrid: Callable[..., HybridForCausalLM], layers: list[str], limit: int | None
) -> None:
    assert position_limit(tiny_hybrid(layers, max_position_embeddings=64).config) == limit


def test_the_limit_of_transformers_own() -> None:
    assert position_limit(llama(50).config) == llama(50).config.max_position_embeddings
    assert position_limit(MambaConfig()) is None


@pytest.mark.parametrize(
    ("generation", "config", "wanted"), [([5, 6], 7, {5, 6}), (5, 7, {5}), (None, 7, {7}), (None, None, set())]
)
def test_end_tokens(generation: list[int] | int | None, config: int | None, wanted: set[int]) -> None:
    model, tokenizer = llama(300), byte_tokenizer()
    model.generation_config.eos_token_id, model.config.eos_token_id = generation, config
    assert stop_ids(model, tokenizer) == wanted | {tokenizer.eos_token_id}
    tokenizer.eos_token = None
    assert stop_ids(model, tokenizer) == wanted


def test_the_mode_comes_back() -> None:
    model: LlamaForCausalLM = llama(50)
    other = llama(50).eval()
    model.train()
    with evaluating(model, None, other):
        assert not model.training
    assert model.training and not other.training
