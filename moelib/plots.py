"""Frames -> figures. Each function draws one and returns it; `show` puts it into a notebook under a name."""

import base64
import functools
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.style
import pandas as pd
import seaborn as sns
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moelib import analyse, files, neutral, table
from moelib.record import Record
from moelib.stats import byte_unit
from moelib.study import Results

COLOURS = ["#3b6fb6", "#d1742f", "#4f9a6b", "#8d6cb3"]
"""Of the placements in the study's order; repeated where there are more."""
DPI = 144


def _styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """`draw` in the document's style; the session's own style is neither used nor changed."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Any:
        style = sns.plotting_context("notebook", font_scale=0.9)
        style |= sns.axes_style("whitegrid", rc={"axes.spines.top": False, "axes.spines.right": False})
        style |= {"axes.prop_cycle": mpl.cycler(color=sns.color_palette("deep")), "font.family": "sans-serif"}
        with mpl.style.context(style, after_reset=True):
            return draw(*args, **kwargs)

    return styled


def _axes(columns: int, height: float = 3.4) -> tuple[Any, list[Any]]:
    # without pyplot: no global state, nothing shown twice
    figure = Figure(figsize=(max(6.0, 1.2 + 3.6 * columns), height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


@_styled
def show(figure: Any, name: str, alt: str, records: Iterable[Record] = ()) -> None:
    """Display the figure as PNG; `name` becomes its file beside the document, `alt` describes it, `records` are
    what it was drawn from."""
    out, name, alt = io.BytesIO(), _file_name(name), neutral.markdown(alt)
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    data = {"image/png": base64.b64encode(out.getvalue()).decode(), "text/plain": alt}
    provenance = table.part("figure", name, table.cite(records))
    display(data, raw=True, metadata={"filename": name, "alt": alt, "moelib": table.once(provenance)})


def _file_name(name: str) -> str:
    """`name`, if it is safe as a file name; else its safe part and a digest that keeps it distinct."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        return name
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name)[:60].strip('-') or 'figure'}-{files.digest(name)[:8]}"


def _colour(name: Any, names: Iterable[Any]) -> str:
    return COLOURS[list(names).index(name) % len(COLOURS)]


def _empty(why: str) -> Any:
    """A figure without data that says why it has none."""
    figure, (axis,) = _axes(1, 1.2)
    axis.set_axis_off()
    axis.text(0.5, 0.5, f"no data: {why}", ha="center", va="center", transform=axis.transAxes)
    return figure


def _legend(figure: Any, names: Sequence[str]) -> None:
    handles = [Patch(color=_colour(n, names), alpha=0.75, label=neutral.label(n)) for n in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(names)), frameon=False)


def placements(results: Results) -> dict[str, str]:
    """Label in records -> name in figures, in the study's order: the same colour in all figures. The name is the
    placement, with the load mode where the study has several."""
    several = len({arm.load_mode for arm in results.study.arms}) > 1
    return {a.label: f"{a.placement}, {a.load_mode}" if several else a.placement for a in results.study.arms}


def _facets(results: Results, frame: pd.DataFrame, y: str, label: str) -> Any:
    """Bars of means, with every single value as a dot."""
    by_label = placements(results)
    names = list(by_label.values())
    labels = [f"{p}/{mode}" for p, mode in zip(frame.placement, frame.load_mode, strict=True)]
    frame = frame.assign(name=[by_label[label] for label in labels])
    how = {"x": "quant", "y": y, "hue": "name", "order": results.study.quants, "hue_order": names, "legend": False}
    models = [m for m in results.study.models if (frame.model == m).any()]
    if not models:
        return _empty(f"no complete round has {label}")
    figure, axes = _axes(len(models))
    for axis, model in zip(axes, models, strict=False):
        how |= {"data": frame[frame.model == model], "ax": axis}
        sns.barplot(**how, palette=[_colour(n, names) for n in names], errorbar=None, alpha=0.75, saturation=1)
        sns.stripplot(**how, palette=["#222222"] * len(names), dodge=True, size=3.2, alpha=0.8, jitter=False)
        axis.set(title=neutral.label(model), xlabel="", ylabel=label if axis is axes[0] else "")
    _legend(figure, names)
    return figure


@_styled
def vram(results: Results) -> Any:
    """Peak VRAM by quant and placement; one dot per run."""
    frame = analyse.runs(r for b in results.blocks for r in b).dropna(subset="vram_bytes")
    name, unit = byte_unit(frame.vram_bytes.max())
    return _facets(results, frame.assign(y=frame.vram_bytes / unit), "y", f"VRAM, {name}")


