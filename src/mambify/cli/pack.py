"""``mambify pack``: a student without its teacher's weights, as a small directory or an installable package."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mambify.cli import options
from mambify.cli.console import print_json, quiet_libraries, stdout, working
from mambify.io import require_apart, require_new

EXAMPLE = "mambify pack runs/half/student --out half-mixers"


def pack(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Directory for the mixers, or for the package.")],
    base: Annotated[
        str | None, typer.Option(help="What gives the other weights; the teacher that the student names by default.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the stored weights: bfloat16, float16, float32 or auto.")] = "bfloat16",
    alias: Annotated[
        str | None, typer.Option(help="Write a Python package that makes the model known by this name.")
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Save a student without what it has from its teacher.

    The directory loads like any model: the base's weights are read and the mixers put in. A base whose
    weights are not the very same is refused.
    """
    require_new(out, overwrite=overwrite)
    require_apart(out, model)
    quiet_libraries()
    from mambify.families import pack as packing

    with working(f"packing {model}", quiet=json):
        packed = packing.pack(model, out, base=base, dtype=dtype, alias=alias, overwrite=overwrite)
    result: dict[str, Any] = asdict(packed) | {"model": str(packed.model), "out": str(out)}
    if json:
        print_json(result)
    else:
        _show(result, alias)


def _show(result: dict[str, Any], alias: str | None) -> None:
    from mambify.cli.plans import facts_table
    from mambify.evaluate.report.quantities import compact

    table = facts_table()
    table.add_row("base", f"{result['base']}, fingerprint {result['fingerprint'][:12]}")
    table.add_row("kept from it", f"{compact(result['num_kept'])} parameters")
    table.add_row("stored", f"{compact(result['num_new'])} parameters, {_megabytes(result['weight_bytes'])}")
    table.add_row("in all", f"{_megabytes(result['total_bytes'])} in {result['model']}")
    console = stdout()
    console.print(table)
    if alias is not None:
        console.print(f"pip install --no-deps {result['out']}, and the model is called {alias}", markup=False)


def _megabytes(size: int) -> str:
    """Decimal megabytes, as package indexes count."""
    return f"{size / 1e6:.1f} MB"
