"""Pure numbers: means and ratios with intervals that hold for a handful of values.

Student's t throughout: at n = 3 a percentile bootstrap's nominal 95 % interval covers 75 to 80 % (simulated), t on
logarithms 94 to 96 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with its two-sided 95 % interval; the bounds are None where n is below 2."""

    value: float
    low: float | None
    high: float | None
    n: int


def _half_width(values: Sequence[float], level: float) -> float | None:
    n = len(values)
    if n < 2:
        return None
    return float(student.ppf((1 + level) / 2, n - 1)) * stdev(values) / math.sqrt(n)


def mean(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Arithmetic mean with its t interval. Raises ValueError on no or non-finite values."""
    _finite(values)
    centre, half = fmean(values), _half_width(values, level)
    return Estimate(centre, *(None, None) if half is None else (centre - half, centre + half), len(values))


def geometric_mean(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Geometric mean of positive values with the t interval on logarithms: it cannot reach below zero."""
    return ratio([(1.0, v) for v in values], level)


def ratio(pairs: Sequence[tuple[float, float]], level: float = LEVEL) -> Estimate:
    """Geometric mean of second / first over pairs, with the paired t interval on logarithms.

    Raises ValueError on no pairs or on a value that is not positive and finite.
    """
    _finite([v for p in pairs for v in p])
    if any(v <= 0 for p in pairs for v in p):
        raise ValueError("a ratio needs positive values")
    logs = [math.log(b / a) for a, b in pairs]
    centre, half = fmean(logs), _half_width(logs, level)
    bounds = (None, None) if half is None else (math.exp(centre - half), math.exp(centre + half))
    return Estimate(math.exp(centre), *bounds, len(pairs))


def _finite(values: Sequence[float]) -> None:
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(f"{len(values)} values, all must be finite and there must be one: {list(values)[:5]}")
