"""Reading numbers out of a report that may lack them, and writing them for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def number(value: Any) -> float | None:
    """``value`` as a finite float, or None: what is missing or NaN is not shown."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def mapping(value: Any) -> Mapping[str, Any]:
    """``value`` if it is a mapping, with its keys as strings (JSON has no other); else an empty one."""
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def significant(value: float, digits: int = 3) -> str:
    """Three significant digits without an exponent where that is readable: 0.184, 15.2, 1,393, 2.1e-05."""
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size > 8:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - size)}f}"


def _without_zeros(written: str) -> str:
    return written.rstrip("0").rstrip(".") if "." in written and "e" not in written else written


def compact(value: float) -> str:
    """A count in k, M or B: 134.5 M."""
    for unit, name in ((1e9, "\u00a0B"), (1e6, "\u00a0M"), (1e3, "\u00a0k")):
        if abs(value) >= unit:
            scaled = value / unit
            return f"{scaled:.{0 if scaled >= 100 or scaled == round(scaled) else 1}f}{name}"
    return f"{value:,.0f}"


def tokens_of_context(value: float) -> str:
    """A context length in binary thousands: 2048 → 2k, 131072 → 128k."""
    return f"{value / 1024:.0f}k" if value >= 1024 and value % 1024 == 0 else f"{value:,.0f}"


def memory(value: float) -> str:
    """Bytes in binary units."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{significant(value / unit)}\u00a0{name}"
    return f"{value:.0f}\u00a0B"


def percent(value: float) -> str:
    """A share in percent, one decimal."""
    return f"{100 * value:.1f}%"


def duration(seconds: float) -> str:
    """Seconds as people say them: 4.2 s, 54 s, 6 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f}\u00a0s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}\u00a0s"
    if whole < 3600:
        return f"{whole // 60}\u00a0min\u00a0{whole % 60}\u00a0s"
    return f"{whole // 3600}\u00a0h\u00a0{whole % 3600 // 60}\u00a0min"


def shown(value: Any) -> str:
    """A value of unknown type for a table cell; a dash where there is none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _without_zeros(significant(value, 4)) if math.isfinite(value) else "–"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(shown(item) for item in value) or "–"
    return "–" if value is None or value == "" else str(value)
