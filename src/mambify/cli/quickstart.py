"""``mambify quickstart``: the whole way at once on the embedded teacher; what ``make demo`` runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mambify.cli import options
from mambify.cli.console import announcer, print_json, progress_bar, quiet_libraries, stdout
from mambify.cli.distill import StageBars
from mambify.io import require_new

if TYPE_CHECKING:
    from rich.progress import TaskID

EXAMPLE = "mambify quickstart --out quickstart"


def quickstart(
    out: Annotated[Path, typer.Option(help="Directory for the student, its text and the report.")] = Path("quickstart"),
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Do all of it once on a small real teacher, in minutes.

    Sample text, convert, distil, evaluate and ask; writes the student and a report. Interrupted and started again, it
    continues where it was.
    """
    if not (out / "settings.json").is_file():
        require_new(out, overwrite=overwrite)
    quiet_libraries()
    from mambify.workflows.quickstart import quickstart as run

    place = options.pick_device(device)
    with progress_bar(quiet=json, transient=False) as bars:
        announce = announcer(quiet=json, console=bars.console)
        tasks: dict[str, TaskID] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total, note="")
            bars.update(tasks[step], completed=done, total=total)

        report = run(
            out,
            device=place,
            overwrite=overwrite,
            announce=announce,
            listener=StageBars(bars, announce),
            progress=progress,
        )
    if json:
        print_json(report)
    else:
        _show(report, out)


def _show(report: dict[str, Any], out: Path) -> None:
    from rich.table import Table

    from mambify.evaluate.report.quantities import significant

    teacher, student = report["teacher"], report["student"]
    console = stdout()
    for sample in report["samples"]:
        answers = Table.grid(padding=(0, 2))
        answers.add_column(style="dim")
        answers.add_column(overflow="fold")
        for name in ("prompt", "teacher", "student"):
            answers.add_row(name, sample[name])
        console.print(answers)
        console.print()
    table = Table(title=report["title"], caption=report["device"], title_justify="left", caption_justify="left")
    for heading in ("", "teacher", "student"):
        table.add_column(heading, justify="right" if heading else "left")
    ratio = significant(student["perplexity_ratio"])
    table.add_row(
        "perplexity, held out",
        significant(teacher["perplexity"]),
        f"{significant(student['perplexity'])} ({ratio}×)",
    )
    table.add_row("KL to the teacher", "", significant(student["kl"]))
    table.add_row("likeliest token agrees", "", f"{student['top1_agreement']:.1%}")
    table.add_row("seconds in all", "", f"{sum(report['seconds'].values()):.0f}")
    console.print(table)
    console.print(f"student: {out / 'student'}\nreport:  {out / 'report.html'}", markup=False)
    console.print(f"talk with it: mambify chat {out / 'student'}", markup=False)
