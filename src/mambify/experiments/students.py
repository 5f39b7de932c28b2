"""Runs of an experiment from presets: what all its students have in common, and what each has of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mambify.conversion.plan import uniform_attention_layers
from mambify.distill.recipe import apply_overrides, load_recipe
from mambify.distill.settings import EndToEnd
from mambify.errors import RecipeError
from mambify.experiments.jobs import Job
from mambify.experiments.request import Request
from mambify.families.load import load_config

#: stages that tune a student after it was distilled
_TUNED = ("sft", "dpo")


def student(
    label: str,
    request: Request,
    preset: str,
    tokens: int,
    *changes: str,
    attention: float | None = None,
    train_mlps: bool = False,
) -> Job:
    """A student distilled by a preset.

    Args:
        changes: to the preset, as ``mambify distill`` takes them.
        attention: share of layers that keep it; the request's by default.
        train_mlps: at the mixers' learning rate, in stages that train the whole student.

    Raises:
        RecipeError: a budget too small for the preset.
    """
    recipe = load_recipe(
        f"preset:{preset}",
        [
            *_common(request),
            f"tokens={tokens}",
            f"student.attention={request.attention if attention is None else attention}",
            *changes,
            *request.changes,
        ],
    )
    raw = recipe.model_dump(mode="json")
    for stage, settings in zip(raw["stages"], recipe.stages, strict=True):
        if train_mlps and isinstance(settings, EndToEnd):
            stage["mlp_learning_rate"] = settings.learning_rate
    return Job(label, raw)


def made(label: str, student: str) -> Job:
    """A student that is there already, to be scored and tuned."""
    return Job(label, {"student": {}}, made=student)


def attention_of(student: str) -> float:
    """The share of its layers that have attention."""
    config = load_config(student)
    return 1 - len(config.converted_layers) / config.num_hidden_layers


def tuned(label: str, request: Request, after: Job, kind: str, tokens: int) -> Job:
    """The student of ``after``, tuned on: the stage of this kind of preset ``paper-tuned``, on the request's files.

    Raises:
        RecipeError: a change to the stage that cannot be, or too few tokens.
    """
    whole = load_recipe(
        "preset:paper-tuned",
        [
            *_common(request),
            f"tokens={tokens}",
            f"instruct={json.dumps(request.instruct)}",
            f"preferences={json.dumps(request.preferences)}",
        ],
    )
    raw = whole.model_dump(mode="json")
    raw["student"] |= {"attention": 1.0}  # of what still has attention: whatever is converted stays so
    raw["stages"] = [stage for stage in raw["stages"] if stage["kind"] == kind]
    length = 2 * request.context_length
    item = (2 if kind == "dpo" else 1) * length  # a pair has two sequences
    for stage in raw["stages"]:
        stage["data"] |= {"context_length": length}
        stage["batch_tokens"] = -(-stage["batch_tokens"] // item) * item
        if request.tuning_tokens is not None:
            stage["tokens"] = request.tuning_tokens
        if kind == "dpo":
            stage["data"] |= {"heldout": request.heldout_preferences}
    return Job(label, change(raw, request.tuning, kind), after=after)


def change(raw: dict[str, Any], changes: Sequence[str], kind: str) -> dict[str, Any]:
    """A recipe of one stage, with those changes ``KIND.KEY=VALUE`` that are for this kind.

    Raises:
        RecipeError: a change that names no kind, or nothing of the stage.
    """
    for text in changes:
        if text.partition(".")[0] not in _TUNED:
            raise RecipeError(
                f"'{text}' changes no stage of tuning: begin it with {' or '.join(_TUNED)}, as dpo.beta=0.1"
            )
    wanted = [text.removeprefix(f"{kind}.") for text in changes if text.startswith(f"{kind}.")]
    return apply_overrides(raw, [f"stages.0.{text}" for text in wanted])


def last_layers(request: Request, attention: float) -> list[int]:
    """As many layers as the share keeps, all of them at the top: the opposite of interleaved."""
    count = load_config(request.teacher).num_hidden_layers
    return list(range(count - len(uniform_attention_layers(count, attention)), count))


def _common(request: Request) -> Sequence[str]:
    """What is the same for every run of an experiment."""
    values: dict[str, Any] = {
        "teacher": request.teacher,
        "batch_tokens": request.batch_tokens,
        "data.train": list(request.data),
        "data.heldout": request.data[0],
        "data.context_length": request.context_length,
        "seed": request.seed,
        "checkpoint_every": 500,
        "report_to": [],
        "output": "-",
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
