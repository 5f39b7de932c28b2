"""Recipes: every shipped one parses; overrides, units, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mambify.config import HybridConfig
from mambify.distill.recipe import Data, Recipe, Student, dump_recipe, load_recipe, parse_count, parse_recipe
from mambify.distill.settings import STAGES, EndToEnd, StageSettings
from mambify.distill.steps import steps_of
from mambify.errors import InvalidOptionError, RecipeError

_STAGES = [
    {"kind": "align", "tokens": "1.5M"},
    {"kind": "kd", "tokens": "1M"},
    {"kind": "sft", "tokens": "300k"},
]
_EIGHT_LAYERS = HybridConfig(num_hidden_layers=8)
SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
MINIMAL = {
    "teacher": "t",
    "data": {"train": "d"},
    "output": "o",
    "stages": [{"kind": "align", "tokens": "1.5M"}, {"kind": "kd", "tokens": 1000}],
}


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_recipes_are_shipped() -> None:
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_parses(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("kind", STAGES)
def test_the_documentation_names_every_key(kind: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    own = page.partition(f"\n### {kind}\n")[2].partition("\n### ")[0]
    assert own, f"docs/recipes.md has no section {kind}"
    common = {"data"} | (EndToEnd if issubclass(STAGES[kind], EndToEnd) else StageSettings).model_fields.keys()
    for key in STAGES[kind].model_fields:
        assert f"`{key}`" in (page if key in common | {"kind"} else own), (
            f"docs/recipes.md does not name {key} of {kind}"
        )
    for key in (*Student.model_fields, *Data.model_fields, *Recipe.model_fields):
        assert f"`{key}`" in page, f"docs/recipes.md does not name {key}"


@pytest.mark.parametrize(("text", "count"), [("1.6M", 1_600_000), ("20k", 20_000), ("3B", 3_000_000_000), (7, 7)])
def test_counts(text: object, count: int) -> None:
    assert parse_count(text) == count


def test_overrides_reach_keys_and_list_entries(tmp_path: Path) -> None:
    path = _write(tmp_path, yaml.safe_dump(MINIMAL))
    recipe = load_recipe(path, ["stages.1.tokens=2M", "student.attention=[0.75, 0.5]", "seed=3"])
    assert recipe.stages[1].tokens == 2_000_000
    assert recipe.student.schedule == [0.75, 0.5]
    assert recipe.seed == 3


def test_a_progressive_schedule_repeats_the_stages() -> None:
    recipe = parse_recipe(MINIMAL | {"student": {"attention": [0.75, 0.5]}, "stages": _STAGES})
    assert [(step.name, step.attention, step.stage.tokens) for step in steps_of(recipe, _EIGHT_LAYERS)] == [
        ("01-align", 0.75, 750_000),
        ("02-kd", 0.75, 500_000),
        ("03-align", 0.5, 750_000),
        ("04-kd", 0.5, 500_000),
        ("05-sft", 0.5, 300_000),  # not before the conversion is over, and then with all of its tokens
    ]


def test_layer_by_layer_in_the_order_of_falling_shares() -> None:
    student = {"attention": 0.25, "stepwise": True}
    recipe = parse_recipe(MINIMAL | {"student": student, "stages": _STAGES})
    steps = steps_of(recipe, _EIGHT_LAYERS)
    converted = [sorted(set(range(8)) - set(step.attention_layers)) for step in steps if step.stage.kind == "kd"]
    assert converted == [[2], [2, 6], [0, 2, 6], [0, 2, 4, 6], [0, 1, 2, 4, 6], [0, 1, 2, 4, 5, 6]]
    assert {step.stage.tokens for step in steps if step.stage.kind == "align"} == {250_000}
    assert [step.stage.kind for step in steps][-3:] == ["align", "kd", "sft"]
    assert steps[-1].attention == 0.25


def test_several_layers_at_a_time_in_a_given_order() -> None:
    student = {"attention_layers": [1, 3, 5, 7], "stepwise": 3, "order": [6, 0, 4, 2]}
    recipe = parse_recipe(MINIMAL | {"student": student, "stages": _STAGES[:1]})
    assert [step.attention_layers for step in steps_of(recipe, _EIGHT_LAYERS)] == [(1, 2, 3, 5, 7), (1, 3, 5, 7)]


def test_explicit_lists_of_layers_are_a_schedule() -> None:
    student = {"attention_layers": [[1, 3, 5, 7], [3, 7], []]}
    recipe = parse_recipe(MINIMAL | {"student": student, "stages": _STAGES[:1]})
    assert [step.attention_layers for step in steps_of(recipe, _EIGHT_LAYERS)] == [(1, 3, 5, 7), (3, 7), ()]


def test_what_is_converted_already_is_no_step() -> None:
    hybrid = HybridConfig(num_hidden_layers=8, layer_mixers=["mamba2", "attention"] * 4)
    recipe = parse_recipe(MINIMAL | {"student": {"attention": 0.25, "stepwise": True}, "stages": _STAGES[:1]})
    assert [step.attention_layers for step in steps_of(recipe, hybrid)] == [(3, 5, 7), (3, 7)]


def test_too_few_tokens_for_every_step_are_refused() -> None:
    stages = [{"kind": "kd", "tokens": 60_000}]
    recipe = parse_recipe(MINIMAL | {"student": {"attention": 0.5, "stepwise": True}, "stages": stages})
    with pytest.raises(RecipeError, match="at least 65536 are needed"):
        steps_of(recipe, _EIGHT_LAYERS)


def test_an_order_must_name_the_layers_to_be_converted() -> None:
    student = {"attention": 0.5, "stepwise": True, "order": [0, 2, 4, 5]}
    with pytest.raises(InvalidOptionError, match=r"\[0, 2, 4, 6\]"):
        steps_of(parse_recipe(MINIMAL | {"student": student}), _EIGHT_LAYERS)


def test_a_stage_may_have_text_of_its_own() -> None:
    stages = [
        {"kind": "kd", "tokens": 1},
        {"kind": "kd", "tokens": 1, "data": {"context_length": 8192}},
        {"kind": "sft", "tokens": 1, "data": {"train": "chat.jsonl"}},
        {"kind": "sft", "tokens": 1, "data": {"answers_only": False}},
    ]
    recipe = parse_recipe(MINIMAL | {"data": {"train": "d", "heldout": "h"}, "stages": stages})
    given, longer, sft, all_of_it = (recipe.data_of(stage) for stage in recipe.stages)
    assert given == recipe.data
    assert longer == given.model_copy(update={"context_length": 8192})
    dpo = parse_recipe(
        MINIMAL
        | {"data": {"train": "d", "packing": "documents"}, "stages": [{"kind": "dpo", "tokens": 1}, *stages[:1]]}
    )
    assert [dpo.data_of(stage).packing for stage in dpo.stages] == ["concat", "documents"]
    assert (sft.train, sft.heldout, sft.answers_only) == ("chat.jsonl", "h", True)
    assert not all_of_it.answers_only
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teecher": "x"}, "did you mean 'teacher'"),
        ({"data": {"train": "d", "contxt_length": 3}}, "did you mean 'context_length'"),
        ({"stages": [{"kind": "kd", "tokens": 1, "learning_rat": 1}]}, "did you mean 'learning_rate'"),
        ({"stages": [{"kind": "sing", "tokens": 1}]}, "align"),
        ({"stages": []}, "stages"),
        ({"stages": [{"kind": "kd", "tokens": -5}]}, "tokens"),
        ({"stages": [{"kind": "kd"}]}, "tokens"),
        ({"student": {"attention": 1.5}}, "attention"),
        ({"student": {"attention": [0.5, 0.75]}}, "must fall"),
        ({"precision": "float8"}, "precision"),
        ({"student": {"attention_layers": [[1, 2], [2, 3]]}}, "must shrink"),
        ({"student": {"attention": [0.5, 0.25], "stepwise": True}}, "not a schedule"),
        ({"student": {"order": [1, 2]}}, "set stepwise"),
        ({"stages": [{"kind": "kd", "tokens": 1, "kl_weight": 0}]}, "must be above 0"),
        ({"stages": [{"kind": "kd", "tokens": 1, "data": {"pakcing": "concat"}}]}, "did you mean 'packing'"),
        ({"stages": [{"kind": "dpo", "tokens": 1, "betta": 0.1}]}, "did you mean 'beta'"),
        ({"stages": [{"kind": "dpo", "tokens": 1, "reference": "me"}]}, "reference"),
        ({"stages": [{"kind": "on_policy", "tokens": 1, "share": 0}]}, "share"),
        ({"stages": [{"kind": "on_policy", "tokens": 1, "data": {"packing": "documents"}}]}, "to concat"),
        ({"stages": [{"kind": "dpo", "tokens": 1, "data": {"train": {"a": 0.5}}}]}, "without weights"),
        ({"stages": [{"kind": "mixing", "tokens": 1, "data": {"context_length": 1024}}]}, "at most 512"),
        ({"stages": [{"kind": "mixing", "tokens": 1, "data": {"packing": "documents"}}]}, "packing"),
    ],
)
def test_what_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(MINIMAL | changes)


@pytest.mark.parametrize("text", ["a: [1, 2", "- just\n- a list", "\x00"])
def test_unreadable_files(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(_write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("override", ["tokens", "stages.7.tokens=1", "stages.x=1", "teacher.name=1"])
def test_overrides_that_lead_nowhere(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(_write(tmp_path, yaml.safe_dump(MINIMAL)), [override])
