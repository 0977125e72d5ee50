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
"""Of the first arms; they come again where there are more."""
DPI = 144


def _styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """`draw` in the document's style, whatever the session's is, and the session's as it was afterwards."""

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
    """Display the figure as PNG; `name` becomes its file beside the document, `alt` says what it shows, `records` is
    what it was drawn from."""
    out, name, alt = io.BytesIO(), _file_name(name), neutral.markdown(alt)
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    data = {"image/png": base64.b64encode(out.getvalue()).decode(), "text/plain": alt}
    told = table.part("figure", name, table.cite(records))
    display(data, raw=True, metadata={"filename": name, "alt": alt, "moelib": table.tell(told)})


def _file_name(name: str) -> str:
    """`name`, if it can be a file's in a folder; else what can be of it, told from others by its digest."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        return name
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name)[:60].strip('-') or 'figure'}-{files.digest(name)[:8]}"


def _colour(of: Any, among: Iterable[Any]) -> str:
    return COLOURS[list(among).index(of) % len(COLOURS)]


def _nothing(why: str) -> Any:
    """A figure that says why there is none."""
    figure, (axis,) = _axes(1, 1.2)
    axis.set_axis_off()
    axis.text(0.5, 0.5, f"nothing to draw: {why}", ha="center", va="center", transform=axis.transAxes)
    return figure


def _legend(figure: Any, arms: Sequence[str]) -> None:
    handles = [Patch(color=_colour(a, arms), alpha=0.75, label=neutral.label(a)) for a in arms]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(arms)), frameon=False)


def _arms(results: Results) -> dict[str, str]:
    """Label -> name in figures, in the study's order: an arm has the same colour in all of them."""
    many = len({arm.load_mode for arm in results.study.arms}) > 1
    return {arm.label: arm.label if many else arm.placement for arm in results.study.arms}


def _facets(results: Results, frame: pd.DataFrame, y: str, label: str) -> Any:
    """Bars of means with every value as a dot on them: a handful of values needs no summary beside itself."""
    named = _arms(results)
    arms = list(named.values())
    frame = frame.assign(arm=[named[f"{p}/{mode}"] for p, mode in zip(frame.placement, frame.load_mode, strict=True)])
    how = {"x": "quant", "y": y, "hue": "arm", "order": results.study.quants, "hue_order": arms, "legend": False}
    models = [m for m in results.study.models if (frame.model == m).any()]
    if not models:
        return _nothing(f"no whole block has {label}")
    figure, axes = _axes(len(models))
    for axis, model in zip(axes, models, strict=False):
        how |= {"data": frame[frame.model == model], "ax": axis}
        sns.barplot(**how, palette=[_colour(a, arms) for a in arms], errorbar=None, alpha=0.75, saturation=1)
        sns.stripplot(**how, palette=["#222222"] * len(arms), dodge=True, size=3.2, alpha=0.8, jitter=False)
        axis.set(title=neutral.label(model), xlabel="", ylabel=label if axis is axes[0] else "")
    _legend(figure, arms)
    return figure


@_styled
def memory(results: Results) -> Any:
    """Peak device memory by quant and placement; a dot a run."""
    frame = analyse.runs(r for b in results.blocks for r in b).dropna(subset="device_memory_bytes")
    name, unit = byte_unit(frame.device_memory_bytes.max())
    return _facets(results, frame.assign(y=frame.device_memory_bytes / unit), "y", f"device memory, {name}")


@_styled
def speed(results: Results, workload: str) -> Any:
    """Decode rate by quant and placement; a dot a request."""
    frame = analyse.requests((r for b in results.blocks for r in b), workload)
    return _facets(results, frame, "tokens_per_s", "tokens/s")


@_styled
def first_token(results: Results, workload: str) -> Any:
    """Time to first token of warm requests by quant and placement; a dot a request."""
    frame = analyse.requests((r for b in results.blocks for r in b), workload)
    frame = frame[frame.request > 0]
    return _facets(results, frame.assign(ms=frame.ttft_s * 1000), "ms", "time to first token, ms")


@_styled
def trade(results: Results, workload: str) -> Any:
    """What offloading trades: an arrow from baseline to each offload arm, device memory across, decode rate up."""
    memory, rate = (analyse.compare(results, q) for q in (analyse.device_memory, analyse.decode_rate(workload)))
    known = [(m, r) for m, r in zip(memory, rate, strict=True) if m.baseline and r.baseline]
    name, unit = byte_unit(max((m.baseline.value for m, _ in known), default=0))
    models = [m for m in results.study.models if any(k.model == m for k, _ in known)]
    named = _arms(results)
    if not models:
        return _nothing("no whole block has both memory and rate")
    figure, axes = _axes(len(models), 3.8)
    for axis, model in zip(axes, models, strict=False):
        rows = [(m, r) for m, r in known if m.model == model]
        for m, r in rows:
            start, end = (m.baseline.value / unit, r.baseline.value), (m.offload.value / unit, r.offload.value)
            arrow = {"arrowstyle": "-|>", "color": "#999999", "shrinkA": 5, "shrinkB": 5}
            axis.annotate("", xy=end, xytext=start, arrowprops=arrow)
            axis.plot(*start, "o", color=COLOURS[0])
            axis.plot(*end, "o", color=_colour(m.arm.label, named))
            axis.annotate(m.quant, start, textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
        axis.set(title=neutral.label(model), xlabel=f"device memory, {name}")
        axis.set(ylabel="tokens/s" if axis is axes[0] else "")
        axis.margins(0.15)
        axis.set(xlim=(0, None), ylim=(0, None))
    _legend(figure, list(named.values()))
    return figure


@_styled
def tokens_over_time(records: Sequence[Record], workload: str) -> Any:
    """Tokens generated against time since the request was sent; a line a request, one panel for each arm."""
    arms = list(dict.fromkeys(r.spec.arm for r in sorted(records, key=lambda r: r.spec.arm)))
    if not arms:
        return _nothing("no run of a whole block")
    figure, axes = _axes(len(arms), 3.0)
    for axis, arm in zip(axes, arms, strict=False):
        for r in records:
            for q in r.observed.requests if r.observed and r.spec.arm == arm else ():
                if q.workload == workload:
                    style = {"color": _colour(arm, arms), "alpha": 0.8, "lw": 1, "ls": "-" if q.index else ":"}
                    axis.plot([t * 1000 for t in q.token_s], q.token_n, **style)
        axis.set(title=neutral.label(arm), xlabel="ms since the request", xlim=(0, None))
        axis.set(ylabel="tokens" if axis is axes[0] else "")
    return figure


@_styled
def memory_over_time(records: Sequence[Record]) -> Any:
    """Device memory against time since the start of each run; a line a run."""
    known = [r for r in records if r.observed and any(x.process_bytes for x in r.observed.memory.trace.during)]
    if not known:
        return _nothing("no run of a whole block has readings of its memory")
    figure, (axis, other) = _axes(2, 3.0)
    figure.delaxes(other)
    name, unit = byte_unit(
        max((x.process_bytes or 0 for r in known for x in r.observed.memory.trace.during), default=0)
    )
    arms = sorted({r.spec.arm for r in known})
    for r in known:
        points = [(x.t_s, x.process_bytes / unit) for x in r.observed.memory.trace.during if x.process_bytes]
        axis.plot(*zip(*points, strict=True), color=_colour(r.spec.arm, arms), alpha=0.8, lw=1)
    axis.set(xlabel="s since the run's start", ylabel=f"device memory, {name}", ylim=(0, None))
    _legend(figure, arms)
    return figure
