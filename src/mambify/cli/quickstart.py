"""``mambify quickstart``: the whole way at once on the embedded teacher; what ``make demo`` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mambify.cli import options
from mambify.cli.console import announcer, print_json, progress_bar, quiet_libraries
from mambify.cli.distill import StageBars
from mambify.io import require_new

EXAMPLE = "mambify quickstart --out quickstart"


def quickstart(
    out: Annotated[Path, typer.Option(help="Directory for the student, its data and the report.")] = Path("quickstart"),
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Do all of it once on a small real teacher, in minutes.

    Convert, distil, evaluate and generate; writes the student and a report.
    """
    require_new(out, overwrite=overwrite)
    quiet_libraries()
    from mambify.workflows.quickstart import quickstart as run

    place = options.pick_device(device)
    with progress_bar(quiet=json, transient=False) as bars:
        tasks: dict[str, object] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total, note="")
            bars.update(tasks[step], completed=done, total=total)  # type: ignore[arg-type]

        report = run(
            out,
            device=place,
            overwrite=overwrite,
            announce=announcer(quiet=json),
            listener=StageBars(bars),
            progress=progress,
        )
    if json:
        print_json(report)
