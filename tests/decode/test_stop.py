from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

import mambify
from mambify.decode import Cutter, stop_strings
from mambify.errors import InvalidOptionError
from mambify.families.load import LoadedModel, require_tokenizer


def cut(pieces: list[str], stop: list[str]) -> tuple[str, str | None]:
    cutter = Cutter(stop)
    text = "".join([*(cutter.add(piece) for piece in pieces), cutter.finish()])
    return text, cutter.found


def test_the_cut_is_the_same_however_the_text_comes() -> None:
    """Every text of six letters, in random pieces, against looking at its beginnings one by one."""
    rng = random.Random(0)
    for letters, stop in itertools.product(
        itertools.product("ab", repeat=6), (["ab"], ["aab", "ba"], ["abab", "ab"], ["xabc", "b"], ["bbb", "aaa", "abb"])
    ):
        text = "".join(letters)
        wanted: tuple[str, str | None] = (text, None)
        for end in range(len(text) + 1):
            if found := [s for s in stop if text[:end].endswith(s)]:
                longest = max(found, key=len)  # the one that began first
                wanted = (text[: end - len(longest)], longest)
                break
        cuts = [0, *sorted(rng.sample(range(1, 6), rng.randrange(4))), 6]
        assert cut([text[a:b] for a, b in itertools.pairwise(cuts)], stop) == wanted


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    cutter = Cutter(["\n\n", "END"])
    assert [cutter.add(piece) for piece in ("one\n", "two E", "N", "d", "\n", "\nx", "y")] == [
        "one", "\ntwo ", "", "ENd", "", "", "",
    ]  # fmt: skip
    assert cutter.found == "\n\n"
    assert cutter.finish() == ""


def test_what_was_held_back_comes_at_the_end() -> None:
    assert cut(["one", "\n"], ["\n\n"]) == ("one\n", None)


@pytest.mark.parametrize("stop", [5, ["a", 3], [""], "", b"x", {"a": 1}])
def test_other_than_strings_is_refused(stop: Any) -> None:
    with pytest.raises(InvalidOptionError, match="stop"):
        stop_strings(stop)


class TestRealTeacher:
    """SmolLM2 counts on: its words are tokens with a space in front, and stops lie across them."""

    PROMPT = "One, two, three, four,"

    @pytest.mark.parametrize("draft", [None, "lookup"])
    @pytest.mark.parametrize("stop", [" seven", "x, sev", ["eight", "en,"]])
    def test_the_text_ends_before_it(self, smollm2: LoadedModel, draft: Any, stop: Any) -> None:
        tokenizer = require_tokenizer(smollm2)
        whole = "".join(mambify.stream(smollm2.model, tokenizer, self.PROMPT, max_new_tokens=12))
        answer = mambify.stream(smollm2.model, tokenizer, self.PROMPT, max_new_tokens=12, stop=stop, draft=draft)
        text = "".join(answer)
        strings = [stop] if isinstance(stop, str) else stop
        assert answer.stop in strings and answer.ended
        assert text == whole[: min(place for s in strings if (place := whole.find(s)) >= 0)]
        assert answer.num_tokens < 12

    def test_rows_end_for_themselves(self, smollm2: LoadedModel) -> None:
        tokenizer = require_tokenizer(smollm2)
        prompts = [tokenizer.encode(text) for text in (self.PROMPT, "Monday, Tuesday, Wednesday,")]
        settings: dict[str, Any] = {"max_new_tokens": 10, "tokenizer": tokenizer, "eos_token_id": []}
        free = mambify.generate(smollm2.model, prompts, **settings)
        ended = mambify.generate(smollm2.model, prompts, stop=["x, sev"], **settings)
        assert tokenizer.decode(ended[0]).endswith("six, seven")
        assert ended[0] == free[0][: len(ended[0])]
        assert ended[1] == free[1]


def test_stop_strings_need_a_tokenizer(hybrid: Any) -> None:
    with pytest.raises(InvalidOptionError, match="give the tokenizer"):
        mambify.generate(hybrid, torch.tensor([[5]]), stop="x")
