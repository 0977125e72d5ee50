"""Figures of a study, a panel for each model, drawn by `axes`; `show` puts one into a notebook under a name."""

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
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from moelib.audit.record import Record
from moelib.base import files, neutral
from moelib.base.stats import byte_unit, values
from moelib.figures import axes
from moelib.figures.axes import COLOURS, HATCHES, MARKERS, nth
from moelib.report import table
from moelib.study import frames
from moelib.study.study import Study

DPI = 144
LETTERS = 9  # of a legend that fit an inch


def _styled(draw: Callable[..., Any]) -> Callable[..., Any]:
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


def _panels(columns: int, height: float = 3.4) -> tuple[Any, list[Any]]:
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


def _empty(why: str) -> Any:
    """A figure without data that says why it has none."""
    figure, (axis,) = _panels(1, 1.2)
    axis.set_axis_off()
    axis.text(0.5, 0.5, f"no data: {why}", ha="center", va="center", transform=axis.transAxes)
    return figure


def _bar_handles(names: Sequence[str]) -> list[Any]:
    """Of a legend of bars."""
    style: dict[str, Any] = {"alpha": 0.75, "edgecolor": "white"}
    return [
        Patch(facecolor=nth(COLOURS, n, names), hatch=nth(HATCHES, n, names), label=neutral.label(n), **style)
        for n in names
    ]


def _point_handles(names: Sequence[str], marked: bool) -> list[Any]:
    """Of a legend of points, or of lines."""

    def form(name: str) -> dict[str, Any]:
        return {"linestyle": "", "marker": nth(MARKERS, name, names)} if marked else {"linewidth": 2}

    return [Line2D([], [], color=nth(COLOURS, n, names), label=neutral.label(n), **form(n)) for n in names]


def _legend(figure: Any, handles: Sequence[Any]) -> None:
    """In as many rows as it takes, below the axes; the figure grows by them."""
    width, height = figure.get_size_inches()
    longest = max((len(h.get_label()) for h in handles), default=0) + 5
    columns = max(1, min(len(handles), int(width * LETTERS // longest)))
    rows = -(-len(handles) // columns)
    figure.set_size_inches(width, height + 0.22 * (rows - 1))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def _by_bits(study: Study) -> list[str]:
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


def _facets(study: Study, frame: pd.DataFrame, y: str, label: str) -> Any:
    """Bars of means, with every single value as a dot."""
    by_label = placements(study)
    names = list(by_label.values())
    labels = [f"{p}/{mode}" for p, mode in zip(frame.placement, frame.load_mode, strict=True)]
    frame = frame.assign(name=[by_label[label] for label in labels])
    how: dict[str, Any] = {"x": "quant", "y": y, "hue": "name", "order": _by_bits(study), "hue_order": names}
    models = [m for m in study.parameters.models if (frame.model == m).any()]
    if not models:
        return _empty(f"no complete round has {label}")
    figure, panels = _panels(len(models))
    for ax, model in zip(panels, models, strict=False):
        axes.bars(frame[frame.model == model], ax=ax, **how)
        ax.set(title=neutral.label(model), xlabel="", ylabel=label if ax is panels[0] else "")
    _legend(figure, _bar_handles(names))
    return figure


@_styled
def vram(study: Study) -> Any:
    """Peak VRAM by quant and placement; one dot per run."""
    frame = study.runs.dropna(subset="vram_bytes")
    name, unit = byte_unit(frame.vram_bytes.max())
    return _facets(study, frame.assign(y=frame.vram_bytes / unit), "y", f"VRAM, {name}")


def _requests(study: Study, workload: str) -> pd.DataFrame:
    return study.requests[study.requests["workload"] == workload]


@_styled
def speed(study: Study, workload: str) -> Any:
    """tokens/s by quant and placement; one dot per request."""
    return _facets(study, _requests(study, workload), "tokens_per_s", "tokens/s")


@_styled
def ttft(study: Study, workload: str) -> Any:
    """TTFT of warm requests by quant and placement; one dot per request."""
    frame = _requests(study, workload)
    frame = frame[frame.request > 0]
    return _facets(study, frame.assign(ms=frame.ttft_s * 1000), "ms", "TTFT, ms")


@_styled
def trade(study: Study, workload: str) -> Any:
    """VRAM (across) against tokens/s (up): an arrow from the baseline to each placement with CPU offload."""
    memory, rate = (frames.comparisons(study.runs, c) for c in ("vram_bytes", f"tokens_per_s/{workload}"))
    known = [(m, r) for m, r in zip(memory, rate, strict=True) if m.baseline and r.baseline]
    name, unit = byte_unit(max(values(m.baseline for m, _ in known), default=0))
    models = [m for m in study.parameters.models if any(k.model == m for k, _ in known)]
    by_label = placements(study)
    if not models:
        return _empty("no complete round has both VRAM and tokens/s")
    figure, panels = _panels(len(models), 3.8)
    for ax, model in zip(panels, models, strict=False):
        across, up = zip(*((m, r) for m, r in known if m.model == model), strict=True)
        axes.arrows(across, up, names=list(by_label), ax=ax, unit=unit)
        ax.set(title=neutral.label(model), xlabel=f"VRAM, {name}", ylabel="tokens/s" if ax is panels[0] else "")
    _legend(figure, _point_handles(list(by_label.values()), marked=True))
    return figure


@_styled
def tokens_over_time(records: Sequence[Record], workload: str) -> Any:
    """Tokens generated against time since the request was sent; one line per request, one panel per placement."""
    names = sorted({r.spec.placed.label for r in records})
    if not names:
        return _empty("no run of a complete round")
    figure, panels = _panels(len(names), 3.0)
    for ax, name in zip(panels, names, strict=False):
        shown = [r for r in records if r.spec.placed.label == name]
        axes.tokens_over_time(shown, workload, colour=nth(COLOURS, name, names), ax=ax)
        ax.set(title=neutral.label(name), ylabel="tokens" if ax is panels[0] else "")
    return figure


@_styled
def vram_over_time(records: Sequence[Record]) -> Any:
    """VRAM against time since the start of each run; one line per run."""
    known = [r for r in records if r.observed and any(x.process_bytes for x in r.observed.memory.trace.during)]
    if not known:
        return _empty("no run of a complete round has readings of its VRAM")
    figure, (ax, other) = _panels(2, 3.0)
    figure.delaxes(other)
    peak = max((x.process_bytes or 0 for r in known for x in r.observation.memory.trace.during), default=0)
    name, unit = byte_unit(peak)
    names = sorted({r.spec.placed.label for r in known})
    axes.vram_over_time(known, names=names, ax=ax, unit=unit)
    ax.set(ylabel=f"VRAM, {name}")
    _legend(figure, _point_handles(names, marked=False))
    return figure
