"""Tables of arXiv 2408.15237 at small scale: its figures beside ours, and where the conclusions agree.

The paper's students have 8 billion parameters and 20 billion tokens; what can be held against it is not a number but an
order: which student is better than which. A conclusion is such an order, read off both columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from mambify.experiments.evaluation import Evaluation, check_evaluation
from mambify.experiments.jobs import Job, Report, Say, check, is_scored, no_report, outcome
from mambify.experiments.recipes import failures, short
from mambify.experiments.request import Request
from mambify.experiments.schedule import run_and_report
from mambify.experiments.texts import with_texts
from mambify.workflows.distill import check_plan

#: figures of which the smaller is the better
_SMALLER = ("perplexity", "ratio", "KL")


@dataclass(frozen=True)
class Conclusion:
    """An order of rows that the paper reports.

    Attributes:
        text: what it says.
        order: rows, the best first.
        theirs: the paper's figure that shows it.
        ours: our figures that it is looked for in; those that were not measured say nothing.
    """

    text: str
    order: tuple[str, ...]
    theirs: str
    ours: tuple[str, ...] = ("perplexity",)


@dataclass(frozen=True)
class Row:
    """One student of a table.

    Attributes:
        job: how it is made; ``None`` for the teacher.
        silenced: with its new mixers giving nothing.
    """

    job: Job | None
    silenced: bool = False


@dataclass(frozen=True)
class PaperTable:
    """One table.

    Attributes:
        title: what it shows.
        paper: row → figure → the paper's value.
        rows: row → our student of that name, for a budget of tokens.
        conclusions: what the paper's figures say.
        differs: what is not as in the paper, a sentence each.
        recipe: the preset that is used where none is asked for.
    """

    title: str
    paper: Mapping[str, Mapping[str, float]]
    rows: Callable[[Request], Mapping[str, Row]]
    conclusions: Sequence[Conclusion]
    differs: Sequence[str] = field(default=())
    recipe: str = "paper-tuned"


DEFAULT_TOKENS = 20_000_000


def run(spec: PaperTable, request: Request, *, device: str, say: Say, report: Report = no_report) -> dict[str, Any]:
    """Trains and scores every student of a table; those that fail are left out and named.

    Args:
        report: given what there is so far, whenever a run is done.

    Raises:
        UsageError: something that no run could be made of; nothing has been trained then.
    """
    request = with_texts(request, device=device, say=say)
    rows = spec.rows(request)
    jobs = [row.job for row in rows.values() if row.job is not None]
    silenced = {row.job.key for row in rows.values() if row.job is not None and row.silenced}
    wanted = [replace(job, silenced=job.key in silenced) for job in [*_origins(jobs), *jobs]]
    for job in wanted:
        if job.made is None:
            recipe = check(job)
            if job.after is None:
                check_plan(recipe)
    evaluation = Evaluation.of(request)
    check_evaluation(evaluation)

    def result(failed: Mapping[str, str]) -> dict[str, Any]:
        outcomes = {
            name: outcome(row.job, request.out, evaluation, silenced=row.silenced)
            for name, row in rows.items()
            if row.job is not None and is_scored(row.job, request.out, evaluation, silenced=row.silenced)
        }
        results = []
        for name, row in rows.items():
            if row.job is None and outcomes:
                some = next(iter(outcomes.values()))
                ours = figures(some, role="teacher")
            elif name in outcomes:
                ours = figures(outcomes[name])
            else:
                ours = {}
            results.append(
                {"row": name, "paper": dict(spec.paper.get(name, {})), "ours": ours} | outcomes.get(name, {})
            )
        return {
            "title": spec.title,
            "differs": list(spec.differs),
            "teacher": request.teacher,
            "recipe": request.recipes[0],
            "tokens": request.tokens[0],
            "student": request.student,
            "seed": request.seed,
            "evaluation": evaluation.as_json(),
            "results": results if outcomes else [],
            "conclusions": [agreement(conclusion, spec.paper, results) for conclusion in spec.conclusions],
            "failed": {job.label: failed[job.key] for job in wanted if job.key in failed},
        }

    return run_and_report(wanted, request, evaluation, result, device=device, say=say, report=report)


def _origins(jobs: Sequence[Job]) -> list[Job]:
    """What the jobs begin from, first ones first."""
    found: list[Job] = []
    for job in jobs:
        if job.after is not None:
            found += [*_origins([job.after]), job.after]
    return found


def figures(scores: Mapping[str, Any], *, role: str = "student") -> dict[str, float]:
    """Our figures of one model, by the names of the columns; the first text is the one without a name."""
    found: dict[str, float] = {}
    for number, (source, score) in enumerate(scores["sources"].items()):
        where = "" if not number else f" {Path(source).name}"
        found[f"perplexity{where}"] = score[role]["perplexity"]
        if role == "student":
            found[f"ratio{where}"] = score[role]["perplexity_ratio"]
            found[f"KL{where}"] = score[role]["kl"]
    preferences = scores.get("preferences")
    if preferences is not None:
        name = "accuracy" if role == "student" else "reference_accuracy"
        found["preferred"] = preferences[name]
        if role == "student":
            found["rewarded"] = preferences["reward_accuracy"]
    for task, result in scores.get("tasks", {}).items():
        metric = "acc_norm" if "acc_norm" in result["metrics"] else "acc"
        found[task] = result["metrics"][metric][role]
    if len(scores.get("tasks", {})) > 1:
        found["mean of tasks"] = scores["means"]["acc"][role]
    return found


def agreement(
    conclusion: Conclusion, paper: Mapping[str, Mapping[str, float]], results: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Whether the order of a conclusion is found in our figures.

    Returns:
        ``text``, the paper's values in that ``order``, and for each of our figures that all its rows have, the values
        and whether it ``agrees``.
    """
    found = {row["row"]: row["ours"] for row in results}
    ours = {}
    for figure in conclusion.ours:
        values = [found.get(name, {}).get(figure) for name in conclusion.order]
        if None not in values:
            ours[figure] = {"values": values, "agrees": in_order(values, figure)}
    return {
        "text": conclusion.text,
        "order": list(conclusion.order),
        "paper": {"figure": conclusion.theirs, "values": [paper[name][conclusion.theirs] for name in conclusion.order]},
        "ours": ours,
    }


