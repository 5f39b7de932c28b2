"""Documents: token ids with where they came from, and reading them from whatever the user has.

A document begins with the tokenizer's document start (or its chat template's opening) and ends with an end
token, unless it was cut off while being sampled. Its id is a hash of its text; which side of the
train/held-out split it falls on is decided by that id alone, so it never changes with order, seed or source.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from mambify.data.chat import Message, document_end, document_start, encode_conversation, encode_text
from mambify.data.manifest import Manifest, is_synthesized
from mambify.data.rows import Conversation, Row, interpret_row
from mambify.errors import (
    InvalidOptionError,
    MissingDependencyError,
    TokenizerMismatchError,
    UnknownSourceError,
    UsageError,
)
from mambify.io import read_text
from mambify.tokenization import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "heldout", "all"]
Kind = Literal["chat", "text"]
Source = str | Path
Weighted = tuple[Source, float]

DEFAULT_HELDOUT = 0.02
_PASSAGE_CHARACTERS = 2000
_PARAGRAPH_CHARACTERS = 3 * _PASSAGE_CHARACTERS  # the most that are left whole
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


@dataclass(frozen=True, eq=False)
class Document:
    """One text as token ids; the ids are the truth, ``text`` is for people and for the id.

    ``loss_start`` is the index of the first token that an answers-only loss counts: where the first answer
    begins in a conversation, the first token after the document start in plain text. ``answers`` are the places
    ``(start, end)`` of all answers of a conversation, where there is more than one or something follows. ``origin`` is
    the id of what several documents have in common, a question with several answers say: they stay on one side of the
    split.
    """

    id: str
    kind: Kind
    text: str
    input_ids: npt.NDArray[np.int32]
    loss_start: int = 1
    messages: tuple[Message, ...] | None = field(default=None, repr=False)
    answers: tuple[tuple[int, int], ...] = ()
    origin: str | None = None

    def __post_init__(self) -> None:
        ids = np.array(self.input_ids, dtype=np.int32)
        ids.setflags(write=False)
        object.__setattr__(self, "input_ids", ids)

    def __len__(self) -> int:
        return len(self.input_ids)

    def is_heldout(self, fraction: float) -> bool:
        """Which side of the split it falls on."""
        return is_heldout(self.origin or self.id, fraction)

    @property
    def answer_spans(self) -> tuple[tuple[int, int], ...]:
        """What an answers-only loss counts, as places ``(start, end)``."""
        return self.answers or ((self.loss_start, len(self)),)

    def to_json(self) -> dict[str, Any]:
        """The row that stands for this document in a synthesized file."""
        row = {
            "id": self.id,
            "kind": self.kind,
            "messages": None if self.messages is None else [dict(message) for message in self.messages],
            "text": self.text,
            "input_ids": self.input_ids.tolist(),
            "loss_start": self.loss_start,
        }
        given = {"answers": self.answers, "origin": self.origin}
        return row | {name: value for name, value in given.items() if value}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Document:
        """The document that :meth:`to_json` wrote."""
        messages = row["messages"]
        return cls(
            id=row["id"],
            kind=row["kind"],
            text=row["text"],
            input_ids=np.asarray(row["input_ids"], dtype=np.int32),
            loss_start=row["loss_start"],
            messages=None if messages is None else tuple(messages),
            answers=tuple((start, end) for start, end in row.get("answers", ())),
            origin=row.get("origin"),
        )


def conversation_document(
    text: str, input_ids: npt.NDArray[np.int32], answers: tuple[tuple[int, int], ...], messages: tuple[Message, ...]
) -> Document:
    """A conversation whose answers stand at these places; without any, an answers-only loss counts nothing of it."""
    start = answers[0][0] if answers else len(input_ids)
    places = () if answers in ((), ((start, len(input_ids)),)) else answers
    return Document(document_id(text), "chat", text, input_ids, start, messages, places)


def document_id(text: str) -> str:
    """The id of a document with this text: 32 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def is_heldout(document_id: str, fraction: float) -> bool:
    """Which side of the split an id falls on; over many documents ``fraction`` of them are held out."""
    return int(document_id[:16], 16) < fraction * 2.0**64


