"""Tables and sentences as Markdown, with the records that each of their numbers came from."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from moelib.audit.record import Record
from moelib.base import files, neutral
from moelib.catalogue.facts import Manifest
from moelib.catalogue.params import PlacementMode
from moelib.measure.run import Spec
from moelib.study.frames import Side
from moelib.study.overhead import Overhead
from moelib.study.study import Study

Sources = dict[str, str]
"""Id of a record, or path of another file of the study, -> digest."""


FEW = 4
"""Sources that are named one by one; more are named as a set, by its digest."""
_BREAKS = re.compile(r"(?<=\d,) (?=[-\d.e+]+\])|(?<=\d) (?=%)")
"""Spaces of an interval and before %."""
_already_shown: set[str] = set()
"""Sets and sources that outputs of this notebook have named."""


def cite(records: Iterable[Record]) -> Sources:
    return {r.run_id: r.digest for r in records}


def cite_of(name: str, records: Iterable[Record]) -> Sources:
    """The records of another study, cited beside one's own."""
    return {f"{name}/{run}": digest for run, digest in cite(records).items()}


def reference(study: Study) -> str:
    """The placement that the others of a study are compared with: `baseline`, or what has most on the GPU; in words
    where that is another one in each cell."""
    firsts = {min((s.placed for s in c.specs), key=lambda p: p.rank) for c in study.cells}
    return str(firsts.pop()) if len(firsts) == 1 else "the fitting placement"


def several_load_modes(of: Iterable[PlacementMode | Spec]) -> bool:
    """Whether these differ in their load mode: it is shown only then."""
    return len({one.load_mode for one in of}) > 1


def placed(study: Study, side: Side) -> str:
    """A placement, with its load mode where the study has several."""
    placement, load_mode = side
    return f"{placement}, {load_mode}" if several_load_modes(study.parameters.arms) else placement


def load_modes_as_one(
    rows: Sequence[dict[str, Any]], sources: Sequence[Sources]
) -> tuple[list[dict[str, Any]], list[Sources]]:
    """A placement in two load modes as one row, where they differ in nothing but how much the device's use grew."""
    shown: list[dict[str, Any]] = []
    of: list[Sources] = []
    for row, cited in zip(rows, sources, strict=True):
        if shown and _without_mode(shown[-1]) == _without_mode(row) and ", " in row["placement"]:
            last, mode = shown[-1], row["placement"].rpartition(", ")[2]
            shown[-1] = last | {"placement": f"{last['placement']} or {mode}"}
            if "device" in row and row["device"] != last["device"]:
                shown[-1]["device"] = f"{last['device']} or {row['device']}"
            of[-1] = of[-1] | cited
        else:
            shown.append(row)
            of.append(cited)
    return shown, of


def _without_mode(row: Mapping[str, Any]) -> dict[str, Any]:
    placement = row["placement"].partition(", ")[0]
    return {k: v for k, v in row.items() if k != "device"} | {"placement": placement}


def merged(every: Iterable[Sources]) -> Sources:
    """All of these sources as one."""
    return {name: digest for sources in every for name, digest in sources.items()}


def cite_manifest(manifest: Manifest) -> Sources:
    # as it was written: what a manifest of older code lacks is not in its digest
    written = manifest.model_dump(mode="json", exclude_unset=True)
    return {f"quants/{manifest.model}-{manifest.quant}.json": files.digest(written)}


def cite_overhead(overhead: dict[str, Overhead]) -> Sources:
    return {name: measured.digest for name, measured in overhead.items()}


def cited(every: Iterable[Sources]) -> tuple[list[list[str]], dict[str, Any]]:
    """The names that each of `every` is cited by, and what resolves them: the members of each set, the digest of each
    source.

    Many rows of many tables may be of all records: their names are written once.
    """
    known: dict[int, tuple[Sources, list[str]]] = {}
    names, sets = [], {}
    digests: Sources = {}
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


def resolved(names: Iterable[str], provenance: dict[str, Any]) -> Sources:
    """The sources behind the names that a row, text or figure is cited by, and their digests by a page's provenance."""
    return {k: provenance["sources"].get(k) for name in names for k in provenance["sets"].get(name, [name])}


def part(kind: str, name: str, sources: Sources, **more: Any) -> dict[str, Any]:
    """Provenance of a text or a figure."""
    (names,), sets_and_digests = cited([sources])
    return {"kind": kind, "name": name, **more, "from": names, **sets_and_digests}


def begin() -> None:
    """Start a notebook: no output has named a source yet."""
    _already_shown.clear()


def once(provenance: dict[str, Any]) -> dict[str, Any]:
    """`provenance` as metadata of a notebook's output, without the sets and digests that an earlier output has."""
    kinds = ("sets", "sources")
    new = {k: {name: v for name, v in provenance[k].items() if name not in _already_shown} for k in kinds}
    for names in new.values():
        _already_shown.update(names)
    return provenance | new


