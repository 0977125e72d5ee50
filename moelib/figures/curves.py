"""Figures of what a study says of memory and speed: VRAM by what takes it, tokens/s against VRAM, TTFT against prompt
length, and what laws predict against what was measured."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from moelib.base import neutral, stats
from moelib.base.stats import Estimate, byte_unit
from moelib.catalogue.placement import Placement
from moelib.figures import axes, layout
from moelib.figures.axes import COLOURS, MARKERS, nth
from moelib.laws import speed, vram
from moelib.laws.law import HELD_OUT, Law, Residual, errors, held_out, standing
from moelib.planner.graph import OFFLOADED_TOKENS
from moelib.study import frames
from moelib.study.study import Study

PARTS = {
    "vram_weights_bytes": "weights",
    "vram_cache_bytes": "KV cache",
    "vram_compute_bytes": "compute buffer",
    "rest": "rest (context, pools)",
}
"""Of VRAM, in order; the rest is what a run's processes held at their peak beside the engine's buffers."""
STACK = (COLOURS[0], COLOURS[1], COLOURS[4], COLOURS[6])
"""Neighbours in a stack, which differ for colour-blind readers too."""
CARDS = (8, 12, 16, 24)
"""GB of VRAM that common cards have."""
BAND = 0.05
"""About a prediction, as a share: what laws aim at."""
MS = 1e-3
DARK = "#333333"
"""Of letters: the colours of lines are too light for them."""
SMALL = 8.5
"""Points of the letters within a panel."""
SHORT = 0.25
"""A bar that is shorter than this share of the axis has its parts in numbers beside it."""
NEAR = 0.15
"""Two points whose logarithms differ by less are at one place."""
Point = tuple[float, float]
PANEL = 3.2
"""Inches of usual letters whose number fits a third of a figure, in small letters."""
HOLLOW = ("D", "s", "v", "P", "X", "o")
STEP = f"from {OFFLOADED_TOKENS} tokens on\nexperts are copied\nto the GPU"


def _models(study: Study, frame: pd.DataFrame) -> list[str]:
    return [m for m in study.parameters.models if (frame["model"] == m).any()]


def _quants(study: Study, frame: pd.DataFrame) -> list[str]:
    return [q for q in layout.by_bits(study) if (frame["quant"] == q).any()]


def _mean(frame: pd.DataFrame, column: str) -> Estimate:
    """Geometric, so that an interval stays above 0 on a logarithmic axis."""
    return stats.geometric_mean(list(frame[column]), frames.machines(frame))


def _offset(ax: Any, text: str, at: Point, by: Point, **how: Any) -> None:
    usual = {"fontsize": SMALL, "color": DARK, "textcoords": "offset points"}
    ax.annotate(text, at, xytext=by, **usual | how)


@layout.styled
def memory_stack(study: Study) -> Any:
    """VRAM of each quant and placement by what takes it, means over runs of all load modes; the total at the end."""
    frame = study.runs.dropna(subset=["vram_bytes", *list(PARTS)[:-1]])
    models = _models(study, frame)
    if not models:
        return layout.empty("no complete round has VRAM and the engine's buffers")
    frame = frame.assign(rest=frame["vram_bytes"] - frame[list(PARTS)[:-1]].sum(axis=1))
    most = frame[["quant", "placement"]].drop_duplicates().shape[0] + frame["quant"].nunique()
    figure, panels = layout.panels(len(models), 0.8 + 0.2 * most, width=layout.WIDTH)
    unit = byte_unit(frame["vram_bytes"].max())
    for ax, model in zip(panels, models, strict=True):
        _stacks(study, frame[frame["model"] == model], unit, ax)
        ax.set(title=neutral.label(model), xlabel=f"VRAM, {unit[0]}")
    layout.legend(figure, layout.bar_handles(list(PARTS.values()), STACK))
    layout.title(figure, "Peak VRAM by what takes it, total at the bar's end", frame, layout.rounds(frame))
    return figure


def _in_order(placement: str) -> tuple[float, str]:
    """By N, then by settings, 8 threads before 16."""
    return Placement.parse(placement).cpu_layers, re.sub(r"\d+", lambda m: m[0].zfill(9), placement)


def _stacks(study: Study, frame: pd.DataFrame, unit: tuple[str, int], ax: Any) -> None:
    """A heading for each quant, and below it a bar for each of its placements in order of N."""
    at, rows, labels, totals = 0, {}, {}, {}
    for quant in _quants(study, frame):
        ax.text(0, at, f" {neutral.label(quant)}", va="center", weight="bold", fontsize=SMALL)
        own = frame[frame["quant"] == quant]
        for placement in sorted(own["placement"].unique(), key=_in_order):
            at += 1
            runs = own[own["placement"] == placement]
            rows[at], totals[at] = runs[list(PARTS)].mean().clip(lower=0) / unit[1], runs["vram_bytes"].mean() / unit[1]
            labels[at] = neutral.label(placement)
        at += 1
    axes.stacks([list(row) for row in rows.values()], list(rows), names=list(PARTS.values()), ax=ax, colours=STACK)
    longest = max(totals.values())
    for y, row in rows.items():
        parts = f" ({' + '.join(map(stats.number, row))})" if totals[y] < SHORT * longest else ""
        _offset(ax, stats.number(totals[y]) + parts, (row.sum(), y), (3, 0), va="center")
    ax.set(ylim=(at - 0.4, -0.7), xlim=(0, 1.15 * longest))
    ax.set_yticks(list(labels), list(labels.values()), fontsize=SMALL)
    ax.grid(axis="y", visible=False)


@layout.styled
def rate_over_vram(study: Study, workload: str) -> Any:
    """tokens/s against VRAM: a curve for each quant through its placements from all experts on the CPU to none, in the
    load mode of the first placement; other load modes and settings as hollow markers."""
    rate = f"tokens_per_s/{workload}"
    frame = study.runs
    frame = frame.dropna(subset=["vram_bytes", rate]) if rate in frame else frame.iloc[:0]
    models, quants = _models(study, frame), _quants(study, frame)
    if not models:
        return layout.empty("no complete round has both VRAM and tokens/s")
    frame = _beyond_a_curve(frame)
    figure, panels = layout.panels(len(models), 4.2, width=layout.WIDTH, sharey=True)
    unit, others = byte_unit(frame["vram_bytes"].max()), [o for o in frame["other"].unique() if o]
    for ax, model in zip(panels, models, strict=True):
        ax.set(xscale="log", yscale="log", title=neutral.label(model), xlabel=f"VRAM, {unit[0]}")
        said: list[tuple[str, Point]] = []
        for quant in quants:
            own = frame[(frame["model"] == model) & (frame["quant"] == quant)]
            _rate_curve(own, rate, unit[1], others, ax, nth(COLOURS, quant, quants), nth(MARKERS, quant, quants), said)
        ax.margins(0.12)
    panels[0].set_ylabel("tokens/s")
    for ax in panels:
        _cards(ax, unit[1])
        axes.ticks(ax)
    handles = layout.point_handles(quants, marked=True)
    handles += [layout.hollow(nth(HOLLOW, name, others), name) for name in others]
    layout.legend(figure, handles)
    what = f"tokens/s against VRAM, {neutral.label(workload)}; beside a point the N of --n-cpu-moe, all: --cpu-moe"
    layout.title(figure, what, frame, f"{layout.rounds(frame)}, bars: 95 %")
    return figure


def _beyond_a_curve(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with `other`: what a run has that those of its model's and quant's curve do not have, settings or
    another load mode than that of the placement with most on the GPU; empty where it is of the curve."""
    placed = [Placement.parse(*side) for side in zip(frame["placement"], frame["load_mode"], strict=True)]
    cells = list(zip(frame["model"], frame["quant"], strict=True))
    most: dict[tuple[str, str], Placement] = {}
    for cell, p in zip(cells, placed, strict=True):
        most[cell] = min(p, most.get(cell, p), key=lambda p: p.rank)
    other = []
    for cell, p in zip(cells, placed, strict=True):
        settings = str(p).partition(",")[2]
        mode = "" if p.load_mode == most[cell].load_mode else f"load mode {p.load_mode}"
        other.append(", ".join(filter(None, (settings, mode))))
    return frame.assign(other=other)


