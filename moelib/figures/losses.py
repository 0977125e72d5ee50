"""Figures of what quantising costs in quality, beside what it saves."""

from __future__ import annotations

from typing import Any

from moelib.answers import quality
from moelib.base import neutral, stats
from moelib.base.stats import byte_unit
from moelib.catalogue import params
from moelib.catalogue.placement import Placement
from moelib.figures import axes, layout
from moelib.figures.axes import COLOURS, MARKERS, nth
from moelib.study import frames
from moelib.study.study import Study

LEAST = 1e-7
"""Nats; what is below is drawn there, as an axis of logarithms has no 0."""


@layout.styled
def loss_over_vram(study: Study) -> Any:
    """What one token in a thousand diverges more than, against VRAM with all experts on the CPU: filled; the mean over
    all tokens: hollow. Both over the study's first text, in nats."""
    lost, frame = quality.by_file(study), study.runs
    whole = [Placement.parse(*side).is_whole for side in zip(frame["placement"], frame["load_mode"], strict=True)]
    frame = frame[whole].dropna(subset=["vram_bytes"])
    known = [(m, q) in lost for m, q in zip(frame["model"], frame["quant"], strict=True)]
    frame = frame[known]
    models = [m for m in study.parameters.models if (frame["model"] == m).any()]
    if not models:
        return layout.empty("no file has both its quality and its VRAM with all experts on the CPU")
    quants = [q for q in layout.by_bits(study) if (frame["quant"] == q).any()]
    figure, panels = layout.panels(len(models), 3.8, width=layout.WIDTH, sharey=True)
    unit = byte_unit(frame["vram_bytes"].max())
    for ax, model in zip(panels, models, strict=True):
        ax.set(xscale="log", yscale="log", title=neutral.label(model), xlabel=f"VRAM with offload, {unit[0]}")
        for quant in quants:
            runs = frame[(frame["model"] == model) & (frame["quant"] == quant)]
            if runs.empty:
                continue
            x, loss = stats.geometric_mean(list(runs["vram_bytes"]), frames.machines(runs)), lost[model, quant]
            form = {"color": nth(COLOURS, quant, quants), "marker": nth(MARKERS, quant, quants), "ls": ""}
            tail, mean = _drawn(loss.tail("kld_999")), _drawn(loss.divergence)
            axes.curve([x], [mean], ax=ax, units=(unit[1], 1), **form, mfc="none", ms=7)
            axes.curve([x], [tail], ax=ax, units=(unit[1], 1), **form, ms=7)
            above = (x.value / unit[1], tail.high or tail.value)
            # with an importance matrix it lies near the same quant without
            at, ha = ((0, 6), "center") if quant == params.plain(quant) else ((9, 4), "left")
            how = {"textcoords": "offset points", "ha": ha, "weight": "bold", "fontsize": 8.5}
            ax.annotate(neutral.label(quant), above, xytext=at, **how)
        ax.margins(0.2)
    panels[0].set_ylabel("divergence from the unquantised file,\nnats a token")
    for ax in panels:
        axes.ticks(ax, "x")
    layout.legend(figure, [_mark("1 token in 1,000 diverges more", filled=True), _mark("mean", filled=False)])
    n = len(next(iter(lost.values())).found.chunks.kld)
    text = neutral.label(quality.first_text(study) or "")
    layout.title(
        figure, f"Quality lost against VRAM with all experts on the CPU; text: {text}", frame, f"n = {n} chunks"
    )
    return figure


def _drawn(e: stats.Estimate) -> stats.Estimate:
    low, high = (None if x is None else max(LEAST, x) for x in (e.low, e.high))
    return stats.Estimate(max(LEAST, e.value), low, high, e.n)


def _mark(name: str, filled: bool) -> Any:
    from matplotlib.lines import Line2D

    face = "#444444" if filled else "none"
    return Line2D([], [], color="#444444", linestyle="", marker="o", mfc=face, ms=7, label=name)
