"""Recipes: one YAML file says what is distilled from what, on which text, in which stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from mambify.distill.presets import expand_preset, preset_file, preset_of
from mambify.distill.sections import Data, Section, Student, parse_count
from mambify.distill.settings import (
    MAX_MATRIX_CONTEXT,
    STAGES,
    Align,
    Dpo,
    Hidden,
    Kd,
    Mixing,
    OnPolicy,
    Sft,
    Stage,
    StageSettings,
)
from mambify.errors import RecipeError, did_you_mean

__all__ = [
    "Align",
    "Data",
    "Dpo",
    "Hidden",
    "Kd",
    "Mixing",
    "OnPolicy",
    "Recipe",
    "Sft",
    "Stage",
    "Student",
    "dump_recipe",
    "load_recipe",
    "parse_count",
    "parse_recipe",
]


class Recipe(Section):
    """Everything ``mambify distill`` needs; unknown keys are errors.

    ``output`` becomes the run directory. ``precision`` is that of the arithmetic: trained weights are float32.
    ``cuda_graphs`` records each stage's step once and replays it, where that is possible: on GPUs that each have
    whole weights, without packed documents, gradient checkpointing or compilation.
    """

    teacher: str
    student: Student = Student()
    data: Data
    stages: Annotated[list[Stage], Field(min_length=1)]
    output: str
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    cuda_graphs: bool = True
    checkpoint_every: Annotated[int, Field(gt=0)] = 100
    log_every: Annotated[int, Field(gt=0)] = 10
    report_to: list[str] = Field(default_factory=lambda: ["tensorboard"])

    def data_of(self, stage: StageSettings) -> Data:
        """The text of ``stage``: the recipe's, but for what the stage says itself."""
        changes = {name: value for name, value in stage.data if value is not None}
        return self.data.model_copy(update=stage.data_defaults | changes)

    @model_validator(mode="after")
    def _stages_have_usable_text(self) -> Recipe:
        for stage in self.stages:
            data = self.data_of(stage)
            if isinstance(stage, Mixing) and data.context_length > MAX_MATRIX_CONTEXT:
                raise ValueError(
                    f"stage mixing compares matrices of context_length² numbers: {data.context_length} is too long, "
                    f"set data.context_length of the stage to at most {MAX_MATRIX_CONTEXT}"
                )
            if stage.whole_rows and data.packing == "documents":
                raise ValueError(f"stage {stage.kind} keeps no documents apart: set data.packing of it to concat")
            if isinstance(stage, Dpo) and isinstance(data.train, dict):
                raise ValueError("stage dpo takes every pair once: give data.train as a list, without weights")
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe and applies ``key.path=value`` overrides (values are YAML; ``stages.0.tokens=2M``).

    Args:
        path: of the file, or ``preset:NAME`` for one of :mod:`mambify.distill.presets`.

    Raises:
        RecipeError: unreadable, not a mapping, an unknown preset or key (names the nearest), or of a wrong type.
    """
    preset = preset_of(path)
    file = path if preset is None else preset_file(preset)
    try:
        raw = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read recipe {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not YAML: {_not_yaml(error)}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"recipe {path} is not a mapping of keys")
    apply_overrides(raw, overrides)
    if preset is not None:
        raw = expand_preset(raw, name=preset, known=Recipe.model_fields)
    return parse_recipe(raw, source=str(path))


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Puts ``key.path=value`` into the plain data of a recipe, and returns it.

    Raises:
        RecipeError: one that is not of this form, or that names no place.
    """
    for override in overrides:
        _override(raw, override)
    return raw


def parse_recipe(raw: dict[str, Any], *, source: str = "recipe") -> Recipe:
    """Checks a recipe given as plain data.

    Raises:
        RecipeError: see :func:`load_recipe`.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_explain(error)}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _override(raw: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator:
        raise RecipeError(f"override '{override}' is not of the form key.path=value")
    keys = path.split(".")
    place: Any = raw
    for key in keys[:-1]:
        place = place[_index(place, key, override)] if isinstance(place, list) else place.setdefault(key, {})
        if not isinstance(place, dict | list):
            raise RecipeError(f"override '{override}': '{key}' holds a value, not keys")
    last: Any = _index(place, keys[-1], override) if isinstance(place, list) else keys[-1]
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override '{override}': the value is not YAML: {_not_yaml(error)}") from error


def _index(items: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise RecipeError(f"override '{override}': '{key}' is not one of the entries 0 to {len(items) - 1}")
    return int(key)


def _not_yaml(error: yaml.YAMLError) -> str:
    """What is wrong, and in which line where that is known."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).splitlines()[0]


#: what pydantic calls the members of a union, which are no keys of a recipe
_TYPES = frozenset({"str", "int", "float", "bool", "constrained-float", "constrained-int"})
_SECTIONS: dict[str, type[BaseModel]] = {"student": Student, "data": Data, **STAGES}


def _explain(error: ValidationError) -> str:
    """The first problem as one line; an unknown key names the nearest known one."""
    problem = error.errors()[0]
    where = [str(part) for part in problem["loc"] if not (isinstance(part, str) and ("[" in part or part in _TYPES))]
    if problem["type"] == "extra_forbidden":
        section = next((_SECTIONS[part] for part in reversed(where[:-1]) if part in _SECTIONS), Recipe)
        shown = [part for part in where if part not in STAGES]
        return f"unknown key '{'.'.join(shown)}': {did_you_mean(where[-1], section.model_fields)}"
    place = ".".join(part for part in where if part not in STAGES) or "recipe"
    if problem["type"] == "union_tag_invalid":  # of stages alone
        return f"{place}: no kind of stage '{problem['ctx']['tag']}': choose {', '.join(STAGES)}"
    if problem["type"] == "int_parsing":
        return f"{place}: '{problem['input']}' is no whole number: write it like 512, 20k, 4M or 1B"
    return f"{place}: {problem['msg']}"
