"""Which benchmarks there are, and running one by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

from mambify.bench import ops
from mambify.bench.machine import describe_machine
from mambify.errors import InvalidOptionError, did_you_mean

Progress = Callable[[int, int], None]
#: (device, progress) → result as plain JSON values
Run = Callable[[str, Progress], dict[str, Any]]
Show = Callable[[dict[str, Any]], Table]

#: name → (what runs it, what makes a table of its result). A new benchmark is a file and a row here.
BENCHMARKS: dict[str, tuple[Run, Show]] = {
    "ops": (ops.run, ops.table),
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


def run_benchmark(name: str, *, device: str, progress: Progress | None = None) -> dict[str, Any]:
    """Runs one benchmark; the result says on which machine and which versions.

    Raises:
        InvalidOptionError: there is no such benchmark.
    """
    (name,) = names_of(name)
    run, _ = BENCHMARKS[name]
    return {"benchmark": name, "machine": describe_machine(device)} | run(device, progress or (lambda _, __: None))
