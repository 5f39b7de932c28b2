"""Prompts as token ids: of text, and of conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from mambify.errors import InvalidOptionError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: one turn of a conversation: its ``role`` and its ``content``
Message = Mapping[str, str]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message]) -> list[int]:
    """Token ids that a model continues with its answer.

    A string is tokenized as it stands (with a bos token where the tokenizer puts one); messages go through the chat
    template up to where the assistant begins to speak.

    Raises:
        UnsupportedError: no chat template, or one that refuses these messages.
        InvalidOptionError: nothing is left to continue: an empty prompt.
    """
    if isinstance(prompt, str):
        ids: list[int] = tokenizer.encode(prompt, verbose=False)
    else:
        if not tokenizer.chat_template:
            raise UnsupportedError("this tokenizer has no chat template: give the prompt as text")
        try:
            rendered = tokenizer.apply_chat_template(
                [{"role": message["role"], "content": message["content"]} for message in prompt],
                tokenize=False,
                add_generation_prompt=True,
            )
        except TemplateError as error:
            raise UnsupportedError(f"the chat template refuses these messages: {error}") from error
        ids = tokenizer.encode(str(rendered), add_special_tokens=False, verbose=False)
    if not ids:
        raise InvalidOptionError("the prompt is empty")
    return ids
