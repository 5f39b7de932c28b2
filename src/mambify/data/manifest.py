"""The manifest of a synthesized directory: what was asked for, and what has been written so far.

It is rewritten after every shard, so a directory always says how far it got; it holds no time and no path,
so the same command writes the same bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mambify.errors import UsageError
from mambify.io import read_json, write_json

NAME = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class ShardFile:
    """One JSONL file of a shard."""

    name: str
    split: str
    documents: int
    tokens: int
    sha256: str

    def intact(self, directory: Path) -> bool:
        """Whether the file is there with the bytes the manifest promises."""
        path = directory / self.name
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == self.sha256

    def verified_lines(self, directory: Path) -> Iterator[str]:
        """The file's lines.

        Raises:
            UsageError: the file is missing or not the one that was written.
        """
        if not self.intact(directory):
            raise UsageError(
                f"{directory / self.name} is missing or was altered: run the same synthesize command to repair it"
            )
        # Not splitlines(): JSON may hold line separators that it would cut at.
        yield from (line for line in (directory / self.name).read_text(encoding="utf-8").split("\n") if line)


@dataclass(frozen=True)
class Shard:
    """The files that were sampled together, with the tokens of each kind of text in them."""

    index: int
    files: tuple[ShardFile, ...]
    tokens_by_kind: dict[str, int]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, template and end tokens included."""
        return sum(file.tokens for file in self.files)


@dataclass(frozen=True)
class Manifest:
    """What a synthesized directory holds.

    ``tokenizer`` is a fingerprint; ``settings`` is all else that decides the bytes.
    """

    teacher: str
    tokenizer: str
    settings: dict[str, Any]
    shards: tuple[Shard, ...]
    complete: bool

    @property
    def num_tokens(self) -> int:
        """Tokens written so far, both splits together."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """Documents written so far, both splits together."""
        return sum(file.documents for shard in self.shards for file in shard.files)

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """``{split: {"documents": …, "tokens": …}}``."""
        totals = {split: {"documents": 0, "tokens": 0} for split in ("train", "heldout")}
        for file in (file for shard in self.shards for file in shard.files):
            totals[file.split]["documents"] += file.documents
            totals[file.split]["tokens"] += file.tokens
        return totals

    @property
    def tokens_by_kind(self) -> dict[str, int]:
        """Tokens of chat and of plain text."""
        counter: Counter[str] = Counter()
        for shard in self.shards:
            counter.update(shard.tokens_by_kind)
        return dict(counter)

    def write(self, directory: Path) -> None:
        """Writes the manifest into its directory, whole or not at all."""
        totals = {"totals": self.totals, "tokens_by_kind": self.tokens_by_kind}
        write_json(directory / NAME, {"format": _FORMAT, **asdict(self), **totals})

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Reads a directory's manifest.

        Raises:
            UsageError: it is no manifest of this format.
        """
        path = directory / NAME
        try:
            raw = read_json(path)
            if raw["format"] != _FORMAT:
                raise UsageError(f"{path} has format {raw['format']}; this version reads {_FORMAT}")
            shards = tuple(
                Shard(
                    index=shard["index"],
                    files=tuple(ShardFile(**file) for file in shard["files"]),
                    tokens_by_kind=shard["tokens_by_kind"],
                )
                for shard in raw["shards"]
            )
            return cls(raw["teacher"], raw["tokenizer"], raw["settings"], shards, raw["complete"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is not a manifest of synthesized text ({error!r})") from error


def is_synthesized(directory: Path) -> bool:
    """Whether ``directory`` was written by ``synthesize``, finished or not."""
    return (directory / NAME).is_file()
