"""Which benchmarks there are, and running one by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from mambify.bench import decode, exported, inits, laws, ops, speculate, synthesize, train, verify
from mambify.bench.clock import copy_bandwidth
from mambify.bench.decode_plots import plot_decode, plot_export, plot_laws, plot_speculate, plot_verify
from mambify.bench.plot import plot_inits, plot_ops, plot_recipes, plot_synthesize, plot_train
from mambify.bench.sheet import Progress, Sheet, last_row, no_progress
from mambify.errors import InvalidOptionError, MambifyError, did_you_mean
from mambify.experiments.jobs import Report, Say, no_report
from mambify.experiments.registry import EXPERIMENTS
from mambify.machine import environment


class Benchmark(NamedTuple):
    """What can be asked of a benchmark.

    Attributes:
        run: (device, sheet, only): fills the sheet; by name also takes those of ``options`` that are given.
        table: the result for people.
        plot: draws the result into a file.
        options: what else it can be told.
    """

    run: Callable[..., None]
    table: Callable[[dict[str, Any]], Table]
    plot: Callable[[dict[str, Any], Path], None]
    options: tuple[str, ...] = ()


#: a new benchmark is a file and a row here
BENCHMARKS: dict[str, Benchmark] = {
    "ops": Benchmark(ops.run, ops.table, plot_ops),
    "train": Benchmark(train.run, train.table, plot_train),
    "synthesize": Benchmark(synthesize.run, synthesize.table, plot_synthesize),
    "decode": Benchmark(decode.run, decode.table, plot_decode),
    "export": Benchmark(exported.run, exported.table, plot_export, ("target",)),
    "inits": Benchmark(inits.run, inits.table, plot_inits, ("text", "tokens", "out")),
    "verify": Benchmark(verify.run, verify.table, plot_verify),
    "speculate": Benchmark(speculate.run, speculate.table, plot_speculate, ("target", "draft", "prompts")),
    "laws": Benchmark(
        laws.run,
        laws.table,
        plot_laws,
        ("target", "draft", "prompts", "limit", "max_new_tokens", "samples"),
    ),
}
#: what draws an experiment (:data:`mambify.experiments.registry.EXPERIMENTS`); these are not among ``all``
EXPERIMENT_PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {"recipes": plot_recipes}
ALL = "all"


def names_of(name: str) -> list[str]:
    """The benchmarks, or the experiment, that ``name`` stands for.

    Raises:
        InvalidOptionError: none.
    """
    if name == ALL:
        return list(BENCHMARKS)
    if name not in BENCHMARKS and name not in EXPERIMENTS:
        raise InvalidOptionError(f"no benchmark '{name}': {did_you_mean(name, [*BENCHMARKS, *EXPERIMENTS, ALL])}")
    return [name]


def run_benchmark(
    name: str,
    *,
    device: str,
    progress: Progress = no_progress,
    say: Say | None = None,
    report: Report = no_report,
    only: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs one benchmark; the result says on which machine and which versions.

    A case that fails has ``error`` in its row, and the others go on. ``failed_rows`` says how many such rows there are
    of our own code; where there are none, it is left out.

    Args:
        progress: told how many cases are done, of how many.
        say: told every row in words as it is found, and where our own code fails.
        report: given the result as far as it goes after every row; ``finished`` is false in it, and in the last one,
            which is returned, left out.
        only: leaves out what is not called so: an operation (``ops``), a curve (``train``), a way (``synthesize``),
            a part (``verify``, ``speculate``), parts or initialisations with commas between them (``decode``,
            ``export``, ``inits``).
        options: see the benchmark's own ``run``.

    Raises:
        InvalidOptionError: there is no such benchmark, nothing in it is called ``only``, or it takes no such option.
    """
    (name,) = names_of(name)
    for option in options:
        if option not in BENCHMARKS[name].options:
            raise InvalidOptionError(f"'{name}' takes no --{option}")
    machine = environment(device) | {
        "load_average": os.getloadavg()[0],  # of the minute before: what else was running
        "copy_bytes_per_second": copy_bandwidth(device),
    }

    def result(sheet: Sheet, **unfinished: bool) -> dict[str, Any]:
        failed = {"failed_rows": sheet.failed} if sheet.failed else {}
        head = {"benchmark": name, **unfinished, **failed, "machine": machine}
        return head | sheet.facts | {"results": [*sheet.rows]}

    def found(sheet: Sheet) -> None:
        so_far = result(sheet, finished=False)
        report(so_far)
        if say is not None:
            row = last_row(BENCHMARKS[name].table(so_far))
            say(f"{name} {sheet.done + 1}/{sheet.total}, {sheet.seconds:.1f} s: {row}")
            if sheet.trace:
                say(sheet.trace)

    sheet = Sheet(device, progress=progress, found=found)
    BENCHMARKS[name].run(device, sheet, only, **options)
    if not sheet.rows:
        raise InvalidOptionError(f"nothing in '{name}' is called '{only}'")
    return result(sheet)


def plot_benchmark(result: dict[str, Any], path: Path) -> None:
    """Draws what was measured; rows that failed are left out.

    Raises:
        MambifyError: all of them failed.
    """
    rows = [row for row in result["results"] if "error" not in row]
    if not rows:
        raise MambifyError(f"every row of '{result['benchmark']}' failed: there is nothing to draw")
    BENCHMARKS[result["benchmark"]].plot(result | {"results": rows}, path)
