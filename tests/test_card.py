"""A model card says what is known, in a form that the Hub reads, and nothing that nobody recorded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from mambify.card import render_card
from mambify.config import HybridConfig
from mambify.errors import CheckpointError, InvalidOptionError
from mambify.provenance import Provenance, read_provenance, read_results

RESULTS: dict[str, Any] = {
    "model": "student",
    "context_length": 512,
    "sources": {
        "book|1.txt": {
            "num_tokens": 32768,
            "student": {
                "perplexity": 13.25, "perplexity_interval": [13.0, 13.5], "kl": 0.0512, "kl_interval": [0.05, 0.053],
                "top1_agreement": 0.885, "top1_agreement_interval": [0.88, 0.89], "perplexity_ratio": 1.034,
            },
            "teacher": {"perplexity": 12.81, "perplexity_interval": [12.6, 13.0]},
        }
    },
}  # fmt: skip
PROVENANCE = Provenance(
    recipe={"teacher": "smollm2", "data": {"context_length": 512}, "stages": [{"kind": "align"}]},
    stages=[
        {"stage": "01-align", "attention": 0.5, "steps": 100, "tokens": 1_600_000, "seconds": 12.3},
        {"stage": "02-kd", "attention": 0.5, "steps": 150, "tokens": 2_400_000, "seconds": 45.6},
    ],
    environment={"device": "NVIDIA H100", "torch": "2.13.0", "commit": None},
    results=RESULTS,
)


def config(**changes: Any) -> HybridConfig:
    facts: dict[str, Any] = {
        "num_hidden_layers": 4,
        "layer_mixers": ["mamba2", "attention", "mamba2", "attention"],
        "teacher": "smollm2",
        "teacher_hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "teacher_license": {"license": "apache-2.0"},
    }
    return HybridConfig(**facts | changes)


def header(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_the_header_is_the_hubs() -> None:
    card = render_card(config(), PROVENANCE)
    assert header(card) == {
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mambify", "hybrid", "mamba2", "distillation"],
    }
    assert ModelCard(card).data.license == "apache-2.0"


def test_what_is_known_is_said() -> None:
    card = render_card(config(), PROVENANCE)
    assert "# SmolLM2-135M-Instruct, 2 of 4 layers as Mamba2\n" in card
    assert "MAMA\nM Mamba2 ×2, A attention ×2" in card
    assert "read as `smollm2`" in card
    assert "| 01-align | 50.0% | 100 | 1,600,000 | 12 |" in card
    assert "In all 4,000,000 tokens." in card
    assert "Made with device NVIDIA H100, torch 2.13.0." in card
    assert "kind: align" in card
    row = "| book\\|1.txt | 32,768 | 13.25 (13.00–13.50) | 12.81 (12.60–13.00) | 1.034 | 0.0512 (0.0500–0.0530) |"
    assert row in card
    assert "88.5% (88.0%–89.0%)" in card
    assert "sequences of 512 tokens" in card
    assert "No " not in card.split("## Limits")[1]


def test_what_is_not_known_is_left_out() -> None:
    card = render_card(config(teacher="", teacher_hub_id="", teacher_license=None))
    assert header(card).keys() == {"library_name", "pipeline_tag", "tags"}
    assert header(card)["tags"] == ["mambify", "hybrid", "mamba2"]
    for heading in ("## Training", "## Results"):
        assert heading not in card
    assert "No training is recorded" in card
    assert "No evaluation is recorded" in card
    assert "None" not in card


def test_folders_of_the_machine_are_not_told() -> None:
    card = render_card(
        config(
            teacher="/home/someone/models/llama", teacher_hub_id="", base={"name": "/home/someone/x", "fingerprint": ""}
        )
    )
    assert "someone" not in card
    assert "# llama, 2 of 4" in card


def test_a_licence_of_its_own_is_given_as_the_teacher_gives_it() -> None:
    terms = {"license": "other", "license_name": "some-terms", "license_link": "LICENSE.md"}
    assert header(render_card(config(teacher_license=terms))).items() >= terms.items()


def test_an_unconverted_model_is_not_called_a_hybrid() -> None:
    card = render_card(config(layer_mixers=["attention"] * 4))
    assert header(card)["tags"] == ["mambify"]
    assert "# SmolLM2-135M-Instruct\n" in card
    assert "no layer is converted" in card


def test_mixers_only_say_what_they_need() -> None:
    card = render_card(config(base={"name": "smollm2", "fingerprint": "0" * 64}))
    assert "they are put into `smollm2`" in card


def test_results_of_a_model_alone() -> None:
    alone = {"sources": {"t": {"num_tokens": 10, "student": {"perplexity": 2.0, "perplexity_interval": [1.0, 3.0]}}}}
    card = render_card(config(), Provenance(results=alone))
    assert "| text | tokens | perplexity |\n| --- | --- | --- |\n| t | 10 | 2.00 (1.00–3.00) |" in card


def test_provenance_survives_the_disk(tmp_path: Path) -> None:
    assert read_provenance(tmp_path) is None
    PROVENANCE.write(tmp_path)
    again = read_provenance(tmp_path)
    assert again is not None
    assert dataclasses.asdict(again) == dataclasses.asdict(PROVENANCE)
    assert again.tokens == 4_000_000


@pytest.mark.parametrize("content", ["", "[]", '{"recipy": {}}'])
def test_a_provenance_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"provenance\.json is not a readable provenance"):
        read_provenance(tmp_path)


def test_new_results_join_the_former_ones() -> None:
    other = {"context_length": 256, "sources": {"other": RESULTS["sources"]["book|1.txt"]}}
    both = PROVENANCE.with_results(other).results
    assert set(both["sources"]) == {"book|1.txt", "other"}
    assert both["context_length"] == 256
    assert set(RESULTS["sources"]) == {"book|1.txt"}


def test_tasks_and_preferences_have_tables_of_their_own() -> None:
    acc = {"teacher": 0.5, "teacher_interval": [0.48, 0.52], "student": 0.49, "difference": -0.01,
           "difference_interval": [-0.02, 0.001]}  # fmt: skip
    measured = {
        "tasks": {"arc_easy": {"num_questions": 2376, "metrics": {"acc": acc}}},
        "means": {"acc": acc | {"tasks": {"arc_easy": "acc"}}},
        "preferences": {"/home/me/pairs.jsonl": {"num_pairs": 194, "accuracy": 0.5, "reference_accuracy": 0.51}},
    }
    card = render_card(config(), PROVENANCE.with_results(measured))
    assert "| arc_easy | 2,376 | acc | 50.0 (48.0–52.0) | 49.0 | -1.0 (-2.0 to +0.1) |" in card
    assert "| mean of 1 |  | acc | 50.0" in card
    assert "| pairs.jsonl | 194 | summed | 50.0% | 51.0% |" in card
    assert "13.25" in card  # the texts' figures are still there


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"sources": 3}'])
def test_results_that_are_none(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidOptionError, match=r"results\.json"):
        read_results(path)
    path.write_text(json.dumps(RESULTS))
    assert read_results(path) == RESULTS


def test_a_draft_says_what_it_is_for_and_what_is_accepted() -> None:
    found = {"temperature": 1.0, "num_draft_tokens": 2, "tokens_per_round": 1.75, "acceptance_by_position": [0.5, None]}
    results = {"acceptance": {"target": "/home/me/student", "expected": found, "measured": [found]}}
    facts = config(layer_mixers=["attention"] * 2, num_hidden_layers=2, cut_from=[0, 3], draft_vocabulary=100)
    card = render_card(facts, Provenance(recipe={"teacher": "smollm2"}, results=results))
    assert "# A draft for SmolLM2-135M-Instruct, of 2 layers" in card
    assert "layers 0, 3 of it" in card and "Its head knows 100 of 32,000 words" in card
    assert "--draft PATH_OR_HUB_ID" in card
    assert "With student as the target" in card and "/home/me" not in card
    assert "| prompts, measured | 1 | 1.75 | 50%, – |" in card


def test_a_draft_that_reads_hidden_states_names_the_model_it_runs_beside() -> None:
    facts = config(layer_mixers=["attention"] * 2, num_hidden_layers=2, cut_from=[0, 3], draft_features=True)
    card = render_card(facts, Provenance(recipe={"teacher": "/home/me/runs/half-student"}))
    assert "# A draft for half-student, of 2 layers" in card and "with `half-student`, made from [" in card
    assert "mambify chat half-student --draft PATH_OR_HUB_ID" in card
    unknown = render_card(facts)
    assert "# A draft for SmolLM2-135M-Instruct, of 2 layers" in unknown
