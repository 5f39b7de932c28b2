from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import mambify
from mambify.decode import generate
from mambify.decode.steps import StepDecoder
from mambify.engine import Sampling, Speculator
from mambify.errors import InvalidOptionError, UnsupportedError
from mambify.language_model import end_token_ids
from mambify.model import HybridForCausalLM

Padded = tuple[Tensor, Tensor]


def test_it_is_the_public_generate() -> None:
    assert mambify.generate is generate


@pytest.mark.parametrize("prompt", ["Hello", ["Hello", "you"]])
def test_text_is_no_list_of_token_ids(model: PreTrainedModel, prompt: Any) -> None:
    with pytest.raises(InvalidOptionError, match=r"token ids and not text: .*mambify\.stream"):
        generate(model, prompt)


def test_greedy_is_what_transformers_generates(model: PreTrainedModel) -> None:
    ids_BT = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    ours = generate(model, ids_BT, max_new_tokens=16, eos_token_id=[])
    theirs = model.generate(ids_BT, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.shape == (2, 22)
    assert torch.equal(ours, theirs)


def test_greedy_with_left_padding_is_what_transformers_generates(model: PreTrainedModel, padded: Padded) -> None:
    ids_BT, mask_BT = padded
    ours = generate(model, ids_BT, attention_mask=mask_BT, max_new_tokens=12, eos_token_id=[])
    theirs = model.generate(
        ids_BT, attention_mask=mask_BT, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(ours, theirs)


def test_a_padded_row_continues_as_it_does_alone(model: PreTrainedModel, padded: Padded) -> None:
    ids_BT, mask_BT = padded
    together = generate(model, ids_BT, attention_mask=mask_BT, max_new_tokens=12, eos_token_id=[])
    for row in range(len(ids_BT)):
        alone = generate(model, ids_BT[row][mask_BT[row].bool()][None], max_new_tokens=12, eos_token_id=[])
        assert torch.equal(together[row, ids_BT.shape[1] :], alone[0, -12:])


def test_each_row_ends_for_itself_and_is_padded(hybrid: HybridForCausalLM) -> None:
    ids_BT = torch.randint(3, 50, (4, 5), generator=torch.Generator().manual_seed(2))
    free = generate(hybrid, ids_BT, max_new_tokens=20, eos_token_id=[])[:, 5:]
    stop = int(free[0, 3])  # a token that comes up: the end token of this test
    ours = generate(hybrid, ids_BT, max_new_tokens=20, eos_token_id=stop)
    theirs = hybrid.generate(ids_BT, max_new_tokens=20, do_sample=False, eos_token_id=stop, pad_token_id=stop)
    assert torch.equal(ours, theirs)
    first = int((free[0] == stop).nonzero()[0])
    assert (ours[0, 5 + first :] == stop).all()
    assert not torch.equal(ours[:, 5:], free[:, : ours.shape[1] - 5])


def test_it_stops_once_every_row_has_ended(hybrid: HybridForCausalLM) -> None:
    ids_1T = torch.tensor([[5, 6, 7]])
    free = generate(hybrid, ids_1T, max_new_tokens=10, eos_token_id=[])
    stop = int(free[0, 5])
    first = int((free[0, 3:] == stop).nonzero()[0])
    ended = generate(hybrid, ids_1T, max_new_tokens=10, eos_token_id=(stop,))
    assert ended.tolist() == free[:, : 4 + first].tolist()


def test_the_padding_token_of_the_model_fills_up(hybrid: HybridForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids_BT = torch.randint(3, 50, (4, 5), generator=torch.Generator().manual_seed(2))
    free = generate(hybrid, ids_BT, max_new_tokens=20, eos_token_id=[])[:, 5:]
    stop = int(free[0, 0])
    rows_that_end = (free == stop).any(1)
    assert not rows_that_end.all()
    monkeypatch.setattr(hybrid.generation_config, "pad_token_id", 0)
    monkeypatch.setattr(hybrid.generation_config, "eos_token_id", [stop])
    assert end_token_ids(hybrid) == [stop]
    filled = generate(hybrid, ids_BT, max_new_tokens=20)
    assert filled[0, 5] == stop
    assert (filled[0, 6:] == 0).all()


def test_sampling_is_fixed_by_the_seed_and_differs_between_seeds(hybrid: HybridForCausalLM) -> None:
    ids_1T = torch.tensor([[5, 6, 7]])
    settings: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "eos_token_id": []}
    one = generate(hybrid, ids_1T, seed=1, **settings)
    torch.rand(5)  # the global generator has no say
    assert torch.equal(one, generate(hybrid, ids_1T, seed=1, **settings))
    assert not torch.equal(one, generate(hybrid, ids_1T, seed=2, **settings))
    torch.manual_seed(7)
    of_global = generate(hybrid, ids_1T, **settings)
    torch.manual_seed(7)
    assert torch.equal(of_global, generate(hybrid, ids_1T, **settings))


def test_sampling_among_one_token_is_greedy(hybrid: HybridForCausalLM) -> None:
    ids_1T = torch.tensor([[5, 6, 7]])
    greedy = generate(hybrid, ids_1T, max_new_tokens=10, eos_token_id=[])
    assert torch.equal(greedy, generate(hybrid, ids_1T, max_new_tokens=10, eos_token_id=[], temperature=2.0, top_k=1))


def test_prompts_stay_as_they_are_and_no_gradient_is_kept(hybrid: HybridForCausalLM) -> None:
    ids_1T = torch.tensor([[5, 6, 7]])
    out = generate(hybrid, ids_1T, max_new_tokens=2)
    assert out[:, :3].tolist() == [[5, 6, 7]]
    assert out.dtype == torch.long
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -0.5}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "padded on the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "padded on the left"),
        ({"attention_mask": torch.tensor([[1, 1]])}, "attention_mask has shape"),
        ({"min_p": -0.1}, "min_p must be 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"seed": [1, 2]}, "2 seeds for 1 rows"),
        ({"stop": 7}, "stop must be strings"),
        ({"draft": "lookup", "num_draft_tokens": 17}, "num_draft_tokens must be 1 to 16, not 17"),
        ({"max_new_tokens": 126}, "pass the 128 positions .* at most 125 new tokens fit"),
    ],
)
def test_settings_out_of_range_are_refused(hybrid: HybridForCausalLM, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidOptionError, match=said):
        generate(hybrid, torch.tensor([[5, 6, 7]]), **settings)


