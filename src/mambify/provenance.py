"""Where a student comes from: the recipe, what was trained on how much, with what, and how it scored.

It stands beside the weights as ``provenance.json`` and is what a model card tells of a training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mambify.errors import CheckpointError, InvalidOptionError
from mambify.io import read_json, write_json

_FILE = "provenance.json"

#: what an evaluation may hold, by its part of the JSON
MEASURED = ("sources", "tasks", "preferences")


@dataclass(frozen=True)
class Provenance:
    """What is known of a student's making; what is not known is left out, never filled in.

    Attributes:
        recipe: the recipe with every default, as the YAML reads.
        stages: of each finished stage, in order: ``stage``, ``attention``, ``steps``, ``tokens``, ``seconds``.
        environment: device and versions.
        results: what ``mambify evaluate --json`` wrote.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    stages: Sequence[Mapping[str, Any]] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens that all stages read together; one that was read twice counts twice."""
        return sum(stage["tokens"] for stage in self.stages)

    def write(self, directory: Path) -> None:
        """Writes ``provenance.json``."""
        write_json(directory / _FILE, asdict(self))

    def with_results(self, results: Mapping[str, Any]) -> Provenance:
        """With further results; a text that was measured before has its new figures."""
        merged = dict(self.results)
        for key, value in results.items():
            former = merged.get(key)
            merged[key] = {**former, **value} if isinstance(former, dict) and isinstance(value, dict) else value
        return replace(self, results=merged)


def read_provenance(directory: Path) -> Provenance | None:
    """What ``provenance.json`` of a model's directory says; ``None`` where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = directory / _FILE
    if not path.is_file():
        return None
    try:
        return Provenance(**read_json(path))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable provenance: {' '.join(str(error).split())}") from error


def forget_provenance(directory: Path) -> None:
    """Removes ``provenance.json`` where there is one."""
    (directory / _FILE).unlink(missing_ok=True)


def read_results(path: Path) -> dict[str, Any]:
    """What ``mambify evaluate --json`` wrote to ``path``.

    Raises:
        InvalidOptionError: it is something else.
    """
    try:
        results = read_json(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InvalidOptionError(f"cannot read results {path}: {reason}") from error
    if not isinstance(results, dict) or not any(isinstance(results.get(part), dict) for part in MEASURED):
        raise InvalidOptionError(f"{path} holds no results: give a file that `mambify evaluate --json` wrote")
    return results
