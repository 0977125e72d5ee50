"""Figures of a study, a panel for each model, drawn by `axes`; `show` puts one into a notebook under a name."""

import base64
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from IPython.display import display

from moelib.audit.record import Record
from moelib.base import files, neutral
from moelib.base.stats import byte_unit
from moelib.evidence import table
from moelib.figures import axes, layout
from moelib.figures.axes import COLOURS, nth

DPI = 144


@layout.styled
def png(figure: Any) -> bytes:
    """The figure as a file, the same bytes each time."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


@layout.styled
def show(
    figure: Any, name: str, alt: str, records: Iterable[Record] = (), sources: dict[str, str] | None = None
) -> None:
    """Display the figure as PNG; `name` becomes its file beside the document, `alt` describes it, `records` and other
    `sources` (path -> digest) are what it was drawn from."""
    name, alt = _file_name(name), neutral.markdown(alt)
    data = {"image/png": base64.b64encode(png(figure)).decode(), "text/plain": alt}
    provenance = table.part("figure", name, table.cite(records) | (sources or {}))
    display(data, raw=True, metadata={"filename": name, "alt": alt, "moelib": table.once(provenance)})


def _file_name(name: str) -> str:
    """`name`, if it is safe as a file name; else its safe part and a digest that keeps it distinct."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        return name
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name)[:60].strip('-') or 'figure'}-{files.digest(name)[:8]}"


@layout.styled
def tokens_over_time(records: Sequence[Record], workload: str) -> Any:
    """Tokens generated against time since the request was sent; one line per request, one panel per placement."""
    names = sorted({r.spec.placed.label for r in records})
    if not names:
        return layout.empty("no run of a complete round")
    figure, panels = layout.panels(len(names), 3.0)
    for ax, name in zip(panels, names, strict=False):
        shown = [r for r in records if r.spec.placed.label == name]
        axes.tokens_over_time(shown, workload, colour=nth(COLOURS, name, names), ax=ax)
        ax.set(title=neutral.label(name), ylabel="tokens" if ax is panels[0] else "")
    return figure


@layout.styled
def vram_over_time(records: Sequence[Record]) -> Any:
    """VRAM against time since the start of each run; one line per run."""
    known = [r for r in records if r.observed and any(x.process_bytes for x in r.observed.memory.trace.during)]
    if not known:
        return layout.empty("no run of a complete round has readings of its VRAM")
    figure, (ax, other) = layout.panels(2, 3.0)
    figure.delaxes(other)
    peak = max((x.process_bytes or 0 for r in known for x in r.observation.memory.trace.during), default=0)
    name, unit = byte_unit(peak)
    names = sorted({r.spec.placed.label for r in known})
    axes.vram_over_time(known, names=names, ax=ax, unit=unit)
    ax.set(ylabel=f"VRAM, {name}")
    layout.legend(figure, layout.point_handles(names, marked=False))
    return figure
