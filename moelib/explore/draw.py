"""Figures of a view. Each is drawn without pyplot, so that it is shown once and no state is left."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moelib.answers import points
from moelib.answers.points import Point
from moelib.base import neutral
from moelib.base.stats import number
from moelib.explore.fits import name
from moelib.explore.view import GB, View, is_plain
from moelib.figures.axes import COLOURS, HATCHES, MARKERS, nth
from moelib.study.study import UnknownName

WIDTH = 9.4  # inches at DPI: what JupyterLab has room for on a screen of 1,280 pixels
DPI = 96
PARTS = ("weights", "cache", "compute", "rest")
PART_NAMES = ("weights", "KV cache", "compute buffer", "rest")
FAINT = "#888888"
CLOSE = 0.12
"""Of logarithms: points of a front that lie nearer in both directions have one label."""


def _styled(draw: Callable[..., Picture]) -> Callable[..., Picture]:
    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Picture:
        with mpl.rc_context({**sns.axes_style("whitegrid"), **sns.plotting_context("notebook", font_scale=0.85)}):
            return draw(*args, **kwargs)

    return styled


class Picture(Figure):
    """A figure that a notebook shows as PNG, whatever backend it has."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
        return out.getvalue()


def png(figure: Picture) -> bytes:
    """As browsers show it."""
    return figure._repr_png_()


