"""Text from a model, piece by piece as its tokens come."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from mambify.decode.sampling import Sampling
from mambify.decode.speculative import seed_or_drawn
from mambify.decode.steps import decode_steps
from mambify.decode.text import Detokenizer, Message, encode_prompt, stop_ids
from mambify.engine import Speculator

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TextStream(Iterator[str]):
    """The pieces of one answer, of its tokens as they come. What is known of it so far can be read meanwhile.

    Attributes:
        num_tokens: tokens drawn so far, the end token among them.
        ended: whether an end token has come; false where ``max_new_tokens`` cut the answer off.
    """

    def __init__(self, tokens: Iterator[int], tokenizer: PreTrainedTokenizerBase, stops: Collection[int]) -> None:
        self.num_tokens = 0
        self.ended = False
        self._tokens, self._stops = tokens, stops
        self._detokenizer = Detokenizer(tokenizer)
        self._pieces = self._speak()

    def __next__(self) -> str:
        return next(self._pieces)

    def _speak(self) -> Iterator[str]:
        for token in self._tokens:
            self.num_tokens += 1
            if token in self._stops:
                self.ended = True
                break
            if piece := self._detokenizer.add(token):
                yield piece
        if piece := self._detokenizer.finish():
            yield piece


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    seed: int | None = None,
    speculator: Speculator | None = None,
) -> TextStream:
    """The answer to tokenized prompt as pieces of text; together they are the text of all its tokens.

    At temperature 0 its tokens are those of ``model.generate``.

    Args:
        speculator: made by :func:`mambify.decode.speculative.speculator` for this model, sampling and its stop tokens.
    """
    tokens: Iterator[int]
    if speculator is None:
        ids_1T = torch.tensor([list(prompt_ids)], device=model.device)
        tokens = (int(next_1) for next_1 in decode_steps(model, ids_1T, sampling, seed=seed))
    else:
        seeds = [seed_or_drawn(seed)]
        pieces = speculator.run([prompt_ids], max_new_tokens=sampling.max_new_tokens, seeds=seeds)
        tokens = (token for _, piece in pieces for token in piece)
    return TextStream(tokens, tokenizer, stop_ids(model, tokenizer))


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """The answer to a prompt or a conversation, piece by piece.

    Raises:
        InvalidOptionError: a setting out of range, or an empty prompt.
        UnsupportedError: messages, and no chat template that takes them.
    """
    sampling = Sampling(temperature, top_k, top_p, max_new_tokens)
    return stream_text(model, tokenizer, encode_prompt(tokenizer, prompt), sampling, seed=seed)
