"""The benchmark of initialisations, on a tiny teacher."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mambify.bench import inits
from mambify.bench.registry import BENCHMARKS, run_benchmark
from mambify.cli.main import main
from mambify.conversion import INITIALISATIONS
from mambify.errors import InvalidOptionError
from tiny import TEXT, byte_tokenizer, llama


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows to learn on; the benchmark's teacher is a tiny one, its budget a few hundred tokens."""
    tokenizer = byte_tokenizer()
    llama(len(tokenizer)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(inits, "_TEACHER", str(tmp_path / "teacher"))
    monkeypatch.setattr(inits, "_CONTEXT", 32)
    monkeypatch.setitem(inits.BUDGETS, "cpu", inits.Budget(train=0, score=256, batch=64, calibration=512))
    path = tmp_path / "rows.jsonl"
    rows = [" ".join(random.Random(index).choices(TEXT.split(), k=60)) for index in range(300)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_initialisation_is_scored(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run_benchmark("inits", device="cpu", text=str(text))
    assert [row["init"] for row in result["results"]] == list(INITIALISATIONS)
    for row in result["results"]:
        assert list(row["scores"]) == ["untrained", "calibrated"]
        assert row["scores"]["calibrated"]["kl"] > 0
        assert 0 <= row["scores"]["untrained"]["top1_agreement"] <= 1
    assert json.loads(json.dumps(result)) == result
    assert len(BENCHMARKS["inits"].table(result).rows) == len(INITIALISATIONS)
    BENCHMARKS["inits"].plot(result, tmp_path / "inits.svg")
    assert (tmp_path / "inits.svg").stat().st_size > 0


def test_training_lowers_the_divergence(text: Path) -> None:
    result = run_benchmark("inits", device="cpu", only="identity", text=str(text), tokens=4096)
    (row,) = result["results"]
    assert list(row["scores"]) == ["untrained", "calibrated", "trained"]
    assert row["scores"]["trained"]["kl"] < row["scores"]["calibrated"]["kl"]


def test_rows_are_kept(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"device": "cpu", "text": str(text), "out": tmp_path / "kept"}
    first = run_benchmark("inits", only="random,paper", **asked)
    measured: list[str] = []
    row = inits._row
    monkeypatch.setattr(inits, "_row", lambda name, *given: measured.append(name) or row(name, *given))
    second = run_benchmark("inits", only="identity,paper", **asked)
    assert measured == ["identity"]
    assert second["results"][0] == first["results"][1]
    run_benchmark("inits", only="paper", tokens=64, **asked)  # another budget is another row
    assert measured == ["identity", "paper"]
    with pytest.raises(InvalidOptionError, match="give --text too"):
        run_benchmark("inits", device="cpu", out=tmp_path / "kept")


def test_refusals(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidOptionError, match="nothing in 'inits' is called 'identty'"):
        run_benchmark("inits", device="cpu", only="identty", text=str(text))
    with pytest.raises(InvalidOptionError, match="'ops' takes no --text"):
        run_benchmark("ops", device="cpu", text=str(text))
    assert main(["bench", "inits", "--tokens", "many", "--device", "cpu"]) == 2
    assert "'many' is no number of tokens" in capsys.readouterr().err
