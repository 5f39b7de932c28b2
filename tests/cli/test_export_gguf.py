"""``mambify export --format gguf``: the file and the line about it; what is asked for wrongly writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGUFReader

from .conftest import Run


def test_writes_a_file_and_a_modelfile(run: Run, student: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "student.gguf"
    result = run("export", student, "--format", "gguf", "--dtype", "f16", "--out", out, "--modelfile")
    assert result.status == 0, result.err
    assert "gguf: " in result.out and "ollama create" in result.out
    assert sorted(path.name for path in out.parent.iterdir()) == ["student.Modelfile", "student.gguf"]
    assert GGUFReader(out).fields["general.architecture"].contents() == "granitehybrid"


def test_json(run: Run, student: Path, tmp_path: Path) -> None:
    out = tmp_path / "student.gguf"
    result = run("export", student, "--format", "gguf", "--out", out, "--json")
    report = json.loads(result.out)
    assert (report["format"], report["dtype"], report["path"]) == ("gguf", "f32", str(out))
    assert report["weight_bytes"] == out.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--format", "gguf", "--dtype", "q4"), "gguf has no dtype 'q4': choose auto, f32"),
        (("--format", "transformers", "--modelfile"), "--modelfile is no option of transformers"),
        (("--format", "transformers", "--pad-state"), "--pad-state is no option of transformers"),
    ],
)
def test_wrong_options(run: Run, student: Path, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    out = tmp_path / "fresh" / "student.gguf"
    result = run("export", student, *arguments, "--out", out)
    assert result.status == 2 and result.err.startswith("mambify: error: ") and said in result.err
    assert not out.parent.exists()


def test_taken_path(run: Run, student: Path, tmp_path: Path) -> None:
    (tmp_path / "student.gguf").write_bytes(b"mine")
    result = run("export", student, "--format", "gguf", "--out", tmp_path / "student.gguf")
    assert result.status == 2 and "--overwrite" in result.err
    assert (tmp_path / "student.gguf").read_bytes() == b"mine"


def test_a_directory_is_no_file(run: Run, student: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("export", student, "--format", "gguf", "--out", tmp_path / "empty")
    assert result.status == 2 and "is a directory: name a file" in result.err
    assert not list((tmp_path / "empty").iterdir())


def test_mamba1_is_refused_before_weights_are_read(run: Run, teacher: Path, tmp_path: Path) -> None:
    assert run("convert", teacher, "--mixer", "mamba1", "--out", tmp_path / "one").status == 0
    (tmp_path / "one" / "model.safetensors").unlink()
    result = run("export", tmp_path / "one", "--format", "gguf", "--out", tmp_path / "one.gguf")
    assert result.status == 2 and "are mamba1" in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "one.gguf").exists()


def test_model_without_a_tokenizer(run: Run, student: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (student / name).unlink()
    result = run("export", student, "--format", "gguf", "--out", tmp_path / "student.gguf")
    assert result.status == 2 and "has no tokenizer" in result.err
    assert not (tmp_path / "student.gguf").exists()