def test_an_empty_prompt_is_refused(hybrid: HybridForCausalLM) -> None:
    with pytest.raises(InvalidOptionError, match="not empty"):
        generate(hybrid, torch.zeros(1, 0, dtype=torch.long))


@pytest.mark.parametrize("draft", ["hybrid", "lookup"])
def test_a_draft_changes_no_token(hybrid: HybridForCausalLM, padded: Padded, draft: str) -> None:
    """Padded rows that end for themselves: what comes out is what comes out without a draft."""
    ids_BT, mask_BT = padded
    chosen: Any = hybrid if draft == "hybrid" else draft
    free = generate(hybrid, ids_BT, attention_mask=mask_BT, max_new_tokens=20, eos_token_id=[])
    for ends in ([], int(free[0, -14])):
        settings: dict[str, Any] = {"attention_mask": mask_BT, "max_new_tokens": 20, "eos_token_id": ends}
        plain = generate(hybrid, ids_BT, **settings)
        assert torch.equal(generate(hybrid, ids_BT, draft=chosen, num_draft_tokens=3, **settings), plain)


def test_drawing_with_a_draft_follows_the_seed(hybrid: HybridForCausalLM) -> None:
    settings: dict[str, Any] = {"draft": "lookup", "temperature": 1.0, "max_new_tokens": 20, "eos_token_id": []}
    ids_BT = torch.tensor([[5, 6], [5, 6]])
    first, same, other = (generate(hybrid, ids_BT, seed=seed, **settings) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(4)
    drawn = generate(hybrid, ids_BT, **settings)
    torch.manual_seed(4)
    assert torch.equal(generate(hybrid, ids_BT, **settings), drawn)


def test_a_draft_needs_models_of_this_package(hybrid: HybridForCausalLM, model: PreTrainedModel) -> None:
    stock = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(UnsupportedError, match="a draft of this package, not a LlamaForCausalLM"):
        generate(hybrid, torch.tensor([[5]]), draft=stock)
    with pytest.raises(UnsupportedError, match="a target of this package"):
        generate(stock, torch.tensor([[5]]), draft="lookup")
    with pytest.raises(InvalidOptionError, match="num_draft_tokens must be 1 to 16"):
        generate(hybrid, torch.tensor([[5]]), draft="lookup", num_draft_tokens=0)


def test_lists_of_any_length_give_lists(model: PreTrainedModel) -> None:
    prompts = [[5, 6, 7, 8], [9], [10, 11]]
    found = generate(model, prompts, max_new_tokens=8, eos_token_id=[])
    for prompt, row in zip(prompts, found, strict=True):
        assert row == generate(model, torch.tensor([prompt]), max_new_tokens=8, eos_token_id=[])[0].tolist()
    for wrong in ([], [[]], [5, 6], [[5], []]):
        with pytest.raises(InvalidOptionError, match="lists of token ids"):
            generate(model, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("draft", [None, "lookup"])
def test_a_row_with_a_seed_of_its_own_draws_what_it_draws_alone(model: PreTrainedModel, draft: Any) -> None:
    if draft and not isinstance(model, HybridForCausalLM):
        pytest.skip("drafts are for models of this package")
    settings: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 12, "eos_token_id": [], "draft": draft}
    prompts = [[5, 6, 7, 8], [9], [5, 6, 7, 8]]
    together = generate(model, prompts, seed=[4, 5, 6], **settings)
    for prompt, seed, row in zip(prompts, (4, 5, 6), together, strict=True):
        assert generate(model, [prompt], seed=seed, **settings) == [row]
    assert together[0] != together[2]


def test_without_attention_there_is_no_last_position(tiny_hybrid: Callable[..., HybridForCausalLM]) -> None:
    model = tiny_hybrid(["mamba2", "mamba1"])
    assert generate(model, torch.tensor([[5, 6]]), max_new_tokens=140, eos_token_id=[]).shape == (1, 142)


def test_a_stock_model_draws_as_the_engine_does(hybrid: HybridForCausalLM) -> None:
    """The loop for other models, given one of this package's: the same tokens for the same seeds."""
    sampling = Sampling(0.9, top_k=20, min_p=0.01, repetition_penalty=1.2, seed=[1, 2])
    prompts, found = [[5, 6, 7], [8, 9]], [[[], []], [[], []]]
    decoders = [
        StepDecoder(hybrid, sampling, stop_ids=[4]),
        Speculator(hybrid, None, num_slots=2, max_length=32, sampling=sampling, stop_ids=[4]),
    ]
    for decoder, answers in zip(decoders, found, strict=True):
        for number, tokens in decoder.run(prompts, max_new_tokens=20):
            answers[number] += tokens
    assert found[0] == found[1]
