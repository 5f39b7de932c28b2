"""``mambify pack`` and ``mambify card`` on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mambify

from .conftest import Run
from .test_refusals import assert_refused


def test_packed_it_is_taken_by_every_command(run: Run, student: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "mixers"
    result = run("pack", student, "--out", out)
    assert result.status == 0
    assert "kept from it" in result.out
    assert " MB in " in result.out
    assert result.err == ""
    facts = json.loads(run("info", out, "--json").out)
    assert facts["layers"] == ["mamba2", "attention"] * 2
    assert facts["base"] == mambify.load(student).model.config.teacher
    assert "of the mixers only" in run("info", out).out
    assert json.loads(run("info", student, "--json").out)["base"] is None
    assert run("generate", out, "Hello", "--max-new-tokens", 3).status == 0
    assert run("chat", out, "--max-new-tokens", 3, stdin="Hello\n").status == 0
    assert run("evaluate", out, "--text", text, "--context-length", 32).status == 0
    assert run("convert", out, "--attention", 0, "--out", tmp_path / "further").status == 0


def test_in_a_process_of_its_own(run_process: Run, student: Path) -> None:
    """Where nothing has registered our model with transformers yet, its configuration is read all the same."""
    result = run_process("info", student)
    assert (result.status, result.err) == (0, "")


def test_json_says_the_sizes(run: Run, student: Path, tmp_path: Path) -> None:
    result = json.loads(run("pack", student, "--out", tmp_path / "mixers", "--dtype", "float32", "--json").out)
    assert result["weight_bytes"] == (tmp_path / "mixers" / "mixers.safetensors").stat().st_size
    assert result["weight_bytes"] > 4 * result["num_new"]
    model = mambify.load(tmp_path / "mixers").model
    assert result["num_new"] + result["num_kept"] == sum(p.numel() for p in model.parameters())


def test_as_a_package(run: Run, student: Path, tmp_path: Path) -> None:
    result = run("pack", student, "--out", tmp_path / "package", "--alias", "tiny")
    assert result.status == 0
    assert "the model is called tiny" in " ".join(result.out.split())  # lines are wrapped
    mambify.load(tmp_path / "package" / "src" / "mambify_tiny" / "model")


def test_results_get_into_the_card_and_go_along(run: Run, student: Path, text: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    evaluate = ("evaluate", student, "--text", text, "--context-length", 32, "--json", figures)
    assert run(*evaluate, "--teacher", student).status == 0
    result = run("card", student, "--results", figures)
    assert result.status == 0
    assert "card written" in result.out
    row = f"| {text.name} |"
    assert row in (student / "README.md").read_text(encoding="utf-8")
    assert run("pack", student, "--out", tmp_path / "mixers").status == 0
    packed = (tmp_path / "mixers" / "README.md").read_text(encoding="utf-8")
    assert row in packed
    assert run("card", tmp_path / "mixers").status == 0
    assert (tmp_path / "mixers" / "README.md").read_text(encoding="utf-8") == packed
    mambify.load(tmp_path / "mixers")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--base", "smolm2"], "'smolm2' is not here"),
        (["--dtype", "int4"], "unknown dtype 'int4': choose auto, float32, bfloat16, float16"),
        (["--alias", "Tiny Model"], "'Tiny Model' cannot be an alias"),
        (["--alias", "smollm2"], "'smollm2' always means the model that mambify knows"),
    ],
)
def test_what_cannot_be_packed(run: Run, student: Path, tmp_path: Path, options: list[str], said: str) -> None:
    assert_refused(run("pack", student, "--out", tmp_path / "mixers", *options), said)
    assert not (tmp_path / "mixers").exists()


def test_a_wrong_base(run: Run, student: Path, other_teacher: Path, tmp_path: Path) -> None:
    result = run("pack", student, "--out", tmp_path / "mixers", "--base", other_teacher)
    assert_refused(result, "shares no weight with", "that is not its base")
    assert_refused(run("pack", student, "--out", student), "--overwrite")


def test_cards_that_cannot_be(run: Run, student: Path, teacher: Path, text: Path, tmp_path: Path) -> None:
    assert_refused(run("card", tmp_path / "nothing"), "holds no config.json")
    assert_refused(run("card", teacher), "no model that mambify saved")
    before = (student / "README.md").read_text(encoding="utf-8")
    assert_refused(run("card", student, "--results", tmp_path / "nothing.json"), "cannot read results")
    assert_refused(run("card", student, "--results", text), "cannot read results")
    figures = tmp_path / "others.json"
    figures.write_text(json.dumps({"model": str(teacher), "sources": {"a": {}}}))
    assert_refused(run("card", student, "--results", figures), f"the figures of '{teacher}', which is not")
    assert (student / "README.md").read_text(encoding="utf-8") == before
