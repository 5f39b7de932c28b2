"""The paper's tables: its figures bear out the conclusions, every row is made, and agreement is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mambify import convert
from mambify.cli.main import main
from mambify.experiments.evaluation import without_mixers
from mambify.experiments.jobs import check
from mambify.experiments.paper import Conclusion, agreement, in_order
from mambify.experiments.registry import EXPERIMENTS, run_experiment
from mambify.experiments.request import Request
from mambify.experiments.tables import TABLES
from mambify.families.load import load, load_config, save
from mambify.workflows.distill import check_plan


@pytest.mark.parametrize("number", TABLES)
def test_the_papers_figures_bear_out_its_conclusions(number: int) -> None:
    spec = TABLES[number]
    for conclusion in spec.conclusions:
        assert in_order([spec.paper[row][conclusion.theirs] for row in conclusion.order], conclusion.theirs), conclusion


@pytest.mark.parametrize("preset", ["best", "paper-tuned", "mohawk"])
@pytest.mark.parametrize("number", TABLES)
def test_every_row_of_the_paper_can_be_made(
    number: int, preset: str, request_of: Callable[..., Request], home: Path
) -> None:
    spec = TABLES[number]
    files = {
        "instruct": str(home / "talk.jsonl"),
        "preferences": str(home / "pairs.jsonl"),
        "heldout_preferences": str(home / "other-pairs.jsonl"),
    }
    rows = spec.rows(request_of(recipes=(preset,), tokens=(20_000,), **files if number == 6 else {}))
    assert set(rows) >= set(spec.paper)
    for row in rows.values():
        if row.job is not None:
            recipe = check(row.job)
            if row.job.after is None:
                check_plan(recipe)


def _agreement(values: dict[str, float | None], **changes: Any) -> dict[str, Any]:
    conclusion = Conclusion("a is better", ("a", "b"), "MT-Bench", **changes)
    results = [{"row": row, "ours": {} if value is None else {"KL": value}} for row, value in values.items()]
    return agreement(conclusion, {"a": {"MT-Bench": 6.0}, "b": {"MT-Bench": 5.0}}, results)


def test_agreement() -> None:
    assert _agreement({"a": 0.1, "b": 0.2}, ours=("KL",))["ours"] == {"KL": {"values": [0.1, 0.2], "agrees": True}}
    assert not _agreement({"a": 0.2, "b": 0.1}, ours=("KL",))["ours"]["KL"]["agrees"]
    assert not _agreement({"a": 0.1, "b": 0.1}, ours=("KL",))["ours"]["KL"]["agrees"]  # equal is not better
    for values in ({"a": 0.1, "b": None}, {"a": 0.1}):
        assert _agreement(values, ours=("KL",))["ours"] == {}
    assert in_order([0.9, 0.8], "preferred") and not in_order([0.9, 0.8], "perplexity text")


def _results(number: int, tmp_path: Path, flags: list[str], *more: str) -> dict[str, Any]:
    file = tmp_path / "table.json"
    assert main(["bench", f"paper-table-{number}", *flags, "--tokens", "640", "--json", str(file), *more]) == 0
    result: dict[str, Any] = json.loads(file.read_text())
    assert not result["failed"]
    assert [row["row"] for row in result["results"] if not row["ours"]] == []
    return result


def test_table_6(home: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--instruct", "talk", "--preferences", "pairs", "--heldout-preferences", "other-pairs"]
    more = [part if part.startswith("--") else str(home / f"{part}.jsonl") for part in more]
    result = _results(6, tmp_path, flags, *more, "--tuning-tokens", "128")
    rows = {row["row"]: row for row in result["results"]}
    assert len(rows) == 12
    assert rows["100%"]["ours"].keys() == {"perplexity", "preferred"}
    both = rows["50% +SFT+DPO"]
    assert [stage["stage"] for stage in both["stages"]] == ["01-align", "02-kd", "01-sft", "01-dpo"]
    assert {"preferred", "rewarded", "KL", "ratio"} <= both["ours"].keys()
    assert both["ours"] != rows["50% +SFT"]["ours"]
    shown = capsys.readouterr().out
    assert "judge that is not at hand" in shown and "Conclusions that agree:" in shown
    assert all(
        set(conclusion["ours"]) in ({"perplexity"}, {"preferred", "rewarded"}) for conclusion in result["conclusions"]
    )


def test_table_6_without_files_to_tune_on(tmp_path: Path, flags: list[str]) -> None:
    result = _results(6, tmp_path, flags)
    assert len(result["results"]) == 6
    assert [bool(conclusion["ours"]) for conclusion in result["conclusions"]] == [True] + [False] * 6


def test_table_6_of_a_student_that_is_there(home: Path, tmp_path: Path, flags: list[str]) -> None:
    """One whose attention is not where an even spread would keep it: no further layer may be converted."""
    teacher = load(home / "teacher")
    save(convert(teacher.model, attention_layers=[0, 1]), tmp_path / "given", tokenizer=teacher.tokenizer)
    more = ["--instruct", "talk", "--preferences", "pairs", "--heldout-preferences", "other-pairs"]
    more = [part if part.startswith("--") else str(home / f"{part}.jsonl") for part in more]
    more += ["--student", str(tmp_path / "given"), "--tuning-tokens", "256", "--tune", "dpo.beta=0.3"]
    result = _results(6, tmp_path, flags, *more)
    rows = {row["row"]: row for row in result["results"]}
    assert list(rows) == ["100%", "50%", "50% +SFT", "50% +DPO", "50% +SFT+DPO"]
    assert rows["50%"]["stages"] == [] and rows["50%"]["training_environment"] is None
    for name, kinds in (("50% +SFT", ["01-sft"]), ("50% +SFT+DPO", ["01-sft", "01-dpo"])):
        assert [(stage["stage"], stage["tokens"]) for stage in rows[name]["stages"]] == [(kind, 256) for kind in kinds]
        tuned = load_config(Path(rows[name]["folder"]) / "run" / "student")
        assert tuned.attention_layers == [0, 1]
    recipe = yaml.safe_load((Path(rows["50% +DPO"]["folder"]) / "run" / "recipe.yaml").read_text())
    assert recipe["stages"][0]["beta"] == 0.3
    by_text = {conclusion["text"]: conclusion["ours"] for conclusion in result["conclusions"]}
    assert by_text["SFT and DPO together are better than neither, at 50%"].keys() == {"preferred", "rewarded"}
    assert by_text["Less attention, higher perplexity"] == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tune", "beta=0.3"], "begin it with sft or dpo"),
        (["--tune", "dpo.bta=0.3"], "did you mean 'beta'"),
        (["--tuning-tokens", "many"], "no number of tokens"),
    ],
)
def test_tuning_that_cannot_be(
    home: Path, flags: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = ["--preferences", str(home / "pairs.jsonl"), "--heldout-preferences", str(home / "other-pairs.jsonl")]
    assert main(["bench", "paper-table-6", *flags, "--tokens", "6400", *pairs, *more]) == 2
    assert message in capsys.readouterr().err


def test_table_7(tmp_path: Path, flags: list[str]) -> None:
    result = _results(7, tmp_path, flags)
    rows = {row["row"]: row for row in result["results"]}
    assert len(rows) == 12
    frozen, trained = (rows[f"50%, attention init, {mlps} MLPs"] for mlps in ("frozen", "trained"))
    assert frozen["ours"]["KL"] != trained["ours"]["KL"]
    assert len(rows["25%, interleaved, stepwise"]["stages"]) == 2 * len(rows["25%, interleaved, at once"]["stages"])
    assert all(set(conclusion["ours"]) == {"perplexity", "KL"} for conclusion in result["conclusions"])


def test_tables_8_and_9_share_a_student(tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    eight = _results(8, tmp_path, flags)
    nine = _results(9, tmp_path, flags)
    full, removed = nine["results"][1:]
    assert full["folder"] == removed["folder"] == eight["results"][1]["folder"]
    assert full["ours"] == eight["results"][1]["ours"]
    assert removed["ours"]["KL"] != full["ours"]["KL"]
    assert "ours: KL" in capsys.readouterr().out  # more figures than students: a row each


def test_tables_8_and_9_ask_questions(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'mambify[eval]'")
    rows = [{"query": f"The {word} is", "choices": ["red", "blue", "big", "small"], "gold": 1} for word in "abcde"]
    for file in ("openbookqa_test.jsonl", "copa_val.jsonl"):
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = {"data_dir": str(tmp_path), "tasks": ("openbookqa",), "limit": 3}
    result = run_experiment("paper-table-9", device="cpu", **options | asked)
    teacher, full, removed = (row["ours"] for row in result["results"])
    assert 0 <= teacher["openbookqa"] <= 1
    assert set(full) - set(teacher) == {"ratio", "KL"}
    assert result["conclusions"][1]["ours"].keys() == {"openbookqa"}
    assert removed.keys() == full.keys()


@torch.no_grad()
def test_removed_layers_add_nothing(home: Path) -> None:
    teacher = load(home / "teacher").model
    student = convert(teacher, attention=0.5)
    ids_BT = torch.arange(20).view(2, 10)
    whole = student(ids_BT).logits
    with without_mixers(student):
        removed = student(ids_BT).logits
    assert torch.equal(student(ids_BT).logits, whole)
    for index in student.config.converted_layers:
        student.model.layers[index].mixer.out_proj.weight.zero_()
    assert torch.allclose(student(ids_BT).logits, removed, atol=1e-5)
    assert not torch.allclose(whole, removed, atol=1e-2)


def test_each_names_its_own_options() -> None:
    assert {"instruct", "preferences", "heldout_preferences"} <= set(EXPERIMENTS["paper-table-6"].options)
    assert "attention" not in EXPERIMENTS["paper-table-7"].options  # it varies that itself


@pytest.mark.slow
def test_on_the_real_teacher(smollm2: Any, tmp_path: Path, shared_data: Path) -> None:
    from mambify.data.synthesize import synthesize

    synthesize(
        smollm2.model.float(), smollm2.tokenizer, tmp_path / "data", num_tokens=6000, kind="text", heldout=0.2,
        max_new_tokens=64, batch_size=32, documents_per_shard=64,
    )  # fmt: skip
    result = run_experiment(
        "paper-table-9",
        device="cpu",
        data=(str(tmp_path / "data"),),
        text=(str(shared_data / "lm_text" / "wikitext2_test.txt"),),
        recipes=("best",),
        tokens=(4096,),
        batch_tokens=512,
        context_length=128,
        max_tokens=512,
        out=tmp_path / "out",
    )
    teacher, full, removed = (row["ours"] for row in result["results"])
    assert teacher["perplexity"] < full["perplexity"] < removed["perplexity"]
    assert result["conclusions"][0]["ours"]["KL"]["agrees"]
