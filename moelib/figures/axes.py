"""Draw on matplotlib axes: each function takes data and `ax`, draws, and returns `ax`. No figure, no legend, no global
state; placements keep colour, hatch and marker by their place in `names`."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from moelib.audit.record import Record
from moelib.base.stats import Estimate

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#4D4D4D")
"""Of the placements in order: Okabe and Ito's, which colour-blind readers tell apart."""
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Beside the colour, so that placements differ in grey as well, and go on differing where colours come again."""


def nth(of: Sequence[str], name: Any, names: Iterable[Any]) -> str:
    """The one of `of` that belongs to `name`, by its place in `names`."""
    return of[list(names).index(name) % len(of)]


def tokens_over_time(records: Iterable[Record], workload: str, *, colour: str, ax: Axes) -> Axes:
    """Tokens generated against ms since the request was sent; a line for each request, dotted for a server's first."""
    for r in records:
        for q in r.observed.requests if r.observed else ():
            if q.workload == workload and len(q.token_n) == len(q.token_s):
                style: dict[str, Any] = {"color": colour, "alpha": 0.8, "lw": 1, "ls": "-" if q.index else ":"}
                ax.plot([t * 1000 for t in q.token_s], q.token_n, **style)
    ax.set(xlabel="ms since the request", xlim=(0, None))
    return ax


def vram_over_time(records: Iterable[Record], *, names: Sequence[str], ax: Axes, unit: float = 1) -> Axes:
    """VRAM (over `unit`) against s since the run's start, a line for each run. names: labels of placements in order."""
    for r in records:
        points = [(x.t_s, x.process_bytes / unit) for x in r.observation.memory.trace.during if x.process_bytes]
        ax.plot(*zip(*points, strict=True), color=nth(COLOURS, r.spec.placed.label, names), alpha=0.8, lw=1)
    ax.set(xlabel="s since the run's start", ylim=(0, None))
    return ax


def stacks(
    rows: Sequence[Sequence[float]], at: Sequence[float], *, names: Sequence[str], ax: Axes, colours: Sequence[str]
) -> Axes:
    """Bars across, at heights `at`: each row's values side by side, a colour and a hatch for each of `names`."""
    left = np.zeros(len(rows))
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        form: dict[str, Any] = {"color": nth(colours, name, names), "hatch": nth(HATCHES, name, names), "alpha": 0.75}
        ax.barh(at, values, left=left, height=0.8, edgecolor="white", linewidth=0.5, **form)
        left = left + values
    return ax


def curve(
    across: Sequence[Estimate], up: Sequence[Estimate], *, ax: Axes, units: tuple[float, float] = (1, 1), **style: Any
) -> Axes:
    """Points in order with their 95 % intervals, joined by a line. units: what `across` and `up` are divided by."""
    (x, x_bars), (y, y_bars) = (_points(e, unit) for e, unit in zip((across, up), units, strict=True))
    ax.errorbar(x, y, xerr=x_bars, yerr=y_bars, **{"capsize": 2.5, "elinewidth": 1, "lw": 1.5, "ms": 5} | style)
    return ax


def _points(estimates: Sequence[Estimate], unit: float) -> tuple[Any, Any]:
    """(values, lengths of their bars below and above), NaN where there is no interval."""
    table = np.array([(e.value, e.low, e.high) for e in estimates], float).reshape(-1, 3) / unit
    value, low, high = table.T
    return value, np.array([value - low, high - value])


def diagonal(band: float, *, ax: Axes) -> Axes:
    """Where what is predicted is what was measured, and `band` (a share) about it; both axes get the same limits."""
    low, high = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
    ends = np.array([low, high])
    ax.plot(ends, ends, color="#666666", lw=1, zorder=1)
    ax.fill_between(ends, ends * (1 - band), ends * (1 + band), color="#999999", alpha=0.3, lw=0, zorder=0)
    ax.set(xlim=(low, high), ylim=(low, high))
    return ax


def heat(table: Any, *, ax: Axes, most: float, colours: str) -> Axes:
    """Cells of a table [row, column] coloured from 0 to `most`, by their roots, as most are small, and a cross in those
    that are exactly 0."""
    norm = PowerNorm(0.5, vmin=0, vmax=most)
    ax.imshow(table, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    rows, columns = np.nonzero(np.asarray(table) == 0)
    ax.scatter(columns, rows, marker="x", color="white", s=9, linewidths=0.8)
    ax.grid(visible=False)
    return ax


def whole_numbers(ax: Axes) -> None:
    """Ticks of what is counted along x."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def ticks(ax: Axes, of: str = "xy") -> Axes:
    """Ticks of logarithmic axes, once all is drawn: plain numbers, at more places where an axis is short."""
    for name in of:
        low, high = getattr(ax, f"get_{name}lim")()
        places = (1, 1.5, 2, 3, 4, 6, 8) if high < 6 * low else (1, 2, 5) if high < 100 * low else (1,)
        axis = getattr(ax, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=places, numticks=20))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    return ax
