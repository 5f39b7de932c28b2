"""The history of a conversation, kept short enough for the model to read."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mambify.decode.text import Message, encode_prompt
from mambify.errors import InvalidOptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Conversation:
    """What was said so far; the oldest exchanges are forgotten when it grows past ``max_prompt_tokens``, if given."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, max_prompt_tokens: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._limit = sys.maxsize if max_prompt_tokens is None else max_prompt_tokens
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """The system message, if any, and the turns that are remembered."""
        return [*self._system, *self._turns]

    def reset(self) -> None:
        """Forgets every turn; the system message stays."""
        self._turns = []

    def ask(self, words: str) -> tuple[list[int], int]:
        """Adds the user's turn; returns the prompt's token ids, and how many exchanges were forgotten to make it fit.

        Raises:
            InvalidOptionError: this turn alone does not fit; the conversation is as before.
            UnsupportedError: the chat template refuses it.
        """
        turns: list[Message] = [*self._turns, {"role": "user", "content": words}]
        num_dropped = 0
        while len(ids := encode_prompt(self._tokenizer, [*self._system, *turns])) > self._limit:
            if len(turns) == 1:
                raise InvalidOptionError(f"that is {len(ids)} tokens, and the model reads {self._limit}")
            turns = turns[2:]
            num_dropped += 1
        self._turns = turns
        return ids, num_dropped

    def answer(self, words: str) -> None:
        """Adds the assistant's turn."""
        self._turns.append({"role": "assistant", "content": words})
