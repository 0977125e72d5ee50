"""Means and ratios with confidence intervals for few values, and their formatting.

All intervals use Student's t: at n = 3, in simulations, a nominal 95 % percentile bootstrap covers 75 to 80 %, and
Student's t on logarithms 94 to 96 %. Values of several machines are no independent ones, see `components`.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import NamedTuple

LEVEL = 0.95
LEAST_COMMON = 0.5
"""Correlation of two ratios to the same run, where all runs vary alike."""
NONE = "n/a"
COVERED = (0.88, 0.97)
"""How many of the 95 % intervals over several machines hold the truth: the least and most in simulations."""
Machines = Sequence[Hashable] | None
"""Of each value, on which machine it was measured; None where all are of one."""


@dataclass(frozen=True)
class Estimate:
    """A value with its two-sided 95 % confidence interval; the bounds are None if n is below 2, and the value itself
    where nothing varies."""

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """What a reader is told of the bounds: None where one value gives none, and where nothing varies."""
        if self.low is None or self.high is None or self.low == self.high:
            return None
        return self.low, self.high


def values(estimates: Iterable[Estimate | None]) -> list[float]:
    """The values of those that there are."""
    return [e.value for e in estimates if e is not None]


@cache
def student(freedom: float) -> float:
    """Quantile of Student's t at the upper end of the interval, without importing all of `scipy.stats`."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


class Component(NamedTuple):
    """A part of the variance of a mean."""

    deviation: float
    n: float
    """How many independent ones the mean has of it: rounds, or machines by their shares of the rounds."""
    freedom: float

    @property
    def error(self) -> float:
        return self.deviation / math.sqrt(self.n)


def components(values: Sequence[float], machines: Machines = None) -> list[Component]:
    """What the mean of at least two values varies by: rounds and, where machines differ more than their rounds tell,
    machines before them.

    A random effect of the machine, its variance by ANOVA (n0 of Searle where rounds are unevenly spread), none where
    that is negative. With one round a machine, or one machine, all is the plain spread. `half` gives each part its own
    quantile: k - 1 degrees of freedom for k machines, n - 1 for rounds, so that an interval widens from the plain one
    on without a jump. In simulations, where machines vary 0 to 5 times as much as rounds:

    - 95 % intervals hold the truth in 90 to 97 % at 3 + 2 rounds (plain t: 63 to 95 %), 88 to 97 % at 5 + 5 (45 to
      95 %), 94 to 97 % at 2 + 2 + 1 (81 to 95 %), 92 to 97 % at 5 + 5 + 5 (51 to 95 %). The least is where machines
      vary about as much as rounds: then two machines often look alike by chance.
    - Satterthwaite's degrees of freedom cover as much (89 to 97 %), but where the mean squares are equal, the interval
      jumps from t at n - 1 to t at k - 1, 4.6 times as wide at 3 + 2 rounds; Satterthwaite over the components covers
      85 to 99 %, as REML would, whose estimates these are where rounds are evenly spread. t over the machines' means
      covers 95 %, but is 2 (three machines) or 4 times too wide where machines are alike, and narrower than the plain
      one where two means agree by chance.

    Two machines tell little of how machines differ: where they do, t is 12.7, and no interval that covers is narrow.
    """
    return anova([values], machines) or [Component(stdev(values), len(values), len(values) - 1)]


def anova(rows: Sequence[Sequence[float]], machines: Machines, free: int = 1) -> list[Component] | None:
    """`components` of rows of one spread, each a value a round, where machines differ more than their rounds tell; else
    None. free: how many of the rows are independent, one less where what they have in common was taken out."""
    places: dict[Hashable, list[int]] = {}
    for i, machine in enumerate(machines or ()):
        places.setdefault(machine, []).append(i)
    n, k = len(machines or ()), len(places)
    if not 1 < k < n:
        return None
    squares, among, within = sum(len(at) ** 2 for at in places.values()), 0.0, 0.0
    for row in rows:
        centre = fmean(row)
        for at in places.values():
            middle = fmean(row[i] for i in at)
            among += len(at) * (middle - centre) ** 2 / (k - 1) / free
            within += sum((row[i] - middle) ** 2 for i in at) / (n - k) / free
    between = (among - within) * (k - 1) / (n - squares / n)
    if between <= 0:
        return None
    return [
        Component(math.sqrt(between), n**2 / squares, free * (k - 1)),
        Component(math.sqrt(within), n, free * (n - 1)),
    ]


def half(parts: Sequence[Component], quantile: Callable[[float], float] = student) -> float:
    """Half the interval of a mean that varies by these, by the quantile of Student's t at so many degrees of freedom;
    by default that of 95 %."""
    return math.hypot(*(quantile(c.freedom) * c.error for c in parts))


def mean(values: Sequence[float], machines: Machines = None) -> Estimate:
    """Arithmetic mean with its t interval. Raises ValueError if there is no value or one is not finite."""
    n = len(values)
    if not n or not all(map(math.isfinite, values)):
        raise ValueError(f"a mean needs at least one value, all finite; given are {n}: {list(values)[:5]}")
    centre = fmean(values)
    if n == 1:
        return Estimate(centre, None, None, n)
    to = half(components(values, machines))
    return Estimate(centre, centre - to, centre + to, n)


def geometric_mean(values: Sequence[float], machines: Machines = None) -> Estimate:
    """Geometric mean of positive values with the t interval on logarithms, which stays above zero."""
    return ratio([(1.0, v) for v in values], machines)


