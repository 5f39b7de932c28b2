"""Presets: recipes for any budget, whose stages have shares of its tokens instead of numbers of them.

``preset:best`` stands for a file of ``recipes/presets``. Beside a recipe's keys it has

    about           what it is, in a line
    tokens          the budget: those of all stages together
    batch_tokens    of every stage that says nothing of its own
    progressive     shares of attention that are passed on the way to ``student.attention``
    instruct        text for ``sft``; without it, the preset's stages of that kind are left out
    preferences     pairs for ``dpo``; likewise

and ``share`` in each stage, weighed against those of the other stages that are run.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from mambify.distill.sections import parse_count
from mambify.errors import RecipeError, did_you_mean

_PREFIX = "preset:"
_FOLDER = Path(__file__).parents[1] / "recipes" / "presets"
_KEYS = ("about", "tokens", "batch_tokens", "progressive", "instruct", "preferences")
#: kind of a stage → the preset's key that names its text
_TEXT_OF = {"sft": "instruct", "dpo": "preferences"}
#: key → its default
_COUNTS: dict[str, object] = {"tokens": None, "batch_tokens": 16384}


def preset_names() -> list[str]:
    """All presets."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def preset_of(path: str | Path) -> str | None:
    """``preset:NAME`` → its name; ``None`` for the path of a file."""
    text = str(path)
    return text.removeprefix(_PREFIX) if text.startswith(_PREFIX) else None


def preset_file(name: str) -> Path:
    """Where the preset is written down.

    Raises:
        RecipeError: there is none of this name.
    """
    if name not in preset_names():
        raise RecipeError(f"no preset '{name}': {did_you_mean(name, preset_names())}")
    return _FOLDER / f"{name}.yaml"


def expand_preset(raw: dict[str, Any], *, name: str, known: Collection[str]) -> dict[str, Any]:
    """A preset as the plain data of a recipe.

    Args:
        raw: what its file says, and what was changed.
        name: of the preset, for errors.
        known: the keys of a recipe.

    Raises:
        RecipeError: an unknown key, no budget, one that is too small, or a share that is none.
    """
    for key in raw:
        if key not in known and key not in _KEYS:
            raise RecipeError(f"preset {name}: unknown key '{key}': {did_you_mean(key, [*known, *_KEYS])}")
    raw = {"teacher": "smollm2"} | raw
    own = {key: raw.pop(key) for key in _KEYS if key in raw}
    budget, batch = (_count(own.get(key, default), name, key) for key, default in _COUNTS.items())
    for kind, key in _TEXT_OF.items():
        if own.get(key) is not None and all(stage["kind"] != kind for stage in raw["stages"]):
            raise RecipeError(f"preset {name} has no stage {kind}, which '{key}' is the text of")
    stages = [
        stage
        for stage in raw["stages"]
        if stage["kind"] not in _TEXT_OF or own.get(_TEXT_OF[stage["kind"]]) is not None
    ]
    shares = [_share(stage, name) for stage in stages]
    raw["stages"] = [
        _stage(stage, name, tokens=int(budget * share / sum(shares)), batch=batch, text=own)
        for stage, share in zip(stages, shares, strict=True)
    ]
    student = dict(raw.get("student", {}))
    wanted = student.get("attention")
    if isinstance(wanted, int | float):
        student["attention"] = [*(share for share in own.get("progressive", []) if share > wanted), wanted]
        raw["student"] = student
    return raw


def _count(value: object, name: str, key: str) -> int:
    count = parse_count(value)
    if count is None:
        raise RecipeError(f"preset {name} needs a budget: tokens=20M")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise RecipeError(f"preset {name}: {key} '{value}' is no number of tokens: write it like 500k, 20M or 1B")
    return count


def _share(stage: dict[str, Any], name: str) -> float:
    share = stage.get("share")
    if "tokens" in stage:
        raise RecipeError(f"preset {name}: stage {stage['kind']} has a share, not tokens: set share, and tokens of all")
    if not isinstance(share, int | float) or share <= 0:
        raise RecipeError(f"preset {name}: the share of stage {stage['kind']} must be above 0, not {share}")
    return float(share)


def _stage(stage: dict[str, Any], name: str, *, tokens: int, batch: int, text: dict[str, Any]) -> dict[str, Any]:
    """The stage with tokens instead of a share, and with its text."""
    stage = {"batch_tokens": batch} | stage | {"tokens": tokens}
    del stage["share"]
    size = _count(stage["batch_tokens"], name, "batch_tokens")
    if tokens < size:
        raise RecipeError(
            f"preset {name}: stage {stage['kind']} would have {tokens} tokens, less than a batch of {size}: "
            "raise tokens, or lower batch_tokens"
        )
    key = _TEXT_OF.get(stage["kind"])
    if key is not None:
        stage["data"] = {"train": text[key]} | stage.get("data", {})
    return stage
