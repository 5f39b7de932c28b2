"""How text is cut into words, by GGUF's names; and that it is the teacher's own way."""

from __future__ import annotations

import pytest

from mambify.families.load import LoadedModel
from mambify.families.pretokenizers import pre_tokenizer


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-2", ["It", "'s", "Ġ2024", "Ċ", "Ċ", "15", "Ġcats"]),
        ("smollm", ["It", "'s", "Ġ", "2", "0", "2", "4", "ĊĊ", "1", "5", "Ġcats"]),
        ("llama-bpe", ["It", "'s", "Ġ", "202", "4", "ĊĊ", "15", "Ġcats"]),
        ("qwen2", ["It", "'s", "Ġ", "2", "0", "2", "4", "ĊĊ", "1", "5", "Ġcats"]),
    ],
)
def test_words_are_cut_as_the_name_says(name: str, words: list[str]) -> None:
    cut = pre_tokenizer(name)
    assert cut is not None
    assert [word for word, _ in cut.pre_tokenize_str("It's 2024\n\n15 cats")] == words


def test_other_names_are_left_to_transformers() -> None:
    assert pre_tokenizer("tekken") is None and pre_tokenizer(None) is None


def test_smollm2_reads_lists_as_it_was_trained_to(smollm2: LoadedModel) -> None:
    """With spaces and digits in one word, two line breaks before a number would be two tokens."""
    tokenizer = smollm2.tokenizer
    assert tokenizer is not None
    text = "1. one\n\n2. two   3"
    assert tokenizer.tokenize(text) == ["1", ".", "Ġone", "ĊĊ", "2", ".", "Ġtwo", "ĠĠĠ", "3"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
