"""Files appear whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import mambify
from mambify import HybridForCausalLM
from mambify.data.manifest import Manifest
from mambify.errors import OutputExistsError, OutputWriteError
from mambify.io import (
    append_jsonl,
    atomic_directory,
    atomic_file,
    atomic_write_text,
    read_json,
    require_apart,
    require_new,
    sync,
    write_json,
)
from mambify.workflows.quickstart import settings_for

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
        mark(path)

    def crashes() -> None:
        with atomic_directory(path, overwrite=True) as directory:
            (directory / "new").write_text("new")
            raise error

    with pytest.raises(error):
        crashes()
    assert names(tmp_path) == (["out"] if there_before else [])
    if there_before:
        assert names(path) == ["modeling_mambify.py"]


def mark(path: Path) -> Path:
    """Makes a directory look like one of mambify's."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "modeling_mambify.py").write_text("from mambify.model import HybridForCausalLM\n")
    return path


def test_overwriting_replaces_everything(tmp_path: Path) -> None:
    path = mark(tmp_path / "out")
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


@pytest.mark.parametrize("name", ["photo.jpg", "README.md", "pyproject.toml", "settings.json", ".git"])
def test_what_somebody_else_made_is_not_replaced(tmp_path: Path, name: str) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / name).write_text("---\ntags: [a]\n---\nabout mambify")
    with pytest.raises(OutputExistsError, match=r"out is not empty: choose another path$"):
        require_new(path)
    message = r"out is not empty, and mambify replaces only what it made: choose another path$"
    with pytest.raises(OutputExistsError, match=message), atomic_directory(path, overwrite=True):
        pytest.fail("the block must not run")
    assert names(path) == [name]


def test_what_mambify_made_is_replaced(tiny_teacher: Callable[..., Any], tmp_path: Path) -> None:
    """Of every kind; a run is in tests/distill/test_run.py."""
    teacher, made = tmp_path / "teacher", tmp_path / "made"
    tiny_teacher("llama2").save_pretrained(teacher)
    student = mambify.convert(teacher)
    mambify.save(student, made / "saved")
    student.save_pretrained(made / "by transformers")
    mambify.pack(made / "saved", made / "packed")
    mambify.pack(made / "saved", made / "package", alias="tiny")
    mambify.export_transformers(student, made / "exported")
    (made / "synthesized").mkdir()
    Manifest("teacher", "tokenizer", {}, (), complete=False).write(made / "synthesized")
    write_json(made / "quickstart" / "settings.json", asdict(settings_for("cpu")))
    assert len(names(made)) == 7
    for path in made.iterdir():
        with pytest.raises(OutputExistsError, match="or pass --overwrite"):
            require_new(path)
        require_new(path, overwrite=True)
    with pytest.raises(OutputExistsError, match="only what it made"):
        require_new(teacher, overwrite=True)


def test_a_link_to_what_is_replaced_goes_alone(tmp_path: Path) -> None:
    mark(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with atomic_directory(tmp_path / "link", overwrite=True) as directory:
        (directory / "new").write_text("new")
    assert names(tmp_path / "link") == ["new"] and not (tmp_path / "link").is_symlink()
    assert names(tmp_path / "model") == ["modeling_mambify.py"]


def renames_without_an_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambify.io._exchange", lambda one, other: False)


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_with_and_without_an_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    path = mark(tmp_path / "out")
    if exchange:  # then nothing is ever moved away from the path
        monkeypatch.setattr(os, "rename", pytest.fail)
        monkeypatch.setattr(os, "replace", pytest.fail)
    else:
        renames_without_an_exchange(monkeypatch)
    with atomic_directory(path, overwrite=True) as directory:
        (directory / "new").write_text("new")
    assert names(path) == ["new"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("number", "error"), [(errno.EINVAL, None), (errno.ENOSYS, None), (errno.EIO, "Input/output error")]
)
def test_what_the_file_system_says_of_an_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: str | None
) -> None:
    """That it cannot is no error; any other refusal is one, and nothing has changed."""
    path = mark(tmp_path / "out")

    class Libc:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def renameat2(self, *_: Any) -> int:
            ctypes.set_errno(number)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", Libc)
    refused = nullcontext() if error is None else pytest.raises(OutputWriteError, match=error)
    with refused, atomic_directory(path, overwrite=True) as directory:
        (directory / "new").write_text("new")
    assert names(path) == (["new"] if error is None else ["modeling_mambify.py"])
    assert names(tmp_path) == ["out"]


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mark(tmp_path / "out")
    renames_without_an_exchange(monkeypatch)
    monkeypatch.setattr(os, "replace", lambda *_: no_space())
    with pytest.raises(OutputWriteError, match="No space"), atomic_directory(path, overwrite=True) as directory:
        (directory / "new").write_text("new")
    assert names(path) == ["modeling_mambify.py"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("writing", ["directory", "file", "text"])
def test_all_is_on_the_disk_before_it_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writing: str
) -> None:
    events: list[str] = []
    sync_one, replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        events.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().relative_to(tmp_path)}")
        sync_one(handle)

    def noted(source: Any, target: Any) -> None:
        events.append(f"rename {Path(source).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", noted)
    path = tmp_path / "out"
    if writing == "directory":
        with atomic_directory(path) as temporary:
            (temporary / "below").mkdir()
            (temporary / "below" / "weights").write_bytes(b"x")
    elif writing == "file":
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"x")
    else:
        atomic_write_text(path, "x")
    *synced, renamed, last = events
    name = renamed.removeprefix("rename ")
    below = [f"sync {name}/below", f"sync {name}/below/weights"] if writing == "directory" else []
    assert sorted(synced) == [f"sync {name}", *below]
    assert last == "sync ."  # the directory that the name is in


def test_sync_of_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputWriteError, match="No such file"):
        sync(tmp_path / "absent")


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
import mambify.io
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
path, moment = sys.argv[1:]
if moment == "aside":  # the former directory was moved, the new one is not there yet
    mambify.io._exchange = lambda *_: False
    os.replace = die
if moment == "exchanged":  # and the former one is not removed yet
    mambify.io.remove = die
with mambify.io.atomic_directory(path, overwrite=True) as directory:
    (directory / "new").write_text("half of it")
    if moment == "writing":
        die()
"""


@pytest.mark.parametrize(
    ("moment", "there"),
    [("writing", ["modeling_mambify.py"]), ("aside", None), ("exchanged", ["new"])],
)
def test_killed(tmp_path: Path, moment: str, there: list[str] | None) -> None:
    path = mark(tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), moment], timeout=120)
    assert done.returncode == -signal.SIGKILL
    if there is None:
        assert not path.exists()
        with pytest.raises(OutputExistsError, match="pass --overwrite"):
            require_new(path)
        there = ["modeling_mambify.py"]  # it is back
    assert names(path) == there
    mark(path)
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
