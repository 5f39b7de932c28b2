"""Pairs of answers to a prompt, of which people preferred one: reading them, and rows of one length for training.

Letters: T tokens of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mambify.data.chat import Message, encode_conversation
from mambify.data.documents import Document, Source, conversation_document, raw_rows
from mambify.data.rows import interpret_messages
from mambify.errors import UsageError
from mambify.fingerprint import arrays_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
KNOWN_PAIRS = "{prompt, chosen, rejected}, the answers as text or as lists of messages"


@dataclass(frozen=True)
class PreferencePair:
    """Two conversations that begin alike; each one's ``loss_start`` is where its own answer begins."""

    chosen: Document
    rejected: Document


@dataclass(frozen=True)
class Preferences:
    """What a source held.

    Attributes:
        pairs: the usable ones, in the source's order.
        dropped: reason → how many were not: ``identical`` answers, ``empty`` ones.
    """

    pairs: tuple[PreferencePair, ...]
    dropped: Mapping[str, int]

    def documents(self) -> list[Document]:
        """Every conversation once: what must not overlap with evaluation text."""
        found = {document.id: document for pair in self.pairs for document in (pair.chosen, pair.rejected)}
        return list(found.values())


def read_preferences(source: Source | Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> Preferences:
    """Pairs of a ``.jsonl``, a ``.json`` list, or a data set ``hf:name[:split]``; or of several of these.

    A row is ``{prompt, chosen, rejected}``. ``prompt`` is a user's words or a list of messages; an answer is text, or a
    list of messages that may repeat the prompt (then ``prompt`` may be missing). Identical and empty answers are
    dropped and counted.

    Raises:
        UsageError: an unreadable row, named by file and line, or no usable pair at all.
        UnsupportedError: the tokenizer has no chat template, or one that cannot be used.
        UnknownSourceError, MissingDependencyError: see :func:`mambify.data.documents.read_documents`.
    """
    pairs: list[PreferencePair] = []
    dropped: Counter[str] = Counter()
    for one in [source] if not isinstance(source, Sequence) or isinstance(source, str) else source:
        for where, row in raw_rows(one):
            conversations = _conversations(row, where)
            reason = _why_unusable(*conversations)
            if reason is None:
                pairs.append(_encode(tokenizer, *conversations, where))
            else:
                dropped[reason] += 1
    if not pairs:
        raise UsageError(f"{source} has no usable pair of answers ({dropped.total()} dropped)")
    return Preferences(tuple(pairs), dict(dropped))


def _conversations(row: Any, where: str) -> tuple[list[Message], list[Message]]:
    """Chosen and rejected, each whole from the prompt on."""
    if not isinstance(row, Mapping) or "chosen" not in row or "rejected" not in row:
        raise UsageError(f"{where}: expected {KNOWN_PAIRS}")
    given = row.get("prompt")
    prompt: list[Message] = []
    if isinstance(given, str):
        prompt = [{"role": "user", "content": given}]
    elif given is not None:
        prompt = list(interpret_messages(given, f"{where}, prompt"))
    chosen, rejected = (_whole(prompt, row[name], f"{where}, {name}") for name in ("chosen", "rejected"))
    if chosen[:1] != rejected[:1]:
        raise UsageError(f"{where}: chosen and rejected must begin with the same turn")
    return chosen, rejected


def _whole(prompt: list[Message], answer: Any, where: str) -> list[Message]:
    if isinstance(answer, str):
        messages: list[Message] = [{"role": "assistant", "content": answer}]
    else:
        messages = list(interpret_messages(answer, where))
    repeated = messages[: len(prompt)] == prompt or messages[0]["role"] != "assistant"
    whole = messages if repeated else prompt + messages
    if len(whole) < 2:
        raise UsageError(f"{where}: an answer without a prompt")
    return whole


def _why_unusable(chosen: list[Message], rejected: list[Message]) -> str | None:
    if chosen == rejected:
        return "identical"
    if any(not m["content"].strip() for m in (*chosen, *rejected) if m["role"] == "assistant"):
        return "empty"
    return None


def _encode(
    tokenizer: PreTrainedTokenizerBase, chosen: list[Message], rejected: list[Message], where: str
) -> PreferencePair:
    """Both as documents whose loss starts with the first answer that they do not have in common."""
    common = next(i for i, (a, b) in enumerate(zip([*chosen, None], [*rejected, None], strict=False)) if a != b)
    documents = []
    for messages in (chosen, rejected):
        try:
            encoded = encode_conversation(tokenizer, messages)
        except UsageError as error:
            raise type(error)(f"{where}: {error}") from error
        before = sum(m["role"] == "assistant" for m in messages[:common])
        if before >= len(encoded.answers):
            raise UsageError(f"{where}: one conversation goes on where the other ends without an answer of its own")
        ids, answers = np.asarray(encoded.input_ids), encoded.answers[before:]
        documents.append(conversation_document(encoded.text, ids, answers, tuple(messages)))
    return PreferencePair(*documents)


class PreferenceDataset(Dataset[dict[str, Tensor]]):
    """Pairs as two rows of ``context_length`` tokens, padded or cut off on the right.

    An item holds ``input_ids [2, T]``, the chosen row first; ``labels [2, T]``, -100 outside the answers;
    ``lengths [2]`` without padding; ``mean_tokens``, which all items share: tokens of a pair, on average.

    Args:
        dropped: as in :class:`Preferences`; pairs whose answers do not differ within the context are added as
            ``too long``.

    Raises:
        UsageError: no pair is left.
    """

    def __init__(self, pairs: Iterable[PreferencePair], context_length: int, *, dropped: Mapping[str, int]) -> None:
        self.context_length, self.dropped = context_length, Counter(dropped)
        self.pairs: list[PreferencePair] = []
        for pair in pairs:
            cut = PreferencePair(_cut(pair.chosen, context_length), _cut(pair.rejected, context_length))
            if _differ(cut):
                self.pairs.append(cut)
            else:
                self.dropped["too long"] += 1
        if not self.pairs:
            raise UsageError(f"no pair of answers differs within {context_length} tokens: raise context_length")
        tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in self.pairs)
        self._mean_tokens = torch.tensor(tokens / len(self.pairs), dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that it gives."""
        documents = [document for pair in self.pairs for document in (pair.chosen, pair.rejected)]
        places = [np.array(list(spans(document)), dtype=np.int64) for document in documents]
        return arrays_fingerprint([*(document.input_ids for document in documents), *places])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pair = self.pairs[index]
        rows = [_row(document, self.context_length) for document in (pair.chosen, pair.rejected)]
        return {
            "input_ids": torch.stack([ids_T for ids_T, _ in rows]),
            "labels": torch.stack([labels_T for _, labels_T in rows]),
            "lengths": torch.tensor([len(pair.chosen), len(pair.rejected)]),
            "mean_tokens": self._mean_tokens,
        }


def as_blocks(dataset: PreferenceDataset) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The pairs as evaluation takes them: ``input_ids`` and ``labels`` of each conversation, without padding."""
    blocks = []
    for pair in dataset.pairs:
        (chosen, chosen_labels), (rejected, rejected_labels) = (
            _row(document, len(document)) for document in (pair.chosen, pair.rejected)
        )
        blocks.append(
            (
                {"input_ids": chosen, "labels": chosen_labels},
                {"input_ids": rejected, "labels": rejected_labels},
            )
        )
    return blocks


def describe(kept: int, dropped: Mapping[str, int]) -> str:
    """``996 pairs, 4 dropped (3 identical, 1 empty)``."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    return f"{kept} pairs" + (f", {sum(dropped.values())} dropped ({reasons})" if reasons else "")


def _cut(document: Document, context_length: int) -> Document:
    return replace(document, input_ids=document.input_ids[:context_length])


def _differ(pair: PreferencePair) -> bool:
    both = (pair.chosen, pair.rejected)
    if any(len(document) <= document.loss_start for document in both):
        return False
    return not np.array_equal(pair.chosen.input_ids, pair.rejected.input_ids)


def _row(document: Document, context_length: int) -> tuple[Tensor, Tensor]:
    ids_T = torch.zeros(context_length, dtype=torch.long)
    labels_T = torch.full((context_length,), IGNORED)
    ids_T[: len(document)] = torch.from_numpy(document.input_ids.astype(np.int64))
    for start, end in spans(document):
        labels_T[start:end] = ids_T[start:end]
    return ids_T, labels_T


def spans(document: Document) -> Iterator[tuple[int, int]]:
    """Where a document's answers stand, within its length."""
    for start, end in document.answer_spans:
        if start < len(document):
            yield start, min(end, len(document))
