"""What a benchmark has found is kept row by row, and what fails in it is neither lost nor silent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.table import Table

from mambify.bench import clock, decode, inits, speculate, speculate_real, speculate_shapes, synthesize, train, verify
from mambify.bench.registry import BENCHMARKS, Benchmark, run_benchmark
from mambify.bench.sheet import Row, Sheet, failure, last_row
from mambify.cli.main import main
from mambify.errors import MambifyError, OutputWriteError, UnknownSourceError


@dataclass(frozen=True)
class Case:
    name: str
    theirs: bool = False


CASES = [Case("one"), Case("two"), Case("three"), Case("four")]


def _table(result: dict[str, Any]) -> Table:
    shown = Table("name", "ms")
    for row in result["results"]:
        shown.add_row(row["name"], failure(row) if "error" in row else f"{row['ms']}")
    return shown


def _plot(result: dict[str, Any], path: Path) -> None:
    path.write_text(" ".join(row["name"] for row in result["results"]))


class Bench:
    """Four cases, in the place of ``ops``; those of ``errors`` raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.errors: dict[str, BaseException] = {}
        self.cases = CASES
        monkeypatch.setitem(BENCHMARKS, "ops", Benchmark(self.run, _table, _plot))

    def run(self, device: str, sheet: Sheet, only: str | None = None) -> None:
        sheet.facts["read_bytes_per_second"] = 7
        sheet.fill(self.cases, self.measure, theirs=lambda case: case.theirs)

    def measure(self, case: Case) -> Row:
        if case.name in self.errors:
            raise self.errors[case.name]
        return {"ms": 3.5}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(clock, "_SECONDS", 1e-9)
    monkeypatch.setattr(clock, "_COPY_BYTES", {"cpu": 2**20})
    return Bench(monkeypatch)


