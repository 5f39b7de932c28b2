"""Reads a checkpoint directory's safetensors one tensor at a time, checking them as it goes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mambify.errors import CheckpointError, OutputWriteError
from mambify.hub import CHECKSUMS
from mambify.io import read_json, write_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def shards(directory: Path) -> list[Path]:
    """The weight files of a checkpoint directory.

    Raises:
        CheckpointError: there are none, or one that the index names is missing.
    """
    if (directory / _INDEX).is_file():
        names = sorted(set(read_json(directory / _INDEX)["weight_map"].values()))
    else:
        names = [_SINGLE]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(f"{directory} lacks {missing[0]}; weights are read from safetensors only")
    return [directory / name for name in names]


def stream(directory: Path, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) for every weight that is ``wanted``; one tensor is in memory at a time.

    Raises:
        CheckpointError: a file is missing, truncated, malformed, or differs from its recorded checksum.
    """
    verify_checksums(directory)
    for path in shards(directory):
        yield from read_file(path, wanted)


def read_file(path: Path, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) for every weight of one file that is ``wanted``.

    Raises:
        CheckpointError: it is missing, truncated or malformed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                if wanted(name):
                    yield name, file.get_tensor(name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} lacks {path.name}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or malformed: {error}") from error


def write_file(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes one weight file.

    Raises:
        OutputWriteError: the disk refused.
    """
    try:
        save_file(dict(weights), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OutputWriteError(f"cannot write the weights of {path}: {error}") from error


def record_checksums(directory: Path, files: Sequence[Path] | None = None) -> None:
    """Writes ``checksums.json``: the SHA-256 of every weight file, so that a changed one is noticed on loading."""
    paths = shards(directory) if files is None else files
    write_json(directory / CHECKSUMS, {path.name: _sha256(path) for path in paths})


def verify_checksums(directory: Path) -> None:
    """Compares the weight files with ``checksums.json``, where there is one.

    Raises:
        CheckpointError: a file is not the one that was saved.
    """
    if not (directory / CHECKSUMS).is_file():
        return
    for name, expected in read_json(directory / CHECKSUMS).items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{directory} lacks {name}, which was saved with it")
        if _sha256(path) != expected:
            raise CheckpointError(f"{path} is not the file that was saved: truncated or changed since")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
