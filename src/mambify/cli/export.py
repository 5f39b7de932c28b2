"""``mambify export``: a model in a form that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mambify.cli import options
from mambify.cli.console import print_json, quiet_libraries, stdout, working
from mambify.errors import InvalidOptionError, did_you_mean
from mambify.io import require_apart, require_new

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mambify.export import Exported, Finding

EXAMPLE = "mambify export runs/half/student --format transformers --out half-stock"


def export(
    model: options.Model,
    out: Annotated[
        Path | None, typer.Option(help="Where the export goes: a directory, or for gguf a file; not with --check.")
    ] = None,
    format: Annotated[str, typer.Option(help="transformers or gguf.")] = "transformers",
    dtype: Annotated[
        str | None, typer.Option(help="Of the stored weights; a format's own list, as stored by default.")
    ] = None,
    split_heads: Annotated[
        int | None,
        typer.Option(help="transformers: cut each head into so many, for kernels that want a multiple of 8 heads."),
    ] = None,
    modelfile: Annotated[
        bool, typer.Option("--modelfile", help="gguf: write a Modelfile for Ollama beside it.")
    ] = False,
    pad_state: Annotated[
        bool, typer.Option("--pad-state", help="gguf: fill states up to what llama.cpp's CUDA kernel takes.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Say what engines would trip over, also in somebody else's; write nothing.")
    ] = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Write a model in a form that other tools read.

    What the form cannot carry exactly is refused with the reason, before any weight is read.
    """
    if check:
        for_writing = {
            "out": out,
            "dtype": dtype,
            "split-heads": split_heads,
            "modelfile": modelfile,
            "pad-state": pad_state,
        }
        for name, value in for_writing.items():
            if value not in (None, False):
                raise InvalidOptionError(f"--check writes nothing, and --{name} is for what is written: leave one out")
        quiet_libraries()
        _check(model, json=json)
        return
    if out is None:
        raise InvalidOptionError("say where the export goes: --out PATH (or --check to write nothing)")
    require_new(out, overwrite=overwrite)
    require_apart(out, model)
    quiet_libraries()
    from mambify.export import FORMATS
    from mambify.families.load import load, load_config

    if format not in FORMATS:
        raise InvalidOptionError(f"unknown format '{format}': {did_you_mean(format, FORMATS)}")
    chosen = FORMATS[format]
    dtype = chosen.dtypes[0] if dtype is None else dtype
    if dtype not in chosen.dtypes:
        raise InvalidOptionError(f"{format} has no dtype '{dtype}': choose {', '.join(chosen.dtypes)}")
    special = {"modelfile": modelfile, "pad_state": pad_state, "split_heads": split_heads}
    for name, given in special.items():
        if given and name not in chosen.options:
            raise InvalidOptionError(f"--{name.replace('_', '-')} is no option of {format}")
    chosen.require(load_config(model))
    with working(f"loading {model}", quiet=json):
        loaded = load(model)
    with working(f"writing {out}", quiet=json):
        exported = chosen.write(
            loaded, out, dtype=dtype, overwrite=overwrite, **{name: special[name] for name in chosen.options}
        )
    result = _as_json(exported) | {"model": model, "format": format}
    if json:
        print_json(result)
    else:
        _show(exported, format)


def _check(model: str, *, json: bool) -> None:
    from dataclasses import asdict

    from mambify.export.check import check

    findings = check(model)
    if json:
        print_json({"model": model, "findings": [asdict(finding) for finding in findings]})
    elif findings:
        show_findings(findings)
    else:
        stdout().print(f"{model}: nothing that engines would trip over", markup=False)


def _as_json(exported: Exported) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(exported) | {"path": str(exported.path)}


def _show(exported: Exported, format: str) -> None:
    console = stdout()
    size = f"{exported.weight_bytes / 1e6:,.1f} MB of weights"
    console.print(f"{format}: {exported.path}, {exported.dtype}, {size}", markup=False)
    for note in exported.notes:
        console.print(note, markup=False, soft_wrap=True)
    show_findings(exported.findings)


def show_findings(findings: Sequence[Finding]) -> None:
    """What engines would trip over, a line each."""
    for finding in findings:
        line = f"{finding.engine}, {finding.field} ({finding.severity}): {finding.reason}"
        stdout().print(line, markup=False, soft_wrap=True)
