"""Recipes: one YAML file says what is distilled from what, on which text, in which stages."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mambify.errors import RecipeError, did_you_mean

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_count(value: object) -> object:
    """``"1.6M"`` → 1600000; integers pass. (k, M and B are powers of ten.)"""
    if isinstance(value, str):
        match = re.fullmatch(r"([\d.]+)\s*([kKmMbB]?)", value.strip().replace("_", ""))
        if match:
            return round(float(match[1]) * _UNITS[match[2].lower()])
    return value


Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Student(_Section):
    """What the teacher becomes.

    ``attention`` may be a list of falling shares: a progressive schedule, all stages at each share in turn.
    """

    mixer: str = "mamba2"
    attention: Share | list[Share] = 0.5
    attention_layers: list[int] | None = None
    init: str = "identity"

    @property
    def schedule(self) -> list[float]:
        """The attention shares in turn; one where the conversion is done at once."""
        return list(self.attention) if isinstance(self.attention, list) else [self.attention]

    @model_validator(mode="after")
    def _falls(self) -> Student:
        shares = self.schedule
        if not shares or any(b >= a for a, b in itertools.pairwise(shares)):
            raise ValueError(f"attention {shares} must fall from step to step")
        if self.attention_layers is not None and len(shares) > 1:
            raise ValueError("attention_layers and a progressive attention schedule exclude each other")
        return self


class Data(_Section):
    """The text: a directory made by ``mambify synthesize``, files, Hub data sets, or a weighted list of them."""

    train: str | list[str] | dict[str, float]
    heldout: str | None = None
    context_length: Annotated[int, Field(ge=8)] = 512
    packing: Literal["concat", "documents"] = "concat"
    answers_only: bool = False


class _Stage(_Section):
    """What all stages have: ``batch_tokens`` of a step are shared by all processes; ``micro_batch`` sequences are in
    memory at once in each of them, and divide its share.
    """

    tokens: Count
    batch_tokens: Count = 16384
    learning_rate: Annotated[float, Field(gt=0)]
    warmup: Annotated[float, Field(ge=0)] = 0.05
    schedule: str = "cosine_with_min_lr"
    min_learning_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: Annotated[float, Field(ge=0)] = 1.0
    micro_batch: Annotated[int, Field(gt=0)] | None = None
    trainer: dict[str, Any] = {}


class Align(_Stage):
    """Each new mixer learns to give what the attention at its place gave, on the teacher's own hidden states.

    ``calibration_tokens`` of the same text first set its output projection by least squares; 0 leaves that out.
    """

    kind: Literal["align"]
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    calibration_tokens: Annotated[int, BeforeValidator(parse_count), Field(ge=0)] = 16384


class Kd(_Stage):
    """End to end: kl_weight · KL(teacher ‖ student) + ce_weight · cross-entropy on the text."""

    kind: Literal["kd"]
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    kl_weight: Annotated[float, Field(ge=0)] = 1.0
    ce_weight: Annotated[float, Field(ge=0)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    mlp_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    gradient_checkpointing: bool = False


Stage = Annotated[Align | Kd, Field(discriminator="kind")]


class Recipe(_Section):
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
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    cuda_graphs: bool = True
    checkpoint_every: Annotated[int, Field(gt=0)] = 100
    log_every: Annotated[int, Field(gt=0)] = 10
    report_to: list[str] = ["tensorboard"]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe and applies ``key.path=value`` overrides (values are YAML; ``stages.0.tokens=2M``).

    Raises:
        RecipeError: unreadable, not a mapping, an unknown key (names the nearest), or a value of a wrong type.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read recipe {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"recipe {path} is not a mapping of keys")
    for override in overrides:
        _override(raw, override)
    return parse_recipe(raw, source=str(path))


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
    place[last] = yaml.safe_load(text)


def _index(items: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise RecipeError(f"override '{override}': '{key}' is not one of the entries 0 to {len(items) - 1}")
    return int(key)


_SECTIONS: dict[str, type[BaseModel]] = {"student": Student, "data": Data, "align": Align, "kd": Kd}


def _explain(error: ValidationError) -> str:
    """The first problem as one line; an unknown key names the nearest known one."""
    problem = error.errors()[0]
    where = [str(part) for part in problem["loc"] if not (isinstance(part, str) and "[" in part)]
    if problem["type"] == "extra_forbidden":
        section = next((_SECTIONS[part] for part in reversed(where[:-1]) if part in _SECTIONS), Recipe)
        shown = [part for part in where if part not in ("align", "kd")]
        return f"unknown key '{'.'.join(shown)}': {did_you_mean(where[-1], section.model_fields)}"
    place = ".".join(part for part in where if part not in ("align", "kd")) or "recipe"
    return f"{place}: {problem['msg']}"