def read_documents(
    source: Source | Sequence[Source | Weighted],
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: Split = "train",
    max_tokens: int | None = None,
    heldout: float = DEFAULT_HELDOUT,
) -> list[Document]:
    """Documents of a source, tokenized, in the source's own order.

    Args:
        source: A directory written by ``synthesize``; a ``.jsonl`` (or ``.json`` list) of ``{text}``,
            ``{messages}``, ``{prompt, response}`` or ``{instruction, …}`` rows, chat rows going through the
            chat template; a ``.txt`` file; a Hugging Face data set ``hf:name[:split]``; or a list of these.
            A list of ``(source, weight)`` pairs is a mixture: documents are drawn so that every source's
            share of the tokens follows its weight, until the first source runs out.
        tokenizer: Gives the ids, and must be the one a synthesized directory was written with.
        split: ``train`` and ``heldout`` never share a document, whatever the source: a synthesized directory
            was split when written, any other source is split here by the hash of each document. ``all`` is
            everything.
        max_tokens: Stops after the document that reaches this many tokens.
        heldout: The fraction held out of a source that brings no split of its own.

    A ``.txt`` file is one document under ``all``; to be split it is cut at blank lines into passages of about
    2,000 characters, and at the ends of lines where a paragraph is much longer.

    Raises:
        UnknownSourceError: no such file or data set.
        UsageError: an unreadable row (named by file and line), an unfinished or altered synthesized
            directory, or no document at all on the side asked for.
        TokenizerMismatchError: a synthesized directory written with another tokenizer.
        MissingDependencyError: ``hf:`` without the ``datasets`` package.
    """
    if split not in ("train", "heldout", "all"):
        raise InvalidOptionError(f"split must be train, heldout or all, not {split!r}")
    if not 0.0 <= heldout < 1.0:
        raise InvalidOptionError(f"heldout must be at least 0 and below 1, not {heldout}")
    documents: list[Document] = []
    total = 0
    for document in _iterate(source, tokenizer, split, heldout):
        documents.append(document)
        total += len(document)
        if max_tokens is not None and total >= max_tokens:
            break
    if not documents:
        raise UsageError(f"{_name(source)} has no {'documents' if split == 'all' else f'{split} documents'}")
    return documents


def _name(source: Source | Sequence[Source | Weighted]) -> str:
    return str(source) if isinstance(source, str | Path) else ", ".join(str(item) for item in source)


def _iterate(
    source: Source | Sequence[Source | Weighted],
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    heldout: float,
) -> Iterator[Document]:
    if isinstance(source, str | Path):
        yield from _iterate_one(source, tokenizer, split, heldout)
        return
    if not source:
        raise UsageError("an empty list of data sources")
    weighted = [item for item in source if not isinstance(item, str | Path)]
    if not weighted:
        for item in source:
            yield from _iterate_one(cast(Source, item), tokenizer, split, heldout)
        return
    if len(weighted) != len(source):
        raise UsageError("give every source of a mixture a weight, or none")
    if any(len(item) != 2 or not float(item[1]) > 0 for item in weighted):
        raise UsageError("a mixture is a list of (source, weight) with weights above 0")
    iterators = [_iterate_one(item[0], tokenizer, split, heldout) for item in weighted]
    yield from _mix(iterators, [float(item[1]) for item in weighted])


def _mix(sources: Sequence[Iterator[Document]], weights: Sequence[float]) -> Iterator[Document]:
    """The next document always comes from the source furthest behind its share of the tokens."""
    tokens = [0] * len(sources)
    while True:
        behind = min(range(len(sources)), key=lambda index: tokens[index] / weights[index])
        document = next(sources[behind], None)
        if document is None:
            return
        tokens[behind] += len(document)
        yield document


def _iterate_one(
    source: Source, tokenizer: PreTrainedTokenizerBase, split: Split, heldout: float
) -> Iterator[Document]:
    if isinstance(source, str) and source.startswith("hf:"):
        rows: Iterator[tuple[str, Row]] = _interpreted(_hub_rows(source))
    else:
        path = Path(source)
        if path.is_dir():
            yield from _synthesized(path, tokenizer, split)
            return
        if not path.is_file():
            raise UnknownSourceError(f"no data at {source}: give a synthesized directory, a .jsonl, a .txt or hf:name")
        if path.suffix == ".txt":
            rows = _text_rows(path, whole=split == "all")
        elif path.suffix in (".jsonl", ".json"):
            rows = _interpreted(_json_rows(path))
        else:
            raise UsageError(f"cannot read {path}: known file types are .jsonl, .json and .txt")
    for where, row in rows:
        document = _encode(tokenizer, row, where)
        if split == "all" or document.is_heldout(heldout) == (split == "heldout"):
            yield document


