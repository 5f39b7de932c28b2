"""How byte-level tokenizers cut text into words before they join pairs, by the names that GGUF has for it.

transformers reads a GGUF file's tokens and merges but not always this: SmolLM2's digits, for one, would be cut with the
spaces before them. The definitions here are those of the tokenizers' own ``tokenizer.json``.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
#: name → the regular expression that isolates words
EXPRESSIONS = {
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}",
}


def _isolated(expression: str) -> PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _digit_by_digit() -> PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


_MAKERS: dict[str, Callable[[], PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": _digit_by_digit,
    **{name: lambda expression=expression: _isolated(expression) for name, expression in EXPRESSIONS.items()},  # type: ignore[misc]
}


def pre_tokenizer(name: str | None) -> PreTokenizer | None:
    """The pre-tokenizer of this GGUF name (``tokenizer.ggml.pre``), or ``None`` where it is not one of ours."""
    make = None if name is None else _MAKERS.get(name)
    return None if make is None else make()
