"""``mambify card``: a saved model's card written again, with the figures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mambify.cli.console import quiet_libraries, stdout
from mambify.errors import InvalidOptionError, UnknownSourceError

EXAMPLE = "mambify card runs/half/student --results half.json"


def card(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that mambify saved a model in.")],
    results: Annotated[
        list[Path] | None, typer.Option(help="What `mambify evaluate --json` wrote; may be given several times.")
    ] = None,
) -> None:
    """Write a model's card again, with the results of an evaluation.

    README.md is replaced. The results are kept beside it, in provenance.json, and go along when the model is
    packed or saved elsewhere.
    """
    if not (model / "config.json").is_file():
        raise UnknownSourceError(f"{model} holds no config.json: it is not a model directory")
    quiet_libraries()
    from mambify.hub import update_card
    from mambify.provenance import read_results

    found = {path: read_results(path) for path in results or []}
    for path, result in found.items():
        _require_of(model, result, path)
    update_card(model, list(found.values()))
    stdout().print(f"card written: {model / 'README.md'}", markup=False)


def _require_of(model: Path, results: Mapping[str, Any], file: Path) -> None:
    """Raises InvalidOptionError for figures of a model that lies elsewhere; one that was moved since is believed."""
    from mambify.families.aliases import find_alias

    name = results.get("model")
    if name is None:
        return
    place = Path(name) if Path(name).exists() else find_alias(name)
    if place is not None and place.resolve() != model.resolve():
        raise InvalidOptionError(f"{file} has the figures of '{name}', which is not {model}: evaluate that")
