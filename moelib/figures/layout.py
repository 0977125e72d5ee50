"""How figures are laid out: the document's style, panels, titles, legends, and in which order quants and placements
come."""

import functools
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.style
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from moelib.base import neutral, stats
from moelib.evidence import table
from moelib.figures.axes import COLOURS, HATCHES, MARKERS, nth
from moelib.study.study import Study

LETTERS = 9  # of a legend or a title that fit an inch
HARD = "\N{NO-BREAK SPACE}"
WIDTH = 8.4
"""Inches: of figures that are read at 760 pixels beside each other, with letters of one size."""


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """`draw` in the document's style; the session's own style is neither used nor changed."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Any:
        style = sns.plotting_context("notebook", font_scale=0.9)
        style |= sns.axes_style("whitegrid", rc={"axes.spines.top": False, "axes.spines.right": False})
        style |= {"axes.prop_cycle": mpl.cycler(color=sns.color_palette("deep"))}  # type: ignore[attr-defined]  # its stubs lack it
        style |= {"font.family": "sans-serif"}
        with mpl.style.context(style, after_reset=True):
            return draw(*args, **kwargs)

    return styled


def panels(columns: int, height: float = 3.4, rows: int = 1, width: float | None = None, **how: Any) -> tuple[Any, Any]:
    """(figure, its axes row by row) without pyplot: no global state, nothing shown twice. height: of a row; inches."""
    size = (width or max(6.0, 1.2 + 3.6 * columns), rows * height)
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **how).flat)


def wrapped(text: str, inches: float) -> str:
    """In lines of this width; a long name stays whole, as one that is escaped must."""
    return textwrap.fill(text, int(inches * LETTERS), break_long_words=False, break_on_hyphens=False)


def title(figure: Any, what: str, frame: pd.DataFrame, n: str) -> None:
    """Above all panels: what is shown, on which GPU and how many machines, and n; in as many lines as it takes, by
    which the figure grows. frame: the runs that are shown."""
    gpus = " and ".join(map(neutral.label, frame["gpu"].fillna("unknown device").unique()))
    machines = frame["machine"].nunique()
    shared = " shared with other runs" if frame["host_shared"].any() else ""
    of = f"{gpus} ({machines}{HARD}machine{'s' * (machines > 1)}{shared})"
    of = of if (frame["device"] == "cuda").all() else f"no GPU: {of}"
    headed(figure, f"{what}; {of}; {n.replace(' ', HARD)}")


def headed(figure: Any, text: str) -> None:
    """A title above all panels, in as many lines as it takes, by which the figure grows."""
    width, height = figure.get_size_inches()
    text = wrapped(text, width)
    figure.set_size_inches(width, height + 0.22 * (1 + text.count("\n")))
    figure.suptitle(text, fontsize="medium")


def rounds(frame: pd.DataFrame) -> str:
    """`n = 3 to 5 rounds`: of each file, placement and load mode."""
    sides = frame.groupby(["model", "quant", "placement", "load_mode"])["round"].nunique()
    return f"n = {stats.span(list(sides), str)} round{'s' * bool(sides.max() > 1)}"


def empty(why: str) -> Any:
    """A figure without data that says why it has none."""
    figure, (axis,) = panels(1, 1.2)
    axis.set_axis_off()
    axis.text(0.5, 0.5, f"no data: {why}", ha="center", va="center", transform=axis.transAxes)
    return figure


def bar_handles(names: Sequence[str], colours: Sequence[str]) -> list[Any]:
    """Of a legend of bars."""
    style: dict[str, Any] = {"alpha": 0.75, "edgecolor": "white"}
    return [
        Patch(facecolor=nth(colours, n, names), hatch=nth(HATCHES, n, names), label=neutral.label(n), **style)
        for n in names
    ]


def point_handles(names: Sequence[str], marked: bool) -> list[Any]:
    """Of a legend of points, or of lines."""

    def form(name: str) -> dict[str, Any]:
        return {"linestyle": "", "marker": nth(MARKERS, name, names)} if marked else {"linewidth": 2}

    return [Line2D([], [], color=nth(COLOURS, n, names), label=neutral.label(n), **form(n)) for n in names]


def hollow(marker: str, name: str) -> Any:
    """Of a legend: points that no line joins."""
    return Line2D([], [], color="#444444", linestyle="", marker=marker, mfc="none", ms=8, label=neutral.label(name))


def line(name: str, colour: str, **form: Any) -> Any:
    """Of a legend: a line as it is drawn."""
    return Line2D([], [], color=colour, label=neutral.label(name), **form)


def legend(figure: Any, handles: Sequence[Any]) -> None:
    """In as many rows as it takes, below the axes; the figure grows by them."""
    width, height = figure.get_size_inches()
    lengths = [len(h.get_label()) + 5 for h in handles]
    in_one_row = sum(lengths) <= width * LETTERS
    columns = max(1, len(handles) if in_one_row else int(width * LETTERS // max(lengths)))
    rows = -(-len(handles) // columns)
    figure.set_size_inches(width, height + 0.22 * (rows - 1))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def by_bits(study: Study) -> list[str]:
    """The study's quants by their bits per weight; as the study has them where these are not known."""
    bits: dict[str, list[float]] = {}
    for manifest in study.manifests:
        bits.setdefault(manifest.quant, []).append(manifest.bits_per_weight)
    return sorted(study.parameters.quants, key=lambda q: sum(bits[q]) / len(bits[q]) if q in bits else 0.0)


def placements(study: Study) -> dict[str, str]:
    """Label in records -> name in figures, in the study's order: the same colour in all figures. The name is the
    placement, with the load mode where the study has several."""
    several = table.several_load_modes(study.parameters.arms)
    return {a.label: a.placed.label if several else a.placement for a in study.parameters.arms}
