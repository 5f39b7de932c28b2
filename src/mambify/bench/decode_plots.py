"""Plots of what is measured of decoding: steps, verification and speculation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mambify.bench.plot import OTHERS, OURS, figure_of, save, thousands


def plot_decode(result: dict[str, Any], path: Path) -> None:
    """Milliseconds of a step by context, tokens a second by batch, and one step beside others, a panel each."""
    rows = [row for row in result["results"] if "ms" in row]
    figure, grid = figure_of(11.0, 3.4, columns=3)
    contexts, batches, steps = grid[0]
    for panel, part, key, value in (
        (contexts, "context", "context", "ms"),
        (batches, "batch", "batch", "tokens_per_second"),
    ):
        points = [row for row in rows if row["part"] == part]
        for index, share in enumerate(dict.fromkeys(row["attention"] for row in points)):
            line = sorted((row for row in points if row["attention"] == share), key=lambda row: int(row[key]))
            colour = OURS if index == 0 else OTHERS[(index - 1) % len(OTHERS)]
            places, values = [row[key] for row in line], [row[value] for row in line]
            panel.plot(places, values, marker="o", markersize=4, color=colour, label=f"{share:.0%} attention")
        if points:
            panel.set_xscale("log", base=2)
            panel.legend(fontsize=7)
    contexts.set_ylim(bottom=0)
    contexts.set_xlabel("tokens of context")
    contexts.set_ylabel("ms a token")
    batches.set_xlabel("sequences at once")
    batches.set_ylabel("tokens a second")
    bars = [row for row in rows if row["part"] == "step" or row["way"] in ("eager", "compiled", "gpt-fast-style loop")]
    labels = [f"{row['shape']} {row['attention']:.0%} {row['way']}" for row in bars]
    labels = [f"{label}, {thousands(row['context'])}" for label, row in zip(labels, bars, strict=True)]
    colours = [OURS if "fused" in row["way"] else OTHERS[0] for row in bars]
    steps.barh(range(len(bars)), [row["tokens_per_second"] for row in bars], color=colours)
    steps.set_yticks(range(len(bars)), labels, fontsize=5)
    steps.invert_yaxis()
    if bars:
        steps.set_xscale("log")
        steps.set_xlim(left=1)
    steps.set_xlabel("tokens a second, one sequence")
    figure.suptitle(result["machine"]["device"], fontsize=9)
    save(figure, path)


def plot_verify(result: dict[str, Any], path: Path) -> None:
    """Time of a round against rows, a panel a mixer; and whole passes over plain steps."""
    layers = [row for row in result["results"] if "ways" in row and row["part"] in ("batch", "mamba1")]
    passes = [row for row in result["results"] if "over_plain" in row]
    mixers = list(dict.fromkeys(row["mixer"] for row in layers))
    figure, axes = figure_of(4.0 * (len(mixers) + bool(passes)) or 4.0, 3.4, columns=max(1, len(mixers) + bool(passes)))
    panels = [axes] if len(mixers) + bool(passes) <= 1 else list(axes[0])
    for panel, mixer in zip(panels, mixers, strict=False):
        rows = sorted((row for row in layers if row["mixer"] == mixer), key=lambda row: int(row["S"]))
        names = list(dict.fromkeys(name for row in rows for name in row["ways"]))
        for name, colour in zip(names, (OURS, *OTHERS), strict=False):
            points = [(row["S"], row["ways"][name]["ms"]) for row in rows if name in row["ways"]]
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=name)
        panel.set(xscale="log", yscale="log", xlabel="rows", ylabel="ms a round of one layer")
        panel.set_title(f"{mixer}, {rows[0]['T']} tokens", fontsize=9)
        panel.legend(fontsize=7)
    if passes:
        labels = [f"{row['S']} × {row['T']}" for row in passes]
        panels[-1].barh(labels[::-1], [row["over_plain"] for row in passes][::-1], color=OURS)
        panels[-1].axvline(1.0, color="black", linewidth=0.8)
        panels[-1].set_xlabel("whole pass over a plain step")
        panels[-1].set_ylabel("rows × tokens")
    figure.suptitle(result["machine"]["device"], fontsize=9)
    save(figure, path)


def plot_export(result: dict[str, Any], path: Path) -> None:
    """Tokens a second of every row, a bar each; ours in colour."""
    rows = [row for row in result["results"] if "ms" in row]
    figure, axes = figure_of(7.5, 0.3 * len(rows) + 1.2)
    colours = [OURS if row["way"] == "ours" else OTHERS[0] for row in rows]
    axes.barh(range(len(rows)), [row["tokens_per_second"] for row in rows], color=colours)
    labels = [f"{row['model']}: {row['way']}, {row['batch']} × {row['context']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("tokens a second")
    axes.set_title(result["machine"]["device"], loc="left", fontsize=9)
    save(figure, path)


def plot_speculate(result: dict[str, Any], path: Path) -> None:
    """A bar for every case: how many times as fast as plain decoding."""
    rows = [row for row in result["results"] if "ratio" in row]
    figure, axes = figure_of(7.5, 0.3 * len(rows) + 1.2)
    axes.barh(range(len(rows)), [row["ratio"] for row in rows], color=OURS)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.invert_yaxis()
    for place, row in enumerate(rows):
        axes.text(row["ratio"], place, f" {row['tokens_per_second']:,.0f} tokens/s", va="center", fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.margins(x=0.15)
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("times as fast as our own plain decoding")
    axes.set_title(result["machine"]["device"], loc="left", fontsize=9)
    save(figure, path)


def plot_laws(result: dict[str, Any], path: Path) -> None:
    """Total variation of every trial, beside what chance makes of it."""
    rows = [row for row in result["results"] if row["law"] == "distribution"]
    figure, axes = figure_of(6.5, 0.35 * len(rows) + 1.2)
    for key, colour, label in (("total_variation", OURS, "found"), ("by_chance", OTHERS[0], "by chance")):
        axes.plot([row[key] for row in rows], range(len(rows)), "o", color=colour, label=label)
    axes.set_yticks(range(len(rows)), [row["trial"] for row in rows])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="total variation")
    axes.legend(fontsize=7)
    axes.set_title(result["machine"]["device"], loc="left", fontsize=9)
    save(figure, path)


def _label(row: dict[str, Any]) -> str:
    if "group" in row:
        return f"{row['draft']}, {row['group']}, temperature {row['temperature']:g}, K={row['K']}"
    return f"{row['target']} × {row['batch']}, draft {row['draft']}, K={row['K']}"
