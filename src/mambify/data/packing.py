"""Documents into blocks of one length, with nothing padded and nothing but the tail dropped.

All tokens live in one int32 array. A token that no loss counts is stored as its bitwise complement (a
negative number), so the array carries the labels as well; document starts are kept beside it.

Letters: T tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mambify.data.documents import Document
from mambify.errors import InvalidOptionError, UsageError, did_you_mean
from mambify.fingerprint import arrays_fingerprint

IGNORED = -100
Mode = Literal["concat", "documents"]
MODES = ("concat", "documents")


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Blocks of ``context_length`` tokens, ready for a trainer.

    An item holds ``input_ids [T]`` and ``labels [T]`` (the same ids, -100 where no loss is counted; the model
    shifts them), and for packed documents ``position_ids [T]``, which start again at 0 with every document: a
    model tells the documents apart by them.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int64],
        context_length: int,
        *,
        mode: Mode,
        num_documents: int,
    ) -> None:
        self._tokens, self._starts, self._mode = tokens, starts, mode
        self.context_length = context_length
        self.num_documents = num_documents

    def __len__(self) -> int:
        return len(self._tokens) // self.context_length

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks."""
        return len(self) * self.context_length

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that it gives."""
        return arrays_fingerprint(
            [self._tokens, self._starts, np.array([self.context_length, MODES.index(self._mode)])]
        )

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        first = (index % len(self)) * self.context_length
        stored_T = self._tokens[first : first + self.context_length].astype(np.int64)
        ids_T = np.where(stored_T < 0, ~stored_T, stored_T)
        labels_T = np.where(stored_T < 0, IGNORED, stored_T)
        item = {"input_ids": torch.from_numpy(ids_T)}
        if self._mode == "documents":
            at_T = np.arange(first, first + self.context_length)
            document_T = np.searchsorted(self._starts, at_T, side="right") - 1
            positions_T = at_T - np.maximum(self._starts[document_T], first)
            labels_T[positions_T == 0] = IGNORED  # nothing before it predicts it
            item["position_ids"] = torch.from_numpy(positions_T)
        item["labels"] = torch.from_numpy(labels_T)
        return item

    def input_ids(self) -> Tensor:
        """All blocks at once, ``[num_blocks, T]``: for evaluation."""
        stored = self._tokens[: self.num_tokens].astype(np.int64).reshape(len(self), self.context_length)
        return torch.from_numpy(np.where(stored < 0, ~stored, stored))


def pack(
    documents: Iterable[Document],
    context_length: int,
    *,
    seed: int,
    mode: Mode = "concat",
    answers_only: bool = False,
) -> PackedDataset:
    """Puts documents end to end, in an order decided by ``seed``, and cuts the stream into blocks.

    ``concat`` is the stream of pretraining: a block is seen as one text. The documents carry their own begin
    and end tokens; where a document begins with the very token the one before ended with (``<|endoftext|>``
    as both), the two share it. ``documents`` keeps them apart: positions restart with each, and a document
    that a block's end cuts goes on in the next block as one of its own. The last block is dropped if not
    full.

    Args:
        documents: Consumed once.
        context_length: Tokens of a block.
        seed: Decides the order of the documents.
        mode: ``concat`` or ``documents``.
        answers_only: Counts no loss outside a document's answers; in plain text, on its start token.

    Raises:
        InvalidOptionError: an unknown mode, or a context length below 2.
        UsageError: fewer tokens than one block.
    """
    if mode not in MODES:
        raise InvalidOptionError(f"unknown packing mode {mode!r}: {did_you_mean(mode, MODES)}")
    if context_length < 2:
        raise InvalidOptionError(f"context_length must be at least 2, not {context_length}")
    pieces = [_with_loss(document, answers_only) for document in documents if len(document)]
    order = np.random.default_rng(seed).permutation(len(pieces))
    pieces = [pieces[index] for index in order]
    if mode == "concat":
        pieces = [
            piece[1:] if index and _token(pieces[index - 1][-1]) == _token(piece[0]) else piece
            for index, piece in enumerate(pieces)
        ]
    num_tokens = sum(map(len, pieces))
    if num_tokens < context_length:
        raise UsageError(f"{num_tokens} tokens do not fill one block of {context_length}: give more text")
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    return PackedDataset(
        np.concatenate(pieces),
        np.cumsum(lengths) - lengths,
        context_length,
        mode=mode,
        num_documents=len(pieces),
    )


def _with_loss(document: Document, answers_only: bool) -> npt.NDArray[np.int32]:
    if not answers_only:
        return document.input_ids
    stored = ~document.input_ids
    for start, end in document.answer_spans:
        stored[start:end] = document.input_ids[start:end]
    return stored


def _token(stored: np.int32) -> int:
    return int(~stored if stored < 0 else stored)
