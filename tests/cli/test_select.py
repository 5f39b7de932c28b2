"""``mambify select`` from text to layers, and what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tiny import TEXT

from .conftest import Run
from .test_refusals import assert_refused


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Documents that share no long phrase: words in an order of their own."""
    path = tmp_path / "rows.jsonl"
    words = TEXT.split()
    texts = [" ".join(random.Random(index).choices(words, k=60)) for index in range(300)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


FEW = ("--align-tokens", "256", "--score-tokens", "512", "--context-length", "32", "--device", "cpu")


@pytest.mark.parametrize("align", ["256", "0"])
def test_all_methods(run: Run, teacher: Path, rows: Path, tmp_path: Path, align: str) -> None:
    out = tmp_path / "report.json"
    result = run(
        "select", teacher, "--budget", "0.5", "--text", rows, "--method", "all", "--out", out, *FEW,
        "--align-tokens", align,
    )  # fmt: skip
    assert result.status == 0, result.err
    report = json.loads(out.read_text("utf-8"))
    assert list(report["methods"]) == ["uniform", "leave-one-out", "restore-one", "trial"]
    assert report["methods"]["uniform"]["attention_layers"] == [1, 3]
    for found in report["methods"].values():
        assert len(found["attention_layers"]) == 2
        assert sorted(found["worth"]) == ["0", "1", "2", "3"]
        assert found["kl"] > 0
        kept = set(found["attention_layers"])
        assert kept - {1, 3} == set(found["not_in_uniform"])
        assert {1, 3} - kept == set(found["only_in_uniform"])
    best = min(report["methods"], key=lambda name: report["methods"][name]["kl"])
    assert report["best"] == best
    assert f"--attention-layers {','.join(map(str, report['attention_layers']))}" in result.out


def test_one_method_and_a_run_that_is_kept(run: Run, teacher: Path, rows: Path, tmp_path: Path) -> None:
    arguments = ("select", teacher, "--text", rows, "--method", "trial", "--run", tmp_path / "run", "--json", *FEW)
    first, again = run(*arguments), run(*arguments)
    assert first.status == 0, first.err
    report = json.loads(first.out)
    assert list(report["methods"]) == ["uniform", "trial"]
    assert report["best"] == "trial"
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    assert json.loads(again.out)["methods"] == report["methods"]


def test_memory_budget(run: Run, teacher: Path, rows: Path) -> None:
    result = run(
        "select", teacher, "--text", rows, "--max-memory", "1", "--memory-context", "4096", "--align-tokens", "0"
    )
    assert_refused(result, "without any attention a sequence holds")
    report = run(
        "select", teacher, "--text", rows, "--max-memory", "1B", "--method", "restore-one", "--json", *FEW,
        "--align-tokens", "0",
    )  # fmt: skip
    assert json.loads(report.out)["methods"]["uniform"]["attention_layers"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "restor-one"], "did you mean 'restore-one'"),
        (["--budget", "1.5"], "attention 1.5 is out of range"),
        (["--mixer", "mamba3"], "unknown mixer"),
        (["--init", "measurd"], "did you mean 'measured'"),
        (["--align-tokens", "many"], "'many' is no number of tokens"),
        (["--score-tokens", "100"], "two blocks are 1024"),
    ],
)
def test_refusals(run: Run, teacher: Path, rows: Path, tmp_path: Path, options: list[str], said: str) -> None:
    out = tmp_path / "report.json"
    assert_refused(run("select", teacher, "--text", rows, "--out", out, *options), said)
    assert not out.exists()


def test_a_share_and_a_size(run: Run, teacher: Path, rows: Path) -> None:
    result = run("select", teacher, "--text", rows, "--budget", "0.5", "--max-memory", "1B")
    assert_refused(result, "--budget and --max-memory", "give one")
    result = run("select", teacher, "--text", rows, "--memory-context", "4096")
    assert_refused(result, "--memory-context is the context length of --max-memory")


def test_a_hybrid_has_chosen_already(run: Run, student: Path, rows: Path) -> None:
    assert_refused(run("select", student, "--text", rows), "is converted already")
