"""The figures of the report: layer strip, memory bars, a stage's curve, alignment error, a sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mambify.evaluate.report.charts import Line, before_after_bars, line_chart, smoothed
from mambify.evaluate.report.markup import Child, Html, data_behind, el, join, table
from mambify.evaluate.report.quantities import (
    compact,
    duration,
    memory,
    number,
    significant,
    tokens_of_context,
)

SMOOTH_FROM = 60  # points; a shorter curve is drawn as it is
DATA_ROWS = 16
MAX_COLUMNS = 36  # layers side by side on a wide screen


def layer_strip(layers: Sequence[tuple[bool, str]]) -> Html:
    """One labelled block a layer, in order: whether it kept attention, and the mixer's name."""
    blocks = []
    for i, (kept, name) in enumerate(layers):
        letter = "A" if kept else "M"
        blocks.append(
            el(
                "li",
                el("span", i, class_="index"),
                el("span", letter, class_="letter", aria_hidden="true"),
                el("span", "attention" if kept else name, class_="sr"),
                class_="kept" if kept else "new",
                title=f"layer {i}: {'attention, kept' if kept else f'{name}, new'}",
            )
        )
    num_kept = sum(kept for kept, _ in layers)
    names = " and ".join(dict.fromkeys(name for kept, name in layers if not kept))
    legend = el(
        "p",
        el("span", el("i", "A", class_="kept"), f"attention, kept from the teacher ({num_kept})"),
        el("span", el("i", "M", class_="new"), f"{names}, new ({len(layers) - num_kept})") if names else None,
        class_="legend",
    )
    columns = math.ceil(len(layers) / math.ceil(len(layers) / MAX_COLUMNS))
    strip = el("ol", blocks, class_="strip", style=f"--columns:{columns}", aria_label="Layers in order")
    return join(strip, legend)


def memory_bars(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> Html | None:
    """Bytes that one sequence keeps between tokens, at each context length both sides give."""
    lengths = sorted(int(key) for key in teacher if key.isdigit() and key in student)
    rows: list[list[Child]] = []
    for length in lengths:
        kv, state = number(teacher[str(length)]), number(student[str(length)])
        if not kv or state is None:
            continue
        widest = max(kv, state)
        bars = join(
            el("span", class_="bar teacher", style=f"--share:{100 * kv / widest:.1f}%"),
            el("span", class_="bar student", style=f"--share:{100 * state / widest:.1f}%"),
        )
        rows.append([tokens_of_context(length), bars, memory(kv), memory(state), f"{100 * state / kv:.0f}%"])
    if not rows:
        return None
    caption = join(
        "Memory one sequence keeps between tokens: ",
        el("span", "teacher's KV cache", class_="is-teacher"),
        " above ",
        el("span", "student's KV cache and state", class_="is-student"),
        ". Each pair has its own scale.",
    )
    return el("div", table(["tokens", "", "teacher", "student", "share"], rows, caption=caption), class_="memory")


def _curve(history: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[float, float]]]:
    """The loss over tokens where every row counts them, else over steps."""
    rows = [row for row in history if isinstance(row, Mapping) and number(row.get("loss")) is not None]
    key = "tokens" if rows and all(number(row.get("tokens")) is not None for row in rows) else "step"
    points = [(x, y) for r in rows if (x := number(r.get(key))) is not None and (y := number(r["loss"])) is not None]
    return key, points


def _thin(rows: list[list[Child]]) -> list[list[Child]]:
    """At most DATA_ROWS rows, evenly spread, with the first and the last."""
    if len(rows) <= DATA_ROWS:
        return rows
    return [rows[round(i * (len(rows) - 1) / (DATA_ROWS - 1))] for i in range(DATA_ROWS)]


