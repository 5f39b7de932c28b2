"""``mambify select``: which layers should keep attention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mambify.cli import options
from mambify.cli.console import (
    announcer,
    print_json,
    print_table,
    progress_bar,
    quiet_libraries,
    require_writable_file,
    stdout,
)
from mambify.errors import InvalidOptionError
from mambify.io import write_json

if TYPE_CHECKING:
    from rich.progress import TaskID

EXAMPLE = "mambify select smollm2 --budget 0.25 --text data/smollm2 --out layers.json"


def select(
    teacher: options.Teacher,
    text: Annotated[
        str, typer.Option(help="Synthesized directory or text: its training side is learned, the rest scored.")
    ],
    budget: Annotated[
        float | None, typer.Option(help="Share of the layers that keep attention; 0.5 by default.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Bytes one sequence may hold instead: 40M; at --memory-context tokens.")
    ] = None,
    memory_context: Annotated[
        str | None, typer.Option(help="Context length that --max-memory speaks of; 32768 by default.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="restore-one, leave-one-out, trial, greedy, uniform; or all but greedy: all.")
    ] = "all",
    mixer: Annotated[str, typer.Option(help="What replaces attention: mamba2 or mamba1.")] = "mamba2",
    init: Annotated[str, typer.Option(help="How a mixer starts from attention.")] = "identity",
    align_tokens: Annotated[
        str, typer.Option(help="Tokens to align the mixers on before scoring; 0: calibrate only.")
    ] = "2M",
    score_tokens: Annotated[str, typer.Option(help="Held-out tokens to score on.")] = "32k",
    context_length: Annotated[int, typer.Option(help="Tokens of a block.")] = 512,
    run: Annotated[
        Path | None, typer.Option(help="Keep the alignment in this directory, to continue or reuse it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report to this file as JSON.")] = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Measure which layers' attention is worth keeping.

    Every layer gets a mixer that is aligned with its attention; then each layer is scored by what exchanging it does to
    the model. The even spread stands beside every choice as the control.
    """
    if out is not None:
        require_writable_file(out)
    tokens = 0 if align_tokens.strip() == "0" else options.parse_tokens(align_tokens)
    scored, context = options.parse_tokens(score_tokens), options.parse_tokens(memory_context or "32768")
    most = None if max_memory is None else options.parse_tokens(max_memory)
    if budget is not None and most is not None:
        raise InvalidOptionError("--budget and --max-memory both say how much attention there may be: give one")
    if memory_context is not None and most is None:
        raise InvalidOptionError("--memory-context is the context length of --max-memory: give that too")
    if scored < 2 * context_length:
        raise InvalidOptionError(f"--score-tokens {scored} is too little: two blocks are {2 * context_length}")
    share = 0.5 if budget is None and most is None else budget
    quiet_libraries()
    from mambify.workflows.select import Budget
    from mambify.workflows.select import select as choose

    place = options.pick_device(device)
    with progress_bar(quiet=json) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, note="")
            bars.update(tasks[name], completed=done)

        report = choose(
            teacher,
            text,
            Budget(share=share, max_bytes=most, context=context),
            method=method,
            mixer=mixer,
            init=init,
            align_tokens=tokens,
            score_tokens=scored,
            context_length=context_length,
            device=place,
            run=run,
            announce=announcer(quiet=json, console=bars.console),
            listener=lambda told: tell("align", told.step, told.num_steps),
            progress=tell,
        )
    if out is not None:
        write_json(out, report)
    if json:
        print_json(report)
        return
    _show(report)
    if out is not None:
        stdout().print(f"report written to {out}", markup=False)


def _show(report: dict[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    methods: dict[str, Any] = report["methods"]
    scores = Table(title="what each layer's attention is worth (* kept)", title_justify="left", box=SIMPLE)
    scores.add_column("layer", justify="right")
    for name in methods:
        scores.add_column(name, justify="right")
    for index in range(report["num_layers"]):
        cells = []
        for found in methods.values():
            mark = "*" if index in found["attention_layers"] else " "
            cells.append(f"{found['worth'][str(index)]:.4f} {mark}")
        scores.add_row(str(index), *cells)
    print_table(scores)
    choices = Table(title="the choices, untrained, on other held-out text", title_justify="left", box=SIMPLE)
    for heading in ("method", "KL", "attention in", "not in uniform", "only in uniform"):
        choices.add_column(heading, justify="right" if heading == "KL" else "left")
    for name, found in methods.items():
        choices.add_row(
            name,
            f"{found['kl']:.4f}",
            *(_list(found[key]) for key in ("attention_layers", "not_in_uniform", "only_in_uniform")),
        )
    print_table(choices)
    layers = report["attention_layers"]
    console = stdout()
    console.print(f"choice: {report['best']}. To use it:", markup=False)
    console.print(f"  mambify convert … --attention-layers {_list(layers)}", markup=False)
    console.print(f"  student: {{attention_layers: [{', '.join(map(str, layers))}]}}", markup=False)


def _list(layers: list[int]) -> str:
    return ",".join(map(str, layers)) or "none"
