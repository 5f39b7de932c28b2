"""``mambify card``: a saved model's card written again, with the figures of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mambify.cli.console import quiet_libraries, stdout
from mambify.errors import UnknownSourceError

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

    update_card(model, [read_results(path) for path in results or []])
    stdout().print(f"card written: {model / 'README.md'}", markup=False)
