"""Answers of a batch are those of greedy decoding one by one, up to a stop string or an end token."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

import mambify
from mambify import HybridForCausalLM
from mambify.errors import InvalidOptionError
from mambify.evaluate.tasks.generation import generate_until
from tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, len(TOKENIZER)) for _ in range(length)] for length in (3, 17, 1, 9, 9)]


@pytest.fixture(scope="module")
def model(tiny_hybrid: Callable[..., HybridForCausalLM]) -> HybridForCausalLM:
    return tiny_hybrid(vocab_size=len(TOKENIZER), eos_token_id=END)


def greedy(model: HybridForCausalLM, prompt: list[int], num: int = 24) -> list[int]:
    """Our own decoding of one prompt, without padding."""
    ids = torch.tensor([prompt])
    return mambify.generate(model, ids, max_new_tokens=num, eos_token_id=[END])[0, len(prompt) :].tolist()


def text_of(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids[: ids.index(END)] if END in ids else ids, skip_special_tokens=True))


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_a_padded_batch_answers_as_greedy_decoding(model: HybridForCausalLM, batch_size: int | None) -> None:
    answers = generate_until(
        model, TOKENIZER, prompts(), until=[], max_new_tokens=24, max_length=128, batch_size=batch_size, do_sample=False
    )
    assert answers == [text_of(greedy(model, prompt)) for prompt in prompts()]
    assert len(set(answers)) == len(answers)


def test_stop_strings_end_each_row_for_itself(model: HybridForCausalLM) -> None:
    whole = [text_of(greedy(model, prompt)) for prompt in prompts()]
    stop = whole[1][5:8]  # whatever this model happens to say
    answers = generate_until(
        model, TOKENIZER, prompts(), until=[stop, ""], max_new_tokens=24, max_length=128, do_sample=False
    )
    assert answers == [text.split(stop)[0] for text in whole]
    assert answers != whole


def test_generation_ends_with_the_stop_string(model: HybridForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompts()[1]
    stop = text_of(greedy(model, prompt))[2:4]
    steps: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: steps.append(1) or forward(*args, **kwargs))
    generate_until(model, TOKENIZER, [prompt], until=[stop], max_new_tokens=100, max_length=128, do_sample=False)
    assert len(steps) < 15


def test_a_stop_string_in_the_prompt_does_not_stop(model: HybridForCausalLM) -> None:
    prompt = TOKENIZER.encode("Question: why? Question")
    answer = generate_until(
        model, TOKENIZER, [prompt], until=["Question"], max_new_tokens=8, max_length=128, do_sample=False
    )
    assert answer == [text_of(greedy(model, prompt, 8)).split("Question")[0]]
    assert answer != [""]


def test_a_special_token_by_name_ends_an_answer(model: HybridForCausalLM) -> None:
    prompt = prompts()[1]
    ids = greedy(model, prompt)
    # the third token becomes a special one of another tokenizer
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(ids[2])]})
    name = tokenizer.convert_ids_to_tokens(ids[2])
    answer = generate_until(
        model, tokenizer, [prompt], until=[name], max_new_tokens=24, max_length=128, do_sample=False
    )
    assert answer == [tokenizer.decode(ids[: ids.index(ids[2])], skip_special_tokens=True)]


def test_long_prompts_lose_their_beginning(model: HybridForCausalLM) -> None:
    prompt = prompts()[1]
    (answer,) = generate_until(model, TOKENIZER, [prompt], until=[], max_new_tokens=8, max_length=13, do_sample=False)
    assert answer == text_of(greedy(model, prompt[-5:], 8))
    with pytest.raises(InvalidOptionError, match="answers of 13 tokens leave no room"):
        generate_until(model, TOKENIZER, [prompt], until=[], max_new_tokens=13, max_length=13)