class _Shown(ABC):
    """What a notebook displays: Markdown, with its provenance as metadata of the output."""

    name: str

    @abstractmethod
    def markdown(self) -> str: ...

    @abstractmethod
    def provenance(self) -> dict[str, Any]: ...

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        return {"text/markdown": self.markdown(), "text/plain": self.name}, {"moelib": once(self.provenance())}


@dataclass(frozen=True)
class Text(_Shown):
    """Sentences with numbers in them."""

    name: str
    text: str
    sources: Sources = field(default_factory=dict)
    verdict: dict[str, Any] | None = None
    """What the command that runs the notebook needs to know of the study; it is not shown."""

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
    """Printed above the table."""
    numbers: tuple[str, ...] = ()
    """Right-aligned columns."""
    why_empty: str = "nothing to show."
    """Printed instead of a table without rows."""
    unbroken: bool = False
    """Whether intervals and percentages stay on one line of a narrow cell: with no-break spaces in them."""

    @cached_property
    def sources(self) -> Sources:
        distinct = {id(row): row for row in self.row_sources}  # rows may share one set of sources
        return {k: v for row in distinct.values() for k, v in row.items()}

    def text(self) -> str:
        from tabulate import tabulate

        columns = list(self.rows[0]) if self.rows else []
        rows = [{_cell(k): self._kept(_cell(v)) for k, v in row.items()} for row in self.rows]
        heads = list(dict.fromkeys(k for row in rows for k in row))
        cells = [[row.get(k, "nan") for k in heads] for row in rows]
        align = ["right" if c in self.numbers else "left" for c in columns]
        return tabulate(cells, heads, tablefmt="pipe", colalign=align, disable_numparse=True)

    def _kept(self, cell: str) -> str:
        return _BREAKS.sub("\u00a0", cell) if self.unbroken else cell

    def markdown(self) -> str:
        """The table, then how many sources it has and the digest of their set, which changes if one of them does."""
        name = neutral.code(self.name)
        if not self.rows:
            return neutral.lines(f"*Table {name}: {self.why_empty}*")
        about = f"{neutral.lines(self.note)}\n\n" if self.note else ""
        sources = f"Table {name}: {len(self.sources)} sources, set digest `{files.digest(self.sources)[:12]}`."
        return f"{about}{self.text()}" + (f"\n\n*{sources}*" if self.sources else "")

    def provenance(self) -> dict[str, Any]:
        names, sets_and_digests = cited(self.row_sources)
        rows = [
            {"cells": {neutral.lines(k): self._kept(neutral.lines(v)) for k, v in row.items()}, "from": row_names}
            for row, row_names in zip(self.rows, names, strict=True)
        ]
        return {"kind": "table", "name": self.name, "note": neutral.lines(self.note), "rows": rows, **sets_and_digests}


def _cell(value: Any) -> str:
    """Text that ends neither its cell nor its row. After a backslash, readers differ in whether another one escapes."""
    return neutral.plain(value, None).replace("\\|", "\\&#124;").replace("|", "\\|")


def heading(name: str, text: str, level: int = 3) -> Text:
    """A heading that contains a name chosen by somebody else."""
    return Text(name, f"{'#' * level} {neutral.markdown(text)}")


def below_names(kind: str, named: Mapping[str, Table]) -> list[Text | Table]:
    """Tables below headings of what they are of, such as models; a note that is the last one's again is said once."""
    shown: list[Text | Table] = []
    said = None
    for name, one in named.items():
        shown += [heading(f"h-{kind}-{name}", name), replace(one, note="") if one.note == said else one]
        said = one.note
    return shown


def collect(parts: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The provenance of a page from that of its parts: tables, texts and figures. Raises ValueError where a part cites
    a source that none of them defines."""
    page: dict[str, dict[str, Any]] = {"tables": {}, "texts": {}, "figures": {}, "sets": {}, "sources": {}}
    names = set()
    for one in parts:
        page["sets"] |= one["sets"]
        page["sources"] |= one["sources"]
        page[f"{one['kind']}s"][one["name"]] = {
            k: v for k, v in one.items() if k not in ("kind", "name", "sets", "sources")
        }
        names |= {name for row in one.get("rows", [one]) for name in row["from"]}
    if undefined := names - page["sets"].keys() - page["sources"].keys():
        raise ValueError(f"{min(undefined)} is cited and not defined")
    return page


def facts(name: str, values: dict[str, str], sources: Sources) -> Table:
    """A table of two columns, all of it from the same sources."""
    return Table(name, [{"what": k, "value": v} for k, v in values.items()], [sources] * len(values))