def _rate_curve(
    own: pd.DataFrame,
    rate: str,
    unit: float,
    others: Sequence[str],
    ax: Any,
    colour: str,
    marker: str,
    said: list[tuple[str, Point]],
) -> None:
    """Of one model and quant. said: labels of points so far, as the same is not written twice at one place."""
    points: list[tuple[Placement, Estimate, Estimate]] = []
    for (placement, _, name), runs in own.groupby(["placement", "load_mode", "other"], sort=False):
        x, y = _mean(runs, "vram_bytes"), _mean(runs, rate)
        if name:
            form = {"marker": nth(HOLLOW, name, others), "mfc": "none", "ls": "", "ms": 8}
            axes.curve([x], [y], ax=ax, units=(unit, 1), color=colour, **form)
        else:
            points.append((Placement.parse(placement), x, y))
    points.sort(key=lambda p: p[0].order)
    axes.curve([x for _, x, _ in points], [y for *_, y in points], ax=ax, units=(unit, 1), color=colour, marker=marker)
    for placed, x, y in points:
        label, at = "all" if placed.is_whole else f"{placed.cpu_layers:.0f}", (x.value / unit, y.value)
        if not any(text == label and _near(at, there) for text, there in said):
            _offset(ax, label, at, (5, -9))
        said.append((label, at))
    for _, x, y in points[:1]:
        top = (x.value / unit, y.high or y.value)
        _offset(ax, neutral.label(own["quant"].iloc[0]), top, (0, 6), ha="center", weight="bold")


