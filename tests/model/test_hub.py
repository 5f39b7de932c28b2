"""What a save brings along for the Hub, and what is uploaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import mambify
from mambify import HybridForCausalLM
from mambify.errors import CheckpointError
from mambify.families.load import load_config
from mambify.hub import update_card
from mambify.provenance import Provenance

Hybrid = Callable[..., HybridForCausalLM]
Teacher = Callable[..., PreTrainedModel]
PROVENANCE = Provenance(stages=({"stage": "01-kd", "tokens": 1234, "attention": 0.5},))
RESULTS = {"sources": {"a text": {"num_tokens": 10, "student": {"perplexity": 2.5}}}}


def card(directory: Path) -> str:
    return (directory / "README.md").read_text(encoding="utf-8")


def test_every_save_has_a_card(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    model = tiny_hybrid()
    model.save_pretrained(tmp_path / "plain")
    assert "2 of 4 layers as Mamba1 and Mamba2" in card(tmp_path / "plain")
    assert not (tmp_path / "plain" / "provenance.json").exists()
    mambify.save(model, tmp_path / "ours", provenance=PROVENANCE)
    assert "1,234" in card(tmp_path / "ours")


@pytest.mark.parametrize("load", [lambda path: mambify.load(path).model, AutoModelForCausalLM.from_pretrained])
def test_provenance_travels_with_the_model(load: Callable[[Path], Any], tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    mambify.save(tiny_hybrid(), tmp_path / "one", provenance=PROVENANCE)
    load(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert card(tmp_path / "two") == card(tmp_path / "one")
    model = load(tmp_path / "two")
    model.train()
    model.save_pretrained(tmp_path / "two")  # in place of weights that had a provenance
    assert "1,234" not in card(tmp_path / "two")
    assert load(tmp_path / "two").provenance is None


def test_a_card_is_written_again_with_results(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    path = mambify.save(tiny_hybrid(), tmp_path / "one", provenance=PROVENANCE)
    update_card(path, [RESULTS])
    assert "| a text | 10 | 2.50 |" in card(path)
    assert "1,234" in card(path)
    update_card(path)
    assert "| a text | 10 | 2.50 |" in card(path)
    mambify.load(path)  # checksums are of weights: they hold


def test_a_card_of_somebody_elses_model(tiny_teacher: Teacher, tmp_path: Path) -> None:
    tiny_teacher().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no model that mambify saved"):
        update_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("header", "license"),
    [
        ("---\nlicense: apache-2.0\n---\n# Model\n", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: x\ntags: [a]\n---\n", {"license": "other", "license_name": "x"}),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: {\n---\n", None),
        ("---\njust words\n---\n", None),
        ("# No header\nlicense: mit\n", None),
        (None, None),
    ],
)
def test_the_licence_is_the_teachers(
    header: str | None, license: dict[str, str] | None, tiny_teacher: Teacher, tmp_path: Path
) -> None:
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    if header is not None:
        (tmp_path / "teacher" / "README.md").write_text(header)
    assert load_config(tmp_path / "teacher").teacher_license == license
    student = mambify.convert(tmp_path / "teacher")
    mambify.save(student, tmp_path / "student")
    assert ("license: " in card(tmp_path / "student")) == (license is not None)
    assert load_config(tmp_path / "student").teacher_license == license


def test_the_embedded_teacher_says_its_licence_and_place(smollm2: Any) -> None:
    config = load_config("smollm2")
    assert config.teacher_license == {"license": "apache-2.0"}
    assert config.teacher_hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct"


def hub_of(seen: dict[str, Any], *, has_card: bool) -> type:
    """A Hub that notes in ``seen`` what it is asked, and the files as they are when they are uploaded."""

    class Api:
        def __init__(self, token: str | None) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            seen["create"] = options
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def file_exists(self, repo_id: str, name: str, **_: Any) -> bool:
            assert (repo_id, name) == ("me/model", "README.md")
            return has_card

        def upload_folder(self, *, folder_path: str, **options: Any) -> str:
            seen["files"] = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
            seen["upload"] = options
            return "https://hub/commit"

    return Api


@pytest.mark.parametrize("has_card", [False, True])
def test_push_to_hub_uploads_the_card(
    has_card: bool, tiny_hybrid: Hybrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository without a card gets ours; one with a card keeps it."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr("mambify.hub.HfApi", hub_of(seen, has_card=has_card))
    model = tiny_hybrid()
    model.provenance = PROVENANCE
    assert model.push_to_hub("model", private=True, token="t") == "https://hub/commit"
    assert seen["token"] == "t"
    assert seen["create"] == {"private": True, "exist_ok": True}
    assert seen["upload"]["repo_id"] == "me/model"
    assert seen["upload"]["ignore_patterns"] == (["README.md"] if has_card else None)
    assert {"README.md", "provenance.json", "config.json", "model.safetensors", "modeling_mambify.py"} <= set(
        seen["files"]
    )
    assert b"1,234" in seen["files"]["README.md"]
    for name, content in seen["files"].items():
        (tmp_path / name).write_bytes(content)
    again = HybridForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_saving_with_push_to_hub_uploads_what_was_written(
    tiny_hybrid: Hybrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, and nothing that lay in the directory before."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr("mambify.hub.HfApi", hub_of(seen, has_card=False))
    monkeypatch.setattr("transformers.utils.hub.PushToHubMixin._upload_modified_files", pytest.fail)
    path = tmp_path / "model"
    path.mkdir()
    (path / "diary.txt").write_text("mine")
    (path / "README.md").write_text("the card of a former model")
    model = tiny_hybrid()
    model.provenance = PROVENANCE
    model.save_pretrained(path, push_to_hub=True, commit_message="first", private=True, token="t")
    assert seen["token"] == "t" and seen["create"] == {"private": True, "exist_ok": True}
    assert seen["upload"]["repo_id"] == "me/model" and seen["upload"]["commit_message"] == "first"
    uploaded = set(seen["upload"]["allow_patterns"])
    assert uploaded == {p.name for p in path.iterdir()} - {"diary.txt"}
    assert uploaded >= {"README.md", "provenance.json", "config.json", "model.safetensors", "modeling_mambify.py"}
    assert b"1,234" in seen["files"]["README.md"] and uploaded <= seen["files"].keys()
    seen.clear()
    model.save_pretrained(path)
    assert not seen
