"""Bootstrap intervals for ratios of sums over blocks of text.

Tokens of one block are not independent, so blocks are resampled, not tokens; every quantity of a resample is
computed from the same blocks, which keeps differences and ratios between two models paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_MAX_WEIGHTS = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval, which is ``None`` of a single block: nothing says how others would differ."""

    value: float
    low: float | None
    high: float | None

    def figures(self, name: str) -> dict[str, Any]:
        """As plain JSON values: ``name``, and ``<name>_interval: [low, high]`` where there is one."""
        interval = {} if self.low is None else {f"{name}_interval": [self.low, self.high]}
        return {name: self.value} | interval


def written(figures: Mapping[str, Any], name: str, form: str, between: str = "–", *, scale: float = 1) -> str:
    """A figure times ``scale`` and, where there is one, its interval dimmed behind it: for cells of tables."""
    text = f"{scale * figures[name]:{form}}"
    if f"{name}_interval" not in figures:
        return text
    low, high = (scale * edge for edge in figures[f"{name}_interval"])
    return f"{text} [dim]({low:{form}}{between}{high:{form}})[/dim]"


def bootstrap(
    sums_NQ: Array,
    statistics: Mapping[str, Callable[[Array], Array]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Estimates with 95% percentile intervals, where there are blocks to resample: more than one.

    Args:
        sums_NQ: Q sums over each of N blocks.
        statistics: From Q totals in the last axis to a value; called with ``[Q]`` and with ``[R, Q]``.
        resamples: R.
        seed: Of the resampling.
    """
    values = {name: float(statistic(sums_NQ.sum(0))) for name, statistic in statistics.items()}
    if len(sums_NQ) == 1:
        return {name: Estimate(value, None, None) for name, value in values.items()}
    totals_RQ = resampled_totals(sums_NQ, resamples, seed)
    estimates = {}
    for name, statistic in statistics.items():
        # A resample may hold no counted token at all when blocks are few and masked: it says nothing.
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = np.nanquantile(statistic(totals_RQ), [0.025, 0.975], method="nearest")
        estimates[name] = Estimate(values[name], float(low), float(high))
    return estimates


def resampled_totals(sums_NQ: Array, resamples: int, seed: int | Sequence[int]) -> Array:
    """Totals over N blocks drawn with replacement, ``[R, Q]``; one seed and one N give the same draws."""
    num_blocks = len(sums_NQ)
    infinite_NQ = np.isinf(sums_NQ)  # apart, because 0 draws of an infinite sum are 0 and not NaN
    finite_NQ = np.where(infinite_NQ, 0.0, sums_NQ)
    random = np.random.default_rng(seed)
    # How often each block is drawn is all that matters: totals are counts times sums, one matrix product.
    totals = []
    remaining = resamples
    while remaining:
        rows = min(remaining, max(1, _MAX_WEIGHTS // num_blocks))
        counts = random.multinomial(num_blocks, np.full(num_blocks, 1.0 / num_blocks), size=rows)
        totals.append(np.where(counts @ infinite_NQ > 0, np.inf, counts @ finite_NQ))
        remaining -= rows
    return np.concatenate(totals)
