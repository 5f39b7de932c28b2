"""A recipe's initialisation that is measured is measured on its training text, at every step of a schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mambify.distill.logs import read_metrics
from mambify.distill.recipe import Recipe
from mambify.errors import InvalidOptionError
from mambify.workflows.distill import distill

MakeRecipe = Callable[..., Recipe]


def first_errors(recipe: Recipe) -> list[float]:
    """The mean error of the fresh mixers, of every align stage."""
    _, run = distill(recipe, device="cpu")
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["step"] == -1]


@pytest.mark.parametrize("attention", [0.5, [0.5, 0.0]])
def test_starts_nearer_than_identity(make_recipe: MakeRecipe, tmp_path: Any, attention: Any) -> None:
    def errors(init: str) -> list[float]:
        student = {"mixer": "mamba2", "attention": attention, "init": init}
        return first_errors(make_recipe(student=student, output=str(tmp_path / init)))

    plain, measured = errors("identity"), errors("measured")
    assert len(plain) == len(measured) == (2 if isinstance(attention, list) else 1)
    assert measured[0] < min(plain[0], 1.0)


def test_the_student_has_what_was_trained(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(student={"mixer": "mamba2", "attention": 0.5, "init": "measured"})
    one, run = distill(recipe, device="cpu")
    again, _ = distill(recipe, device="cpu")  # done already: what is on disk
    assert (run / "student" / "config.json").is_file()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in one.state_dict().items())


def test_an_unknown_name(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(student={"init": "measurd"})
    with pytest.raises(InvalidOptionError, match="did you mean 'measured'"):
        distill(recipe, device="cpu")
