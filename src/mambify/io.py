"""Writing files so that a crash, a full disk or a second run never leaves half of one behind.

Every write goes to a temporary neighbour first and is renamed into place: readers see the old content
or the new, nothing between. ``OSError`` from the disk becomes one :class:`OutputWriteError`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mambify.errors import OutputExistsError, OutputWriteError, UsageError


def require_new(path: str | Path, *, overwrite: bool = False) -> Path:
    """Checks that ``path`` may be written: absent, an empty directory, or ``overwrite`` is set.

    Raises:
        OutputExistsError: something is there already, or the current directory is in it, which is never replaced.
        OutputWriteError: there can be no such path.
    """
    path = Path(path)
    taken = any(path.iterdir()) if path.is_dir() else path.exists()
    if taken and not overwrite:
        what = "is not empty" if path.is_dir() else "exists"
        raise OutputExistsError(f"{path} {what}: choose another path or pass --overwrite")
    if taken:
        require_apart(path, Path.cwd())
    require_room(path)
    return path


def require_new_file(path: str | Path, *, overwrite: bool = False) -> Path:
    """Checks that the file ``path`` may be written: nothing is there, or a file and ``overwrite`` is set.

    Raises:
        OutputExistsError: a file is there already, or a directory, which no file replaces.
        OutputWriteError: there can be no such path.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputExistsError(f"{path} is a directory: name a file in it, as in {path / 'model'}")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists: choose another path or pass --overwrite")
    require_room(path)
    return path


def require_room(path: str | Path) -> None:
    """Checks before the work that ``path`` can be written after it.

    Raises:
        OutputWriteError: what it is to be in is no directory, or one that cannot be written.
    """
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputWriteError(f"cannot write {path}: {folder} is no directory that can be written")


def require_apart(path: str | Path, source: str | Path) -> None:
    """Checks that ``path`` can be replaced without a loss of ``source``: a file or directory, or any other name.

    Raises:
        OutputExistsError: ``source`` is there, or in it.
    """
    source = Path(source)
    if source.exists() and source.resolve().is_relative_to(Path(path).resolve()):
        raise OutputExistsError(f"{path} would be replaced, and {source} is in use there: choose another path")


@contextmanager
def _disk_errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputWriteError(f"cannot write {path}: {error.strerror or error}") from error


def atomic_write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` (UTF-8) to ``path``, whole or not at all."""
    path = Path(path)
    with _disk_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, whole or not at all."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """A text file in UTF-8: with any kind of line end, without the byte order mark that some begin with.

    Raises:
        UsageError: it is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from error


def read_json(path: str | Path) -> Any:
    """Reads a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Appends one JSON line; a reader may see a shorter file, never half a line before the last."""
    path = Path(path)
    with _disk_errors_named(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Makes the directories that ``path`` is in; after an error those that it made are gone again."""
    missing = [parent for parent in path.absolute().parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # somebody else has put something there
            for parent in missing:
                parent.rmdir()
        raise


@contextmanager
def atomic_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a path beside ``path`` to write one file to, which becomes ``path`` when the block ends without an error.

    Raises:
        OutputExistsError: ``path`` is taken and ``overwrite`` is false, or it is a directory (before the block runs).
        OutputWriteError: the disk refused a write.
    """
    path = require_new_file(path, overwrite=overwrite)
    with _disk_errors_named(path), _parents(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a fresh temporary directory that becomes ``path`` when the block ends without an error.

    On an error the temporary directory is removed and whatever stood at ``path`` is untouched.

    Raises:
        OutputExistsError: ``path`` is taken and ``overwrite`` is false (before the block runs).
        OutputWriteError: the disk refused a write.
    """
    path = require_new(path, overwrite=overwrite)
    with _disk_errors_named(path), _parents(path):
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        os.chmod(temporary, 0o755)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():  # some libraries write files that only their owner may read
                    os.chmod(file, 0o644)
            _swap(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def remove(path: Path) -> None:
    """Removes a file or a directory with all that is in it; nothing may be there.

    Raises:
        OutputWriteError: the disk refused.
    """
    with _disk_errors_named(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _swap(new: Path, path: Path) -> None:
    """Puts ``new`` where ``path`` is; a previous directory is moved aside first, then removed."""
    if not path.exists():
        os.rename(new, path)
        return
    aside = path.with_name(f".{path.name}.old-{os.getpid()}")
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(aside, path)
        raise
    remove(aside)
