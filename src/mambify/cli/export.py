"""``mambify export``: a model in a form that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mambify.cli import options
from mambify.cli.console import print_json, print_table, quiet_libraries, stdout, working
from mambify.errors import InvalidOptionError, did_you_mean
from mambify.io import require_new

if TYPE_CHECKING:
    from mambify.export import Exported, Finding

EXAMPLE = "mambify export runs/half/student --format transformers --out half-stock"


def export(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Where the export goes: a directory, or for gguf a file.")],
    format: Annotated[str, typer.Option(help="transformers or gguf.")] = "transformers",
    dtype: Annotated[
        str | None, typer.Option(help="Of the stored weights; a format's own list, as stored by default.")
    ] = None,
    modelfile: Annotated[
        bool, typer.Option("--modelfile", help="gguf: write a Modelfile for Ollama beside it.")
    ] = False,
    pad_state: Annotated[
        bool, typer.Option("--pad-state", help="gguf: fill states up to what llama.cpp's CUDA kernel takes.")
    ] = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Write a model in a form that other tools read.

    What the form cannot carry exactly is refused with the reason, before any weight is read.
    """
    require_new(out, overwrite=overwrite)
    quiet_libraries()
    from mambify.export import FORMATS
    from mambify.families.load import load, load_config

    if format not in FORMATS:
        raise InvalidOptionError(f"unknown format '{format}': {did_you_mean(format, FORMATS)}")
    chosen = FORMATS[format]
    dtype = chosen.dtypes[0] if dtype is None else dtype
    if dtype not in chosen.dtypes:
        raise InvalidOptionError(f"{format} has no dtype '{dtype}': choose {', '.join(chosen.dtypes)}")
    flags = {"modelfile": modelfile, "pad_state": pad_state}
    for name, given in flags.items():
        if given and name not in chosen.flags:
            raise InvalidOptionError(f"--{name.replace('_', '-')} is no option of {format}")
    chosen.require(load_config(model))
    with working(f"loading {model}", quiet=json):
        loaded = load(model)
    with working(f"writing {out}", quiet=json):
        exported = chosen.write(
            loaded, out, dtype=dtype, overwrite=overwrite, **{name: flags[name] for name in chosen.flags}
        )
    result = _as_json(exported) | {"model": model, "format": format}
    if json:
        print_json(result)
    else:
        _show(exported, format)


def _as_json(exported: Exported) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(exported) | {"path": str(exported.path)}


def _show(exported: Exported, format: str) -> None:
    console = stdout()
    size = f"{exported.weight_bytes / 1e6:,.1f} MB of weights"
    console.print(f"{format}: {exported.path}, {exported.dtype}, {size}", markup=False)
    for note in exported.notes:
        console.print(note, markup=False)
    show_findings(exported.findings)


def show_findings(findings: tuple[Finding, ...]) -> None:
    """A table of what engines would trip over; nothing where there is nothing."""
    from rich.table import Table

    if not findings:
        return
    table = Table(title="what engines trip over", title_justify="left")
    for heading in ("engine", "field", "", "reason"):
        table.add_column(heading)
    for finding in findings:
        table.add_row(finding.engine, finding.field, finding.severity, finding.reason)
    print_table(table)
