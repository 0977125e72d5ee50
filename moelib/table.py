"""Tables and sentences as Markdown that know which records each of their numbers came from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moelib import files, neutral
from moelib.facts import Sheet
from moelib.harness import Harness
from moelib.record import Record

Sources = dict[str, str]
"""Id of a record, or path of another file of the study, -> digest."""


def cite(records: Iterable[Record]) -> Sources:
    return {r.run_id: r.digest for r in records}


def cite_sheet(sheet: Sheet) -> Sources:
    # as it was written: what a sheet of older code lacks is not in its digest
    return {f"quants/{sheet.model}-{sheet.quant}.json": files.digest(sheet.model_dump(mode="json", exclude_unset=True))}


def cite_harness(accuracy: dict[str, Harness]) -> Sources:
    return {name: found.digest for name, found in accuracy.items()}


class _Shown:
    """What a notebook displays: Markdown, with its provenance as metadata of the output."""

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        return {"text/markdown": self.markdown(), "text/plain": self.name}, {"moelib": self.provenance()}


@dataclass(frozen=True)
class Text(_Shown):
    """Sentences with numbers in them."""

    name: str
    text: str
    sources: Sources = field(default_factory=dict)

    def markdown(self) -> str:
        return neutral.lines(self.text)

    def provenance(self) -> dict[str, Any]:
        return {"kind": "text", "name": self.name, "text": self.markdown(), "sources": self.sources}


@dataclass(frozen=True)
class Table(_Shown):
    """A Markdown table: a name, rows of equal columns, and for each row what its numbers came from."""

    name: str
    rows: Sequence[dict[str, Any]]
    row_sources: Sequence[Sources]
    note: str = ""
    """What the table shows, said above it."""
    numbers: tuple[str, ...] = ()
    """Columns to set flush right."""
    why_empty: str = "nothing to show."
    """What is said instead of a table without rows."""

    @property
    def sources(self) -> Sources:
        return {k: v for row in self.row_sources for k, v in row.items()}

    def text(self) -> str:
        import pandas as pd

        columns = list(self.rows[0]) if self.rows else []
        rows = [{_cell(k): _cell(v) for k, v in row.items()} for row in self.rows]
        align = ["right" if c in self.numbers else "left" for c in columns]
        return pd.DataFrame(rows).to_markdown(index=False, colalign=align, disable_numparse=True)

    def markdown(self) -> str:
        """The table, then where its numbers came from: the digest shows whether they still do."""
        name = neutral.code(self.name)
        if not self.rows:
            return neutral.lines(f"*Table {name}: {self.why_empty}*")
        about = f"{neutral.lines(self.note)}\n\n" if self.note else ""
        cited = f"Table {name}: {len(self.sources)} sources, set digest `{files.digest(self.sources)[:12]}`."
        return f"{about}{self.text()}" + (f"\n\n*{cited}*" if self.sources else "")

    def provenance(self) -> dict[str, Any]:
        rows = [
            {"cells": {neutral.lines(k): neutral.lines(v) for k, v in row.items()}, "from": sorted(sources)}
            for row, sources in zip(self.rows, self.row_sources, strict=True)
        ]
        return {
            "kind": "table",
            "name": self.name,
            "note": neutral.lines(self.note),
            "rows": rows,
            "sources": self.sources,
        }


def _cell(value: Any) -> str:
    """What ends neither its cell nor its row."""
    return neutral.plain(value, None).replace("|", "\\|")


def heading(name: str, text: str, level: int = 3) -> Text:
    """A heading with a name in it that somebody else chose."""
    return Text(name, f"{'#' * level} {neutral.markdown(text)}")


def collect(told: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Where every number of a page came from, by table, text and figure, of what its parts tell."""
    found: dict[str, dict[str, Any]] = {"tables": {}, "texts": {}, "figures": {}, "sources": {}}
    for part in told:
        found["sources"] |= part["sources"]
        entry = {k: v for k, v in part.items() if k not in ("kind", "name", "sources")}
        if part["kind"] != "table":
            entry["from"] = sorted(part["sources"])
        found[f"{part['kind']}s"][part["name"]] = entry
    return found


def facts(name: str, told: dict[str, str], sources: Sources) -> Table:
    """A table of two columns, all of it from the same sources."""
    return Table(name, [{"what": k, "value": v} for k, v in told.items()], [sources] * len(told))