def ratio(pairs: Sequence[tuple[float, float]], machines: Machines = None) -> Estimate:
    """Geometric mean of second / first over pairs, with the paired t interval on logarithms.

    Raises ValueError without pairs, or for a value that is not positive and finite.
    """
    if any(v <= 0 for p in pairs for v in p):
        raise ValueError("a ratio needs positive values")
    e = mean([math.log(b / a) for a, b in pairs], machines)
    low, high = (None if x is None else math.exp(x) for x in (e.low, e.high))
    return Estimate(math.exp(e.value), low, high, e.n)


def apart(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Geometric mean of second over that of first, which are not paired, with Welch's interval on logarithms; n is that
    of the smaller one."""
    import numpy as np
    from scipy.stats import ttest_ind

    x, y = (np.log(values) for values in (first, second))
    value, n = math.exp(y.mean() - x.mean()), min(len(x), len(y))
    if n < 2 or np.ptp(x) + np.ptp(y) == 0:
        return Estimate(value, None, None, n)
    low, high = ttest_ind(y, x, equal_var=False).confidence_interval(LEVEL)
    return Estimate(value, math.exp(low), math.exp(high), n)


def inverse(e: Estimate) -> Estimate:
    """Of a ratio, that of the other side to the one."""
    low, high = (1 / x if x else None for x in (e.high, e.low))
    return Estimate(1 / e.value, low, high, e.n)


def pooled_ratios(groups: Sequence[Mapping[str, tuple[float, float]]]) -> list[Estimate] | None:
    """As `ratio` of each group, with the spread of all of them together; None where their spreads are not alike by
    Bartlett's test at 5 %, or fewer than three groups have three pairs, and more than one value.

    groups: of each, pairs by the run that gave the first value, so that groups that have runs in common share these
    runs' noise; each group of one machine. Few pairs of their own give a wide interval: at n = 3, Student's t is 4.3.

    Assumed: logarithms of ratios are normal and of one variance, and all of those to the same run of one correlation,
    so that they tell less of that variance than as many of their own would (degrees of freedom by Satterthwaite). The
    correlation is that of the residuals, but no less than where all runs vary alike: few residuals often show less by
    chance. What a round has in common cancels. Baseline and placements need not vary alike; they seldom do, on a GPU
    the baseline varies least. In simulations 94 to 96 % of the intervals hold the truth where they do, 92 to 98 % where
    the baseline varies three times or a fifth as much, or placements have noise of their own in common.
    """
    import numpy as np
    from scipy.stats import bartlett

    logs = [{run: math.log(b / a) for run, (a, b) in pairs.items()} for pairs in groups]
    told = [list(of.values()) for of in logs]
    if len(told) < 3 or any(len(x) < 3 or stdev(x) == 0 for x in told) or bartlett(*told).pvalue < 1 - LEVEL:
        return None
    means, runs = [fmean(x) for x in told], list(dict.fromkeys(run for of in logs for run in of))
    left = np.array([[of.get(run, mean) - mean for run in runs] for of, mean in zip(logs, means, strict=True)])
    there = np.array([[run in of for run in runs] for of in logs], float)
    n, shared = there.sum(axis=1), there @ there.T
    # of the residuals' products, were variance and correlation 1
    expected = shared * (1 - 1 / n - 1 / n[:, None] + shared / np.outer(n, n))
    products = left @ left.T
    own, between = np.trace(expected), expected.sum() - np.trace(expected)
    variance = np.trace(products) / own
    common = (products.sum() - np.trace(products)) / between / variance if between else 0.0
    freedom = own**2 / (own + min(max(common, LEAST_COMMON), 1.0) ** 2 * between)
    halves = student(float(freedom)) * np.sqrt(variance / n)
    return [
        Estimate(math.exp(mean), math.exp(mean - h), math.exp(mean + h), len(x))
        for mean, h, x in zip(means, halves, told, strict=True)
    ]


def overlap(a: Estimate, b: Estimate) -> bool:
    """Whether the intervals of two estimates overlap, so that the data do not settle which is larger; False where one
    has no interval."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.low <= b.high and b.low <= a.high


def byte_unit(largest: float) -> tuple[str, int]:
    """(name, bytes) of the unit that suits `largest`: MiB or GiB."""
    return ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)


def size(n: float | None) -> str:
    """Bytes as MiB or GiB."""
    if n is None:
        return NONE
    name, unit = byte_unit(abs(n))
    return f"{n / unit:.2f} {name}"


def number(x: float | None, scale: float = 1.0) -> str:
    """`x * scale` with three significant figures; from 100 up, as a whole number."""
    if x is None:
        return NONE
    x *= scale
    text = f"{x:#.3g}" if x else "0"
    return f"{x:.0f}" if abs(float(text)) >= 100 else text


def _interval(e: Estimate | None, text: Callable[[float], str], unit: str = "") -> str:
    if e is None:
        return NONE
    if e.low is None or e.high is None:
        return f"{text(e.value)}{unit} (n = {e.n})"
    if text(e.low) == text(e.high):  # nothing that is shown varies
        return f"{text(e.value)}{unit}"
    return f"{text(e.value)} [{text(e.low)}, {text(e.high)}]{unit}"


def estimate(e: Estimate | None, scale: float = 1.0) -> str:
    """`value [low, high]`, or the value alone if a single measurement gives no interval."""
    return _interval(e, lambda x: number(x, scale))


def sizes(e: Estimate | None) -> str:
    """An estimate of bytes with its interval, in one unit."""
    name, unit = byte_unit(abs(e.value) if e else 0)
    return _interval(e, lambda x: f"{x / unit:.2f}", f" {name}")


def close(e: Estimate | None) -> str:
    """An estimate with four decimals, for ratios that should be 1."""
    return _interval(e, lambda x: f"{x:.4f}")


def span(values: Sequence[float], text: Callable[[float], str]) -> str:
    """`low to high`, or one value if both are formatted the same."""
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"


def percent(x: float | None) -> str:
    return NONE if x is None else f"{100 * x:.1f} %"