def test_a_run_that_is_cut_leaves_what_it_found(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.errors["three"] = KeyboardInterrupt()
    file = tmp_path / "new" / "ops.json"
    assert main(["bench", "ops", "--device", "cpu", "--json", str(file)]) == 130
    left = json.loads(file.read_text())
    assert left["finished"] is False and left["results"] == [
        {"name": n, "theirs": False, "ms": 3.5} for n in ("one", "two")
    ]
    assert left["read_bytes_per_second"] == 7 and left["machine"]["torch"] == torch.__version__
    assert [path.name for path in file.parent.iterdir()] == ["ops.json"]
    out, err = capsys.readouterr()
    assert not out
    lines = err.splitlines()
    assert [line.partition(",")[0] for line in lines[:2]] == ["ops 1/4", "ops 2/4"]
    assert lines[0].endswith(" s: one, ms 3.5")

    del bench.errors["three"]
    assert main(["bench", "ops", "--device", "cpu", "--json", str(file)]) == 0
    whole = json.loads(file.read_text())
    assert whole.keys() == left.keys() - {"finished"} and len(whole["results"]) == 4


def test_all_of_them_keep_what_is_finished_too(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(device: str, sheet: Sheet, only: str | None = None) -> None:
        sheet.fill(CASES, stops_at_two)

    def stops_at_two(case: Case) -> Row:
        if case.name == "two":
            raise KeyboardInterrupt
        return {"ms": 1}

    for name in BENCHMARKS.keys() - {"ops"}:
        monkeypatch.setitem(BENCHMARKS, name, Benchmark(second, _table, _plot))
    file = tmp_path / "all.json"
    assert main(["bench", "all", "--device", "cpu", "--json", str(file)]) == 130
    left = json.loads(file.read_text())
    first, cut = left["benchmarks"]
    assert left["finished"] is False and cut["finished"] is False and "finished" not in first
    assert (len(first["results"]), len(cut["results"])) == (4, 1)


def test_what_fails_stands_in_its_row_and_the_others_go_on(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.errors["three"] = RuntimeError("no memory [/is left]")
    file, drawn = tmp_path / "ops.json", tmp_path / "ops.svg"
    assert main(["bench", "ops", "--device", "cpu", "--json", str(file), "--plot", str(drawn)]) == 1
    found = json.loads(file.read_text())
    assert found["results"][2] == {"name": "three", "theirs": False, "error": "RuntimeError: no memory [/is left]"}
    assert found["failed_rows"] == 1 and "finished" not in found and len(found["results"]) == 4
    assert drawn.read_text() == "one two four"
    out, err = capsys.readouterr()
    assert "failed: RuntimeError: no memory [/is left]" in out
    assert "three, failed: RuntimeError: no memory [/is left]" in err
    assert "in measure\n" in err and "raise self.errors" in err  # where, too
    assert err.endswith("mambify: error: 1 of 4 rows failed: see above\n")
    assert main(["bench", "ops", "--device", "cpu", "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out)["failed_rows"] == 1  # nothing else is on stdout


def test_nothing_is_drawn_of_nothing(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.errors |= {case.name: MambifyError("it may not be") for case in CASES}
    assert main(["bench", "ops", "--device", "cpu", "--plot", str(tmp_path / "ops.svg")]) == 1
    assert "every row of 'ops' failed: there is nothing to draw" in (err := capsys.readouterr().err)
    assert "Traceback" not in err  # mambify's own errors say it all


def test_what_fails_of_others_is_a_finding(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.cases = [Case("one"), Case("theirs", theirs=True)]
    bench.errors["theirs"] = RuntimeError("no compiler")
    assert main(["bench", "ops", "--device", "cpu", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["results"][1]["error"] == "RuntimeError: no compiler" and "failed_rows" not in out
    assert "failed: RuntimeError: no compiler" in err and "Traceback" not in err


def test_what_is_asked_for_wrongly_is_refused_before_anything_is_written(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ops.json"
    bench.errors["one"] = UnknownSourceError("no such model")
    assert main(["bench", "ops", "--device", "cpu", "--json", str(file)]) == 2
    assert "mambify: error: no such model" in capsys.readouterr().err and not file.exists()
    bench.errors = {"two": UnknownSourceError("no such model")}  # by then something is worth going on for
    assert main(["bench", "ops", "--device", "cpu", "--json", str(file)]) == 1
    assert len(json.loads(file.read_text())["results"]) == 4


def test_progress_and_reports(bench: Bench) -> None:
    seen: list[tuple[int, int]] = []
    reports: list[dict[str, Any]] = []
    result = run_benchmark(
        "ops", device="cpu", progress=lambda done, total: seen.append((done, total)), report=reports.append
    )
    assert seen == [(done, 4) for done in range(5)]
    assert [len(report["results"]) for report in reports] == [1, 2, 3, 4]
    assert all(report.pop("finished") is False for report in reports) and reports[-1] == result


def test_a_case_of_several_rows_keeps_those_that_were_found() -> None:
    def measure(case: Case) -> Iterator[Row]:
        yield {"ms": 1}
        raise RuntimeError

    seen: list[int] = []
    sheet = Sheet("cpu", found=lambda sheet: seen.append(len(sheet.rows)))
    sheet.fill(CASES[:2], measure)
    assert [row.get("ms", row.get("error")) for row in sheet.rows] == [1, "RuntimeError: no message"] * 2
    assert seen == [1, 2, 3, 4] and sheet.failed == 2 and "in measure" in sheet.trace


def test_an_error_of_whoever_is_told_is_no_row() -> None:
    def full(sheet: Sheet) -> None:
        raise OutputWriteError("no space is left")

    sheet = Sheet("cpu", found=full)
    with pytest.raises(OutputWriteError):
        sheet.fill(CASES, lambda case: {"ms": 1})
    assert sheet.rows == [{"name": "one", "theirs": False, "ms": 1}]


def test_where_others_wait_an_error_ends_the_run() -> None:
    def fails(case: Case) -> Row:
        raise RuntimeError("they wait")

    sheet = Sheet("cpu")
    with pytest.raises(RuntimeError, match="they wait"):
        sheet.fill(CASES, fails, go_on=False)
    assert not sheet.rows


def test_a_row_in_words() -> None:
    shown = Table("part", "ms\na step", "of bound", "")
    shown.add_row("step", "1.5")
    shown.add_row("verify [a]", "2.5", "", "red")
    assert last_row(shown) == "verify [a], ms a step 2.5, red"


MACHINE = {"device": "here", "copy_bytes_per_second": 1.0, "transformers": "5"}
FACTS = {"read_bytes_per_second": {}, "kernels": {}, "matmul_flops_per_second": 1.0, "machine": MACHINE}


def test_real_models_that_failed_are_shown() -> None:
    rows = [case.about() | {"error": "RuntimeError: no"} for case in speculate_real.cases_of(["lookup"], "cpu")]
    shown = speculate.table(FACTS | {"target": "a/model", "results": rows})
    assert len(shown.rows) == len(rows)
    assert last_row(shown) == "context, lookup, after 8,192 tokens, failed: RuntimeError: no"


def _failed(name: str, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """The rows of a benchmark every case of which fails."""
    rows: list[Row] = []

    class Failing(Sheet):
        def fill(self, cases: Any, measure: Any, **settings: Any) -> None:
            def fails(case: Any) -> Row:
                raise RuntimeError("as it is told to")

            super().fill(cases, fails, **settings)
            rows.extend(self.rows)

    monkeypatch.setattr(decode, "read_bandwidth", lambda *_: 1.0)
    monkeypatch.setattr(speculate_shapes, "read_bandwidth", lambda *_: 1.0)
    monkeypatch.setattr(train, "matmul_peak", lambda *_: 1.0)
    monkeypatch.setattr(verify, "copy_bandwidth", lambda *_: 1.0)
    monkeypatch.setattr(synthesize, "load", lambda *_, **__: None)
    monkeypatch.setattr(synthesize, "require_tokenizer", lambda *_: None)
    monkeypatch.setattr(inits, "_trial", lambda *_: None)
    BENCHMARKS[name].run("cpu", Failing("cpu"))
    return rows


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_table_shows_what_failed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _failed(name, monkeypatch)
    assert rows and all(row["error"] == "RuntimeError: as it is told to" for row in rows)
    assert json.loads(json.dumps(rows)) == rows
    shown = BENCHMARKS[name].table(FACTS | {"results": rows})
    assert len(shown.rows) == len(rows)
    assert "failed: RuntimeError: as it is told to" in last_row(shown)
