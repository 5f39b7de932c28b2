"""Charts as inline SVG that keep their text size at any width.

The outer ``<svg>`` has no viewBox: text, grid and bars are placed in percent, and lines live in a nested
``<svg>`` that stretches while its strokes do not. Margins for labels come from the style sheet (``.plot``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mambify.evaluate.report.markup import Html, el, join
from mambify.evaluate.report.quantities import compact, significant

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve. ``shade`` in [0, 1] places it on the depth scale; None takes the student's colour."""

    points: Points
    faint: bool = False
    shade: float | None = None
    name: str | None = None


@dataclass(frozen=True)
class Axis:
    """A mapping of values to shares of the plot's width or height, with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(value) if self.log else value
        return (at - low) / (high - low) if high > low else 0.5


def _linear(low: float, high: float, *, about: int = 4) -> Axis:
    """An axis from ``low`` to ``high`` or a little further, with ticks at round numbers."""
    span = (high - low) or abs(high) or 1.0
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(i * step, 12) for i in range(first, max(last, first + 1) + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def _logarithmic(low: float, high: float) -> Axis:
    """A log axis with ticks at 1, 2 and 5 times powers of ten, or only at the powers over a wide range."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if math.log10(high / low) > 3 else (1, 2, 5)
    every = [f * 10.0**d for d in decades for f in factors]
    below = max((t for t in every if t <= low), default=low)
    above = min((t for t in every if t >= high), default=high)
    return Axis(below, above, tuple(t for t in every if below <= t <= above), log=True)


def _value_axis(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    return _logarithmic(low, high) if low > 0 and high / low > 6 else _linear(low, high)


def _at(share: float) -> str:
    return f"{100 * share:.2f}%"


def _grid(axis: Axis) -> Html:
    """Horizontal rules with their values at the left margin."""
    parts: list[Html] = []
    for tick in axis.ticks:
        y = _at(1 - axis.share(tick))
        parts.append(el("line", x1="0", x2="100%", y1=y, y2=y, class_="grid"))
        label = "0" if tick == 0 else f"{tick:.6g}"
        parts.append(el("text", label, x="-8", y=y, dy="0.32em", class_="y-tick"))
    return join(parts)


def _frame(kind: str, title: str, description: str, *children: object) -> Html:
    """The outer svg, which a screen reader announces as one image with a name and a description."""
    return el(
        "svg",
        el("title", title),
        el("desc", description),
        *children,
        class_=f"plot {kind}",
        role="img",
        aria_label=f"{title}. {description}",
        width="100%",
    )


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    x_format: Callable[[float], str] = compact,
) -> Html:
    """Curves over a common x axis; the y axis is logarithmic where values span more than a factor of six."""
    xs = [x for line in lines for x, _ in line.points]
    y_axis = _value_axis([y for line in lines for _, y in line.points])
    x_axis = Axis(min(xs), max(xs), ())
    ticks = [t for t in _linear(min(xs), max(xs)).ticks if x_axis.low <= t <= x_axis.high]
    x_ticks = [
        el("text", x_format(tick), x=_at(x_axis.share(tick)), y="100%", dy="18", class_="x-tick") for tick in ticks
    ]
    curves = []
    for line in lines:
        points = " ".join(f"{1000 * x_axis.share(x):.1f},{1000 * (1 - y_axis.share(y)):.1f}" for x, y in line.points)
        style = None if line.shade is None else f"--shade:{100 * line.shade:.0f}%"
        kind = "faint" if line.faint else "shaded" if line.shade is not None else "bold"
        name = el("title", line.name) if line.name else None
        curves.append(el("polyline", name, points=points, class_=f"curve {kind}", style=style))
    return _frame(
        "lines",
        title,
        description,
        el("text", y_label + (" (log scale)" if y_axis.log else ""), x="0", y="-14", class_="axis-label"),
        _grid(y_axis),
        x_ticks,
        el("text", x_label, x="100%", y="100%", dy="34", class_="axis-label end"),
        el("svg", curves, viewBox="0 0 1000 1000", preserveAspectRatio="none", width="100%", height="100%"),
    )


def before_after_bars(rows: Sequence[tuple[str, float, float]], *, title: str, description: str, y_label: str) -> Html:
    """For each label a pale bar (before) with a solid, narrower one in front of it (after).

    The axis begins at zero, or is logarithmic where the bars after would not be seen beside those before.
    """
    values = [value for _, *pair in rows for value in pair]
    wide = min(values) > 0 and max(values) > 30 * min(values)
    axis = _logarithmic(min(values) / 2, max(values)) if wide else _linear(0.0, max(values))
    slot = 1 / len(rows)
    every = 1 if len(rows) <= 16 else 2  # labels that would touch are left out
    parts: list[Html] = []
    for i, (label, before, after) in enumerate(rows):
        middle = (i + 0.5) * slot
        bars = [
            el(
                "rect",
                x=_at(middle - width * slot / 2),
                y=_at(1 - axis.share(value)),
                width=_at(width * slot),
                height=_at(axis.share(value)),
                class_=name,
            )
            for name, value, width in (("before", before, 0.78), ("after", after, 0.46))
        ]
        hover = el("title", f"layer {label}: {significant(before)} → {significant(after)}")
        tick = el("text", label, x=_at(middle), y="100%", dy="18", class_="x-tick") if i % every == 0 else None
        parts.append(el("g", hover, bars, tick))
    return _frame(
        "bars",
        title,
        description,
        el("text", f"{y_label} (log scale)" if wide else y_label, x="0", y="-14", class_="axis-label"),
        _grid(axis),
        parts,
        el("line", x1="0", x2="100%", y1="100%", y2="100%", class_="base"),
        el("text", "layer", x="100%", y="100%", dy="34", class_="axis-label end"),
    )


def smoothed(points: Points, reach: int) -> list[tuple[float, float]]:
    """The mean of each value with up to ``reach`` neighbours on either side, as many on both."""
    result = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        window = [y for _, y in points[i - near : i + near + 1]]
        result.append((x, sum(window) / len(window)))
    return result
