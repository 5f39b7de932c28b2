"""Telling whether two tokenizers are the same one.

Distillation compares two models token by token and trains on stored token ids, so every stage must know that
the ids mean the same thing on both sides. A fingerprint covers what decides the ids of a text (vocabulary,
merges through what they do to a probe, added tokens) and the tokens that begin and end documents; it ignores
what does not change ids: padding, truncation, the chat template.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from mambify.errors import TokenizerMismatchError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Covers cases, digits, indentation, accents, a script with long merges, an emoji and code: two byte-pair
# tokenizers with one vocabulary and different merges or pre-tokenizers disagree somewhere here.
_PROBE = (
    "The quick brown fox, 1234567890 times over; it's naïve… isn't it?\n\n    def f(x): return x**2  # №5\n"
    "Übergrößenträger 東京都の天気 Быстрая лисица 🙂🙂\tinternationalization\r\n"
)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hexadecimal name that two tokenizers share exactly when they give the same ids to a text."""
    facts = {
        "vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])),
        "probe": tokenizer.encode(_PROBE, add_special_tokens=False),
        "specials": [tokenizer.bos_token_id, tokenizer.eos_token_id],
    }
    text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def require_same_tokenizer(
    one: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    *,
    names: tuple[str, str] = ("teacher", "student"),
) -> None:
    """Checks that both tokenizers give the same ids to a text.

    Raises:
        TokenizerMismatchError: they do not; the message names the sizes and the first token that differs.
    """
    if tokenizer_fingerprint(one) == tokenizer_fingerprint(other):
        return
    raise TokenizerMismatchError(
        f"the {names[0]} and the {names[1]} do not share a tokenizer: {_first_difference(one, other)}"
    )


def _first_difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    if len(one) != len(other):
        return f"{len(one)} tokens against {len(other)}"
    vocabularies = one.get_vocab(), other.get_vocab()
    for token, token_id in sorted(vocabularies[0].items(), key=lambda item: item[1]):
        if vocabularies[1].get(token) != token_id:
            return f"token {token_id} is {token!r} in the first and not in the second"
    if (one.bos_token_id, one.eos_token_id) != (other.bos_token_id, other.eos_token_id):
        return f"begin/end tokens {one.bos_token!r}, {one.eos_token!r} against {other.bos_token!r}, {other.eos_token!r}"
    return "the same vocabulary is applied differently (merges or pre-tokenizer)"
