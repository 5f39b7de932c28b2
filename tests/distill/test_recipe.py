"""Recipes: every shipped one parses; overrides, units, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mambify.distill.recipe import dump_recipe, load_recipe, parse_count, parse_recipe
from mambify.distill.run import steps_of
from mambify.errors import RecipeError

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
    recipe = parse_recipe(MINIMAL | {"student": {"attention": [0.75, 0.5]}})
    assert [(step.name, step.attention) for step in steps_of(recipe)] == [
        ("01-align", 0.75),
        ("02-kd", 0.75),
        ("03-align", 0.5),
        ("04-kd", 0.5),
    ]


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
