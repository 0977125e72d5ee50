"""Figures of which experts a text uses, by layer, and of what a cache of some of them would hit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moelib.answers.experts import TWIN, Used
from moelib.base import files, neutral
from moelib.figures import axes, layout, plots
from moelib.figures.axes import COLOURS

MAP = "cividis"
"""Lighter is more, for colour-blind readers and in grey alike."""
STYLES = {
    "LRU": {"ls": "-", "marker": "o"},
    "LRU, tokens in random order": {"ls": "--", "marker": "s", "mfc": "white"},
    "the text's most used, never replaced": {"ls": ":", "marker": "^", "mfc": "white"},
}
"""What a cache does -> its line, which differs in grey too."""
LINES = dict(zip(STYLES, (COLOURS[0], COLOURS[5], COLOURS[6]), strict=True))
MARKS = 12
"""Markers on a curve, at most."""
ROW = 0.14
"""Inches of a layer."""


@layout.styled
def use(every: Sequence[Used]) -> Any:
    """A panel for each file, a row for each MoE layer, a column for each expert: its uses over the mean of its layer,
    on one scale for all; crosses where an expert was not used."""
    if not every:
        return layout.empty("no file's use of experts holds")
    columns = min(2, len(every))
    most = max(len(u.found.experts.layers) for u in every)
    height = max(2.4, 1.1 + ROW * most)
    figure, panels = layout.panels(columns, height, rows=-(-len(every) // columns), width=layout.WIDTH)
    shares = [_shares(u) for u in every]
    top = max(float(np.nanmax(s)) for s in shares)
    for ax, u, s in zip(panels, every, shares, strict=False):
        axes.heat(s, ax=ax, most=top, colours=MAP)
        _layers(ax, u)
        ax.set(xlabel="expert", title=_title(u, f"evenness {u.overall.evenness:.2f}"))
        axes.whole_numbers(ax)
    for ax in panels[len(every) :]:
        figure.delaxes(ax)
    figure.colorbar(panels[0].images[0], ax=panels[: len(every)], label="times the mean", aspect=30, pad=0.01)
    layout.headed(figure, f"Uses of each expert, over the mean of its layer; x: never used; {_texts(every)}")
    return figure


@layout.styled
def hits(every: Sequence[Used]) -> Any:
    """A panel for each file: share of accesses that a cache of k experts a layer would hit, over k."""
    shown = [(u, c) for u in every if (c := u.curve) is not None]
    if not shown:
        return layout.empty("no file has a trace in which one size of cache fits all layers")
    columns = min(2, len(shown))
    figure, panels = layout.panels(columns, 3.2, rows=-(-len(shown) // columns), width=layout.WIDTH, sharey=True)
    for i, (ax, (u, c)) in enumerate(zip(panels, shown, strict=False)):
        for (name, form), ys in zip(STYLES.items(), (c.lru, c.shuffled, c.static), strict=True):
            every_nth = max(1, len(c.k) // MARKS)
            ax.plot(c.k, [100 * y for y in ys], color=LINES[name], lw=1.6, ms=4.5, markevery=every_nth, **form)
        axes.whole_numbers(ax)
        ax.set(ylim=(0, 103), xlim=(0, c.k[-1] * 1.02), xlabel="experts in each layer's cache (k)")
        ax.set(ylabel="" if i % columns else "accesses that hit, %", title=_title(u, f"{c.k[0]} used by a token"))
    for ax in panels[len(shown) :]:
        figure.delaxes(ax)
    layout.legend(figure, [layout.line(name, LINES[name], **form) for name, form in STYLES.items()])
    tokens = sorted({u.routed.spec.tokens for u, _ in shown})
    what = "Simulated hits of a cache of k experts a layer: accesses of one text, not time"
    layout.headed(figure, f"{what}; {' or '.join(map(str, tokens))} tokens, text {_names([u for u, _ in shown])}")
    return figure


def draw(every: Sequence[Used], into: Path) -> list[Path]:
    """Write both figures into a folder, with a note of what they show and of which records."""
    made = []
    for name, figure, alt in (("experts", use(every), use_alt(every)), ("hits", hits(every), hits_alt(every))):
        path = into / f"{name}.png"
        files.write_bytes(path, plots.png(figure))
        sources = {k: v for u in every for k, v in u.routed.cited.items()}
        files.write_json(path.with_suffix(".json"), {"alt": alt, "from": sources})
        made.append(path)
    return made


def use_alt(every: Sequence[Used]) -> str:
    """What `use` shows, in words."""
    each = "; ".join(
        f"{u.name}: evenness {u.overall.evenness:.2f} (1 is even), the busiest expert of a layer has "
        f"{u.overall.busiest:.1f} times the mean on average, {u.overall.dead} of {u.overall.experts} unused"
        for u in every
    )
    return f"Heat maps of uses by layer and expert. {each}"


def hits_alt(every: Sequence[Used]) -> str:
    """What `hits` shows, in words."""
    said = []
    for u in every:
        if (c := u.curve) is not None:
            i = c.at(0.5)
            hit = f"{c.lru[i]:.0%}, with the tokens in random order {c.shuffled[i]:.0%}"
            said.append(f"{u.name}: a cache of {c.k[i]} of {c.k[-1]} experts hits {hit}")
    return f"Share of accesses that an LRU cache of k experts would hit, over k. {'; '.join(said)}"


def _shares(u: Used) -> Any:
    """[layer, expert]: uses over the layer's mean; NaN where a layer has fewer experts than others."""
    table = np.full((len(u.counts), max(map(len, u.counts))), np.nan)
    for row, counts in zip(table, u.counts, strict=True):
        row[: len(counts)] = [c * len(counts) / sum(counts) for c in counts]
    return table


def _layers(ax: Any, u: Used) -> None:
    numbers = u.found.experts.layers
    step = max(1, len(numbers) // 8)
    ax.set_yticks(range(0, len(numbers), step), [str(n) for n in numbers[::step]])
    ax.set_ylabel("layer")


def _title(u: Used, more: str) -> str:
    s = u.routed.spec
    return f"{neutral.label(f'{s.model} {s.quant}')}\n{TWIN if u.is_twin else 'trained'}, {more}"


def _names(every: Sequence[Used]) -> str:
    return " and ".join(sorted({neutral.label(u.routed.spec.corpus) for u in every}))


def _texts(every: Sequence[Used]) -> str:
    tokens = sorted({u.routed.spec.context * u.routed.spec.chunks for u in every})
    return f"{' or '.join(f'{n:,}' for n in tokens)} tokens, text {_names(every)}"
