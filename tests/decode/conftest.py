"""Tiny models: a Transformer, a hybrid of it, and one without any attention."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from mambify.config import HybridConfig
from mambify.model import HybridForCausalLM
from tiny import llama

VOCAB = 50


def make_hybrid(mixers: list[str]) -> HybridForCausalLM:
    config = HybridConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=len(mixers),
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
        layer_mixers=mixers,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return HybridForCausalLM(config).eval()


@pytest.fixture(scope="session")
def hybrid() -> HybridForCausalLM:
    return make_hybrid(["mamba2", "attention", "mamba1"])


@pytest.fixture(scope="session", params=["hybrid", "mamba", "llama"])
def model(request: pytest.FixtureRequest, hybrid: HybridForCausalLM) -> PreTrainedModel:
    if request.param == "hybrid":
        return hybrid
    if request.param == "mamba":
        return make_hybrid(["mamba2", "mamba1"])
    return llama(VOCAB, seed=3, num_hidden_layers=2, num_key_value_heads=2, initializer_range=0.3, pad_token_id=None)


@pytest.fixture(scope="session")
def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of different lengths, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, VOCAB, (3, 7), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :3] = 0
    mask_BT[1, :1] = 0
    return ids_BT.masked_fill(mask_BT == 0, 0), mask_BT
