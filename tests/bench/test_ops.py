"""The benchmark of operations compares like with like, and says where it ran."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mambify.bench import machine, ops, run_benchmark
from mambify.bench.registry import BENCHMARKS, names_of
from mambify.cli.main import main
from mambify.errors import InvalidOptionError

# Odd sizes, several key/value heads, more than one chunk of the scan.
SHAPE = ops.Shape("tiny", 2, 140, 6, 2, 16)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "SHAPES", {"cpu": (SHAPE,)})
    monkeypatch.setattr(machine, "_SECONDS", 1e-9)
    monkeypatch.setattr(machine, "_AT_MOST", 0.0)
    monkeypatch.setattr(machine, "_COPY_BYTES", {"cpu": 2**20})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("maker", ops._MAKERS)
def test_ours_and_theirs_give_the_same_values_and_gradients(
    maker: Callable[..., ops.Case], dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    case = maker(SHAPE, lambda *sizes: torch.randn(*sizes, generator=generator).to(dtype))
    pairs = [(case.ours(case.inputs), case.other(case.inputs))]
    if not case.step:
        pairs += zip(ops._backward(case.ours, case.inputs), ops._backward(case.other, case.inputs), strict=True)
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert (ours.float() - theirs.float()).abs().max() <= tolerance * theirs.float().abs().max()


def test_the_result_says_where_it_ran() -> None:
    seen: list[tuple[int, int]] = []
    result = run_benchmark("ops", device="cpu", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(ops._MAKERS), len(ops._MAKERS))
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"]["copy_bytes_per_second"] > 1e6
    assert {row["operation"] for row in result["results"]} >= {"ssd_scan", "ssd_step", "selective_scan", "causal_conv"}
    for row in result["results"]:
        assert row["ms"] > 0 < row["other_ms"]
        assert row["difference"] < 1e-4


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "ops.json"
    assert main(["bench", "ops", "--device", "cpu", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    result = json.loads(file.read_text())
    assert result["benchmark"] == "ops"
    assert all(row["operation"] in shown for row in result["results"])
    assert main(["bench", "all", "--device", "cpu", "--json", "-"]) == 0
    every = json.loads(capsys.readouterr().out)["benchmarks"]
    assert [one["benchmark"] for one in every] == list(BENCHMARKS)


def test_names() -> None:
    assert names_of("all") == list(BENCHMARKS)
    with pytest.raises(InvalidOptionError, match="did you mean 'ops'"):
        names_of("op")