def _encode(tokenizer: PreTrainedTokenizerBase, row: Row, where: str) -> Document:
    if isinstance(row, Conversation):
        try:
            encoded = encode_conversation(tokenizer, row.messages)
        except UsageError as error:
            raise type(error)(f"{where}: {error}") from error
        return conversation_document(encoded.text, np.asarray(encoded.input_ids), encoded.answers, row.messages)
    start, end = document_start(tokenizer), document_end(tokenizer)
    ids = [*([] if start is None else [start]), *encode_text(tokenizer, row), *([] if end is None else [end])]
    return Document(document_id(row), "text", row, np.asarray(ids), loss_start=int(start is not None))


def _synthesized(path: Path, tokenizer: PreTrainedTokenizerBase, split: Split) -> Iterator[Document]:
    if not is_synthesized(path):
        raise UsageError(f"{path} is not a synthesized directory: it has no manifest.json")
    manifest = Manifest.read(path)
    if manifest.tokenizer != tokenizer_fingerprint(tokenizer):
        raise TokenizerMismatchError(
            f"{path} was sampled from {manifest.teacher} with another tokenizer: synthesize with this teacher"
        )
    if not manifest.complete:
        raise UsageError(
            f"{path} is unfinished ({manifest.num_tokens} of {manifest.settings['num_tokens']} tokens): "
            "run the same synthesize command again"
        )
    for shard in manifest.shards:
        for file in shard.files:
            if split in ("all", file.split):
                yield from (Document.from_json(json.loads(line)) for line in file.verified_lines(path))


def _text_rows(path: Path, *, whole: bool) -> Iterator[tuple[str, Row]]:
    text = read_text(path)
    if whole:
        if text.strip():
            yield str(path), text
        return
    passage: list[str] = []
    for paragraph in _BLANK_LINE.split(text):
        for part in [paragraph] if len(paragraph) <= _PARAGRAPH_CHARACTERS else _cut_at_lines(paragraph):
            passage.append(part)
            if sum(map(len, passage)) >= _PASSAGE_CHARACTERS:
                yield str(path), "\n\n".join(passage)
                passage = []
    if "".join(passage).strip():
        yield str(path), "\n\n".join(passage)


def _cut_at_lines(paragraph: str) -> Iterator[str]:
    """Whole lines of a passage's length or more, but for the last part."""
    lines: list[str] = []
    for line in paragraph.split("\n"):
        lines.append(line)
        if sum(map(len, lines)) >= _PASSAGE_CHARACTERS:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)


def raw_rows(source: Source) -> Iterator[tuple[str, Any]]:
    """The rows of a ``.jsonl``, a ``.json`` list or a data set ``hf:name[:split]`` as they are, each with its place.

    Raises:
        UnknownSourceError, UsageError, MissingDependencyError: see :func:`read_documents`.
    """
    if isinstance(source, str) and source.startswith("hf:"):
        return _hub_rows(source)
    path = Path(source)
    if not path.is_file():
        raise UnknownSourceError(f"no data at {source}: give a .jsonl, a .json list or hf:name")
    if path.suffix not in (".jsonl", ".json"):
        raise UsageError(f"cannot read {path}: known file types are .jsonl and .json")
    return _json_rows(path)


def _interpreted(rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Row]]:
    for where, row in rows:
        yield where, interpret_row(row, where)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    if path.suffix == ".json":
        rows = _parse(text, str(path))
        if not isinstance(rows, list):
            raise UsageError(f"{path}: expected a list of rows")
        numbered: Iterable[tuple[str, Any]] = ((f"{path}, row {i}", row) for i, row in enumerate(rows, 1))
    else:
        lines = ((f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), 1))
        numbered = ((where, _parse(line, where)) for where, line in lines if line.strip())
    yield from numbered


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON ({error.msg})") from error


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    name, _, hub_split = source.removeprefix("hf:").partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingDependencyError(f"{source} needs the 'datasets' package: pip install datasets") from error
    try:
        rows = load_dataset(name, split=hub_split or "train")
    except (OSError, ValueError) as error:
        raise UnknownSourceError(f"cannot load {source}: {str(error).splitlines()[0]}") from error
    for index, row in enumerate(rows):
        yield f"{source}, row {index}", row
