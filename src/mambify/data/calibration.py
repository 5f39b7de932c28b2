"""Text to measure a teacher on before anything is trained: the training side of a source, as whole blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambify.data.documents import Document, read_documents
from mambify.data.packing import pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def calibration_documents(source: str | Path, tokenizer: PreTrainedTokenizerBase, *, num_tokens: int) -> list[Document]:
    """The first training documents of ``source`` that hold this many tokens; never a held-out one.

    Raises:
        UsageError: see :func:`mambify.data.documents.read_documents`.
    """
    return read_documents(source, tokenizer, split="train", max_tokens=num_tokens)


def calibration_blocks(documents: list[Document], *, num_tokens: int, context_length: int = 512) -> Tensor:
    """Token ids ``[N, T]``, always the same for the same documents: at most ``num_tokens``, and at least one block.

    Raises:
        UsageError: less text than one block.
    """
    packed = pack(documents, context_length, seed=0)
    count = min(max(num_tokens // context_length, 1), len(packed))
    return torch.stack([packed[index]["input_ids"] for index in range(count)])
