"""Writing files so that a crash, a full disk or a second run never leaves half of one behind.

Every write goes to a temporary neighbour first, is synced to the disk, and renamed into place: readers see the old
content or the new, nothing between. A directory is exchanged with the former one in one step; where a file system
cannot do that (NFS), the former one is aside for a moment, and the next write to the path puts it back if that was all
that happened. ``OSError`` from the disk becomes one :class:`OutputWriteError`.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mambify.errors import OutputExistsError, OutputWriteError, UsageError

#: file → what stands in it; a directory that holds one of them was made by mambify
_MARKS = {
    "modeling_mambify.py": "mambify",  # a saved model, whole or mixers only
    "README.md": "\n- mambify\n",  # its export: the card's tags
    "pyproject.toml": "# Written by `mambify pack`",
    "manifest.json": '"tokens_by_kind"',  # synthesized text
    "environment.json": '"mambify"',  # a run
    "settings.json": '"sampling_batch"',  # a quickstart
}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux
_CANNOT_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


def require_new(path: str | Path, *, overwrite: bool = False) -> Path:
    """Checks that ``path`` may be written: absent, an empty directory, or ``overwrite`` is set.

    What is overwritten is a file, or a directory that mambify made: it carries one of a few files that say so.

    Raises:
        OutputExistsError: something is there already, or somebody else's directory, or the current directory is in it:
            these are never replaced.
        OutputWriteError: there can be no such path.
    """
    path = Path(path)
    _put_back(path)
    taken = not is_free(path)
    if taken and overwrite:
        require_apart(path, Path.cwd())
    if taken and path.is_dir() and not _is_ours(path):
        why = ", and mambify replaces only what it made" if overwrite else ""
        raise OutputExistsError(f"{path} is not empty{why}: choose another path")
    if taken and not overwrite:
        what = "is not empty" if path.is_dir() else "exists"
        raise OutputExistsError(f"{path} {what}: choose another path or pass --overwrite")
    require_room(path)
    return path


def is_free(path: Path) -> bool:
    """Whether nothing is at ``path``, or an empty directory."""
    return not any(path.iterdir()) if path.is_dir() else not path.exists()


def _is_ours(directory: Path) -> bool:
    """Whether mambify made ``directory``: it holds one of the files that say so."""
    return any(
        (directory / name).is_file() and text in (directory / name).read_text(encoding="utf-8", errors="replace")
        for name, text in _MARKS.items()
    )


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


def sync(path: str | Path) -> None:
    """Waits until a file, or a directory with all that is in it, is on the disk: then a rename may announce it.

    Raises:
        OutputWriteError: the disk refused.
    """
    path = Path(path)
    with _disk_errors_named(path):
        for each in (*path.rglob("*"), path) if path.is_dir() else (path,):
            if not each.is_symlink():
                _sync_one(each)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _announce(new: Path, path: Path) -> None:
    """Renames what is on the disk already, and waits until the name is there too."""
    os.replace(new, path)
    _sync_one(path.parent)


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
            _announce(Path(temporary), path)
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
            os.chmod(temporary, 0o644)
            sync(temporary)
            _announce(temporary, path)
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
            sync(temporary)
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
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _swap(new: Path, path: Path) -> None:
    """Puts ``new`` where ``path`` is, in one step where the file system can, and removes what was there."""
    if not path.exists():
        _announce(new, path)
        return
    if _exchange(new, path):
        _sync_one(path.parent)
        remove(new)
        return
    os.rename(path, path.with_name(f".{path.name}.old-{os.getpid()}"))
    try:
        _announce(new, path)
    except BaseException:
        _put_back(path)
        raise
    for former in _aside(path):
        remove(former)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges what two names stand for, in one step; false, and nothing done, where that cannot be."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _aside(path: Path) -> list[Path]:
    """What was at ``path`` and was moved aside to be replaced, the latest last."""
    if not path.parent.is_dir():
        return []
    found = path.parent.glob(f".{glob.escape(path.name)}.old-*")
    return sorted(found, key=lambda each: each.stat().st_mtime_ns)


def _put_back(path: Path) -> None:
    """Undoes a replacement that went no further than to move the former directory aside."""
    former = _aside(path)
    if former and not path.exists():
        os.rename(former[-1], path)