def _near(a: Point, b: Point) -> bool:
    return all(abs(math.log(x / y)) < NEAR for x, y in zip(a, b, strict=True))


def _cards(ax: Any, unit: float) -> None:
    """A thin line at the VRAM of each common card that is within the axis."""
    low, high = ax.get_xlim()
    for gigabytes in CARDS:
        x = gigabytes * 2**30 / unit
        if low < x < high:
            ax.axvline(x, color="#666666", lw=0.8, ls=":", zorder=0)
            how = {"rotation": 90, "va": "bottom", "ha": "right", "color": DARK, "fontsize": SMALL}
            ax.text(x, 0.01, f"{gigabytes} GB", transform=ax.get_xaxis_transform(), **how)


@layout.styled
def ttft_over_prompt(study: Study) -> Any:
    """TTFT of warm requests against the tokens of the prompt, over the study's workloads: a panel for each model and
    quant, a line for each placement and load mode, dotted where it crosses the length at which experts are copied. What
    is between a baseline and all experts on the CPU lies between their lines, and is left out where these are there."""
    frame = _by_prompt(study.runs)
    lengths = frame["tokens"].unique()
    if len(lengths) < 2:
        has = f"one length ({lengths[0]:.0f} tokens)" if len(lengths) else "none in a complete round"
        return layout.empty(f"a curve takes prompts of two lengths, and this study has {has}")
    models, quants = _models(study, frame), _quants(study, frame)
    figure, panels = layout.panels(len(quants), 3.0, len(models), layout.WIDTH, sharex=True, sharey="row")
    known, there = layout.placements(study), list(frame["label"].unique())
    names = {label: known.get(label, label) for label in [*known, *there] if label in there}
    ends: dict[str, Point] = {}
    for ax, (model, quant) in zip(panels, ((m, q) for m in models for q in quants), strict=True):
        own = frame[(frame["model"] == model) & (frame["quant"] == quant)]
        ax.set_visible(not own.empty)
        ax.set(xscale="log", yscale="log")
        ax.set_title(layout.wrapped(f"{neutral.label(model)}, {neutral.label(quant)}", layout.WIDTH / len(quants)))
        for label, side in own.groupby("label", sort=False):
            form = {"color": nth(COLOURS, label, names), "marker": nth(MARKERS, label, names)}
            ends[label] = _ttft_line(side, ax, **form)
        ax.margins(0.1)
    for ax in panels[:: len(quants)]:
        low, high = ax.get_ylim()
        ax.set(ylabel="TTFT, ms", ylim=(low, high * (high / low) ** 0.3))  # room for what the line says
    for ax in panels:
        _step(frame, ax, STEP if ax is panels[0] else "")
        axes.ticks(ax)
    for ax in panels[-len(quants) :]:
        ax.set_xlabel("prompt, tokens")
    if len(panels) == 1:
        _beside({names[label]: end for label, end in ends.items()}, panels[0])
    else:
        layout.legend(figure, layout.point_handles(list(names.values()), marked=True))
    layout.title(figure, "TTFT of warm requests against prompt length", frame, f"{layout.rounds(frame)}, bars: 95 %")
    return figure


