"""Between text and token ids: prompts, the tokens that end an answer, and text out of tokens as they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from mambify.decode.generate import end_token_ids
from mambify.errors import InvalidOptionError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"

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


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: the model's own, and the tokenizer's."""
    stops = set(end_token_ids(model))
    return stops if tokenizer.eos_token_id is None else stops | {tokenizer.eos_token_id}


class Detokenizer:
    """Turns tokens into text as they come; the pieces together are the text of all tokens.

    A character may take several tokens (emoji, Chinese), and some tokenizers drop a space at the beginning of what they
    decode. So a few earlier tokens are decoded along each time, and text that may still change is held back.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # tokens from here on are decoded along
        self._said = 0  # tokens up to here have been given out

    def add(self, token_id: int) -> str:
        """The text that has become certain with this token; often one word, sometimes nothing."""
        self._ids.append(token_id)
        return self._take(final=False)

    def finish(self) -> str:
        """What was held back: a character whose last bytes never came."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._context : self._said])
        after = self._decode(self._ids[self._context :])
        if after.endswith(_UNFINISHED) and not final:
            return ""
        if len(after) > len(before):  # a special token adds nothing: it stays within what is decoded along
            self._context, self._said = self._said, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
