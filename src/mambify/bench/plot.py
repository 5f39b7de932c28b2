"""Plots of benchmark results, drawn from their JSON by matplotlib (the extra ``bench``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mambify.errors import MissingDependencyError

OURS, OTHERS = "#2a6f97", ("#b8b8b8", "#8d8d8d", "#5f5f5f")


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
    figure, axes = figure_of(7.5, 0.3 * len(labels) + 1.2)
    axes.barh(range(len(labels)), ratios, color=OURS)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    for place, (ratio, name) in enumerate(zip(ratios, names, strict=True)):
        axes.text(ratio, place, f" {ratio:.2f}× {name}", va="center", fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(right=2.2 * max(ratios))  # room for the names
    axes.margins(y=0.01)
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("times faster than the fastest of the others")
    axes.set_title(result["machine"]["device"], loc="left", fontsize=9)
    save(figure, path)


def plot_train(result: dict[str, Any], path: Path) -> None:
    """Tokens a second and peak memory, a column for each growth curve."""
    rows = [row for row in result["results"] if row["fits"]]
    panels = {label: found for label, (choose, _) in _GROWTH.items() if len(found := choose(rows)) > 1}
    if not panels:  # a machine on which only the headline was run
        panels = {"stage": [row for row in rows if row["curve"] == "headline"]}
    figure, grid = figure_of(2.7 * len(panels) + 0.6, 4.6, rows=2, columns=len(panels))
    for column, (label, points) in enumerate(panels.items()):
        name = _GROWTH[label][1] if label in _GROWTH else lambda row: str(row["stage"])
        names = [name(row) for row in points]
        for line, (heading, unit, key) in enumerate(
            (("thousand tokens a second", 1e3, "tokens_per_second"), ("peak memory, GB", 1e9, "peak_bytes"))
        ):
            axes, values = grid[line][column], [(row[key] or 0) / unit for row in points]
            axes.plot(names, values, marker="o", color=OURS)
            axes.margins(0.12)
            if label == "shape" and all(values):
                axes.set_yscale("log")
                axes.set_ylim(min(values) / 2, 2.5 * max(values))
                axes.yaxis.set_ticks([], minor=True)
                axes.yaxis.set_ticks([])
                for place, value in enumerate(values):
                    axes.annotate(
                        f"{value:.3g}",
                        (place, value),
                        xytext=(0, 6),
                        textcoords="offset points",
                        fontsize=7,
                        ha="center",
                    )
            else:
                axes.set_ylim(0, 1.12 * max(values) or 1)
            if line:
                axes.set_xlabel(label)
            if column == 0:
                axes.set_ylabel(heading)
    figure.suptitle(f"kd on {result['machine']['device']}; {rows[0]['shape']} where no shape is named", fontsize=9)
    save(figure, path)


Rows = list[dict[str, Any]]


def _curve(name: str, key: str) -> Callable[[Rows], Rows]:
    """Chooses the points of one growth curve, in order."""
    return lambda rows: sorted((row for row in rows if row["curve"] == name), key=lambda row: float(row[key]))


def _shapes(rows: Rows) -> Rows:
    """The best kd row of every shape, smallest shape first."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["curve"] in ("headline", "size") and row["stage"] == "kd" and row["mixer"] == "mamba2":
            best.setdefault(row["shape"], row)
            if row["tokens_per_second"] > best[row["shape"]]["tokens_per_second"]:
                best[row["shape"]] = row
    return list(best.values())


#: label of a growth curve → its points among all rows, and what a point is called
_GROWTH: dict[str, tuple[Callable[[Rows], Rows], Callable[[dict[str, Any]], str]]] = {
    "sequences of 512": (_curve("batch", "sequences"), lambda row: str(row["sequences"])),
    "context": (_curve("context", "context"), lambda row: thousands(row["context"])),
    "layers converted": (
        lambda rows: _curve("converted", "attention")(rows)[::-1],
        lambda row: f"{1 - row['attention']:.0%}",
    ),
    "shape": (_shapes, lambda row: f"{row['shape']}\n{row['sequences']} × {row['context']}"),
}


def thousands(count: int) -> str:
    """512, 2k, 32k: powers of two as they are spoken of."""
    return f"{count // 1024}k" if count >= 1024 else str(count)


def plot_synthesize(result: dict[str, Any], path: Path) -> None:
    """A bar for every way of sampling and batch size."""
    rows = result["results"]
    labels = [f"{row['way']}, {row['batch']} at once" for row in rows]
    figure, axes = figure_of(6.5, 0.4 * len(rows) + 1.2)
    colours = [OURS if row["way"] == "slots" else OTHERS[0] for row in rows]
    axes.barh(labels[::-1], [row["tokens_per_second"] for row in rows][::-1], color=colours[::-1])
    axes.set_xlabel("tokens a second")
    axes.set_title(f"{result['teacher']}, {result['machine']['device']}", loc="left", fontsize=9)
    save(figure, path)


def plot_inits(result: dict[str, Any], path: Path) -> None:
    """KL of every initialisation: before training, after calibration, after the little training."""
    rows = result["results"]
    stages = list(rows[0]["scores"])
    figure, axes = figure_of(6.5, 0.5 * len(rows) + 1.2)
    height = 0.8 / len(stages)
    for row_of_bars, (stage, colour) in enumerate(zip(reversed(stages), (OURS, *OTHERS), strict=False)):
        places = [index + row_of_bars * height for index in range(len(rows))]
        values = [row["scores"][stage]["kl"] for row in reversed(rows)]
        axes.barh(places, values, height, color=colour, label=stage)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(rows))], [row["init"] for row in rows][::-1])
    axes.set_xscale("log")
    axes.set_xlabel("KL to the teacher, nats a token")
    axes.set_title(f"{result['teacher']}, {result['budget']['train']:,} training tokens", loc="left", fontsize=9)
    axes.legend(fontsize=7)
    save(figure, path)


def plot_recipes(result: dict[str, Any], path: Path) -> None:
    """KL against tokens, a panel a text and a line a recipe, both axes logarithmic."""
    sources = result["evaluation"]["sources"]
    names = list(dict.fromkeys(row["recipe"] for row in result["results"]))
    figure, axes = figure_of(4.2 * len(sources) + 0.4, 3.6, columns=len(sources))
    panels = [axes] if len(sources) == 1 else list(axes[0])
    for panel, source in zip(panels, sources, strict=True):
        for name in names:
            rows = sorted(
                (row for row in result["results"] if row["recipe"] == name), key=lambda row: int(row["tokens"])
            )
            kl = [row["sources"][source]["student"]["kl"] for row in rows]
            style = {"color": OURS, "linewidth": 2.2} if name == "best" else {"linewidth": 1.1}
            panel.plot([row["tokens"] for row in rows], kl, marker="o", markersize=4, label=name, **style)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("training tokens")
        panel.set_title(Path(source).name, fontsize=9)
    panels[0].set_ylabel("KL to the teacher, nats a token")
    panels[0].legend(fontsize=7)
    title = f"{result['teacher']}, {result['attention']:.0%} attention; {result['machine']['device']}"
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def figure_of(width: float, height: float, *, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of this many inches, and its axes: one, or an array of rows and columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    return figure, axes[0][0] if rows == columns == 1 else axes


def save(figure: Any, path: Path) -> None:
    """Writes the figure, making the folder that it goes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
