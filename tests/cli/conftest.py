"""Tiny models on disk, and running a command in this process or in one of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import GPT2Config

from mambify.cli.main import main
from tiny import TEXT, byte_tokenizer, llama

NUM_LAYERS = 4


@dataclass(frozen=True)
class Result:
    """What a command did."""

    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama teacher with a chat template."""
    path = tmp_path_factory.mktemp("models") / "teacher"
    tokenizer = byte_tokenizer()
    llama(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def other_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another Llama, of another tokenizer, without a chat template."""
    path = tmp_path_factory.mktemp("models") / "other"
    tokenizer = byte_tokenizer(merges=30, template=None)
    llama(len(tokenizer), seed=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of a family that is not supported."""
    path = tmp_path_factory.mktemp("models") / "gpt2"
    GPT2Config(n_layer=1, n_embd=16, n_head=2).save_pretrained(path)
    return path


@pytest.fixture
def student(teacher: Path, tmp_path: Path, run: Run) -> Path:
    """A freshly converted student in a directory of its own."""
    path = tmp_path / "student"
    assert run("convert", teacher, "--out", path).status == 0
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT[:2000], encoding="utf-8")
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``mambify ARGUMENTS`` in this process."""

    def call(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return call


@pytest.fixture
def run_process() -> Run:
    """Runs ``mambify ARGUMENTS`` as a user does, in a process of its own."""

    def call(*arguments: object, stdin: str = "") -> Result:
        command = [str(Path(sys.executable).parent / "mambify"), *map(str, arguments)]
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=120, check=False, env=os.environ
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(autouse=True)
def library_verbosity() -> Iterator[None]:
    """A command quiets the libraries; other tests get them back as they were."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()
