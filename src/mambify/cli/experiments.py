"""The part of ``mambify bench`` that trains: options that experiments take, and what they print."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mambify.cli import options
from mambify.cli.console import announcer, print_json, print_table, stdout
from mambify.errors import InvalidOptionError, MambifyError
from mambify.io import write_json

#: field of an experiment's request → its option, where that is not called the same
_FLAGS = {"changes": "set", "tuning": "tune"}
#: fields that are lists of names with commas between
_LISTS = ("tokens", "recipes", "tasks")


def refuse_others(name: str, given: Mapping[str, Any], taken: Mapping[str, Collection[str]]) -> None:
    """Refuses options that say nothing in a benchmark.

    Args:
        given: option → value, of all that were given.
        taken: benchmark → the options that it takes.

    Raises:
        InvalidOptionError: names one of them, and the benchmarks that it is for.
    """
    for option in given:
        if option not in taken[name]:
            others = [other for other, known in taken.items() if option in known]
            flag = _FLAGS.get(option, option).replace("_", "-")
            raise InvalidOptionError(f"--{flag} says nothing in '{name}': it is for {', '.join(others)}")


def run(name: str, given: Mapping[str, Any], *, device: str | None, json: Path | None, plot: Path | None) -> None:
    """Runs an experiment, writes and prints what came of it.

    Args:
        given: option → value.
        json, plot: files to write; ``-`` for JSON is stdout.

    Raises:
        UsageError: see :func:`mambify.experiments.registry.run_experiment`.
        MambifyError: runs failed; the figures of the others have been written then.
    """
    from mambify.bench.registry import EXPERIMENT_PLOTS
    from mambify.experiments.registry import EXPERIMENTS, run_experiment

    if plot is not None and name not in EXPERIMENT_PLOTS:
        raise InvalidOptionError(f"'{name}' has no plot: --plot is for the others")
    values: dict[str, Any] = dict(given)
    for field in _LISTS:
        if field in values:
            values[field] = tuple(part.strip() for part in values[field].split(","))
    for field in ("data", "text", "changes", "tuning"):
        if field in values:
            values[field] = tuple(str(part) for part in values[field])
    if "tokens" in values:
        values["tokens"] = tuple(options.parse_tokens(part) for part in values["tokens"])
    for field in ("batch_tokens", "max_tokens", "tuning_tokens"):
        if field in values:
            values[field] = options.parse_tokens(values[field])
    quiet = json == Path("-")
    place = options.pick_device(device)

    def report(so_far: dict[str, Any]) -> None:
        if json is not None and not quiet:
            write_json(json, so_far)

    result = run_experiment(name, device=place, say=announcer(quiet=False), report=report, **values)
    if plot is not None:
        EXPERIMENT_PLOTS[name](result, plot)
    if json is not None and not quiet:
        write_json(json, result)
    if quiet:
        print_json(result)
    else:
        print_table(EXPERIMENTS[name].table(result))
        for line in EXPERIMENTS[name].notes(result):
            stdout().print(line, markup=False, soft_wrap=True)
        if json is not None:
            stdout().print(f"figures written to {json}", markup=False)
    if result["failed"]:
        label, reason = next(iter(result["failed"].items()))
        raise MambifyError(
            f"{len(result['failed'])} runs failed ({label}: {reason}); the same command tries them again, and them only"
        )
