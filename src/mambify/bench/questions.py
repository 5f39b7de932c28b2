"""Prompts for speculation, by what they ask for: code and mathematics repeat themselves more than conversation does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mambify.data.documents import raw_rows
from mambify.data.questions import interpret_question
from mambify.decode.text import encode_prompt

CHAT, CODE_AND_MATH = "chat", "code/math"
#: Spec-Bench's category → ours; a category of its own where there is none
_GROUPS = {
    **dict.fromkeys(("writing", "roleplay", "reasoning", "extraction", "stem", "humanities"), CHAT),
    **dict.fromkeys(("coding", "math", "math_reasoning"), CODE_AND_MATH),
}
_OWN = {
    CHAT: (
        "Write a short story about a lighthouse keeper who finds a letter.",
        "What should I see on a first visit to Rome?",
        "Explain to a child why the sky is blue.",
        "Give me five tips for a good night's sleep.",
    ),
    CODE_AND_MATH: (
        "Write a Python function that checks whether a string is a palindrome.",
        "Write a Python class for a stack with push, pop and peek.",
        "A train travels 60 km in 45 minutes. What is its speed in km/h? Think step by step.",
        "Tom has 3 boxes of 12 pencils and gives away 10 pencils. How many are left? Think step by step.",
    ),
}


def read_questions(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """Group → token ids of prompts, through the chat template where there is one.

    Args:
        files: rows with ``turns`` (Spec-Bench and MT-Bench, the first is taken), ``question`` (GSM8K), ``prompt``
            (HumanEval) or any other that :func:`~mambify.data.questions.interpret_question` knows, and ``category``; a
            few questions of our own by default.

    Raises:
        UsageError: a file that cannot be read so.
    """
    texts: dict[str, list[str]] = {}
    for file in files:
        for group, text in _read(file):
            texts.setdefault(group, []).append(text)
    if not texts:
        texts = {group: list(own) for group, own in _OWN.items()}
    return {
        group: [
            encode_prompt(tokenizer, [{"role": "user", "content": text}] if tokenizer.chat_template else text)
            for text in found
        ]
        for group, found in texts.items()
    }


def _read(file: Path) -> list[tuple[str, str]]:
    found = []
    for where, row in raw_rows(file):
        first = next(message for message in interpret_question(row, where) if message["role"] == "user")
        # GSM8K and HumanEval name none.
        category = str(row.get("category", CODE_AND_MATH)) if isinstance(row, dict) else CODE_AND_MATH
        found.append((_GROUPS.get(category, category), first["content"]))
    return found