def in_order(values: Sequence[float], figure: str) -> bool:
    """Whether each value is better than the next."""
    smaller = any(word in figure for word in _SMALLER)
    return all((a < b) if smaller else (a > b) for a, b in pairwise(values))


def table(result: Mapping[str, Any]) -> Table:
    """The paper's figures and ours: a row a student, or where there are more figures than students, a row a figure."""
    rows = result["results"]
    columns = [
        (side, figure)
        for side in ("paper", "ours")
        for figure in dict.fromkeys(figure for row in sorted(rows, key=lambda r: -len(r[side])) for figure in row[side])
    ]
    made_by = result["student"] or f"{result['recipe']}, {short(result['tokens'])} tokens a student"
    title = f"{result['title']}: {result['teacher']}, {made_by}"
    shown = Table(title=f"{title}; {result['machine']['device']}", title_justify="left", box=SIMPLE, pad_edge=False)
    cells = [
        [_value(row[side][figure], figure, side) if figure in row[side] else "" for side, figure in columns]
        for row in rows
    ]
    if len(columns) <= len(rows):
        shown.add_column("student")
        for side, figure in columns:
            shown.add_column(f"{side}\n{figure}", justify="right")
        for row, values in zip(rows, cells, strict=True):
            shown.add_row(row["row"], *values)
        return shown
    shown.add_column("figure")
    for row in rows:
        shown.add_column(row["row"], justify="right")
    for (side, figure), across in zip(columns, zip(*cells, strict=True), strict=True):
        shown.add_row(f"{side}: {figure}", *across)
    return shown


def notes(result: Mapping[str, Any]) -> list[str]:
    """What is to be said below the table, a line each: where the conclusions agree, what differs, and what failed."""
    differs = [f"Not as in the paper: {sentence}." for sentence in result["differs"]]
    return [*map(_sentence, result["conclusions"]), *_summary(result["conclusions"]), *differs, *failures(result)]


def _summary(conclusions: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many of the conclusions agree, by each of our figures; nothing where none was measured."""
    found: dict[str, list[bool]] = {}
    for conclusion in conclusions:
        for figure, one in conclusion["ours"].items():
            found.setdefault(figure, []).append(one["agrees"])
    parts = [f"{sum(agreed)} of {len(agreed)} by {figure}" for figure, agreed in found.items()]
    return [f"Conclusions that agree: {', '.join(parts)}."] if parts else []


def _value(value: float, figure: str, side: str) -> str:
    if side == "paper" or any(word in figure for word in _SMALLER):
        return f"{value:.4g}"
    return f"{value:.1%}"


def _sentence(conclusion: Mapping[str, Any]) -> str:
    paper = conclusion["paper"]
    known = f"{conclusion['text']} (paper: {_chain(paper['values'])})"
    if not conclusion["ours"]:
        return f"{known}: not measured."
    parts = [
        f"{'agrees' if found['agrees'] else 'DISAGREES'} by {figure} ({_chain(found['values'])})"
        for figure, found in conclusion["ours"].items()
    ]
    return f"{known}: {', '.join(parts)}."


def _chain(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
