"""Prompts for speculation, by what they ask for: code and mathematics repeat themselves more than conversation does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mambify.decode.text import encode_prompt
from mambify.errors import InvalidOptionError

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
        files: JSON lines with ``turns`` (Spec-Bench and MT-Bench, the first is taken), ``question`` (GSM8K) or
            ``prompt`` (HumanEval), and ``category``; a few questions of our own by default.

    Raises:
        InvalidOptionError: a file that cannot be read so.
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
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidOptionError(f"cannot read {file}: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["turns"][0] if "turns" in row else row["question"] if "question" in row else row["prompt"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InvalidOptionError(f"{file}:{number}: expected JSON with turns, question or prompt") from error
        category = str(row.get("category", CODE_AND_MATH))  # GSM8K and HumanEval name none
        found.append((_GROUPS.get(category, category), str(text)))
    return found