@_styled
def curves(view: View) -> Picture:
    """tokens/s and VRAM over the number of layers with experts on the CPU.

    Points: measured, with 95 % intervals. Dashed: the law fitted to them. Solid: estimated for the chosen RAM.
    """
    figure = Picture(figsize=(WIDTH, 4.2), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    modes = _modes(view)
    for p in view.measured:
        low, high = (p.rate.value if end is None else end for end in (p.rate.low, p.rate.high))
        faint = view.ram_bytes_per_s is not None and p.moved_layers > 0
        speed.errorbar(
            p.moved_layers,
            p.rate.value,
            [[p.rate.value - low], [high - p.rate.value]],
            color=_colour(view, p.quant),
            marker=nth(MARKERS, p.placement.load_mode, modes),
            alpha=0.4 if faint else 1,
            capsize=2,
        )
    for (quant, mode), law in view.laws.items():
        layers = np.linspace(0, max((p.moved_layers for p in view.measured if p.quant == quant), default=0), 60)
        seconds = [law.at(view.model, quant, n) for n in layers]
        style: dict[str, Any] = {"color": _colour(view, quant), "lw": 1.2}
        if None not in seconds:
            speed.plot(layers, [1 / s for s in seconds if s], ls="--", alpha=0.6, **style)
        told = [view.estimate(quant, mode, n) for n in layers]
        if None not in told:
            speed.plot(layers, [one.value for one in told if one], **style)
    for quant, mode in view.laws:
        of = [p for p in view.points if p.quant == quant and (p.placement.load_mode == mode or not p.moved_layers)]
        of = sorted((p for p in of if is_plain(p.placement)), key=lambda p: p.moved_layers)
        style = {"color": _colour(view, quant), "marker": nth(MARKERS, mode, modes), "lw": 0.8}
        memory.plot([p.moved_layers for p in of], [p.vram_bytes / GB for p in of], **style)
    memory.axhline(view.vram_bytes / GB, color=FAINT, ls=":")
    memory.annotate("budget", (1, view.vram_bytes / GB), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    across = "layers with experts on the CPU"
    speed.set(yscale="log", xlabel=across, ylabel=f"tokens/s, {neutral.label(view.workload)}")
    _log_ticks(speed.yaxis)
    memory.set(xlabel=across, ylabel=_vram(view), ylim=(0, None))
    how = [Line2D([], [], color=FAINT, ls="--", label="law of the measured machine")]
    if view.ram_bytes_per_s is not None:
        ram = f"{view.ram_bytes_per_s / GB:g} GB/s"
        how.append(Line2D([], [], color=FAINT, ls="-", label=f"estimated for RAM of {ram}"))
    _finish(figure, view, [*_quant_handles(view), *_mode_handles(modes), *how])
    return figure


@_styled
def front(view: View) -> Picture:
    """VRAM against tokens/s: what is on the front of VRAM, tokens/s and TTFT is filled and named, what is dominated
    hollow."""
    figure = Picture(figsize=(WIDTH, 4.6), layout="constrained")
    ax = figure.subplots()
    modes, by = _modes(view), points.front(view.points)
    best = [p for p, better in by.items() if better is None]
    for p, better in by.items():
        at = p.vram_bytes / GB, p.rate.value
        marker, colour = nth(MARKERS, p.placement.load_mode, modes), _colour(view, p.quant)
        ax.plot(*at, marker, color=colour, mfc=colour if better is None else "none", ms=8, zorder=3)
        if better is not None:
            top = better.vram_bytes / GB, better.rate.value
            ax.annotate("", xy=top, xytext=at, arrowprops={"arrowstyle": "->", "color": FAINT, "ls": ":"}, zorder=1)
    _name(ax, best)
    ax.axvline(view.vram_bytes / GB, color=FAINT, ls=":")
    ax.annotate("budget", (view.vram_bytes / GB, 0.02), xycoords=("data", "axes fraction"), rotation=90, ha="right")
    ax.set(xscale="log", yscale="log", xlabel=_vram(view), ylabel=f"tokens/s, {neutral.label(view.workload)}")
    ax.margins(0.15)
    _log_ticks(ax.xaxis)
    _log_ticks(ax.yaxis)
    hollow = [Line2D([], [], color=FAINT, ls="", marker="o", mfc="none", label="dominated")]
    _finish(figure, view, [*_quant_handles(view), *_mode_handles(modes), *hollow])
    return figure


@_styled
def memory(view: View) -> Picture:
    """VRAM of every placement by what takes it, and the budget."""
    told = [(p, parts) for p in view.measured if (parts := view.parts(p))]
    figure = Picture(figsize=(WIDTH, 1.4 + 0.3 * max(len(told), 4)), layout="constrained")
    ax = figure.subplots()
    for row, (_, parts) in enumerate(told):
        left = 0.0
        for part, colour, hatch in zip(PARTS, COLOURS, HATCHES, strict=False):
            width = getattr(parts, part) / GB
            ax.barh(row, width, left=left, color=colour, hatch=hatch, edgecolor="white", height=0.75)
            left += width
        ax.annotate(f" {number(parts.total / GB)}", (left, row), va="center", fontsize="small")
    names = [name(p) for p, _ in told]
    ax.set_yticks(range(len(told)), [neutral.label(n) for n in names])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.08)
    ax.axvline(view.vram_bytes / GB, color="black", ls=":")
    ax.set(xlabel=f"{_vram(view)}; dotted: the budget", xlim=(0, None))
    if not told:
        ax.text(0.5, 0.5, "not told for this context", ha="center", transform=ax.transAxes)
    handles = [
        mpl.patches.Patch(facecolor=c, hatch=h, edgecolor="white", label=n)
        for n, c, h in zip(PART_NAMES, COLOURS, HATCHES, strict=False)
    ]
    _finish(figure, view, handles)
    return figure


@_styled
def intervals(view: View, run_id: str | None = None) -> Picture:
    """Time from token to token of a run (by default the first of the view): in order, and how they are distributed.

    Raises UnknownName for a run that is not there, or observed nothing.
    """
    record = view.study.record(run_id or str(view.runs["run_id"].iloc[0]))
    if not record.observed:
        raise UnknownName(f"{record.run_id} has no tokens: it {record.status}, {', '.join(record.reasons)}")
    figure = Picture(figsize=(WIDTH, 4.0), layout="constrained")
    over, share = figure.subplots(1, 2, width_ratios=(2, 1))
    requests = [q for q in record.observed.requests if len(q.token_n) == len(q.token_s) > 1]
    names = [f"{q.workload} #{q.index + 1}" for q in requests]
    for q, label in zip(requests, names, strict=True):
        gaps = 1000 * np.diff(q.token_s) / np.diff(q.token_n)
        style: dict[str, Any] = {"color": nth(COLOURS, label, names), "label": neutral.label(label)}
        over.plot(q.token_n[1:], gaps, lw=1, marker=".", ms=3, **style)
        sns.ecdfplot(x=gaps, ax=share, **style)
    over.set(xlabel="token", ylabel="ms since the token before", ylim=(0, None))
    share.set(xlabel="ms", ylabel="share of intervals")
    figure.suptitle(neutral.label(record.line.partition(": ")[0]), fontsize="medium")
    figure.legend(handles=over.get_legend_handles_labels()[0], loc="outside lower center", ncols=4, frameon=False)
    return figure


def _name(ax: Any, best: list[Point]) -> None:
    """Write what the points of a front are beside them; what lies close together is written once, in several lines.
    Above and below in turn, for the sake of neighbours."""
    groups: list[list[Point]] = []
    for p in sorted(best, key=lambda p: -p.rate.value):
        near = (g for g in groups if max(_apart(g[0].rate.value, p.rate.value), _apart(*_vrams(g[0], p))) < CLOSE)
        group = next(near, None)
        if group is None:
            groups.append([p])
        else:
            group.append(p)
    for i, group in enumerate(sorted(groups, key=lambda g: g[0].vram_bytes)):
        where = {"xytext": (0, -9), "va": "top"} if i % 2 else {"xytext": (0, 9), "va": "bottom"}
        text = "\n".join(neutral.label(name(p)) for p in group)
        at = group[0].vram_bytes / GB, group[0].rate.value
        ax.annotate(text, at, textcoords="offset points", ha="center", fontsize="small", **where)


def _apart(a: float, b: float) -> float:
    return abs(math.log(a / b))


def _vrams(a: Point, b: Point) -> tuple[float, float]:
    return a.vram_bytes, b.vram_bytes


def _colour(view: View, quant: str) -> str:
    return nth(COLOURS, quant, view.study.parameters.quants)


def _modes(view: View) -> list[str]:
    return list(dict.fromkeys(p.placement.load_mode for p in view.measured))


def _log_ticks(axis: Any) -> None:
    """Plain numbers at some of each decade: the data seldom span several."""
    axis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.set_major_formatter(lambda y, _: f"{y:g}")
    axis.set_minor_formatter(mpl.ticker.NullFormatter())


def _vram(view: View) -> str:
    return "VRAM, GB" if view.context is None else f"VRAM, GB, estimated at {view.context:,} tokens"


def _quant_handles(view: View) -> list[Line2D]:
    return [Line2D([], [], color=_colour(view, q), lw=3, label=neutral.label(q)) for q in view.quants]


def _mode_handles(modes: list[str]) -> list[Line2D]:
    return [Line2D([], [], color=FAINT, ls="", marker=nth(MARKERS, m, modes), label=neutral.label(m)) for m in modes]


def _finish(figure: Figure, view: View, handles: list[Any]) -> None:
    names = (view.model, view.study.name, *view.runs["gpu"].unique())
    figure.suptitle(", ".join([*map(neutral.label, names), f"n = {len(view.runs)} runs"]), fontsize="medium")
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
