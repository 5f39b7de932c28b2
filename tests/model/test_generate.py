"""``generate`` through transformers' caches: greedy, sampling, beams, batches padded on the left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from mambify import HybridForCausalLM

Hybrid = Callable[..., HybridForCausalLM]

LAYERS = {
    "hybrid": ["mamba2", "attention", "mamba1", "attention"],
    "ends-recurrent": ["attention", "mamba2"],
    "mamba2": ["mamba2", "mamba2"],
    "mamba1": ["mamba1", "mamba1"],
    "attention": ["attention", "attention"],
}


@pytest.fixture(params=list(LAYERS))
def model(request: pytest.FixtureRequest, tiny_hybrid: Hybrid) -> HybridForCausalLM:
    return tiny_hybrid(LAYERS[request.param])


@pytest.fixture
def sliding(tiny_hybrid: Hybrid) -> HybridForCausalLM:
    return tiny_hybrid(sliding_window=6)


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def greedy_without_cache(model: HybridForCausalLM, ids: Tensor, count: int) -> Tensor:
    """Token by token, each from a forward pass over everything before it; ends a row at token 2."""
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(count):
        following = model(ids, use_cache=False).logits[:, -1].argmax(-1)
        following[ended] = 0
        ended |= following == 2
        ids = torch.cat([ids, following[:, None]], 1)
        if ended.all():
            break
    return ids


def test_cached_greedy_equals_uncached(model: HybridForCausalLM) -> None:
    ids = tokens()
    expected = greedy_without_cache(model, ids, 15)
    assert len(set(expected[0, 9:].tolist())) > 3  # not one token over and over
    mask = torch.ones_like(ids)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False), expected)
    uncached = model.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False, use_cache=False)
    assert torch.equal(uncached, expected)


def test_sliding_window_is_passed(sliding: HybridForCausalLM) -> None:
    ids = tokens()
    expected = greedy_without_cache(sliding, ids, 15)
    mask = torch.ones_like(ids)
    assert torch.equal(sliding.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False), expected)


@pytest.mark.parametrize("arguments", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}], ids=str)
def test_left_padded_batch_equals_single_rows(model: HybridForCausalLM, arguments: dict[str, Any]) -> None:
    ids, mask = tokens(3), torch.ones(3, 9, dtype=torch.long)
    for row, padding in enumerate((0, 2, 6)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, **arguments)
    for row, padding in enumerate((0, 2, 6)):
        alone = model.generate(
            ids[row : row + 1, padding:], attention_mask=mask[row : row + 1, padding:], max_new_tokens=8, **arguments
        )[0, 9 - padding :]
        assert torch.equal(together[row, 9 : 9 + len(alone)], alone)
        assert (together[row, 9 + len(alone) :] == 0).all()


def test_beams_find_what_an_uncached_search_finds(model: HybridForCausalLM) -> None:
    ids = tokens()
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "num_beams": 4, "do_sample": False}
    cached, uncached = model.generate(ids, **arguments), model.generate(ids, use_cache=False, **arguments)
    assert torch.equal(cached, uncached)


def test_sampling_is_seeded_and_cached(model: HybridForCausalLM) -> None:
    ids, drawn = tokens(), []
    for use_cache in (True, True, False):
        torch.manual_seed(0)
        drawn.append(
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=10,
                do_sample=True,
                temperature=0.8,
                top_p=0.9,
                use_cache=use_cache,
                eos_token_id=None,
            )
        )
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_scores_and_cache_are_returned(model: HybridForCausalLM) -> None:
    ids = tokens()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.no_grad():
        expected = model(output.sequences[:, :-1]).logits[:, 8:]
    assert (torch.stack(output.logits, 1) - expected).abs().max() <= 1e-4
    assert output.past_key_values.get_seq_length() == 12


def test_continuing_a_conversation(model: HybridForCausalLM) -> None:
    """The cache of one call is given to the next, which reads only what was added."""
    ids = tokens()
    first = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    longer = torch.cat([first.sequences, tokens(2, 3)], 1)
    arguments: dict[str, Any] = {
        "attention_mask": torch.ones_like(longer),
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
    }
    continued = model.generate(longer, past_key_values=first.past_key_values, **arguments)
    assert torch.equal(continued, model.generate(longer, **arguments))


def test_one_token_prompt(model: HybridForCausalLM) -> None:
    ids = tokens(2, 1)
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert torch.equal(generated, greedy_without_cache(model, ids, 10))


def test_static_cache(model: HybridForCausalLM) -> None:
    """Buffers of a fixed size (what torch.compile wants) hold the same states."""
    ids, mask = tokens(2), torch.ones(2, 9, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **arguments)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **arguments)
    assert torch.equal(static, expected)


def test_stock_assisted_decoding_refuses(tiny_hybrid: Hybrid) -> None:
    """A recurrent state cannot be cropped, so transformers must not try."""
    model, ids = tiny_hybrid(), tokens(1)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, assistant_model=tiny_hybrid(seed=1))


def test_generation_config_is_used(tiny_hybrid: Hybrid) -> None:
    model, ids = tiny_hybrid(), tokens(1)
    model.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=None, pad_token_id=0, do_sample=False)
    assert model.generate(ids, attention_mask=torch.ones_like(ids)).shape == (1, 12)


@torch.no_grad()
def test_cache_rows_can_be_reordered_and_repeated(model: HybridForCausalLM) -> None:
    ids = tokens(3)
    cache = model(ids, use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    following = tokens(3, 1)
    expected = model(torch.cat([ids[[2, 0, 0]], following], 1)).logits[:, -1:]
    assert (model(following, past_key_values=cache).logits - expected).abs().max() <= 1e-4
