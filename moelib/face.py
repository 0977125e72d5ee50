"""What `import moelib` offers: studies as data frames, comparisons, records and headers. Nothing here writes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from html import escape
from pathlib import Path

import pandas as pd

from moelib import frames, gguf_file, neutral, params, record, study, words
from moelib.placement import REFERENCE
from moelib.record import Record as Record


class UnknownName(params.UserError, LookupError):
    """There is no such study, record or cell; the message has the nearest name, or all."""


def _folders() -> dict[str, Path]:
    """Name -> folder of every study that has a plan: in outputs/ (or $MOELIB_OUTPUTS), then the committed example."""
    places = (study.outputs(), params.root() / "docs" / "example")
    folders = [p.parent for place in places for p in sorted(place.glob("*/plan.json"))]
    return {folder.name: folder for folder in reversed(folders)}


def studies() -> pd.DataFrame:
    """Every study that can be loaded, by name: its title, weights, models, quants, records and folder."""
    rows = {}
    for name, folder in sorted(_folders().items()):
        asked = study.read_plan(folder / "plan.json")["study"]
        rows[name] = {
            "title": asked["title"],
            "weights": asked["weights"],
            "models": ", ".join(asked["models"]),
            "quants": ", ".join(asked["quants"]),
            "records": sum(1 for _ in (folder / "records").glob("*.json")),
            "folder": str(folder),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("study")


def load(name: str) -> Study:
    """The study `name`, read, verified and audited with its logs. Raises UnknownName, or StudyError without records."""
    folders = _folders()
    if name not in folders:
        raise UnknownName(f"no study {name!r} was measured here{frames.near(name, sorted(folders))}")
    return Study(study.results(folders[name]), folders[name])


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each record that holds an observation; units in the columns' names. See `columns` of a study."""
    return frames.runs(records)


def compare(runs: pd.DataFrame, column: str, baseline: str = REFERENCE) -> pd.DataFrame:
    """`column` of every placement against `baseline`, paired within rounds: ratio, low and high (95 %), n.

    runs: a frame of runs, such as `load("h100-twins").runs`. Raises FrameError where they cannot be compared.
    """
    return frames.compare(runs, column, baseline)


def header(path: str | Path) -> gguf_file.Header:
    """The header of a GGUF file (of all its parts, given the first): metadata, tensors, experts' and other bytes.

    Weights are not read. Raises GGUFError for what is no whole GGUF of a model.
    """
    return gguf_file.read_header(path)


class Study:
    """A measured study, as it was read: frames of its runs and requests, its records, and why any of them is not used.

    `runs` and `requests` hold the usable runs of whole rounds, which the document is made of; `records` holds all.
    """

    def __init__(self, results: study.Results, folder: Path):
        self._results, self._folder = results, folder

    @property
    def name(self) -> str:
        return self._results.name

    @property
    def title(self) -> str:
        return self._results.study.title

    @property
    def records(self) -> list[Record]:
        """Every record that can be read, used or not."""
        return self._results.records

    @cached_property
    def _used(self) -> list[Record]:
        return [r for block in self._results.blocks for r in block]

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row for each usable run of a whole round."""
        return frames.runs(self._used)

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row for each request of these runs."""
        return frames.requests(self._used)

    @property
    def columns(self) -> pd.DataFrame:
        """What the measured columns of `runs` hold: label, unit, whether more or less is better, source."""
        columns = frames.columns(self._results.study.workloads)
        rows = {
            n: {"label": c.label, "unit": c.unit, "better": c.better, "source": c.source} for n, c in columns.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("column")

    @property
    def problems(self) -> list[str]:
        """Every planned run without a usable result, and what the study as a whole shows; empty if there is nothing."""
        return self._results.problems

    def record(self, run_id: str) -> Record:
        """The whole record of a run, by its id or an unambiguous part of it. Raises UnknownName."""
        ids = [r.run_id for r in self.records]
        matches = [i for i in ids if i == run_id] or [i for i in ids if run_id in i]
        if len(matches) != 1:
            count = f"{len(matches)} records" if matches else "no record"
            raise UnknownName(f"{count} of {self.name} match {run_id!r}{frames.near(run_id, (matches or ids)[:10])}")
        return record.read(self._folder / "records" / f"{matches[0]}.json")

    def why(self, cell: str) -> str:
        """Why runs of a cell (`model/quant`) are flagged or not used, in sentences. Raises UnknownName."""
        statuses = self._results.statuses
        if cell not in statuses:
            raise UnknownName(f"{self.name} has no cell {cell!r}{frames.near(cell, sorted(statuses))}")
        status = statuses[cell]
        flagged = [r for block in status.blocks for r in block if r.reasons]
        lines = [f"{cell}: {status.usable} of {status.planned} runs usable"]
        lines += [f"- {problem}" for problem in status.problems]
        lines += [f"- {r.run_id}: {r.status} ({', '.join(r.reasons)})" for r in flagged]
        return neutral.lines("\n".join(lines))

    def __repr__(self) -> str:
        cells = len(self._results.measured)
        return f"<Study {self.name}: {words.summary(self._results)}; {cells} cells, columns in .runs and .requests>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{s.planned}</td><td>{s.usable}</td><td>{len(s.blocks)}</td></tr>"
            for name, s in self._results.statuses.items()
        )
        return (
            f"<b>{escape(self.name)}</b>: {escape(self.title)}. {escape(words.summary(self._results))}."
            "<table><tr><th>cell</th><th>planned</th><th>usable</th><th>whole rounds</th></tr>"
            f"{rows}</table>"
        )
