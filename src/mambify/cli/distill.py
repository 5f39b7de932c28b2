"""``mambify distill``: runs a recipe's stages, from the teacher to the finished student."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mambify.cli import options
from mambify.cli.console import announcer, print_json, print_table, progress_bar, quiet_libraries, stdout

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from mambify.distill.logs import Progress

_PREFERRED = "rewards/accuracies"
_SAY_EVERY = 15.0  # seconds
EXAMPLE = "mambify distill recipes/smollm2-50-probe.yaml stages.1.tokens=8M output=runs/longer"


def distill(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.yaml", help="What to distil, on what, in which stages; or preset:NAME.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changes to the recipe.")
    ] = None,
    device: options.Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where a run was begun.")] = False,
    json: options.Json = False,
) -> None:
    """Run a recipe, from the teacher to the finished student.

    Killed and started again, the same command continues from the last checkpoint. Several GPUs share the work when it
    is started with torchrun or accelerate launch: torchrun --nproc_per_node 8 -m mambify distill RECIPE.yaml
    """
    quiet_libraries()
    from mambify.distill.logs import read_metrics
    from mambify.distill.parallel import leave, process_rank
    from mambify.distill.recipe import load_recipe
    from mambify.distill.run import summaries
    from mambify.workflows.distill import distill as run_recipe

    checked = load_recipe(recipe, overrides or ())
    place = options.pick_device(device)
    first = process_rank() == 0
    with progress_bar(quiet=json or not first, transient=False) as bars:
        announce = announcer(quiet=json, console=bars.console)
        _, run = run_recipe(
            checked,
            overwrite=overwrite,
            device=place,
            listener=StageBars(bars, announce),
            announce=announce,
        )
    leave()
    if not first:
        return
    last = {row["stage"]: row for row in read_metrics(run / "metrics.jsonl")}
    stages = [summary | _final_figures(last.get(summary["stage"], {})) for summary in summaries(run)]
    result = {"run": str(run), "student": str(run / "student"), "stages": stages}
    if json:
        print_json(result)
    else:
        _show(result)


class StageBars:
    """Listens to a run: one bar a stage, with the loss beside it; where no bars are drawn, a line of words at times.

    Args:
        announce: says the lines.
    """

    def __init__(self, bars: Bars, announce: Callable[[str], None]) -> None:
        self.bars, self.announce = bars, announce
        self.tasks: dict[str, TaskID] = {}
        self.said: tuple[str, float] = "", 0.0  # of which stage a line spoke last, and when

    def __call__(self, progress: Progress) -> None:
        if progress.stage not in self.tasks:
            self.tasks[progress.stage] = self.bars.add_task(progress.stage, total=progress.num_steps, note="")
        shown = {
            name: value
            for name, value in _final_figures(progress.figures).items()
            if name not in ("top1_agreement", _PREFERRED)
        }
        note = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self.bars.update(self.tasks[progress.stage], completed=progress.step, note=note)
        if self.bars.console.is_terminal or not note:
            return
        stage, when = self.said
        last = progress.step == progress.num_steps
        if last or stage != progress.stage or time.monotonic() - when >= _SAY_EVERY:
            self.announce(f"{progress.stage}: step {progress.step:,} of {progress.num_steps:,}  {note}")
            self.said = progress.stage, time.monotonic()


def _final_figures(row: dict[str, Any]) -> dict[str, float]:
    return {name: row[name] for name in ("loss", "kl", "top1_agreement", _PREFERRED) if name in row}


def _show(result: dict[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    stages = result["stages"]
    figures = {"loss": ("loss", ".4f"), "kl": ("KL", ".4f"), "top1_agreement": ("agreement", ".1%")}
    figures[_PREFERRED] = "preferred", ".1%"
    shown = {name: figure for name, figure in figures.items() if any(name in stage for stage in stages)}
    table = Table(box=SIMPLE, pad_edge=False, caption="figures of the last steps, on training text")
    for heading in ("stage", "attention", "steps", "tokens", "seconds", *(heading for heading, _ in shown.values())):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in stages:
        table.add_row(
            stage["stage"],
            f"{stage['attention']:.0%}",
            f"{stage['steps']:,}",
            f"{stage['tokens']:,}",
            f"{stage['seconds']:.0f}",
            *(format(stage[name], form) if name in stage else "" for name, (_, form) in shown.items()),
        )
    print_table(table)
    stdout().print(f"student saved in {result['student']}", markup=False)
