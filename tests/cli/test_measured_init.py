"""``convert --init`` with an initialisation that is measured on text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import mambify
from tiny import TEXT

from .conftest import Run
from .test_refusals import assert_refused


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = [" ".join(random.Random(index).choices(TEXT.split(), k=80)) for index in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_converts_on_text(run: Run, teacher: Path, rows: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        options = ("--init", "measured", "--calibration-text", rows, "--calibration-tokens", "1k")
        result = run("convert", teacher, "--out", tmp_path / name, "--json", *options)
        assert result.status == 0, result.err
        assert json.loads(result.out)["init"] == "measured"
    one, two = (mambify.load(tmp_path / name).model.state_dict() for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_plan_needs_no_text(run: Run, teacher: Path) -> None:
    assert run("convert", teacher, "--init", "measured", "--dry-run").status == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--init", "measured"], "'measured' is measured on text: give some (--calibration-text FILE"),
        (["--init", "mesured"], "did you mean 'measured'"),
        (["--init", "distance", "--calibration-text", "no-such.jsonl"], "no-such.jsonl"),
        (["--calibration-text", "any.txt"], "--calibration-text is for an init that is measured: identity is not"),
        (["--calibration-tokens", "some"], "'some' is no number of tokens"),
    ],
)
def test_refusals(run: Run, teacher: Path, tmp_path: Path, options: list[str], said: str) -> None:
    assert_refused(run("convert", teacher, "--out", tmp_path / "out", *options), said)
    assert not (tmp_path / "out").exists()


def test_too_little_text(run: Run, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words.", encoding="utf-8")
    options = ("--init", "distance", "--calibration-text", tmp_path / "short.txt")
    assert_refused(run("convert", teacher, "--out", tmp_path / "out", *options), "do not fill one block of 512")
    assert not (tmp_path / "out").exists()
