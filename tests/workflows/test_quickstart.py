"""The whole job on a tiny teacher that has a chat template: what it leaves, and that it continues."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import mambify
from mambify.errors import OutputExistsError
from mambify.workflows.quickstart import PROMPTS, Settings, quickstart, settings_for
from tiny import byte_tokenizer, llama


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    path = tmp_path_factory.mktemp("teacher")
    tokenizer = byte_tokenizer()
    llama(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return replace(
        settings_for("cpu", str(path)),
        tokens=4000,
        sampling_batch=16,
        documents_per_shard=16,
        max_new_tokens=24,
        align_tokens=1024,
        kd_tokens=1024,
        batch_tokens=256,
        context_length=64,
        evaluation_tokens=512,
    )


def test_what_it_leaves(settings: Settings, tmp_path: Path) -> None:
    said: list[str] = []
    steps: set[str] = set()
    report = quickstart(
        tmp_path / "out",
        device="cpu",
        settings=settings,
        announce=said.append,
        progress=lambda name, done, total: steps.add(name),
    )
    out = tmp_path / "out"
    assert json.loads((out / "report.json").read_text())["student"]["kl"] == report["student"]["kl"]
    assert report["teacher"]["perplexity"] > 1
    assert report["student"]["perplexity"] > 1
    assert 0 <= report["student"]["top1_agreement"] <= 1
    assert [sample["prompt"] for sample in report["samples"]] == list(PROMPTS)
    assert {stage["name"] for stage in report["stages"]} == {"01-align", "02-kd"}
    assert set(report["alignment"]) == {2}
    page = (out / "report.html").read_text()
    assert "<svg" in page and PROMPTS[0] in page
    assert mambify.load(out / "student").model.config.converted_layers == [2]
    assert "| held-out |" in (out / "student" / "README.md").read_text()
    assert len(said) >= 5
    assert {"sample", "answer"} <= steps


def test_the_same_command_continues_and_another_is_refused(settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = quickstart(out, device="cpu", settings=settings)
    again = quickstart(out, device="cpu", settings=settings)
    assert again["student"] == first["student"]
    with pytest.raises(OutputExistsError, match="another quickstart"):
        quickstart(out, device="cpu", settings=replace(settings, seed=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(OutputExistsError):
        quickstart(tmp_path / "mine", device="cpu", settings=settings)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
