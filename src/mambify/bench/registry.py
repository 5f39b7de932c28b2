"""Which benchmarks there are, and running one by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from mambify.bench import decode, inits, ops, synthesize, train
from mambify.bench.clock import copy_bandwidth
from mambify.bench.plot import plot_decode, plot_inits, plot_ops, plot_recipes, plot_synthesize, plot_train
from mambify.errors import InvalidOptionError, did_you_mean
from mambify.experiments.registry import EXPERIMENTS
from mambify.machine import environment

Progress = Callable[[int, int], None]


class Benchmark(NamedTuple):
    """What can be asked of a benchmark.

    Attributes:
        run: (device, progress, only) → result as plain JSON values; where it learns, also ``text`` and ``tokens``.
        table: the result for people.
        plot: draws the result into a file.
        learns: takes a text, and a number of tokens to train on.
    """

    run: Callable[..., dict[str, Any]]
    table: Callable[[dict[str, Any]], Table]
    plot: Callable[[dict[str, Any], Path], None]
    learns: bool = False


#: a new benchmark is a file and a row here
BENCHMARKS: dict[str, Benchmark] = {
    "ops": Benchmark(ops.run, ops.table, plot_ops),
    "train": Benchmark(train.run, train.table, plot_train),
    "synthesize": Benchmark(synthesize.run, synthesize.table, plot_synthesize),
    "decode": Benchmark(decode.run, decode.table, plot_decode),
    "inits": Benchmark(inits.run, inits.table, plot_inits, learns=True),
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
    progress: Progress | None = None,
    only: str | None = None,
    text: str | None = None,
    tokens: int | None = None,
) -> dict[str, Any]:
    """Runs one benchmark; the result says on which machine and which versions.

    Args:
        only: leaves out what is not called so: an operation (``ops``), a curve (``train``), a way (``synthesize``),
            parts with commas between them (``decode``), an initialisation (``inits``).
        text, tokens: for benchmarks that learn; see :func:`mambify.bench.inits.run`.

    Raises:
        InvalidOptionError: there is no such benchmark, nothing in it is called ``only``, or it does not learn and is
            given something to.
    """
    (name,) = names_of(name)
    learning = {key: value for key, value in (("text", text), ("tokens", tokens)) if value is not None}
    if learning and not BENCHMARKS[name].learns:
        raise InvalidOptionError(f"'{name}' trains nothing: --{next(iter(learning))} is for a benchmark that does")
    machine = environment(device) | {
        "load_average": os.getloadavg()[0],  # of the minute before: what else was running
        "copy_bytes_per_second": copy_bandwidth(device),
    }
    result = BENCHMARKS[name].run(device, progress or (lambda _, __: None), only, **learning)
    if not result["results"]:
        raise InvalidOptionError(f"nothing in '{name}' is called '{only}'")
    return {"benchmark": name, "machine": machine} | result
