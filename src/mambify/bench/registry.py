"""Which benchmarks there are, and running one by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from mambify.bench import ops, synthesize, train
from mambify.bench.clock import copy_bandwidth
from mambify.bench.plot import plot_ops, plot_synthesize, plot_train
from mambify.errors import InvalidOptionError, did_you_mean
from mambify.machine import environment

Progress = Callable[[int, int], None]


class Benchmark(NamedTuple):
    """What can be asked of a benchmark.

    Attributes:
        run: (device, progress, only) → result as plain JSON values.
        table: the result for people.
        plot: draws the result into a file.
    """

    run: Callable[[str, Progress, str | None], dict[str, Any]]
    table: Callable[[dict[str, Any]], Table]
    plot: Callable[[dict[str, Any], Path], None]


#: a new benchmark is a file and a row here
BENCHMARKS: dict[str, Benchmark] = {
    "ops": Benchmark(ops.run, ops.table, plot_ops),
    "train": Benchmark(train.run, train.table, plot_train),
    "synthesize": Benchmark(synthesize.run, synthesize.table, plot_synthesize),
}
ALL = "all"


def names_of(name: str) -> list[str]:
    """The benchmarks that ``name`` stands for.

    Raises:
        InvalidOptionError: none.
    """
    if name == ALL:
        return list(BENCHMARKS)
    if name not in BENCHMARKS:
        raise InvalidOptionError(f"no benchmark '{name}': {did_you_mean(name, [*BENCHMARKS, ALL])}")
    return [name]


def run_benchmark(
    name: str, *, device: str, progress: Progress | None = None, only: str | None = None
) -> dict[str, Any]:
    """Runs one benchmark; the result says on which machine and which versions.

    Args:
        only: leaves out what is not called so: an operation (``ops``), a curve (``train``), a way (``synthesize``).

    Raises:
        InvalidOptionError: there is no such benchmark, or nothing in it is called ``only``.
    """
    (name,) = names_of(name)
    machine = environment(device) | {
        "load_average": os.getloadavg()[0],  # of the minute before: what else was running
        "copy_bytes_per_second": copy_bandwidth(device),
    }
    result = BENCHMARKS[name].run(device, progress or (lambda _, __: None), only)
    if not result["results"]:
        raise InvalidOptionError(f"nothing in '{name}' is called '{only}'")
    return {"benchmark": name, "machine": machine} | result