@_styled
def speed(results: Results, workload: str) -> Any:
    """tokens/s by quant and placement; one dot per request."""
    frame = analyse.requests((r for b in results.blocks for r in b), workload)
    return _facets(results, frame, "tokens_per_s", "tokens/s")


@_styled
def ttft(results: Results, workload: str) -> Any:
    """TTFT of warm requests by quant and placement; one dot per request."""
    frame = analyse.requests((r for b in results.blocks for r in b), workload)
    frame = frame[frame.request > 0]
    return _facets(results, frame.assign(ms=frame.ttft_s * 1000), "ms", "TTFT, ms")


@_styled
def trade(results: Results, workload: str) -> Any:
    """VRAM (across) against tokens/s (up): an arrow from the baseline to each placement with CPU offload."""
    memory, rate = (analyse.compare(results, q) for q in (analyse.vram, analyse.tokens_per_s(workload)))
    known = [(m, r) for m, r in zip(memory, rate, strict=True) if m.baseline and r.baseline]
    name, unit = byte_unit(max((m.baseline.value for m, _ in known), default=0))
    models = [m for m in results.study.models if any(k.model == m for k, _ in known)]
    by_label = placements(results)
    if not models:
        return _empty("no complete round has both VRAM and tokens/s")
    figure, axes = _axes(len(models), 3.8)
    for axis, model in zip(axes, models, strict=False):
        rows = [(m, r) for m, r in known if m.model == model]
        for m, r in rows:
            start, end = (m.baseline.value / unit, r.baseline.value), (m.offload.value / unit, r.offload.value)
            arrow = {"arrowstyle": "-|>", "color": "#999999", "shrinkA": 5, "shrinkB": 5}
            axis.annotate("", xy=end, xytext=start, arrowprops=arrow)
            axis.plot(*start, "o", color=COLOURS[0])
            axis.plot(*end, "o", color=_colour(m.arm.label, by_label))
            axis.annotate(m.quant, start, textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
        axis.set(title=neutral.label(model), xlabel=f"VRAM, {name}")
        axis.set(ylabel="tokens/s" if axis is axes[0] else "")
        axis.margins(0.15)
        axis.set(xlim=(0, None), ylim=(0, None))
    _legend(figure, list(by_label.values()))
    return figure


def _name(r: Record) -> str:
    return f"{r.spec.placement}, {r.spec.load_mode}"


@_styled
def tokens_over_time(records: Sequence[Record], workload: str) -> Any:
    """Tokens generated against time since the request was sent; one line per request, one panel per placement."""
    names = sorted({_name(r) for r in records})
    if not names:
        return _empty("no run of a complete round")
    figure, axes = _axes(len(names), 3.0)
    for axis, name in zip(axes, names, strict=False):
        for r in records:
            for q in r.observed.requests if r.observed and _name(r) == name else ():
                if q.workload == workload:
                    style = {"color": _colour(name, names), "alpha": 0.8, "lw": 1, "ls": "-" if q.index else ":"}
                    axis.plot([t * 1000 for t in q.token_s], q.token_n, **style)
        axis.set(title=neutral.label(name), xlabel="ms since the request", xlim=(0, None))
        axis.set(ylabel="tokens" if axis is axes[0] else "")
    return figure


@_styled
def vram_over_time(records: Sequence[Record]) -> Any:
    """VRAM against time since the start of each run; one line per run."""
    known = [r for r in records if r.observed and any(x.process_bytes for x in r.observed.memory.trace.during)]
    if not known:
        return _empty("no run of a complete round has readings of its VRAM")
    figure, (axis, other) = _axes(2, 3.0)
    figure.delaxes(other)
    peak = max((x.process_bytes or 0 for r in known for x in r.observed.memory.trace.during), default=0)
    name, unit = byte_unit(peak)
    names = sorted({_name(r) for r in known})
    for r in known:
        points = [(x.t_s, x.process_bytes / unit) for x in r.observed.memory.trace.during if x.process_bytes]
        axis.plot(*zip(*points, strict=True), color=_colour(_name(r), names), alpha=0.8, lw=1)
    axis.set(xlabel="s since the run's start", ylabel=f"VRAM, {name}", ylim=(0, None))
    _legend(figure, names)
    return figure
