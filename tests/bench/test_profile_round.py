"""The script that profiles rounds of speculation: what it tells apart, with models of next to nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/profile_round.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("profile_round", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_round_is_profiled_by_its_parts(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rounds.json"
    common = ["--device", "cpu", "--shape", "tiny", "--words", "50", "--context", "8", "--json", str(path)]
    script.main([*common, "--K", "2", "4"])
    plain, two, four = json.loads(path.read_text())["results"]
    assert [result["K"] for result in (plain, two, four)] == [0, 2, 4]
    assert script.DRAFT not in plain["parts"]
    for result in (two, four):
        assert result["wall_microseconds"] > 0
        assert set(result["parts"]) == {script.DRAFT, script.PRODUCTS, script.MIXERS, script.REST}
        for part in result["parts"].values():
            assert part["count"] == sum(kernel["count"] for kernel in part["kernels"])

    def count(result: dict, part: str) -> int:
        return result["parts"][part]["count"]

    assert count(four, script.DRAFT) > count(two, script.DRAFT)  # a read for every token
    assert count(four, script.PRODUCTS) == count(two, script.PRODUCTS) == count(plain, script.PRODUCTS)  # one pass
    said = capsys.readouterr().out
    assert "plain step" in said and "round with K = 4" in said


def test_kernels_are_added_up_by_part_and_name(script: ModuleType) -> None:
    found = [("a", "x", 1.0), ("b", "y", 4.0), ("a", "z", 5.0), ("a", "x", 2.0)]
    parts = script.summary(found)
    assert [row["name"] for row in parts["a"]["kernels"]] == ["z", "x"]
    assert parts["a"]["kernels"][1] == {"name": "x", "count": 2, "microseconds": 3.0}
    assert parts["a"]["microseconds"] == 8.0 and parts["b"]["count"] == 1
