"""Frames -> figures. Each function draws one and returns it; `show` puts it into a notebook under a name."""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moelib import analyse
from moelib.record import Record
from moelib.stats import byte_unit
from moelib.study import Results
from moelib.table import cite

COLOURS = ["#3b6fb6", "#d1742f", "#4f9a6b", "#8d6cb3"]
DPI = 144


def _axes(columns: int, height: float = 3.4) -> tuple[Any, list[Any]]:
    sns.set_theme(style="whitegrid", font_scale=0.9, rc={"axes.spines.top": False, "axes.spines.right": False})
    # without pyplot: no global state, nothing shown twice
    figure = Figure(figsize=(max(6.0, 1.2 + 3.6 * columns), height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def show(figure: Any, name: str, alt: str, records: Iterable[Record] = ()) -> None:
    """Display the figure as PNG; `name` becomes its file beside the document, `alt` says what it shows, `records` is
    what it was drawn from."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    data = {"image/png": base64.b64encode(out.getvalue()).decode(), "text/plain": alt}
    told = {"kind": "figure", "name": name, "sources": cite(records)}
    display(data, raw=True, metadata={"filename": name, "alt": alt, "moelib": told})


def _legend(figure: Any, arms: Sequence[str]) -> None:
    handles = [Patch(color=c, alpha=0.75, label=a) for c, a in zip(COLOURS, arms, strict=False)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(arms), frameon=False)


def _arms(results: Results) -> dict[str, str]:
    """Label -> name in figures, in the study's order: an arm has the same colour in all of them."""
    many = len({arm.load_mode for arm in results.study.arms}) > 1
    return {arm.label: arm.label if many else arm.placement for arm in results.study.arms}


def _facets(results: Results, frame: pd.DataFrame, y: str, label: str) -> Any:
    """Bars of means with every value as a dot on them: a handful of values needs no summary beside itself."""
    named = _arms(results)
    arms = list(named.values())
    frame = frame.assign(arm=(frame.placement + "/" + frame.load_mode).map(named))
    how = {"x": "quant", "y": y, "hue": "arm", "order": results.study.quants, "hue_order": arms, "legend": False}
    models = [m for m in results.study.models if (frame.model == m).any()]
    figure, axes = _axes(max(1, len(models)))
    for axis, model in zip(axes, models, strict=False):
        how |= {"data": frame[frame.model == model], "ax": axis}
        sns.barplot(**how, palette=COLOURS[: len(arms)], errorbar=None, alpha=0.75, saturation=1)
        sns.stripplot(**how, palette=["#222222"] * len(arms), dodge=True, size=3.2, alpha=0.8, jitter=False)
        axis.set(title=model, xlabel="", ylabel=label if axis is axes[0] else "")
    _legend(figure, arms)
    return figure


def memory(results: Results) -> Any:
    """Peak device memory by quant and placement; a dot a run."""
    frame = analyse.runs(r for b in results.blocks for r in b).dropna(subset="device_memory_bytes")
    name, unit = byte_unit(frame.device_memory_bytes.max())
    return _facets(results, frame.assign(y=frame.device_memory_bytes / unit), "y", f"device memory, {name}")


def speed(results: Results, workload: str) -> Any:
    """Decode rate by quant and placement; a dot a request."""
    frame = analyse.requests(r for b in results.blocks for r in b)
    return _facets(results, frame[frame.workload == workload], "tokens_per_s", "tokens/s")


def first_token(results: Results, workload: str) -> Any:
    """Time to first token of warm requests by quant and placement; a dot a request."""
    frame = analyse.requests(r for b in results.blocks for r in b)
    frame = frame[(frame.workload == workload) & (frame.request > 0)]
    return _facets(results, frame.assign(ms=frame.ttft_s * 1000), "ms", "time to first token, ms")


def trade(results: Results, workload: str) -> Any:
    """What offloading trades: an arrow from baseline to each offload arm, device memory across, decode rate up."""
    memory, rate = (analyse.compare(results, q) for q in (analyse.device_memory, analyse.decode_rate(workload)))
    known = [(m, r) for m, r in zip(memory, rate, strict=True) if m.baseline and r.baseline]
    name, unit = byte_unit(max((m.baseline.value for m, _ in known), default=0))
    models = [m for m in results.study.models if any(k.model == m for k, _ in known)]
    named = _arms(results)
    figure, axes = _axes(max(1, len(models)), 3.8)
    for axis, model in zip(axes, models, strict=False):
        rows = [(m, r) for m, r in known if m.model == model]
        for m, r in rows:
            start, end = (m.baseline.value / unit, r.baseline.value), (m.offload.value / unit, r.offload.value)
            arrow = {"arrowstyle": "-|>", "color": "#999999", "shrinkA": 5, "shrinkB": 5}
            axis.annotate("", xy=end, xytext=start, arrowprops=arrow)
            axis.plot(*start, "o", color=COLOURS[0])
            axis.plot(*end, "o", color=COLOURS[list(named).index(m.arm.label)])
            axis.annotate(m.quant, start, textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
        axis.set(title=model, xlabel=f"device memory, {name}", ylabel="tokens/s" if axis is axes[0] else "")
        axis.margins(0.15)
        axis.set(xlim=(0, None), ylim=(0, None))
    _legend(figure, list(named.values()))
    return figure


def tokens_over_time(records: Sequence[Record], workload: str) -> Any:
    """Tokens generated against time since the request was sent; a line a request, one panel for each arm."""
    arms = list(dict.fromkeys(r.spec.arm for r in sorted(records, key=lambda r: r.spec.arm)))
    figure, axes = _axes(max(1, len(arms)), 3.0)
    for axis, arm in zip(axes, arms, strict=False):
        for r in records:
            for q in r.observed.requests if r.observed and r.spec.arm == arm else ():
                if q.workload == workload:
                    style = {"color": COLOURS[arms.index(arm)], "alpha": 0.8, "lw": 1, "ls": "-" if q.index else ":"}
                    axis.plot([t * 1000 for t in q.token_s], q.token_n, **style)
        axis.set(title=arm, xlabel="ms since the request", ylabel="tokens" if axis is axes[0] else "", xlim=(0, None))
    return figure


def memory_over_time(records: Sequence[Record]) -> Any:
    """Device memory against time since the start of each run; a line a run."""
    known = [r for r in records if r.observed and any(x.process_bytes for x in r.observed.memory.trace.during)]
    figure, (axis, other) = _axes(2, 3.0)
    figure.delaxes(other)
    name, unit = byte_unit(
        max((x.process_bytes or 0 for r in known for x in r.observed.memory.trace.during), default=0)
    )
    arms = sorted({r.spec.arm for r in known})
    for r in known:
        points = [(x.t_s, x.process_bytes / unit) for x in r.observed.memory.trace.during if x.process_bytes]
        axis.plot(*zip(*points, strict=True), color=COLOURS[arms.index(r.spec.arm)], alpha=0.8, lw=1)
    axis.set(xlabel="s since the run's start", ylabel=f"device memory, {name}", ylim=(0, None))
    _legend(figure, arms)
    return figure
