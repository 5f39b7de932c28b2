"""The report page: a heading, then a section for each thing the report holds; what it lacks is not shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mambify.errors import InvalidOptionError
from mambify.evaluate.report import figures
from mambify.evaluate.report.markup import Child, Html, el, join, table
from mambify.evaluate.report.quantities import (
    compact,
    mapping,
    memory,
    number,
    percent,
    shown,
    significant,
)

MIXER_NAMES = {
    "mamba1": "Mamba1",
    "mamba2": "Mamba2",
    "stock_mamba1": "Mamba1",
    "stock_mamba2": "Mamba2",
    "linear_attention": "Mamba",
}
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # no network, no script, whatever the text holds
HEADLINE_CONTEXT = "32768"


def render_report(report: Mapping[str, Any]) -> str:
    """Renders a report as one self-contained HTML page.

    Every key but ``title`` may be absent; a section appears when its numbers do, and a number that is missing
    or NaN is left out. All text is escaped. Keys that are numbers may be strings, as they are after a trip
    through JSON.

    Args:
        report: with these keys:

            - ``title``, ``created``, ``device``: text
            - ``teacher``: ``name``, ``parameters``, ``perplexity``, ``kv_bytes`` (tokens → bytes a sequence)
            - ``student``: ``perplexity``, ``kl`` (nats a token), ``top1_agreement`` (0 to 1),
              ``parameters_new``, ``parameters_kept``, ``state_bytes`` (tokens → bytes a sequence, KV of the
              kept attention included), ``layer_types`` (one name a layer: ``attention``, ``mamba2``, …),
              ``intervals`` (metric → [low, high], and ``level``: 0.95)
            - ``table``: rows, each a mapping from column to value
            - ``stages``: ``name``, ``seconds``, ``tokens``, ``history`` (``step``, ``tokens``, ``loss``)
            - ``alignment``: layer → [[step, normalised error], …]; 0 is exact, 1 what giving zeros would cost
            - ``text_scores``: text → ``teacher_perplexity``, ``student_perplexity``, ``kl``,
              ``top1_agreement``
            - ``samples``: ``prompt``, ``teacher``, ``student``
            - ``settings``: any nesting; ``versions``: package → version

    Raises:
        InvalidOptionError: there is no title.
    """
    title = report.get("title")
    if not title:
        raise InvalidOptionError("a report needs a title")
    sections: tuple[tuple[str, str, Callable[[Mapping[str, Any]], Html | None]], ...] = (
        ("layers", "What was converted", _layers),
        ("training", "Recovery", _training),
        ("alignment", "Alignment, layer by layer", _alignment),
        ("texts", "Text by text", _texts),
        ("samples", "Side by side", _samples),
        ("results", "Results", _results),
        ("settings", "Settings and environment", _settings),
    )
    found = [(key, heading, body) for key, heading, build in sections if (body := build(report)) is not None]
    contents = [el("li", el("a", heading, href=f"#{key}")) for key, heading, _ in found]
    body = join(
        el("header", _byline(report), el("h1", title), _summary(report), _headline(report)),
        el("nav", el("ol", contents), aria_label="Contents") if len(found) > 1 else None,
        el("main", [el("section", el("h2", heading), body, id=key) for key, heading, body in found]),
        el("footer", el("p", "Made by mambify. One file: no script, nothing loaded from elsewhere.")),
    )
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"{el('title', title)}\n<style>\n{style}</style>\n</head>\n{el('body', body)}\n</html>\n"
    )


def _mixers(report: Mapping[str, Any]) -> list[str]:
    kinds = mapping(report.get("student")).get("layer_types")
    return [str(kind) for kind in kinds] if isinstance(kinds, list | tuple) else []


def _is_attention(kind: str) -> bool:
    return "attention" in kind and not kind.startswith("linear")


def _byline(report: Mapping[str, Any]) -> Html | None:
    parts = [str(report[key]) for key in ("created", "device") if report.get(key)]
    return el("p", " · ".join(parts), class_="byline") if parts else None


def _summary(report: Mapping[str, Any]) -> Html | None:
    """One or two sentences that say what was done and how much was kept."""
    teacher, student, kinds = mapping(report.get("teacher")), mapping(report.get("student")), _mixers(report)
    sentences: list[Child] = []
    new = [kind for kind in kinds if not _is_attention(kind)]
    if new:
        names = " and ".join(dict.fromkeys(MIXER_NAMES.get(kind, kind) for kind in new))
        of = f" of {teacher['name']}" if teacher.get("name") else ""
        became = "became a" if len(new) == 1 else "became"
        plural = "mixer" if len(new) == 1 else "mixers"
        sentences.append(f"{len(new)} of the {len(kinds)} attention layers{of} {became} {names} {plural}.")
    ours, theirs = number(student.get("perplexity")), number(teacher.get("perplexity"))
    agreement = number(student.get("top1_agreement"))
    claims = []
    if ours and theirs:
        claims.append(f"the student's perplexity is {significant(ours / theirs)} times the teacher's")
    if agreement is not None:
        claims.append(f"both name the same most likely token at {percent(agreement)} of positions")
    if claims:
        sentences.append("On held-out text " + ", and ".join(claims) + ".")
    return el("p", " ".join(str(s) for s in sentences), class_="summary") if sentences else None


def _interval(student: Mapping[str, Any], metric: str, write: Callable[[float], str]) -> str | None:
    intervals = mapping(student.get("intervals"))
    pair, level = intervals.get(metric), number(intervals.get("level"))
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return None
    low, high = number(pair[0]), number(pair[1])
    if low is None or high is None:
        return None
    name = f"{100 * level:.0f}% interval" if level else "interval"
    return f"{name} {write(low)}–{write(high)}"


def _headline(report: Mapping[str, Any]) -> Html | None:
    teacher, student = mapping(report.get("teacher")), mapping(report.get("student"))
    tiles: list[Html] = []

    def tile(label: str, value: str, *notes: str | None) -> None:
        lines = [el("span", note) for note in notes if note]
        tiles.append(el("div", el("dt", label), el("dd", el("b", value), lines)))

    ours, theirs = number(student.get("perplexity")), number(teacher.get("perplexity"))
    bounds = _interval(student, "perplexity", significant)
    if ours is not None and theirs:
        both = f"{significant(ours, 4)} against {significant(theirs, 4)}"
        tile("Perplexity, student ÷ teacher", f"{significant(ours / theirs)}×", both, bounds)
    elif ours is not None:
        tile("Perplexity", significant(ours, 4), bounds)
    if (kl := number(student.get("kl"))) is not None:
        tile("KL to the teacher", significant(kl), "nats a token", _interval(student, "kl", significant))
    if (agreement := number(student.get("top1_agreement"))) is not None:
        tile(
            "Top-1 agreement",
            percent(agreement),
            "same most likely next token",
            _interval(student, "top1_agreement", percent),
        )
    kv = number(mapping(teacher.get("kv_bytes")).get(HEADLINE_CONTEXT))
    state = number(mapping(student.get("state_bytes")).get(HEADLINE_CONTEXT))
    if kv and state:
        tile(
            "Memory at 32k tokens",
            percent(state / kv),
            f"{memory(state)} instead of {memory(kv)}",
            "a sequence",
        )
    return el("dl", tiles, class_="headline") if tiles else None


def _layers(report: Mapping[str, Any]) -> Html | None:
    teacher, student, kinds = mapping(report.get("teacher")), mapping(report.get("student")), _mixers(report)
    facts: list[str] = []
    for label, value in (
        ("teacher", teacher.get("parameters")),
        ("kept", student.get("parameters_kept")),
        ("new", student.get("parameters_new")),
    ):
        if (count := number(value)) is not None:
            facts.append(f"{label} {compact(count)}")
    strip = figures.layer_strip([(_is_attention(k), MIXER_NAMES.get(k, k)) for k in kinds]) if kinds else None
    sizes = figures.memory_bars(mapping(teacher.get("kv_bytes")), mapping(student.get("state_bytes")))
    if strip is None and sizes is None and not facts:
        return None
    line = el("p", "Parameters: " + ", ".join(facts), class_="facts") if facts else None
    return join(strip, line, sizes)


def _training(report: Mapping[str, Any]) -> Html | None:
    stages = [mapping(stage) for stage in report.get("stages") or []]
    built = [figures.stage(n, stage) for n, stage in enumerate(stages, start=1)]
    return el("div", built, class_="grid-2") if built else None


def _alignment(report: Mapping[str, Any]) -> Html | None:
    return figures.alignment(mapping(report.get("alignment")))


def _texts(report: Mapping[str, Any]) -> Html | None:
    rows: list[list[Child]] = []
    for name, given in mapping(report.get("text_scores")).items():
        scores = mapping(given)
        theirs, ours = number(scores.get("teacher_perplexity")), number(scores.get("student_perplexity"))
        kl, agreement = number(scores.get("kl")), number(scores.get("top1_agreement"))
        rows.append(
            [
                name,
                "–" if theirs is None else significant(theirs, 4),
                "–" if ours is None else significant(ours, 4),
                f"{significant(ours / theirs)}×" if ours is not None and theirs else "–",
                "–" if kl is None else significant(kl),
                "–" if agreement is None else percent(agreement),
            ]
        )
    head = [
        "text",
        "teacher perplexity",
        "student perplexity",
        "ratio",
        "KL, nats a token",
        "top-1 agreement",
    ]
    return table(head, rows) if rows else None


def _samples(report: Mapping[str, Any]) -> Html | None:
    cards = [figures.sample(mapping(sample)) for sample in report.get("samples") or []]
    return el("div", cards, class_="samples") if cards else None


def _results(report: Mapping[str, Any]) -> Html | None:
    rows = [mapping(row) for row in report.get("table") or []]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not columns:
        return None
    return table(columns, [[shown(row.get(column)) for column in columns] for row in rows])


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as rows with dotted keys and plain values, the way overrides are written."""
    if not isinstance(value, Mapping):
        return [(prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))]
    return [row for key, item in value.items() for row in _flat(item, f"{prefix}.{key}" if prefix else str(key))]


def _settings(report: Mapping[str, Any]) -> Html | None:
    groups = (("Settings", report.get("settings")), ("Versions", report.get("versions")))
    built = [
        el(
            "div",
            el("h3", heading),
            el("dl", [(el("dt", key), el("dd", text)) for key, text in _flat(given)]),
        )
        for heading, given in groups
        if mapping(given)
    ]
    return el("div", built, class_="settings") if built else None
