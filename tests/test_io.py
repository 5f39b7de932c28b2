"""Files appear whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import mambify
from mambify import HybridForCausalLM
from mambify.errors import OutputExistsError, OutputWriteError
from mambify.io import (
    append_jsonl,
    atomic_directory,
    atomic_file,
    atomic_write_text,
    read_json,
    require_apart,
    require_new,
    write_json,
)

Hybrid = Callable[..., HybridForCausalLM]


class Crash(BaseException):
    """Stands for anything: an error, control-C."""


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_text_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    atomic_write_text(path, "one ü\n")
    assert path.read_bytes() == "one ü\n".encode()
    atomic_write_text(path, "two\n")
    assert path.read_text() == "two\n"
    assert names(path.parent) == ["file.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file.txt"
    atomic_write_text(path, "old")
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(OutputWriteError, match=r"cannot write .*file\.txt: No space left on device"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputWriteError, match="cannot write"):
        atomic_write_text(tmp_path / "file" / "below", "x")
    with pytest.raises(OutputWriteError, match="cannot write"), atomic_directory(tmp_path / "file" / "below"):
        pass


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, 2.5, None, "ü"]})
    assert read_json(tmp_path / "a.json") == {"a": [1, 2.5, None, "ü"]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert read_json(tmp_path / "a.json")["a"][0] == 1


def test_jsonl_grows(tmp_path: Path) -> None:
    for step in range(3):
        append_jsonl(tmp_path / "log.jsonl", {"step": step, "text": "line\nbreak"})
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    with pytest.raises(OutputWriteError, match="cannot write"):
        append_jsonl(tmp_path, {})


def test_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "a" / "b") as directory:
        (directory / "file").write_text("x")
        (directory / "below").mkdir()
        assert not (tmp_path / "a" / "b").exists()
    assert names(tmp_path / "a" / "b") == ["below", "file"]
    assert names(tmp_path / "a") == ["b"]
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o755


@pytest.mark.parametrize("writing", [atomic_directory, atomic_file])
def test_an_error_leaves_no_empty_directories(
    tmp_path: Path, writing: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(Crash), writing(tmp_path / "a" / "b" / "c" / "out"):
        raise Crash
    assert names(tmp_path / "a") == []


def test_what_is_in_use_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for path, source in ((tmp_path, "model"), (tmp_path / "model", "model"), (tmp_path / "link", "model")):
        with pytest.raises(OutputExistsError, match="would be replaced"):
            require_apart(path, tmp_path / source)
    require_apart(tmp_path / "model" / "below", tmp_path / "model")
    require_apart(tmp_path, "owner/name")
    monkeypatch.chdir(tmp_path / "model")
    with pytest.raises(OutputExistsError, match="is in use there"):
        require_new(tmp_path, overwrite=True)


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("error", [Crash, KeyboardInterrupt, ValueError])
def test_a_crash_inside_changes_nothing(tmp_path: Path, there_before: bool, error: type[BaseException]) -> None:
    path = tmp_path / "out"
    if there_before:
        path.mkdir()
        (path / "old").write_text("old")

    def crashes() -> None:
        with atomic_directory(path, overwrite=True) as directory:
            (directory / "new").write_text("new")
            raise error

    with pytest.raises(error):
        crashes()
    assert names(tmp_path) == (["out"] if there_before else [])
    if there_before:
        assert names(path) == ["old"]


def test_overwriting_replaces_everything(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(OutputExistsError, match="pass --overwrite"), atomic_directory(path):
        pytest.fail("the block must not run")
    with atomic_directory(path, overwrite=True) as directory:
        (directory / "new").write_text("new")
    assert names(path) == ["new"]
    assert names(tmp_path) == ["out"]
    with atomic_directory(tmp_path / "file", overwrite=True) as directory:
        (directory / "x").write_text("")
    (tmp_path / "text").write_text("a file where a directory is to be")
    with atomic_directory(tmp_path / "text", overwrite=True) as directory:
        (directory / "x").write_text("")
    assert names(tmp_path / "text") == ["x"]


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_text("old")
    real, calls = os.rename, 0

    def second_fails(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            no_space()
        real(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OutputWriteError, match="No space"), atomic_directory(path, overwrite=True) as directory:
        (directory / "new").write_text("new")
    assert names(path) == ["old"]
    assert names(tmp_path) == ["out"]


def test_what_counts_as_new(tmp_path: Path) -> None:
    assert require_new(tmp_path / "absent") == tmp_path / "absent"
    (tmp_path / "empty").mkdir()
    require_new(str(tmp_path / "empty"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match=r"file exists: choose another path or pass --overwrite"):
        require_new(tmp_path / "file")
    require_new(tmp_path / "file", overwrite=True)
    with pytest.raises(OutputWriteError, match=r"file is no directory that can be written"):
        require_new(tmp_path / "file" / "below")
    with atomic_directory(tmp_path / "empty") as directory:
        (directory / "x").write_text("")
    assert names(tmp_path / "empty") == ["x"]


SAVE = """
import resource, signal, sys, mambify
model = mambify.load(sys.argv[1]).model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write over the limit is an error, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    mambify.save(model, sys.argv[1], overwrite=True)
except mambify.MambifyError as error:
    print(type(error).__name__, error)
"""


def test_a_model_saved_on_a_full_disk(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    """A real refusal of the kernel, somewhere in the weights: the error is one line, the former model intact."""
    path = mambify.save(tiny_hybrid(), tmp_path / "student")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SAVE, str(path), "100000"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OutputWriteError cannot write")
    assert len(done.stdout.strip().splitlines()) == 1
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert names(tmp_path) == ["student"]


KILLED = """
import os, signal, sys
from mambify.io import atomic_directory
with atomic_directory(sys.argv[1], overwrite=True) as directory:
    (directory / "new").write_text("half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert names(path) == ["old"]
    with atomic_directory(path, overwrite=True) as directory:  # and what it left is in nobody's way
        (directory / "new").write_text("new")
    assert names(path) == ["new"]


def test_saving_is_reproducible(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, two = (mambify.save(tiny_hybrid(), tmp_path / name) for name in "ab")
    assert {f.name: f.read_bytes() for f in one.iterdir()} == {f.name: f.read_bytes() for f in two.iterdir()}


def test_atomic_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.bin"
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o644
    assert [file.name for file in path.parent.iterdir()] == ["file.bin"]


def half_way(path: Path) -> None:
    path.write_bytes(b"ne")
    raise RuntimeError("half-way")


def test_atomic_file_leaves_nothing_of_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half-way"), atomic_file(path, overwrite=True) as temporary:
        half_way(temporary)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_atomic_file_is_refused_before_the_block_runs(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"old")
    with pytest.raises(OutputExistsError, match="--overwrite"), atomic_file(tmp_path / "file.bin"):
        pytest.fail("the block ran")
    with pytest.raises(OutputExistsError, match="is a directory"), atomic_file(tmp_path, overwrite=True):
        pytest.fail("the block ran")
