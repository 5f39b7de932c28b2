"""A model that is asked again and again, with buffers that grow as its prompts do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mambify.decode.decoder import Decoder, decoder_for
from mambify.decode.speed import Speed
from mambify.decode.stop import stop_strings
from mambify.decode.stream import TextStream, stream_tokens
from mambify.engine import DraftCount, Sampling, Speculator
from mambify.errors import InvalidOptionError
from mambify.language_model import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mambify.decode.drafts import Draft

_FIRST = 1024  # tokens that the first buffers hold


class Session:
    """Answers one prompt at a time, in buffers that are kept.

    They hold what was needed so far and are doubled when a prompt outgrows them, so that keys and values of a long
    context are not reserved for a short talk.

    Args:
        max_length: the most tokens of a prompt and its answer; buffers never grow beyond it, and as memory allows where
            it is ``None``.
        first: tokens that the first buffers hold.
        stop: strings that end an answer.
        on_growth: told how many tokens new buffers hold, once they replace smaller ones.

    Raises:
        InvalidOptionError: a stop that is no string, a draft that does not suit, buffers that do not fit the memory.
        UnsupportedError: a draft for a model that is not of this package.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        max_length: int | None,
        first: int = _FIRST,
        draft: Draft = None,
        num_draft_tokens: DraftCount = 4,
        stop: str | Sequence[str] | None = None,
        on_growth: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.max_length = sys.maxsize if max_length is None else max_length
        self._draft, self._num_draft_tokens = draft, num_draft_tokens
        self._strings, self._stops = stop_strings(stop), stop_ids(model, tokenizer)
        self._on_growth = on_growth
        self._decoder: Decoder | None = None
        self._holds = min(first, self.max_length)
        self._prompt_tokens = 0
        self._answer: TextStream | None = None
        self._make()

    def answer(self, prompt_ids: Sequence[int], *, max_new_tokens: int, seed: int | None = None) -> TextStream:
        """The answer to one prompt; an earlier one that was not heard to its end is dropped, and going on with it is an
        error.

        Raises:
            InvalidOptionError: too long for the session, an empty prompt, or buffers that do not fit the memory.
        """
        needed = len(prompt_ids) + max_new_tokens
        if needed > self.max_length:
            raise InvalidOptionError(
                f"a prompt of {len(prompt_ids)} tokens and {max_new_tokens} new ones do not fit "
                f"{self.max_length} tokens"
            )
        if self._answer is not None:
            self._answer.drop()
        if needed > self._holds:
            while self._holds < needed:
                self._holds *= 2
            self._holds = min(self._holds, self.max_length)
            self._make()
            if self._on_growth is not None:
                self._on_growth(self._holds)
        assert self._decoder is not None
        self._prompt_tokens = len(prompt_ids)
        self._answer = stream_tokens(
            self._decoder,
            self.tokenizer,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            stops=self._stops,
            strings=self._strings,
            seed=seed,
        )
        return self._answer

    def speed(self, *, with_bandwidth: bool = False) -> Speed | None:
        """Of the last answer; ``None`` for a model that the engine does not run."""
        if not isinstance(self._decoder, Speculator):
            return None
        return Speed.of(self._decoder, prompt_tokens=self._prompt_tokens, with_bandwidth=with_bandwidth)

    def _make(self) -> None:
        self._decoder = None  # its buffers are free before the new ones are made
        self._decoder = decoder_for(
            self.model,
            self._draft,
            self.sampling,
            max_length=self._holds,
            stop_ids=sorted(self._stops),
            num_draft_tokens=self._num_draft_tokens,
        )
