"""Text out of tokens as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


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