def stage(position: int, stage: Mapping[str, Any]) -> Html:
    """One training stage: its name, what it cost, and its loss curve."""
    name = str(stage.get("name") or f"stage {position}")
    seconds, tokens = number(stage.get("seconds")), number(stage.get("tokens"))
    facts = [
        f"{compact(tokens)} tokens" if tokens is not None else None,
        duration(seconds) if seconds is not None else None,
        f"{compact(tokens / seconds)} tokens/s" if tokens and seconds else None,
    ]
    key, points = _curve(stage.get("history") or [])
    chart: Child = None
    if len(points) > 1:
        lines = [Line(points)]
        note = ""
        first, last = points[0][1], points[-1][1]
        if len(points) >= SMOOTH_FROM:
            reach = len(points) // 50
            width = 2 * reach + 1
            lines = [Line(points, faint=True), Line(smoothed(points, reach))]
            last = sum(y for _, y in points[-width:]) / width
            note = f"Faint: each logged value. Bold, and the last number above: mean of {width}."
        facts.append(f"loss {significant(first)} → {significant(last)}")
        chart = join(
            line_chart(
                lines,
                title=f"Loss during {name}",
                description=f"From {significant(first)} to {significant(last)}",
                x_label="tokens" if key == "tokens" else "step",
                y_label="loss",
            ),
            el("p", note, class_="note") if note else None,
            data_behind([key, "loss"], _thin([[compact(x), significant(y)] for x, y in points])),
        )
    return el(
        "figure",
        el(
            "figcaption",
            el("h3", el("span", position, class_="number"), name),
            el("p", " · ".join(fact for fact in facts if fact), class_="facts"),
        ),
        chart,
    )


def _by_layer(alignment: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    curves = {}
    for layer, pairs in alignment.items():
        points = [
            (step, error)
            for pair in pairs or []
            if isinstance(pair, list | tuple) and len(pair) == 2
            if (step := number(pair[0])) is not None and (error := number(pair[1])) is not None
        ]
        if points:
            curves[layer] = points
    return dict(sorted(curves.items(), key=lambda item: (len(item[0]), item[0])))


def alignment(given: Mapping[str, Any]) -> Html | None:
    """Normalised error of each new mixer against the attention it replaced: over steps, before, after."""
    curves = _by_layer(given)
    if not curves:
        return None
    rows = [(layer, points[0][1], points[-1][1]) for layer, points in curves.items()]
    worst = max(rows, key=lambda row: row[2])
    largest = f"{significant(worst[2])} at layer {worst[0]}"
    bars = el(
        "figure",
        el(
            "figcaption",
            el("h3", "Before and after"),
            el(
                "p",
                el("span", "first", class_="is-before"),
                " and ",
                el("span", "last", class_="is-student"),
                f" value of each layer · largest left: {largest}",
                class_="facts",
            ),
        ),
        before_after_bars(
            rows,
            title="Alignment error of each layer before and after",
            description=f"{len(rows)} layers; the largest error left is {largest}",
            y_label="normalised error",
        ),
        data_behind(["layer", "first", "last"], [[name, significant(a), significant(b)] for name, a, b in rows]),
    )
    meaning = el(
        "p",
        "How far each new mixer is from the attention it replaced, on the teacher's own hidden states: "
        "squared error over the attention's own square. 0 is exact, 1 is what an output of zeros costs.",
        class_="lead",
    )
    if all(len(points) < 2 for points in curves.values()):
        return join(meaning, el("div", bars, class_="grid-2"))
    last = max(len(curves) - 1, 1)
    lines = [Line(points, shade=i / last, name=f"layer {layer}") for i, (layer, points) in enumerate(curves.items())]
    names = list(curves)
    over_time = el(
        "figure",
        el(
            "figcaption",
            el("h3", "While aligning"),
            el(
                "p",
                "one line a layer: ",
                el("span", f"layer {names[0]}"),
                el("i", class_="ramp", aria_hidden="true"),
                el("span", f"layer {names[-1]}"),
                class_="facts",
            ),
        ),
        line_chart(
            lines,
            title="Alignment error of each layer over the steps",
            description=f"One curve for each of {len(curves)} layers",
            x_label="step",
            y_label="normalised error",
        ),
    )
    return join(meaning, el("div", over_time, bars, class_="grid-2"))


def sample(given: Mapping[str, Any]) -> Html:
    """A prompt with the teacher's and the student's answers beside each other."""
    answers = [
        el("div", el("h4", who), el("p", given[key]), class_=f"answer {key}")
        for key, who in (("teacher", "Teacher"), ("student", "Student"))
        if given.get(key)
    ]
    prompt = el("h3", given["prompt"], class_="prompt") if given.get("prompt") else None
    return el("article", prompt, el("div", answers, class_="answers"))
