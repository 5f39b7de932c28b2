"""``mambify draft``: a small model that guesses ahead for a large one, cut from it and trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mambify.cli import options
from mambify.cli.console import announcer, print_json, print_table, progress_bar, quiet_libraries, stdout
from mambify.cli.distill import StageBars

if TYPE_CHECKING:
    from collections.abc import Sequence

EXAMPLE = "mambify draft smollm2 --layers 2 --data data/smollm2-chat --tokens 50M --out runs/smollm2-draft"


def draft(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Whose tokens are guessed: any model or student.")],
    out: Annotated[Path, typer.Option(help="Directory for the draft; OUT.run beside it keeps the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Further changes to the recipe.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="How many layers of the target (2 by default), or which: 0,15,29.")
    ] = None,
    spread: Annotated[
        str | None, typer.Option(help="Which ones, where a number is given: even, ends or first.")
    ] = None,
    mixer: Annotated[
        str | None, typer.Option(help="keep (as in the target), attention, or mamba2 or mamba1 in place of it.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Text of the target, made by synthesize; may be given several times.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="To train on, however often the text is passed: 50M.")] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="Words that the draft's head knows, the text's most frequent; all by default.")
    ] = None,
    features: Annotated[
        bool | None,
        typer.Option("--features", help="The draft reads the target's hidden states too: more of it is accepted."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe to train by; recipes/smollm2-draft.yaml by default.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Held-out prompts to measure acceptance on.")] = 32,
    score_tokens: Annotated[str, typer.Option(help="Held-out tokens to compute expected acceptance on.")] = "64k",
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Cut a draft from a model, train it to guess that model's tokens, and measure what is accepted.

    Killed and started again, the same command continues from the last checkpoint.
    """
    chosen = _layers(layers)
    count = None if tokens is None else options.parse_tokens(tokens)
    scored = options.parse_tokens(score_tokens)
    options.require_positive("--prompts", prompts)
    quiet_libraries()
    from mambify.distill.parallel import leave
    from mambify.workflows.draft import Measure, Settings, draft_recipe
    from mambify.workflows.draft import draft as train

    settings = Settings(chosen, spread, mixer, tuple(data or ()), count, vocabulary, features, tuple(overrides or ()))
    checked = draft_recipe(target, settings, recipe=recipe, out=out)
    with progress_bar(quiet=json, transient=False) as bars:
        announce = announcer(quiet=json, console=bars.console)
        report = train(
            checked,
            out,
            measure=Measure(num_prompts=prompts, expected_tokens=scored),
            overwrite=overwrite,
            device=options.pick_device(device),
            listener=StageBars(bars, announce),
            announce=announce,
        )
    leave()
    if report is None:
        return
    if json:
        print_json({"draft": str(out), "run": checked.output} | report)
    else:
        _show(report, out, target)


def _layers(text: str | None) -> int | Sequence[int] | None:
    """``"2"`` is a number of layers, ``"0,29"`` says which."""
    if text is None or text.strip().isdecimal():
        return None if text is None else int(text)
    return options.parse_layers(text)


def _show(report: dict[str, Any], out: Path, target: str) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from mambify.engine import written_shares

    table = Table(box=SIMPLE, pad_edge=False)
    for heading in ("acceptance", "temperature", "drafted", "tokens a round", "by position"):
        table.add_column(heading, justify="left" if heading in ("acceptance", "by position") else "right")
    measured = [("measured on prompts", found) for found in report["measured"]]
    for how, found in [("expected on held-out text", report["expected"]), *measured]:
        table.add_row(
            how,
            f"{found['temperature']:g}",
            str(found["num_draft_tokens"]),
            f"{found['tokens_per_round']:.2f}",
            " ".join(written_shares(found["acceptance_by_position"])),
        )
    print_table(table)
    stdout().print(f"draft saved in {out}. To use it:", markup=False)
    stdout().print(f"  mambify generate {target} … --draft {out}", markup=False)
