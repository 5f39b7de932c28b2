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


def draw_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    kind: str = "auto",
    prompts: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """``input_ids`` and ``labels``, each ``[N, T]``: documents that ``model`` writes, end to end.

    The caller's random state is as before afterwards; the same arguments give the same sequences.

    Args:
        count, length: N and T.
        kind: what is written: ``chat``, ``text``, ``mixed``; ``auto``: chat if the tokenizer has a template.
        prompts: answer these instead, in an order drawn from the seed; labels are -100 on the prompts then.
        seed, temperature, top_k, max_new_tokens, batch_size: see :func:`mambify.data.synthesize.synthesize`.

    Raises:
        MambifyError: the model writes nothing but empty texts.
    """
    if kind == "auto":
        kind = "chat" if has_chat_template(tokenizer) and prompts is None else "text"
    settings = Settings(
        num_tokens=count * length,
        kind=kind,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    device = torch.device(model.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        documents = _draw(Sampler(model, tokenizer, settings, prompts=prompts or ()), prompts, count * length, seed)
    blocks = pack(documents, length, seed=seed, answers_only=prompts is not None)
    items = [blocks[index] for index in range(count)]
    return {name: torch.stack([item[name] for item in items]) for name in ("input_ids", "labels")}


def _draw(sampler: Sampler, prompts: Sequence[Sequence[int]] | None, num_tokens: int, seed: int) -> list[Document]:
    """Documents of at least ``num_tokens`` tokens; two that meet may share a token, which is not counted."""
    settings = sampler.settings
    shuffled = _endless(prompts, seed) if prompts is not None else None
    documents: list[Document] = []
    tokens = dict.fromkeys(settings.kinds, 0)
    empty = 0
    while sum(tokens.values()) < num_tokens:
        kind = min(settings.kinds, key=lambda kind: tokens[kind])
        mean = sum(map(len, documents)) / len(documents) if documents else sampler.longest / 2
        rows = int((num_tokens - sum(tokens.values())) / max(mean, 1)) + 1
        rows = -(-rows // len(settings.kinds)) if sampler.at_once is None else min(rows, sampler.at_once)
        if shuffled is None:
            drawn = sampler.sample(kind, rows)
        else:
            drawn = sampler.answer([next(shuffled) for _ in range(rows)])
        documents += drawn
        tokens[kind] += sum(max(len(document) - 1, 0) for document in drawn)
        empty = 0 if drawn else empty + 1
        if empty == _MAX_EMPTY:
            raise MambifyError(f"the student writes nothing: the last {empty} batches held only empty texts")
    return documents


def _endless(prompts: Sequence[Sequence[int]], seed: int) -> Iterator[Sequence[int]]:
    generator = random.Random(seed)
    while True:
        yield from generator.sample(prompts, len(prompts))
