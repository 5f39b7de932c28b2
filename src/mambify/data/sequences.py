"""Training sequences that a model writes, in memory: texts of its own, or answers to given prompts.

Letters: N sequences, T tokens of each.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambify.data.chat import has_chat_template
from mambify.data.documents import Document
from mambify.data.packing import pack
from mambify.data.sampler import Sampler, Settings
from mambify.errors import MambifyError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TEXT_PROMPT = 32
_MAX_EMPTY = 20


def prompts_of(documents: Iterable[Document], *, longest: int) -> list[list[int]]:
    """What a model is to go on from: of a conversation all up to its first answer, of a text its first words.

    Raises:
        UsageError: there is none of at most ``longest`` tokens.
    """
    prompts = []
    for document in documents:
        length = document.loss_start if document.kind == "chat" else min(_TEXT_PROMPT, len(document) // 2)
        if 0 < length <= min(longest, len(document) - 1):
            prompts.append([int(token) for token in document.input_ids[:length]])
    if not prompts:
        raise UsageError(
            f"the text holds no prompt of at most {longest} tokens: raise data.context_length of the stage"
        )
    return prompts


class SequenceWriter:
    """Has a model write documents, and puts them end to end.

    Args:
        tokenizer: the model's.
        length: T.
        kind: what is written: ``chat``, ``text``, ``mixed``; ``auto``: chat if the tokenizer has a template.
        prompts: answer these instead, in an order drawn from the seed; labels are -100 on the prompts then.
        temperature, top_k, max_new_tokens, batch_size: see :func:`mambify.data.synthesize.synthesize`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        *,
        kind: str = "auto",
        prompts: Sequence[Sequence[int]] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int = 256,
        batch_size: int = 64,
    ) -> None:
        if kind == "auto":
            kind = "chat" if has_chat_template(tokenizer) and prompts is None else "text"
        self.tokenizer, self.length, self.prompts = tokenizer, length, prompts
        self.settings = Settings(
            num_tokens=length,
            kind=kind,
            temperature=temperature,
            top_k=top_k,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )

    def sampler(self, model: PreTrainedModel) -> Sampler:
        """What draws from ``model``.

        Raises:
            UnsupportedError: no chat template where one is needed, or one that cannot be taken apart.
            InvalidOptionError: documents of these lengths do not fit the model.
        """
        return Sampler(model, self.tokenizer, self.settings, prompts=self.prompts or ())

    def write(self, model: PreTrainedModel, count: int, *, seed: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, each ``[N, T]`` with N = ``count``.

        The same arguments give the same sequences; the caller's random state is afterwards as it was before.

        Raises:
            MambifyError: the model writes nothing but empty texts.
        """
        device = torch.device(model.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            documents = self._draw(self.sampler(model), count * self.length, seed)
        blocks = pack(documents, self.length, seed=seed, answers_only=self.prompts is not None)
        items = [blocks[index] for index in range(count)]
        return {name: torch.stack([item[name] for item in items]) for name in ("input_ids", "labels")}

    def _draw(self, sampler: Sampler, num_tokens: int, seed: int) -> list[Document]:
        """Documents of at least ``num_tokens`` tokens; two that meet may share a token, which is not counted."""
        prompts = None if self.prompts is None else _endless(self.prompts, seed)
        documents: list[Document] = []
        tokens = dict.fromkeys(self.settings.kinds, 0)
        empty = 0
        while (left := num_tokens - sum(tokens.values())) > 0:
            kind = min(tokens, key=lambda kind: tokens[kind])
            mean = sum(map(len, documents)) / len(documents) if documents else sampler.longest / 2
            rows = -(-int(left / mean + 1) // len(tokens))
            rows = rows if sampler.at_once is None else min(rows, sampler.at_once)
            if prompts is None:
                drawn = sampler.sample(kind, rows)
            else:
                drawn = sampler.answer([next(prompts) for _ in range(rows)])
            documents += drawn
            tokens[kind] += sum(len(document) - 1 for document in drawn)
            empty = 0 if drawn else empty + 1
            if empty == _MAX_EMPTY:
                raise MambifyError(f"the model writes nothing: the last {empty} batches held only empty texts")
        return documents


def _endless(prompts: Sequence[Sequence[int]], seed: int) -> Iterator[Sequence[int]]:
    generator = random.Random(seed)
    while True:
        yield from generator.sample(prompts, len(prompts))
