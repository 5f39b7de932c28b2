"""What an evaluation gave, as tables of a card: distance to the teacher on text, preferences, tasks, acceptance.

The figures are those of ``mambify evaluate --json``; brackets hold 95% bootstrap intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mambify.card.text import table, without_way

Figures = Mapping[str, Any]

_PREFERENCES = {"accuracy": "summed", "accuracy_per_token": "a token", "reward_accuracy": "gain on the teacher"}


def results_section(results: Figures) -> str:
    """The tables of everything that ``results`` holds."""
    return "\n\n".join(_tables(results))


def acceptance_section(report: Figures) -> str:
    """What of a draft is accepted; see :func:`mambify.workflows.draft.acceptance_report`."""
    measured = [("prompts, measured", found) for found in report["measured"]]
    first = ", one token a round" if report.get("features") else ""
    rows = [
        (
            on,
            f"{found['temperature']:g}",
            f"{found['tokens_per_round']:.2f}",
            ", ".join("–" if share is None else f"{share:.0%}" for share in found["acceptance_by_position"]),
        )
        for on, found in [(f"held-out text, expected{first}", report["expected"]), *measured]
    ]
    headings = ("on", "temperature", "tokens a round", "accepted by position")
    return f"With {without_way(report['target'])} as the target:\n\n{table(headings, rows)}"


def _tables(results: Figures) -> Iterator[str]:
    if results.get("sources"):
        yield _texts(results["sources"])
        length = f" of {results['context_length']} tokens" if "context_length" in results else ""
        yield f"Measured by `mambify evaluate` on blocks{length}; in brackets 95% bootstrap intervals over blocks."
    if results.get("tasks"):
        yield _tasks(results["tasks"], results.get("means", {}))
        yield "Percent of the questions that `mambify evaluate --tasks` found answered right (lm-eval), with intervals."
    if results.get("preferences"):
        yield _preferences(results["preferences"])
        yield "How often the preferred of two answers is the likelier one (`mambify evaluate --preferences`)."


def _texts(sources: Mapping[str, Figures]) -> str:
    beside_teacher = any("teacher" in source for source in sources.values())
    headings = ["text", "tokens", "perplexity"]
    if beside_teacher:
        headings += ["teacher's", "ratio", "KL", "top-1 agreement"]
    rows = []
    for text, source in sources.items():
        cells = [without_way(text), f"{source['num_tokens']:,}", _figure(source["student"], "perplexity", ".2f")]
        if beside_teacher:
            cells += [
                _figure(source.get("teacher", {}), "perplexity", ".2f"),
                _figure(source["student"], "perplexity_ratio", ".3f"),
                _figure(source["student"], "kl", ".4f"),
                _figure(source["student"], "top1_agreement", ".1%"),
            ]
        rows.append(cells)
    return table(headings, rows)


def _tasks(tasks: Mapping[str, Figures], means: Mapping[str, Figures]) -> str:
    rows = [
        (name, f"{task['num_questions']:,}", metric, *_beside(figures))
        for name, task in tasks.items()
        for metric, figures in task["metrics"].items()
    ]
    rows += [(f"mean of {len(mean['tasks'])}", "", metric, *_beside(mean)) for metric, mean in means.items()]
    return table(("task", "questions", "metric", "teacher", "student", "difference"), rows)


def _beside(figures: Figures) -> tuple[str, str, str]:
    """Teacher, student and their difference, of what was measured of them, in percent and percentage points."""
    percent = {key: [100 * part for part in value] if isinstance(value, list) else 100 * value
               for key, value in figures.items() if key != "tasks"}  # fmt: skip
    return (
        _figure(percent, "teacher", ".1f"),
        _figure(percent, "student", ".1f"),
        _figure(percent, "difference", "+.1f", " to "),
    )


def _preferences(preferences: Mapping[str, Figures]) -> str:
    rows = [
        (
            without_way(name),
            f"{figures['num_pairs']:,}",
            label,
            _figure(figures, key, ".1%"),
            _figure(figures, f"reference_{key}", ".1%"),
        )
        for name, figures in preferences.items()
        for key, label in _PREFERENCES.items()
        if key in figures
    ]
    return table(("pairs of", "number", "log-probability", "student", "teacher"), rows)


def _figure(figures: Figures, key: str, form: str, between: str = "–") -> str:
    if key not in figures:
        return ""
    text = f"{figures[key]:{form}}"
    if f"{key}_interval" in figures:
        low, high = figures[f"{key}_interval"]
        text += f" ({low:{form}}{between}{high:{form}})"
    return text
