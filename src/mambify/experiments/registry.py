"""Which experiments there are, what each takes, and running one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.table import Table

from mambify.errors import InvalidOptionError, MambifyError
from mambify.experiments import paper, recipes
from mambify.experiments.jobs import Report, Say, no_report
from mambify.experiments.request import Request
from mambify.experiments.tables import TABLES
from mambify.machine import environment

_ALWAYS = (
    "tokens", "recipes", "teacher", "data", "text", "out", "parallel", "seed", "batch_tokens", "context_length",
    "max_tokens", "changes",
)  # fmt: skip
_TASKS = ("tasks", "data_dir", "limit")


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        execute: (request, device, say) → result as plain JSON values.
        table, notes: the result for people, and lines below it.
        options: the fields of :class:`Request` that say something in it.
        defaults: of those, what they are where nothing is said.
        single: it takes one budget and one recipe.
    """

    execute: Callable[..., dict[str, Any]]
    table: Callable[[Mapping[str, Any]], Table]
    notes: Callable[[Mapping[str, Any]], list[str]]
    options: tuple[str, ...]
    defaults: Mapping[str, Any]
    single: bool = False


#: number of a table → what it takes beside the options of all experiments
_OF_TABLE = {
    6: ("instruct", "preferences", "heldout_preferences", "student", "tuning_tokens", "tuning"),
    7: (),
    8: ("attention", *_TASKS),
    9: ("attention", *_TASKS),
}

EXPERIMENTS: dict[str, Experiment] = {
    "recipes": Experiment(recipes.run, recipes.table, recipes.notes, (*_ALWAYS, "attention", *_TASKS), recipes.DEFAULTS)
} | {
    f"paper-table-{number}": Experiment(
        partial(paper.run, spec),
        paper.table,
        paper.notes,
        (*_ALWAYS, *_OF_TABLE[number]),
        {"recipes": (spec.recipe,), "tokens": (paper.DEFAULT_TOKENS,)},
        single=True,
    )
    for number, spec in TABLES.items()
}


def run_experiment(
    name: str, *, device: str, say: Say | None = None, report: Report = no_report, **options: Any
) -> dict[str, Any]:
    """Runs one experiment, or what is left of it; the result says on which machine and which versions.

    Args:
        say: told in words what begins, and how far runs are.
        report: given the result as far as it goes, whenever a run is done.
        options: fields of :class:`~mambify.experiments.request.Request`.

    Raises:
        InvalidOptionError: more than one budget or recipe where the experiment takes one.
        UsageError: nothing that could be run; see :class:`Request`, :func:`recipes.run` and :func:`paper.run`.
        MambifyError: every run failed.
    """
    experiment = EXPERIMENTS[name]
    request = Request(**{**experiment.defaults, **options})
    if experiment.single and (len(request.tokens) > 1 or len(request.recipes) > 1):
        raise InvalidOptionError(f"{name} takes one number of tokens and one recipe")
    if experiment.single and "@" in request.recipes[0]:
        raise InvalidOptionError(f"{name} takes a recipe without a budget of its own: say --tokens")
    head = {"benchmark": name, "machine": environment(device)}
    result = experiment.execute(
        request, device=device, say=say or (lambda _: None), report=lambda so_far: report(head | so_far)
    )
    if not result["results"]:
        label, reason = next(iter(result["failed"].items()))
        raise MambifyError(f"every run failed, {label} for one: {reason}")
    return head | result
