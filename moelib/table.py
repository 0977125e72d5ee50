"""Tables and sentences as Markdown that know which records each of their numbers came from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moelib import files, neutral
from moelib.facts import Manifest
from moelib.harness import Harness
from moelib.record import Record

Sources = dict[str, str]
"""Id of a record, or path of another file of the study, -> digest."""


FEW = 4
"""Sources that are named one by one; more are named as a set, by its digest."""
_told: set[str] = set()


def cite(records: Iterable[Record]) -> Sources:
    return {r.run_id: r.digest for r in records}


def cite_manifest(sheet: Manifest) -> Sources:
    # as it was written: what a sheet of older code lacks is not in its digest
    return {f"quants/{sheet.model}-{sheet.quant}.json": files.digest(sheet.model_dump(mode="json", exclude_unset=True))}


def cite_harness(accuracy: dict[str, Harness]) -> Sources:
    return {name: found.digest for name, found in accuracy.items()}


def cited(every: Iterable[Sources]) -> tuple[list[list[str]], dict[str, Any]]:
    """What each of `every` is cited by, and what resolves that: the members of each set, the digest of each source.

    All rows of a table may be of all records, and so may many tables: their names are written once.
    """
    known: dict[int, tuple[Sources, list[str]]] = {}
    names, sets, digests = [], {}, {}
    for sources in every:
        if id(sources) not in known:
            by = sorted(sources)
            if len(by) > FEW:
                name = f"set {files.digest(sources)[:12]}"
                sets[name], by = by, [name]
            digests |= sources
            known[id(sources)] = (sources, by)
        names.append(known[id(sources)][1])
    return names, {"sets": sets, "sources": digests}


def resolved(names: Iterable[str], told: dict[str, Any]) -> Sources:
    """The sources that a row, text or figure is cited by, with the digests that a page's provenance tells."""
    return {k: told["sources"].get(k) for name in names for k in told["sets"].get(name, [name])}


def part(kind: str, name: str, sources: Sources, **more: Any) -> dict[str, Any]:
    """What a text or a figure tells of itself."""
    (by,), what = cited([sources])
    return {"kind": kind, "name": name, **more, "from": by, **what}


def begin() -> None:
    """A notebook begins, and none of its outputs has told anything."""
    _told.clear()


def tell(told: dict[str, Any]) -> dict[str, Any]:
    """`told` as metadata of a notebook's output, without the sets and digests that an output before has told."""
    new = {k: {name: v for name, v in told[k].items() if name not in _told} for k in ("sets", "sources")}
    for names in new.values():
        _told.update(names)
    return told | new


class _Shown:
    """What a notebook displays: Markdown, with its provenance as metadata of the output."""

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        return {"text/markdown": self.markdown(), "text/plain": self.name}, {"moelib": tell(self.provenance())}


@dataclass(frozen=True)
class Text(_Shown):
    """Sentences with numbers in them."""

    name: str
    text: str
    sources: Sources = field(default_factory=dict)
    verdict: dict[str, Any] | None = None
    """What the command that runs the notebook is to know of the study; it is not shown."""

    def markdown(self) -> str:
        return neutral.lines(self.text)

    def provenance(self) -> dict[str, Any]:
        return part("text", self.name, self.sources, text=self.markdown())

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        data, metadata = super()._repr_mimebundle_()
        return data, metadata | ({"moelib-verdict": self.verdict} if self.verdict else {})


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

    @cached_property
    def sources(self) -> Sources:
        once = {id(row): row for row in self.row_sources}  # rows may share all that they are from
        return {k: v for row in once.values() for k, v in row.items()}

    def text(self) -> str:
        from tabulate import tabulate

        columns = list(self.rows[0]) if self.rows else []
        rows = [{_cell(k): _cell(v) for k, v in row.items()} for row in self.rows]
        heads = list(dict.fromkeys(k for row in rows for k in row))
        cells = [[row.get(k, "nan") for k in heads] for row in rows]
        align = ["right" if c in self.numbers else "left" for c in columns]
        return tabulate(cells, heads, tablefmt="pipe", colalign=align, disable_numparse=True)

    def markdown(self) -> str:
        """The table, then where its numbers came from: the digest shows whether they still do."""
        name = neutral.code(self.name)
        if not self.rows:
            return neutral.lines(f"*Table {name}: {self.why_empty}*")
        about = f"{neutral.lines(self.note)}\n\n" if self.note else ""
        cited = f"Table {name}: {len(self.sources)} sources, set digest `{files.digest(self.sources)[:12]}`."
        return f"{about}{self.text()}" + (f"\n\n*{cited}*" if self.sources else "")

    def provenance(self) -> dict[str, Any]:
        names, what = cited(self.row_sources)
        rows = [
            {"cells": {neutral.lines(k): neutral.lines(v) for k, v in row.items()}, "from": by}
            for row, by in zip(self.rows, names, strict=True)
        ]
        return {"kind": "table", "name": self.name, "note": neutral.lines(self.note), "rows": rows, **what}


def _cell(value: Any) -> str:
    """What ends neither its cell nor its row."""
    return neutral.plain(value, None).replace("|", "\\|")


def heading(name: str, text: str, level: int = 3) -> Text:
    """A heading with a name in it that somebody else chose."""
    return Text(name, f"{'#' * level} {neutral.markdown(text)}")


def collect(told: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Where every number of a page came from, by table, text and figure, of what its parts tell. Raises ValueError
    where they name what none of them tells."""
    found: dict[str, dict[str, Any]] = {"tables": {}, "texts": {}, "figures": {}, "sets": {}, "sources": {}}
    named = set()
    for here in told:
        found["sets"] |= here["sets"]
        found["sources"] |= here["sources"]
        found[f"{here['kind']}s"][here["name"]] = {
            k: v for k, v in here.items() if k not in ("kind", "name", "sets", "sources")
        }
        named |= {name for row in here.get("rows", [here]) for name in row["from"]}
    if unknown := named - found["sets"].keys() - found["sources"].keys():
        raise ValueError(f"{min(unknown)} is named and not told")
    return found


def facts(name: str, told: dict[str, str], sources: Sources) -> Table:
    """A table of two columns, all of it from the same sources."""
    return Table(name, [{"what": k, "value": v} for k, v in told.items()], [sources] * len(told))
