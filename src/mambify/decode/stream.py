"""``mambify.stream``: text from a model, piece by piece as its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from mambify.decode.decoder import Decoder
from mambify.decode.detokenizer import Detokenizer
from mambify.decode.kept import OneRun, kept_decoder
from mambify.decode.rows import require_count, require_positions
from mambify.decode.stop import Cutter, stop_strings
from mambify.decode.text import Message, encode_prompt
from mambify.engine import DraftCount, Sampling
from mambify.errors import InvalidOptionError
from mambify.language_model import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mambify.decode.drafts import Draft


class TextStream(Iterator[str]):
    """The pieces of one answer, of its tokens as they come. What is known of it so far can be read meanwhile.

    Attributes:
        num_tokens: tokens drawn so far, the end token among them.
        ended: whether an end token or a stop string has come; false where ``max_new_tokens`` cut the answer off.
        stop: the stop string that ended it, which is no part of the text; ``None`` where none did.
    """

    def __init__(
        self,
        tokens: Iterator[int],
        tokenizer: PreTrainedTokenizerBase,
        stops: Collection[int],
        strings: Sequence[str] = (),
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self.num_tokens = 0
        self.ended = False
        self.stop: str | None = None
        self._tokens, self._stops = tokens, stops
        self._detokenizer, self._cutter = Detokenizer(tokenizer), Cutter(strings)
        self._on_end = on_end
        self._pieces = self._speak()
        self._over = self._dropped = False

    def __next__(self) -> str:
        if self._dropped:
            raise InvalidOptionError("this answer was dropped when the next was asked for: hear it to its end before")
        return next(self._pieces)

    def drop(self) -> None:
        """Nothing more of it is wanted: lets go of its decoder. Asking for another piece then is an error."""
        if not self._over:
            self._dropped = True
            self._pieces.close()
            self._tokens = iter(())

    def _speak(self) -> Generator[str, None, None]:
        yield from self._read()
        self._over = True
        if self._on_end is not None:
            self._on_end()

    def _read(self) -> Iterator[str]:
        for token in self._tokens:
            self.num_tokens += 1
            if token in self._stops:
                self.ended = True
                break
            if piece := self._cutter.add(self._detokenizer.add(token)):
                yield piece
            if self._cutter.found is not None:
                self.ended, self.stop = True, self._cutter.found
                return
        if piece := self._cutter.add(self._detokenizer.finish()):
            yield piece
        self.stop = self._cutter.found  # of characters that came too late for another token
        if piece := self._cutter.finish():
            yield piece


def stream_tokens(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stops: Collection[int],
    strings: Sequence[str] = (),
    seed: int | None = None,
) -> TextStream:
    """The answer of a decoder that is kept, to one prompt.

    Args:
        stops: the tokens that end the answer, as the decoder has them.
        strings: stop strings.
        seed: of this answer; the decoder's own by default.
    """
    seeds = None if seed is None else Sampling(seed=seed).seeds(1)
    pieces = decoder.run([prompt_ids], max_new_tokens=max_new_tokens, seeds=seeds)
    on_end = decoder.finish if isinstance(decoder, OneRun) else None
    return TextStream((token for _, piece in pieces for token in piece), tokenizer, stops, strings, on_end)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message] | Sequence[int],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    draft: Draft = None,
    num_draft_tokens: DraftCount = 4,
) -> TextStream:
    """The answer to a prompt, piece by piece; together they are the text of all its tokens.

    At temperature 0 its tokens are those of ``model.generate``. Whoever wants no more stops listening.

    Args:
        prompt: a text, a conversation, or token ids.
        stop: strings at which the text ends, without them.
        temperature, top_k, top_p, min_p, repetition_penalty, seed, draft, num_draft_tokens: see
            :func:`mambify.generate`.

    Raises:
        InvalidOptionError: a setting out of range, an empty prompt, or one too long for the model.
        UnsupportedError: messages, and no chat template that takes them; a draft for a model of another package.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    require_count(max_new_tokens)
    strings = stop_strings(stop)
    ids = _token_ids(prompt)
    if ids is None:
        ids = encode_prompt(tokenizer, cast("str | Sequence[Message]", prompt))
    require_positions(model, len(ids), max_new_tokens)
    stops = stop_ids(model, tokenizer)
    decoder = kept_decoder(
        model,
        draft,
        sampling,
        max_length=len(ids) + max_new_tokens,
        stop_ids=sorted(stops),
        num_draft_tokens=num_draft_tokens,
    )
    return stream_tokens(decoder, tokenizer, ids, max_new_tokens=max_new_tokens, stops=stops, strings=strings)


def _token_ids(prompt: str | Sequence[Message] | Sequence[int]) -> list[int] | None:
    """The prompt itself where it is token ids."""
    if isinstance(prompt, str) or not prompt:
        return None
    ids = [token for token in prompt if isinstance(token, int)]
    return ids if len(ids) == len(prompt) else None
