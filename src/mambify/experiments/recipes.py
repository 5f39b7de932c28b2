"""``mambify bench recipes``: presets at several budgets, on the same text, and scored alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE
from rich.table import Table

from mambify.distill.presets import preset_file
from mambify.experiments.evaluation import Evaluation, check_evaluation
from mambify.experiments.jobs import Report, Say, check, is_done, no_report, outcome
from mambify.experiments.request import Request, parse_budget
from mambify.experiments.schedule import run_and_report
from mambify.experiments.students import student
from mambify.experiments.texts import with_texts
from mambify.workflows.distill import check_plan

OURS = "best"
DEFAULTS = {
    "recipes": ("paper", "paper-tuned", "mohawk-tuned", "radlads-tuned", OURS),
    "tokens": (5_000_000, 20_000_000),
}


def run(request: Request, *, device: str, say: Say, report: Report = no_report) -> dict[str, Any]:
    """Every preset at every budget, or at its own; those that fail are left out and named.

    Args:
        report: given what there is so far, whenever a run is done.

    Raises:
        UsageError: something that no run could be made of; nothing has been trained then.
    """
    request = with_texts(request, device=device, say=say)
    jobs = {
        (name, tokens): student(f"{name} {short(tokens)}", request, name, tokens) for name, tokens in runs_of(request)
    }
    for job in jobs.values():
        check_plan(check(job))
    evaluation = Evaluation.of(request)
    check_evaluation(evaluation)

    def result(failed: Mapping[str, str]) -> dict[str, Any]:
        results = [
            {"recipe": name, "about": about(name), "budget": tokens} | outcome(job, request.out, evaluation)
            for (name, tokens), job in jobs.items()
            if is_done(job, request.out, evaluation)
        ]
        return {
            "teacher": request.teacher,
            "attention": request.attention,
            "seed": request.seed,
            "evaluation": evaluation.as_json(),
            "results": results,
            "claims": claims(results, evaluation.sources),
            "failed": {job.label: failed[job.key] for job in jobs.values() if job.key in failed},
        }

    longest_first = [jobs[run] for run in sorted(jobs, key=lambda run: -run[1])]  # processes end at about the same time
    return run_and_report(longest_first, request, evaluation, result, device=device, say=say, report=report)


def runs_of(request: Request) -> list[tuple[str, int]]:
    """Preset and budget of every student, small budgets first; ``paper@45M`` has its own, ``paper`` the request's."""
    parts = [entry.partition("@") for entry in request.recipes]
    found = [
        (name, tokens) for name, _, own in parts for tokens in ([parse_budget(own, name)] if own else request.tokens)
    ]
    return sorted(dict.fromkeys(found), key=lambda run: run[1])


def about(preset: str) -> str:
    """What a preset says of itself."""
    said: str = yaml.safe_load(Path(preset_file(preset)).read_text(encoding="utf-8"))["about"]
    return said


def claims(results: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> list[dict[str, Any]]:
    """At how many tokens ``best`` has the KL that each other recipe ends with, on each text.

    ``best_tokens`` is interpolated between budgets, straight in the logarithms of tokens and KL. Where its smallest
    budget is enough already, ``bound`` is ``at most``; where its largest is not, there is no number.
    """
    found = []
    for source in sources:
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in sorted(results, key=lambda row: int(row["tokens"])):
            curves.setdefault(row["recipe"], []).append((row["tokens"], row["sources"][source]["student"]["kl"]))
        ours = curves.pop(OURS, [])
        for name, curve in curves.items() if ours else ():
            tokens, kl = curve[-1]
            needed, bound = tokens_to_reach(kl, ours)
            found.append(
                {
                    "text": source,
                    "recipe": name,
                    "tokens": tokens,
                    "kl": kl,
                    "best_tokens": needed,
                    "bound": bound,
                    "share": None if needed is None else needed / tokens,
                    "at_most_a_tenth": needed is not None and needed <= tokens / 10,
                }
            )
    return found


def tokens_to_reach(kl: float, curve: Sequence[tuple[float, float]]) -> tuple[float | None, str]:
    """Where a curve of (tokens, KL), fewest tokens first, first comes down to ``kl``.

    Returns:
        Tokens, and how they are known: ``interpolated``, ``at most`` (the first point is below), or ``None`` and
        ``not reached``.
    """
    if curve[0][1] <= kl:
        return curve[0][0], "at most"
    for (tokens, before), (more, after) in pairwise(curve):
        if after <= kl:
            part = math.log(before / kl) / math.log(before / after)
            return tokens * (more / tokens) ** part, "interpolated"
    return None, "not reached"


def table(result: Mapping[str, Any]) -> Table:
    """The rows of :func:`run` for people."""
    sources = result["evaluation"]["sources"]
    shown = Table(
        title=f"{result['teacher']}, {result['attention']:.0%} attention; {result['machine']['device']}",
        title_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    shown.add_column("recipe")
    for heading in ("tokens", "seconds"):
        shown.add_column(heading, justify="right")
    for source in sources:
        for heading in ("KL", "ratio", "agreement"):
            shown.add_column(f"{Path(source).name}\n{heading}", justify="right")
    for row in result["results"]:
        cells = [row["recipe"], f"{row['tokens']:,}", f"{row['seconds']:.0f}"]
        for source in sources:
            ours = row["sources"][source]["student"]
            cells += [f"{ours['kl']:.4f}", f"{ours['perplexity_ratio']:.3f}", f"{ours['top1_agreement']:.1%}"]
        shown.add_row(*cells)
    return shown


def notes(result: Mapping[str, Any]) -> list[str]:
    """What is to be said below the table, a line each: the claims, what the recipes are, and what failed."""
    about_each = {row["recipe"]: row["about"] for row in result["results"]}
    recipes = [f"{name}: {words}" for name, words in about_each.items()]
    return [*map(_sentence, result["claims"]), *recipes, *failures(result)]


def _sentence(claim: Mapping[str, Any]) -> str:
    where = f"{claim['recipe']}'s KL of {claim['kl']:.4f} at {short(claim['tokens'])} tokens on {claim['text']}"
    if claim["best_tokens"] is None:
        return f"{OURS} does not reach {where}."
    needed = f"{'at most ' if claim['bound'] == 'at most' else ''}{short(claim['best_tokens'])} tokens"
    word = "at most a tenth" if claim["at_most_a_tenth"] else "more than a tenth"
    if claim["bound"] == "at most" and not claim["at_most_a_tenth"]:
        word = "whether a tenth is enough takes a smaller budget to see"
    return f"{OURS} reaches {where} with {needed}, {claim['share']:.1%} of them: {word}."


def failures(result: Mapping[str, Any]) -> list[str]:
    """A line for each run that failed."""
    return [f"FAILED {label}: {reason}" for label, reason in result["failed"].items()]


def short(count: float) -> str:
    """20_000_000 → 20M, 1_234_567 → 1.23M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
