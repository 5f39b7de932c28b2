from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

import mambify
from mambify.decode import Sampling, Session
from mambify.errors import InvalidOptionError
from mambify.families.load import LoadedModel, require_tokenizer
from mambify.model import HybridForCausalLM
from tiny import byte_tokenizer, llama


@pytest.mark.parametrize("draft", [None, "lookup"])
def test_buffers_grow_as_prompts_do(hybrid: HybridForCausalLM, draft: Any) -> None:
    tokenizer, told = byte_tokenizer(), list[int]()
    talk = Session(hybrid, tokenizer, Sampling(0.0), max_length=100, first=16, draft=draft, on_growth=told.append)
    for length in (5, 10, 20, 90, 30):
        prompt = [3 + place % 40 for place in range(length)]
        answer = "".join(talk.answer(prompt, max_new_tokens=6))
        assert answer == "".join(mambify.stream(hybrid, tokenizer, prompt, max_new_tokens=6))
    assert told == [32, 100]
    with pytest.raises(InvalidOptionError, match="95 tokens and 6 new ones do not fit 100 tokens"):
        talk.answer([5] * 95, max_new_tokens=6)


@pytest.mark.parametrize("transformers_own", [False, True])
@pytest.mark.parametrize("length", [5, 90])  # in the same buffers, and in new ones
def test_an_answer_is_dropped_when_the_next_is_asked_for(
    hybrid: HybridForCausalLM, transformers_own: bool, length: int
) -> None:
    model = llama(300) if transformers_own else hybrid
    talk = Session(model, byte_tokenizer(), Sampling(0.0), max_length=120, first=32)
    over, first = talk.answer([5, 6], max_new_tokens=9), [7] * length
    heard = "".join(over)
    left = talk.answer([5, 6], max_new_tokens=20)
    next(left)
    answer = talk.answer(first, max_new_tokens=20)
    for _ in range(2):
        with pytest.raises(InvalidOptionError, match="this answer was dropped"):
            next(left)
    assert "".join(answer) == "".join(mambify.stream(model, byte_tokenizer(), first, max_new_tokens=20))
    assert heard and list(over) == []


def test_a_dropped_answer_lets_go_of_its_buffers(hybrid: HybridForCausalLM) -> None:
    talk = Session(hybrid, byte_tokenizer(), Sampling(0.0), max_length=120, first=32)
    buffers = weakref.ref(talk._decoder)
    left = talk.answer([5, 6], max_new_tokens=20)
    next(left)
    talk.answer([7] * 90, max_new_tokens=20)
    gc.collect()
    assert buffers() is None


def test_each_answer_has_its_seed(hybrid: HybridForCausalLM) -> None:
    talk = Session(hybrid, byte_tokenizer(), Sampling(1.0), max_length=64)
    answers = ["".join(talk.answer([5, 6], max_new_tokens=20, seed=seed)) for seed in (1, 2, 1)]
    assert answers[0] == answers[2] != answers[1]


def test_speed(smollm2: LoadedModel) -> None:
    tokenizer = require_tokenizer(smollm2)
    talk = Session(smollm2.model, tokenizer, Sampling(0.0), max_length=64, draft="lookup", num_draft_tokens=2)
    list(talk.answer(tokenizer.encode("one two one two one two"), max_new_tokens=8))
    speed = talk.speed(with_bandwidth=True)
    assert speed is not None and speed.tokens == 8
    assert 1.0 < speed.tokens_per_round <= 3.0 and len(speed.acceptance_by_position) == 2
    assert speed.share_of_bandwidth is not None and 0.01 < speed.share_of_bandwidth < 1.5
    assert speed.line().startswith("8 tokens, ") and "of the memory bandwidth" in speed.line()
    assert speed.facts()["decode_tokens_per_second"] == pytest.approx(8 / speed.seconds, rel=0.01)


def test_a_model_of_transformers_has_no_speed() -> None:
    talk = Session(llama(300), byte_tokenizer(), Sampling(0.0), max_length=64)
    assert "".join(talk.answer([5, 6, 7], max_new_tokens=4)) is not None
    assert talk.speed() is None
