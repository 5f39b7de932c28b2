"""``bench recipes``: equal tokens, the same evaluation, nothing done twice, and what the claims say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mambify.cli.main import main
from mambify.errors import InvalidOptionError, TrainingDivergedError, UnknownSourceError
from mambify.experiments import jobs
from mambify.experiments.recipes import claims, runs_of, short, tokens_to_reach
from mambify.experiments.registry import run_experiment
from mambify.experiments.request import Request
from mambify.experiments.students import student


def _no_training(*_: Any, **__: Any) -> None:
    raise AssertionError("this was trained before")


def test_the_whole_command(
    home: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    file, drawn = tmp_path / "r.json", tmp_path / "r.svg"
    command = ["bench", "recipes", *flags, "--tokens", "640,1k", "--recipes", "paper,best", "--json", str(file)]
    command += ["--data", str(home / "text"), "--set", "stages.0.share=60"]
    assert main([*command, "--plot", str(drawn)]) == 0
    shown = capsys.readouterr()
    result = json.loads(file.read_text())
    assert [(row["recipe"], row["budget"]) for row in result["results"]] == [
        ("paper", 640), ("best", 640), ("paper", 1000), ("best", 1000),
    ]  # fmt: skip
    for row in result["results"]:
        assert 0 < row["tokens"] <= row["budget"]
        assert row["tokens"] == sum(stage["tokens"] for stage in row["stages"])
        assert row["seconds"] > 0
        assert row["environment"]["torch"]
        assert list(row["sources"]) == [str(home / "chat"), str(home / "text")]
    assert len(result["claims"]) == 2
    assert "best" in shown.out and "[4/4] best 640: scoring" in shown.err.replace("\n", " ")
    assert "<svg" in drawn.read_text()

    monkeypatch.setattr(jobs, "distill", _no_training)
    monkeypatch.setattr(jobs, "Examination", _no_training)
    assert main(command) == 0
    assert json.loads(file.read_text())["results"] == result["results"]


def test_a_further_text_is_scored_without_training(
    home: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options | {"recipes": ("best",)}
    before = run_experiment("recipes", device="cpu", **asked)
    monkeypatch.setattr(jobs, "distill", _no_training)
    words = home / "talk.jsonl"
    after = run_experiment("recipes", device="cpu", **asked, text=(str(words),))
    assert list(after["results"][0]["sources"]) == [*before["results"][0]["sources"], str(words)]
    assert after["claims"] == []  # nothing to hold it against


def test_a_run_that_fails_costs_the_others_nothing(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    distill, tried = jobs.distill, []

    def fails(recipe: Any, **how: Any) -> Any:
        tried.append(recipe.stages[0].kind)
        if recipe.stages[0].kind == "kd":
            raise TrainingDivergedError("the loss became\nNaN")
        return distill(recipe, **how)

    monkeypatch.setattr(jobs, "distill", fails)
    file = tmp_path / "r.json"
    command = ["bench", "recipes", *flags, "--tokens", "640", "--recipes", "paper,best", "--json", str(file)]
    assert main(command) == 1
    assert "1 runs failed (paper 640: TrainingDivergedError: the loss became NaN)" in capsys.readouterr().err
    result = json.loads(file.read_text())
    assert [row["recipe"] for row in result["results"]] == ["best"]
    assert list(result["failed"]) == ["paper 640"]
    monkeypatch.setattr(jobs, "distill", distill)
    tried.clear()
    assert main(command) == 0
    assert len(json.loads(file.read_text())["results"]) == 2
    assert tried == []
    monkeypatch.setattr(jobs, "distill", fails)
    assert main([*command[:-2], "--recipes", "paper", "--seed", "1"]) == 1
    assert "every run failed" in capsys.readouterr().err


def test_text_is_sampled_where_none_is_given(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    short_ones = {"chat": {"max_new_tokens": 40, "max_user_tokens": 20}, "text": {"max_new_tokens": 40}}
    for name, value in (("_LEAST", 5000), ("_HELDOUT", 0.1), ("_KINDS", short_ones)):
        monkeypatch.setattr(f"mambify.experiments.texts.{name}", value)
    asked = options | {"recipes": ("best",), "data": ()}
    said: list[str] = []
    result = run_experiment("recipes", device="cpu", **asked, say=said.append)
    sources = result["evaluation"]["sources"]
    assert [Path(source).name for source in sources] == ["chat-5000-0", "text-5000-0"]
    assert sum("sampling" in line for line in said) == 2
    said.clear()
    assert run_experiment("recipes", device="cpu", **asked, say=said.append)["results"] == result["results"]
    assert not any("sampling" in line for line in said)


def test_a_preset_may_have_a_budget_of_its_own(request_of: Callable[..., Request]) -> None:
    request = request_of(recipes=("paper@2k", "best", "best@640"), tokens=(640, 1000))
    assert runs_of(request) == [("best", 640), ("best", 1000), ("paper", 2000)]


def test_figures_are_written_as_they_come(options: dict[str, Any]) -> None:
    seen: list[tuple[str, list[str]]] = []

    def report(so_far: dict[str, Any]) -> None:
        seen.append((so_far["benchmark"], [row["recipe"] for row in so_far["results"]]))

    run_experiment("recipes", device="cpu", **options | {"recipes": ("paper", "best")}, report=report)
    assert seen == [("recipes", ["paper"]), ("recipes", ["paper", "best"])]


def test_what_decides_a_folder(request_of: Callable[..., Request]) -> None:
    def key(label: str = "a", tokens: int = 640, *changes: str, **asked: Any) -> str:
        return student(label, request_of(**asked), "best", tokens, *changes).key

    assert key() == key("b") == key(out=Path("elsewhere")) == key(text=()) == key("a", 640, "log_every=3")
    assert len({key(), key(tokens=1024), key("a", 640, "student.init=paper"), key(seed=1), key(attention=0.25)}) == 5
    first = student("first", request_of(), "best", 640)
    assert jobs.Job("x", {}, after=first).key != jobs.Job("x", {}).key


CURVE = [(1e6, 0.4), (4e6, 0.2), (16e6, 0.1)]


@pytest.mark.parametrize(
    ("kl", "tokens", "bound"),
    [
        (0.2, 4e6, "interpolated"),
        (0.2**0.5 * 0.4**0.5, 2e6, "interpolated"),
        (0.1, 16e6, "interpolated"),
        (0.5, 1e6, "at most"),
        (0.05, None, "not reached"),
    ],
)
def test_tokens_are_interpolated_in_logarithms(kl: float, tokens: float | None, bound: str) -> None:
    found, how = tokens_to_reach(kl, CURVE)
    assert how == bound
    assert found == pytest.approx(tokens)


def test_a_recipe_is_held_against_best_at_its_largest_budget() -> None:
    def row(recipe: str, tokens: int, kl: float) -> dict[str, Any]:
        return {"recipe": recipe, "tokens": tokens, "sources": {"chat": {"student": {"kl": kl}}}}

    results = [row("paper", 20_000_000, 0.4), row("best", 4_000_000, 0.2), row("best", 1_000_000, 0.8)]
    results.append(row("paper", 5_000_000, 0.9))
    (found,) = claims(results, ["chat"])
    assert (found["recipe"], found["tokens"], found["kl"]) == ("paper", 20_000_000, 0.4)
    assert found["best_tokens"] == pytest.approx(2_000_000)
    assert found["share"] == pytest.approx(0.1)
    assert claims([row("paper", 1, 0.4)], ["chat"]) == []


def test_counts_are_short() -> None:
    assert [short(count) for count in (20_000_000, 1_234_567, 640, 3e9)] == ["20M", "1.23M", "640", "3B"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipes": ("bset",)}, "no preset 'bset': did you mean 'best'"),
        ({"recipes": ("best", "best")}, "--recipes names one twice"),
        ({"recipes": ("best@few",)}, "'few' is no number of tokens"),
        ({"student": "smollm2-hybrid"}, "--student is tuned"),
        ({"attention": 1.0}, "below 1"),
        ({"tasks": ("piqa",)}, "give --data-dir"),
        ({"preferences": __file__}, "--heldout-preferences"),
    ],
)
def test_what_is_refused(request_of: Callable[..., Request], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        request_of(**changes)


def test_what_is_not_there(request_of: Callable[..., Request], tmp_path: Path) -> None:
    for changes in ({"data": (str(tmp_path),)}, {"text": ("nowhere.txt",)}, {"data_dir": "nowhere"}):
        with pytest.raises(UnknownSourceError, match="no "):
            request_of(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--recipes", "best"], "--recipes says nothing in 'ops': it is for recipes, paper-table-6"),
        (["all", "--tokens", "1M"], "--tokens says nothing in 'ops': it is for inits, recipes"),
        (["recipes", "--only", "best"], "--only says nothing in 'recipes': it is for ops"),
        (["paper-table-7", "--data-dir", "d"], "--data-dir says nothing in 'paper-table-7'"),
        (["recipes", "--set", "x", "--preferences", "p"], "--preferences says nothing in 'recipes'"),
        (["paper-table-8", "--plot", "x.svg"], "'paper-table-8' has no plot"),
        (["paper-table-8", "--tokens", "1M,2M"], "one number of tokens"),
        (["paper-table-8", "--recipes", "paper@1M"], "without a budget of its own"),
        (["recipes", "--tokens", "many"], "'many' is no number of tokens"),
        (["recipe"], "did you mean 'recipes'"),
        (["inits", "--text", "a", "--text", "b"], "takes one --text"),
    ],
)
def test_options_that_say_nothing_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_budget_too_small_is_known_before_anything_is_trained(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Exception, match="less than a batch of 64"):
        run_experiment("recipes", device="cpu", **options | {"recipes": ("best", "mohawk")})
    with pytest.raises(InvalidOptionError, match="one number of tokens"):
        run_experiment("paper-table-9", device="cpu", **options | {"tokens": (640, 1280)})
    assert not (tmp_path / "out" / "runs").exists()