def _by_prompt(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each run and workload: `tokens` of the prompt, `ttft` in s, `label` of the placement."""
    workloads = [c.partition("/")[2] for c in runs if c.startswith("prompt_tokens/")]
    parts = [runs.assign(tokens=runs[f"prompt_tokens/{w}"], ttft=runs[f"ttft_warm_s/{w}"]) for w in workloads]
    frame = pd.concat(parts) if parts else runs.assign(tokens=0.0, ttft=0.0)
    frame = frame.assign(label=[f"{p}/{mode}" for p, mode in zip(frame["placement"], frame["load_mode"], strict=True)])
    known = {name: Placement.parse(name) for name in frame["placement"].unique()}
    if any(p.is_whole for p in known.values()):
        frame = frame[~frame["placement"].isin([name for name, p in known.items() if p.is_between])]
    return frame.dropna(subset=["tokens", "ttft"])


def _ttft_line(own: pd.DataFrame, ax: Any, color: str, marker: str) -> Point:
    """Of one model, quant, placement and load mode; returns where it ends."""
    by_length = sorted(own.groupby("tokens"), key=lambda of: of[0])
    points = [(stats.mean([tokens] * len(runs)), _mean(runs, "ttft")) for tokens, runs in by_length]
    copied = [tokens >= OFFLOADED_TOKENS and _copies(own) for tokens, _ in by_length]
    for side in (False, True):
        if part := [p for p, on_gpu in zip(points, copied, strict=True) if on_gpu == side]:
            across, up = zip(*part, strict=True)
            axes.curve(across, up, ax=ax, units=(1, MS), color=color, marker=marker)
    first = copied.index(True) if True in copied else 0
    if first:  # what is between was not measured
        (x, y), (to_x, to_y) = points[first - 1 : first + 1]
        ax.plot([x.value, to_x.value], [y.value / MS, to_y.value / MS], color=color, lw=1.2, ls=":")
    x, y = points[-1]
    return x.value, y.value / MS


def _beside(ends: dict[str, Point], ax: Any) -> None:
    """A name beside the end of each line, as far apart as letters are high, and led to it."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    ax.set_xlim(left, right * (right / left) ** 0.22)
    lowest = 0.0
    for name, (x, y) in sorted(ends.items(), key=lambda end: end[1][1]):
        beside = x * (right / left) ** 0.03, max(y, lowest)
        lowest = beside[1] * (high / low) ** 0.06
        leader = {"arrowstyle": "-", "color": "#999999", "lw": 0.8, "shrinkA": 0, "shrinkB": 4}
        how = {"textcoords": "data", "va": "center", "weight": "bold", "arrowprops": leader}
        _offset(ax, neutral.label(name), (x, y), beside, **how)


def _copies(own: pd.DataFrame) -> bool:
    """Whether experts are copied to a GPU for long prompts of these runs of one placement."""
    placed = Placement.parse(own["placement"].iloc[0], own["load_mode"].iloc[0])
    return (own["device"] == "cuda").all() and not placed.is_baseline and placed.op_offload


def _step(frame: pd.DataFrame, ax: Any, text: str) -> None:
    """A line where llama.cpp begins to copy experts to the GPU, if prompts are on both sides and a GPU was used."""
    if frame["tokens"].min() < OFFLOADED_TOKENS <= frame["tokens"].max() and (frame["device"] == "cuda").any():
        ax.axvline(OFFLOADED_TOKENS, color="#666666", lw=0.8, ls=":", zorder=0)
        how = {"va": "top", "xycoords": ax.get_xaxis_transform()}
        _offset(ax, text, (OFFLOADED_TOKENS, 0.98), (4, 0), **how)


@layout.styled
def predicted_against_measured(study: Study, workload: str) -> Any:
    """What the laws of a token, a prompt and VRAM predict for what they had not seen, against what was measured."""
    runs = study.runs
    if f"tokens_per_s/{workload}" not in runs:
        return layout.empty("no complete round has this workload")
    name, unit = byte_unit(runs["vram_bytes"].max())
    shown: list[tuple[str, float, Sequence[Law]]] = [
        ("ms per token", MS, speed.decode(runs, workload)),
        ("TTFT, ms", MS, speed.ttft(runs, workload)),
        (f"VRAM, {name}", unit, vram.vram(runs)),
    ]
    figure, panels = layout.panels(len(shown), 3.5, width=layout.WIDTH)
    kinds = dict.fromkeys(_kind(r) for *_, laws in shown for law in laws for r in law.residuals)
    for ax, (what, scale, laws) in zip(panels, shown, strict=True):
        _predicted(laws, list(kinds), what, scale, ax)
    panels[0].set_ylabel("predicted")
    layout.legend(figure, layout.point_handles(list(kinds), marked=True))
    what = f"Predicted by laws against measured, {neutral.label(workload)}; grey: within {100 * BAND:.0f} %"
    layout.title(figure, what, runs, f"{len(runs)} runs")
    return figure


def _kind(r: Residual) -> str:
    return f"{r.model}, {r.load_mode}"


def _predicted(laws: Sequence[Law], kinds: Sequence[str], what: str, scale: float, ax: Any) -> None:
    every = [r for law in standing(laws) for r in law.residuals]
    unseen = held_out(every)
    told = [r for r in every if r.held_out == unseen and r.predicted is not None]
    if unseen == "nothing":
        why = next((law.reason for law in laws if law.reason), None) or "nothing was held out that the rest tells"
        ax.set_axis_off()
        ax.text(
            0.5,
            0.5,
            layout.wrapped(f"{what}: {why}", PANEL),
            ha="center",
            fontsize=SMALL + 1,
            va="center",
            transform=ax.transAxes,
        )
        return
    ax.set(xscale="log", yscale="log", xlabel=f"measured {what}")
    for kind in kinds:
        own = [r for r in told if _kind(r) == kind]
        form = {"color": nth(COLOURS, kind, kinds), "marker": nth(MARKERS, kind, kinds), "ls": "", "ms": 5.5}
        ax.plot([r.measured / scale for r in own], [(r.predicted or 0) / scale for r in own], **form, alpha=0.85)
    ax.margins(0.12)
    axes.ticks(axes.diagonal(BAND, ax=ax))
    if of := errors(told, unseen):
        text = f"median error {stats.percent(of.median)}\nlargest {stats.percent(of.largest)}"
        ax.text(0.04, 0.96, text, va="top", fontsize=SMALL, transform=ax.transAxes)
    ax.set_title(layout.wrapped(f"{len(told)} predicted without {HELD_OUT[unseen]}", PANEL), fontsize=SMALL + 1)
