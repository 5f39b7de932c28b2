"""The benchmark of decoding: every part on a tiny model, and what fails among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mambify.bench import clock, decode
from mambify.bench.decode_steps import drawn_model, read_weight_bytes
from mambify.bench.registry import BENCHMARKS, run_benchmark
from mambify.conversion import state_bytes
from mambify.engine import Sampling, Speculator
from mambify.errors import InvalidOptionError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_SECONDS", 0.0)
    monkeypatch.setattr(clock, "_MIN_REPEATS", 1)
    monkeypatch.setattr(clock, "_COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(decode, "_ROUNDS", 4)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["compiled", "loop"])
def test_compiled_peers_give_figures(part: str) -> None:
    (row,) = run_benchmark("decode", device="cpu", only=part)["results"]
    assert "error" not in row and row["ms"] > 0


def test_every_part_gives_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    cases = [case for case in decode.CASES["cpu"] if case.part not in ("compiled", "loop")]  # compiling takes its time
    monkeypatch.setattr(decode, "CASES", {"cpu": cases})
    result = run_benchmark("decode", device="cpu")
    assert set(result["read_bytes_per_second"]) == {"M=1", "M=5"}
    assert [row["part"] for row in result["results"]] == [case.part for case in cases]
    for row in result["results"]:
        assert "error" not in row
        if row["part"] in ("linears", "tiles"):
            assert row["read_bytes_per_second"]["torch"] > 0
        else:
            assert row["ms"] > 0 and row["tokens_per_second"] > 0
    for row in result["results"]:
        if row["part"] == "verify":
            assert (row["of_one_step"] == 1.0) == (row["tokens"] == 1)
    flat = [row["carried_bytes"] for row in result["results"] if row["part"] == "context" and row["attention"] == 0]
    assert len(set(flat)) == 1  # a state is as large after any text
    BENCHMARKS["decode"].table(result)
    BENCHMARKS["decode"].plot(result, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_what_fails_says_so_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler was found")

    monkeypatch.setattr(decode, "seconds_a_token", fails)
    monkeypatch.setattr(decode, "CASES", {"cpu": [decode.Case("step", "tiny", way=w) for w in ("eager", "fused")]})
    result = run_benchmark("decode", device="cpu")
    assert result["results"][0]["error"] == "RuntimeError: no compiler was found"
    assert result["results"][1]["ms"] > 0
    BENCHMARKS["decode"].table(result)


def test_parts_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_benchmark("decode", device="cpu", only="batch,context")
    assert {row["part"] for row in result["results"]} == {"batch", "context"}
    with pytest.raises(InvalidOptionError, match="nothing in 'decode' is called 'bach'"):
        run_benchmark("decode", device="cpu", only="bach")


def test_bytes_that_a_token_reads() -> None:
    model = drawn_model("tiny", "cpu", attention=0.5)
    assert read_weight_bytes(model) == sum(p.nbytes for p in model.parameters())  # tied
    assert decode.carried_at(model, 100) == state_bytes(model.config, 100)


def test_a_pretended_text_is_as_long_as_it_says() -> None:
    model = drawn_model("tiny", "cpu", attention=0.5)
    speculator = Speculator(model, None, num_slots=2, max_length=64, sampling=Sampling(temperature=0.0))
    step = speculator.pretend(40)
    with torch.inference_mode():
        for _ in range(3):
            step()
    assert speculator.target.length_S.tolist() == [43, 43]
    first = next(iter(speculator.run([[3, 4, 5]], max_new_tokens=4)))
    again = Speculator(model, None, num_slots=2, max_length=64, sampling=Sampling(temperature=0.0))
    assert first == next(iter(again.run([[3, 4, 5]], max_new_tokens=4)))
