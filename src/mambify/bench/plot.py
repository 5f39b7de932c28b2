"""Plots of benchmark results, drawn from their JSON by matplotlib (the extra ``bench``)."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import Any

from mambify.errors import MissingDependencyError

_OURS, _OTHERS = "#2a6f97", ("#b8b8b8", "#8d8d8d", "#5f5f5f")


def require_matplotlib() -> None:
    """Raises MissingDependencyError where plots cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("plots need matplotlib: pip install 'mambify[bench]'")


def plot_ops(result: dict[str, Any], path: Path) -> None:
    """A bar for every operation and pass: how many times faster than the fastest of the others."""
    labels, ratios, names = [], [], []
    for row in result["results"]:
        others = {name: other["ms"] for name, other in row.get("peers", {}).items() if "ms" in other}
        if not others:
            continue
        best = min(others, key=lambda name: others[name])
        labels.append(f"{row['operation']} {row['pass']}\n{row['shape']}")
        ratios.append(others[best] / row["ms"])
        names.append(best)
    figure, axes = _figure(7.5, 0.42 * len(labels) + 1.2)
    axes.barh(labels[::-1], ratios[::-1], color=_OURS)
    for place, (ratio, name) in enumerate(zip(ratios[::-1], names[::-1], strict=True)):
        axes.text(ratio, place, f" {ratio:.2f}× {name}", va="center", fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(right=2.2 * max(ratios))  # room for the names
    axes.margins(y=0.01)
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("times faster than the fastest of the others")
    axes.set_title(result["machine"]["device"], loc="left", fontsize=9)
    _save(figure, path)


def plot_train(result: dict[str, Any], path: Path) -> None:
    """Tokens a second and peak memory, a column for each growth curve."""
    curves: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in result["results"]:
        if row["fits"]:
            curves[row["curve"]].append(row)
    axis_of = {"batch": "sequences", "context": "context", "converted": "attention"}
    shown = [name for name in axis_of if len(curves[name]) > 1]
    if not shown:  # a machine on which only the headline was run
        shown, axis_of["headline"] = ["headline"], "context"
    figure, grid = _figure(3.2 * len(shown) + 0.6, 5.0, rows=2, columns=len(shown))
    for column, name in enumerate(shown):
        key = axis_of[name]
        rows = sorted(curves[name], key=lambda row: float(row[key]))
        places = [1 - row[key] if key == "attention" else row[key] for row in rows]
        for line, (heading, values) in enumerate(
            (
                ("tokens a second", [row["tokens_per_second"] for row in rows]),
                ("peak memory, GB", [(row["peak_bytes"] or 0) / 1e9 for row in rows]),
            )
        ):
            axes = grid[line][column]
            axes.plot(places, values, marker="o", color=_OURS)
            axes.set_ylim(0, 1.1 * max(values) or 1)
            if key != "attention":
                axes.set_xscale("log", base=2)
            if line:
                axes.set_xlabel({"attention": "share of layers converted"}.get(key, key))
            if column == 0:
                axes.set_ylabel(heading)
    figure.suptitle(f"{curves[shown[0]][0]['shape']}, kd, {result['machine']['device']}", fontsize=9)
    _save(figure, path)


def plot_synthesize(result: dict[str, Any], path: Path) -> None:
    """A bar for every way of sampling and batch size."""
    rows = result["results"]
    labels = [f"{row['way']}, {row['batch']} at once" for row in rows]
    figure, axes = _figure(6.5, 0.4 * len(rows) + 1.2)
    colours = [_OURS if row["way"] == "slots" else _OTHERS[0] for row in rows]
    axes.barh(labels[::-1], [row["tokens_per_second"] for row in rows][::-1], color=colours[::-1])
    axes.set_xlabel("tokens a second")
    axes.set_title(f"{result['teacher']}, {result['machine']['device']}", loc="left", fontsize=9)
    _save(figure, path)


def plot_inits(result: dict[str, Any], path: Path) -> None:
    """KL of every initialisation: before training, after calibration, after the little training."""
    rows = result["results"]
    stages = list(rows[0]["scores"])
    figure, axes = _figure(6.5, 0.5 * len(rows) + 1.2)
    height = 0.8 / len(stages)
    for row_of_bars, (stage, colour) in enumerate(zip(reversed(stages), (_OURS, *_OTHERS), strict=False)):
        places = [index + row_of_bars * height for index in range(len(rows))]
        values = [row["scores"][stage]["kl"] for row in reversed(rows)]
        axes.barh(places, values, height, color=colour, label=stage)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(rows))], [row["init"] for row in rows][::-1])
    axes.set_xscale("log")
    axes.set_xlabel("KL to the teacher, nats a token")
    axes.set_title(f"{result['teacher']}, {result['budget']['train']:,} training tokens", loc="left", fontsize=9)
    axes.legend(fontsize=7)
    _save(figure, path)


def _figure(width: float, height: float, *, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    return figure, axes[0][0] if rows == columns == 1 else axes


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
