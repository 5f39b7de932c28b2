"""Text to evaluate on, as blocks of token ids: a text file, or the held-out side of synthesized text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mambify.errors import InvalidOptionError, TokenizerMismatchError, UnknownSourceError, UsageError
from mambify.evaluate.scoring import as_ids
from mambify.io import read_json, read_text
from mambify.tokenization import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MANIFEST = "manifest.json"

#: files that hold rows, each a text or a conversation of its own; others are one text
FILES_OF_ROWS = (".jsonl", ".json")


def cut_into_blocks(
    sequences: Iterable[Sequence[int] | Tensor], context_length: int, *, max_tokens: int | None = None
) -> list[Tensor]:
    """Non-overlapping blocks of at most ``context_length`` tokens, each from one sequence, in order.

    A sequence's last block may be shorter; one of a single token is left out, as nothing in it is predicted.

    Raises:
        InvalidOptionError: a context length below 2.
    """
    if context_length < 2:
        raise InvalidOptionError(f"context_length must be at least 2, not {context_length}")
    blocks: list[Tensor] = []
    total = 0
    for sequence in sequences:
        ids_T = as_ids(sequence)
        for block_T in ids_T.split(context_length):
            if len(block_T) < 2:
                continue
            if max_tokens is not None and total >= max_tokens:
                return blocks
            blocks.append(block_T)
            total += len(block_T)
    return blocks


def read_blocks(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    max_tokens: int | None = None,
) -> list[Tensor]:
    """Blocks of a UTF-8 text file (one document), or of a synthesized directory's held-out documents.

    The text is tokenized in one piece, as the tokenizer does by default (a bos token, where it puts one,
    stands at the beginning of the text), and cut every ``context_length`` tokens.

    Raises:
        UnknownSourceError: nothing there.
        UsageError: not text, empty, or not a finished synthesized directory; or a file of rows, which
            :func:`mambify.workflows.evaluate.read_material` reads.
        TokenizerMismatchError: a synthesized directory written with another tokenizer.
    """
    path = Path(source)
    if path.is_dir():
        sequences = _heldout_ids(path, tokenizer)
    elif path.is_file() and path.suffix in FILES_OF_ROWS:
        raise UsageError(f"{path} holds rows and not one text: read them by mambify.workflows.evaluate.read_material")
    elif path.is_file():
        sequences = [tokenizer.encode(read_text(path), verbose=False)]
    else:
        raise UnknownSourceError(f"no text at {path}: give a text file or a synthesized directory")
    blocks = cut_into_blocks(sequences, context_length, max_tokens=max_tokens)
    if not blocks:
        raise UsageError(f"{path} holds no text to evaluate on")
    return blocks


def _heldout_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    try:
        manifest: dict[str, Any] = read_json(path / _MANIFEST)
        complete, written_with = manifest["complete"], manifest["tokenizer"]
        files = [file for shard in manifest["shards"] for file in shard["files"] if file["split"] == "heldout"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is not a synthesized directory: no readable {_MANIFEST}") from error
    if not complete:
        raise UsageError(f"{path} is unfinished: run the same synthesize command again")
    if written_with != tokenizer_fingerprint(tokenizer):
        raise TokenizerMismatchError(f"{path} was written with another tokenizer than this model's")
    sequences: list[list[int]] = []
    for file in files:
        try:
            content = (path / file["name"]).read_bytes()
        except OSError as error:
            raise UsageError(f"{path / file['name']} is missing: run the same synthesize command") from error
        if hashlib.sha256(content).hexdigest() != file["sha256"]:
            raise UsageError(f"{path / file['name']} was altered: run the same synthesize command to repair it")
        sequences += [json.loads(line)["input_ids"] for line in content.decode("utf-8").split("\n") if line]
    return sequences
