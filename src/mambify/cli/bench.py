"""``mambify bench``: runs a benchmark on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mambify.cli import options
from mambify.cli.console import print_json, print_table, progress_bar, quiet_libraries, require_writable_file, stdout
from mambify.errors import InvalidOptionError
from mambify.io import write_json

EXAMPLE = "mambify bench ops --json benchmarks/ops.json"
_STDOUT = Path("-")


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="ops, train, synthesize, inits, or all of them.")],
    only: Annotated[
        str | None,
        typer.Option(help="A part: one operation (ops), curve (train), way (synthesize), initialisation (inits)."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="What inits learns and is scored on; else sampled text.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens that inits trains each start on: 1M; 0 for none.")] = None,
    device: options.Device = None,
    json: Annotated[Path | None, typer.Option(help="Write the result to this file as JSON; - is stdout.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the result into this file (.svg, .png, .pdf).")] = None,
) -> None:
    """Measure speed on this machine, and what initialisations are worth.

    Every speed stands beside others' code for the same, and beside what the memory can do.
    """
    if json is not None and json != _STDOUT:
        require_writable_file(json)
    quiet = json == _STDOUT
    quiet_libraries()
    from mambify.distill.parallel import leave, process_count, process_rank

    if process_count() > 1 and name != "train":
        raise InvalidOptionError("only 'bench train' runs in several processes")
    from mambify.bench.plot import require_matplotlib
    from mambify.bench.registry import BENCHMARKS, names_of, run_benchmark

    names = names_of(name)
    if only is not None and len(names) > 1:
        raise InvalidOptionError("--only names a part of one benchmark: name the benchmark instead of 'all'")
    if plot is not None:
        if len(names) > 1:
            raise InvalidOptionError("--plot draws one benchmark: name it instead of 'all'")
        if plot.suffix not in (".svg", ".png", ".pdf"):
            raise InvalidOptionError(f"cannot draw into '{plot}': end its name in .svg, .png or .pdf")
        require_writable_file(plot)
        require_matplotlib()
    place = options.pick_device(device)
    count = None if tokens is None else 0 if tokens.strip() == "0" else options.parse_tokens(tokens)
    results = []
    first = process_rank() == 0
    with progress_bar(quiet=quiet or not first) as bars:
        for each in names:
            task = bars.add_task(each, total=None, note="")
            results.append(
                run_benchmark(
                    each,
                    device=place,
                    only=only,
                    text=text,
                    tokens=count,
                    progress=lambda done, total, task=task: bars.update(task, completed=done, total=total),  # type: ignore[misc]
                )
            )
    leave()
    if not first:
        return
    if plot is not None:
        BENCHMARKS[name].plot(results[0], plot)
    report = results[0] if name != "all" else {"benchmarks": results}
    if quiet:
        print_json(report)
        return
    for each, result in zip(names, results, strict=True):
        print_table(BENCHMARKS[each].table(result))
    if json is not None:
        write_json(json, report)
        stdout().print(f"figures written to {json}", markup=False)
