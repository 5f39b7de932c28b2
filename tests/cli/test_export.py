"""``mambify export`` with ``--format transformers``, ``--check``, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import mambify

from .conftest import Run
from .test_refusals import assert_refused


def test_export_and_back(run: Run, student: Path, tmp_path: Path) -> None:
    out = tmp_path / "stock"
    result = run("export", student, "--out", out)
    assert result.status == 0
    assert "5.23.0 or newer" in result.out
    assert "Tensor parallel sizes: 1, 2." in result.out
    assert "llama.cpp, mamba_expand (broken)" in result.out
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "GraniteMoeHybridForCausalLM"
    described = run("info", out, "--json")
    assert json.loads(described.out)["layers"] == json.loads(run("info", student, "--json").out)["layers"]
    answer = run("generate", out, "Hello", "--max-new-tokens", "4", "--json")
    assert answer.status == 0
    expected = run("generate", student, "Hello", "--max-new-tokens", "4", "--json")
    assert json.loads(answer.out)["text"] == json.loads(expected.out)["text"]


def test_json_and_options(run: Run, student: Path, tmp_path: Path) -> None:
    out = tmp_path / "stock"
    result = run("export", student, "--out", out, "--dtype", "bfloat16", "--split-heads", "4", "--json")
    report = json.loads(result.out)
    assert (report["dtype"], report["format"], report["path"]) == ("bfloat16", "transformers", str(out))
    assert report["weight_bytes"] > 0
    assert {finding["engine"] for finding in report["findings"]} == {"llama.cpp"}
    config = json.loads((out / "config.json").read_text())
    assert (config["mamba_n_heads"], config["mamba_n_groups"], config["mamba_d_head"]) == (8, 2, 4)
    assert mambify.load(out).model.config.head_dim == 16


def test_check(run: Run, student: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = run("export", student, "--check")
    assert result.status == 0
    assert "llama.cpp, mamba_expand (broken)" in result.out
    findings = json.loads(run("export", student, "--check", "--json").out)["findings"]
    assert {finding["field"] for finding in findings} == {"mamba_expand", "mamba_n_heads"}
    assert sorted(tmp_path.rglob("*")) == before


def test_check_of_a_directory_without_a_finding(run: Run, student: Path, tmp_path: Path) -> None:
    run("export", student, "--out", tmp_path / "stock", "--split-heads", "4")
    file = tmp_path / "stock" / "config.json"
    config = json.loads(file.read_text()) | {"mamba_expand": 2, "mamba_n_heads": 16, "mamba_n_groups": 4}
    file.write_text(json.dumps(config))
    assert "nothing that engines would trip over" in run("export", tmp_path / "stock", "--check").out


def test_no_output_path(run: Run, student: Path) -> None:
    assert_refused(run("export", student), "--out PATH", "--check")


def test_check_with_what_is_for_writing(run: Run, student: Path, tmp_path: Path) -> None:
    for option in (["--out", tmp_path / "out"], ["--dtype", "bfloat16"], ["--modelfile"], ["--pad-state"]):
        assert_refused(run("export", student, "--check", *option), "--check writes nothing", option[0])
    assert not (tmp_path / "out").exists()


def test_taken_output_path(run: Run, student: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in student.rglob("*")}
    assert_refused(run("export", student, "--out", student), "is not empty", "--overwrite")
    assert before == {path: path.stat().st_mtime_ns for path in student.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "transfomers"], "did you mean 'transformers'"),
        (["--dtype", "q8_0"], "transformers has no dtype 'q8_0'"),
        (["--modelfile"], "--modelfile is no option of transformers"),
        (["--split-heads", "3"], "heads of 16"),
        (["--split-heads", "0"], "heads of 16"),
    ],
)
def test_wrong_options(run: Run, student: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    assert_refused(run("export", student, "--out", tmp_path / "out", *arguments), said)
    assert not (tmp_path / "out").exists()


def test_mamba1(run: Run, teacher: Path, tmp_path: Path) -> None:
    run("convert", teacher, "--mixer", "mamba1", "--out", tmp_path / "student")
    for arguments in (["--out", tmp_path / "out"], ["--check"]):
        assert_refused(run("export", tmp_path / "student", *arguments), "are mamba1", "--mixer mamba2")
    assert not (tmp_path / "out").exists()
