"""A study: its plan, its folder of products, and what of it is done.

Reading writes nothing; `begin` writes the plan. What is done is what has a verified record; everything else is done
again, whenever and however often the study was interrupted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from moelib.audit import audit
from moelib.audit.record import Check, Record, each, spec_key
from moelib.audit.record import read as read_record
from moelib.base import files, neutral
from moelib.base.schema import closest, near
from moelib.catalogue import params
from moelib.catalogue.facts import Manifest
from moelib.quality import checks, comparison
from moelib.quality.comparison import Comparison
from moelib.study import plan as plans
from moelib.study.gather import Evidence, gather
from moelib.study.overhead import FOLDER as OVERHEAD
from moelib.study.overhead import Overhead
from moelib.study.overhead import read as read_overhead
from moelib.study.plan import Cell, Plan, StudyError
from moelib.study.status import KINDS, Status, summary

if TYPE_CHECKING:
    import pandas as pd


class UnknownName(params.UserError, LookupError):
    """There is no such study, record or cell; the message has the nearest name, or all."""


def read_manifest(path: Path) -> Manifest | None:
    """The manifest at `path`; None if there is none that can be read."""
    try:
        return Manifest.model_validate_json(path.read_bytes(), strict=True)
    except (OSError, ValueError):
        return None


def same_manifest(a: Manifest | None, b: Manifest | None) -> bool:
    """Whether two manifests describe the same file; the time that quantising took may differ."""
    return a is not None and b is not None and a.model_copy(update={"quantize_s": b.quantize_s}) == b


@dataclass(frozen=True)
class Contents:
    """What a study's folder holds beside its plan, each file read once."""

    evidence: Evidence
    manifests: tuple[Manifest, ...]
    overhead: dict[str, Overhead]
    """How much measuring changes what is measured, by file; empty where nobody measured it."""
    comparisons: tuple[Comparison, ...] = ()
    """Of what its files say, those that stand."""

    @classmethod
    def read(cls, path: Path) -> Contents:
        evidence = gather(path, light=True)
        manifests = {p.name: read_manifest(p) for p in sorted((path / "quants").glob("*.json"))}
        # a cell's manifest must be the one that its records name, if it has records: else another file was run
        recorded: dict[str, list[Manifest]] = {}
        for r in evidence.records:
            listed = recorded.setdefault(f"{r.spec.model}-{r.spec.quant}.json", [])
            if not any(r.sheet is m or r.sheet == m for m in listed):
                listed.append(r.sheet)
        good, damaged = [], []
        for name, manifest in manifests.items():
            listed = recorded.get(name, [])
            if manifest is None or (listed and not any(same_manifest(manifest, m) for m in listed)):
                damaged.append(f"quants/{name}: not the manifest of its records")
            else:
                good.append(manifest)
        overhead = {}
        for p in sorted((path / OVERHEAD).glob("*.json")):
            try:
                overhead[f"{OVERHEAD}/{p.name}"] = read_overhead(p)
            except files.FileError:
                damaged.append(f"{OVERHEAD}/{p.name}: not what was written")
        comparisons, unread = comparison.read_all(path)
        off = {c.run_id: wrong for c in comparisons if c.done and (wrong := checks.again(path, c))}
        unread += [f"{name}: {'; '.join(wrong)}" for name, wrong in off.items()]
        standing = tuple(comparison.standing([c for c in comparisons if c.run_id not in off]).values())
        evidence = replace(evidence, damaged=[*evidence.damaged, *damaged, *unread])
        return cls(evidence, tuple(good), overhead, standing)


class Study:
    """A study by its plan and its folder: data frames of its runs and requests, its records, and why any of them is not
    used.

    What the folder holds is read once, verified and audited, when it is first asked for; `again` reads it anew.
    `runs` and `requests` hold the usable runs of whole rounds, which the document is made of; `records` holds all.
    """

    def __init__(self, path: Path, plan: Plan, contents: Contents | None = None):
        self.path, self.plan = path, plan
        if contents is not None:
            self.contents = contents

    @classmethod
    def named(cls, name: str) -> Study:
        """The study that `params/studies/` describes, begun or not.

        Raises params.ParamsError for an unknown study, StudyError if the plan in its folder is another one.
        """
        path, parameters = plans.outputs() / name, params.study(name)
        file = path / "plan.json"
        if parameters.fitting:
            if not file.exists():
                raise StudyError(
                    f"{name} has no plan yet, as its placements are planned where it runs: `moelib study plan {name}` "
                    f"shows it, `moelib study run {name}` follows it"
                )
            plan = plans.read(file)
            same = plan.fits(parameters)
        else:
            plan = plans.of(parameters)
            same = not file.exists() or plans.read(file).asks_for_the_runs_of(plan)
        if not same:
            raise StudyError(
                f"{file} is the plan of a study with other parameters; give the changed study another name, "
                f"or move {path} away"
            )
        return cls(path, plan)

    @classmethod
    def read(cls, path: Path) -> Study:
        """The study in a folder, from its plan, manifests and records alone, whatever `params/` says now.

        Raises StudyError if there is no plan, or no record that stands.
        """
        study = cls(path, _plan_in(path))
        _require_done(path, study.records)
        return study

    def begin(self) -> None:
        """Write the plan if there is none: what measuring does first, and nothing else does."""
        plans.write(self.path / "plan.json", self.plan)

    def again(self) -> Study:
        """The study with what its folder holds by now."""
        return Study(self.path, self.plan)

    def part(self, model: str, quants: Iterable[str]) -> Study:
        """The study of these quants of one model alone, with the manifests of those that have a whole round."""
        quants = tuple(quants)
        names = [f"{model}/{q}" for q in quants]
        manifests = {f"{m.model}/{m.quant}": m for m in self.manifests}
        parameters = self.parameters.model_copy(update={"models": (model,), "quants": quants})
        plan = self.plan.model_copy(update={"study": parameters, "cells": [c for c in self.cells if c.name in names]})
        contents = replace(
            self.contents,
            evidence=replace(self.evidence, records=[r for r in self.records if r.cell in names]),
            manifests=tuple(manifests[n] for n in names if n in self.measured and n in manifests),
            comparisons=tuple(c for c in self.comparisons if c.spec.model == model and c.spec.other.quant in quants),
        )
        return Study(self.path, plan, contents)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parameters(self) -> params.Study:
        return self.plan.study

    @property
    def title(self) -> str:
        return self.parameters.title

    @property
    def cells(self) -> list[Cell]:
        return self.plan.cells

    @property
    def workloads(self) -> dict[str, params.Workload]:
        return self.plan.workloads

    @property
    def work(self) -> Path:
        """Scratch: logs of running tools, locks. Git-ignored, safe to delete between runs."""
        return self.path / "work"

    def cell(self, model: str, quant: str) -> Cell:
        """The cell of `model` and `quant`. Raises ParamsError naming what the study has."""
        params.model(model).refuse_unusable(self.parameters.scale, self.parameters.quants)
        cells, name = {c.name: c for c in self.cells}, f"{model}/{quant}"
        if name not in cells:
            near = closest(name, cells)
            raise params.ParamsError(f"study {self.name} has no cell {name}{near}; it has {', '.join(sorted(cells))}")
        return cells[name]

    def manifest_path(self, cell: Cell) -> Path:
        return self.path / "quants" / f"{cell.file_name}.json"

    def manifest(self, cell: Cell) -> Manifest | None:
        """The cell's manifest as it is on the disk now."""
        return read_manifest(self.manifest_path(cell))

    def evidence_now(self, cell: Cell | None = None, set_aside: bool = False, light: bool = False) -> Evidence:
        """What the disk holds now of the whole study, or of one cell."""
        return gather(self.path, f"{cell.model}_{cell.quant}_" if cell else "", set_aside, light)

    def status_now(self, cell: Cell, evidence: Evidence | None = None) -> Status:
        """What `cell` has, by `evidence`, or by its own records, read for this."""
        return Status.of(cell, evidence or self.evidence_now(cell, light=True), self.workloads)

    @cached_property
    def contents(self) -> Contents:
        return Contents.read(self.path)

    @property
    def evidence(self) -> Evidence:
        return self.contents.evidence

    @property
    def records(self) -> list[Record]:
        """Every record that can be read, used or not."""
        return self.evidence.records

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        return self.contents.manifests

    @property
    def overhead(self) -> dict[str, Overhead]:
        return self.contents.overhead

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """What its files say, compared token by token; by id."""
        return self.contents.comparisons

    @property
    def done(self) -> list[Record]:
        """The records of runs that came to a result, whole round or not."""
        return [r for r in self.records if r.done]

    @cached_property
    def statuses(self) -> dict[str, Status]:
        """Status of every planned cell, in the study's order of models and quants."""
        cells = {c.name: c for c in self.cells}
        names = [f"{model}/{quant}" for model in self.parameters.models for quant in self.parameters.quants]
        return {name: Status.of(cells[name], self.evidence, self.workloads) for name in names}

    @property
    def measured(self) -> dict[str, Status]:
        """The cells that have a whole, usable round."""
        return {name: s for name, s in self.statuses.items() if s.rounds}

    @property
    def rounds(self) -> list[tuple[Record, ...]]:
        """The whole, usable rounds."""
        return [runs for s in self.statuses.values() for runs in s.rounds]

    @cached_property
    def used(self) -> list[Record]:
        """The runs of these rounds: cell by cell, and the placements of a round in the study's order."""
        labels = [mode.label for mode in self.parameters.arms]  # one may be there again, for another model
        order = {label: labels.index(label) for label in labels}
        return [r for runs in self.rounds for r in sorted(runs, key=lambda r: order.get(r.spec.label, len(order)))]

    @property
    def host_shared(self) -> bool:
        """Whether any of them shared its host with runs on the host's other GPUs, so that times are not its own."""
        return any(r.host.shared for r in self.used)

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row for each usable run of a whole round; see `columns`."""
        from moelib.study import frames

        return frames.runs(self.used)

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row for each request of these runs."""
        from moelib.study import frames

        return frames.requests(self.used)

    @property
    def columns(self) -> pd.DataFrame:
        """What the measured columns of `runs` hold: label, unit, whether more or less is better, source."""
        import pandas as pd

        from moelib.study.columns import columns

        rows = {
            name: {"label": c.label, "unit": c.unit, "better": c.better, "source": c.source}
            for name, c in columns(self.parameters.workloads).items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("column")

    @cached_property
    def audit(self) -> tuple[Check, ...]:
        """The invariants of the study as a whole."""
        planned = [spec_key(s) for c in self.cells for s in c.specs]
        return audit.study(audit.Matrix(planned, self.used, self.records, self.evidence.set_aside))

    @property
    def problems(self) -> list[str]:
        """Every planned run without a usable result, and what the study as a whole shows; empty if there is nothing."""
        problems = [p for s in self.statuses.values() for p in s.problems]
        problems += [f"damaged: {d}" for d in self.evidence.damaged]
        problems += [one.line for one in checks.sameness(self.comparisons) if one.verdict == "differs"]
        # a matrix that is not complete has said so, run by run
        return problems + [f"{c.id}: {c.measured}" for c in self.audit if c.failed and c.id != "matrix-complete"]

    @property
    def tally(self) -> dict[str, int]:
        """planned = usable + invalid + missing, and usable = valid + degraded, in runs."""
        count: Counter[str] = sum((s.tally for s in self.statuses.values()), Counter())
        kinds = {k: count[k] for k in KINDS}
        return {"planned": count.total(), "usable": kinds["valid"] + kinds["degraded"], **kinds}

    @property
    def flags(self) -> Counter[str]:
        """Reason -> how many usable runs are degraded by it."""
        return sum((s.flags for s in self.statuses.values()), Counter())

    def summary(self) -> str:
        """How many runs are usable, and why the others are not."""
        return summary(self.tally, self.flags)

    def record(self, run_id: str) -> Record:
        """The whole record of a run, by its id or an unambiguous part of it. Raises UnknownName."""
        ids = [r.run_id for r in self.records]
        matches = [i for i in ids if i == run_id] or [i for i in ids if run_id in i]
        if len(matches) != 1:
            count = f"{len(matches)} records" if matches else "no record"
            raise UnknownName(f"{count} of {self.name} match {run_id!r}{near(run_id, (matches or ids)[:10])}")
        return read_record(self.path / "records" / f"{matches[0]}.json")

    def why(self, cell: str) -> str:
        """Why runs of a cell (`model/quant`) are flagged or not used, in sentences. Raises UnknownName."""
        if cell not in self.statuses:
            raise UnknownName(f"{self.name} has no cell {cell!r}{near(cell, sorted(self.statuses))}")
        status = self.statuses[cell]
        flagged = [r for runs in status.rounds for r in runs if r.reasons]
        lines = [f"{cell}: {status.usable} of {status.planned} runs usable"]
        lines += [f"- {problem}" for problem in status.problems]
        lines += [f"- {r.run_id}: {r.status} ({', '.join(r.reasons)})" for r in flagged]
        return neutral.lines("\n".join(lines))

    def __repr__(self) -> str:
        return f"<Study {self.name}: {self.summary()}; {len(self.measured)} cells, columns in .runs and .requests>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{s.planned}</td><td>{s.usable}</td><td>{len(s.rounds)}</td></tr>"
            for name, s in self.statuses.items()
        )
        return (
            f"<b>{escape(self.name)}</b>: {escape(self.title)}. {escape(self.summary())}."
            "<table><tr><th>cell</th><th>planned</th><th>usable</th><th>whole rounds</th></tr>"
            f"{rows}</table>"
        )


def load(name: str) -> Study:
    """The study `name` of `plans.folders()`, read. Raises UnknownName, or StudyError without records."""
    folders = plans.folders()
    if name not in folders:
        raise UnknownName(f"no study {name!r} was measured here{near(name, sorted(folders))}")
    return Study.read(folders[name])


def require_results(path: Path) -> None:
    """Raise StudyError where `Study.read` would; of the records no more are read than until one is done."""
    _plan_in(path)
    _require_done(path, each(path))


def _plan_in(path: Path) -> Plan:
    if not (path / "plan.json").exists():
        others = sorted(p.parent.name for p in path.parent.glob("*/plan.json"))
        raise StudyError(f"{path} holds no plan{closest(path.name, others)}; {_first(path)}")
    return plans.read(path / "plan.json")


def _require_done(path: Path, records: Iterable[Record]) -> None:
    if not any(r.done for r in records):
        raise StudyError(f"{path} holds no valid record; {_first(path)}")


def _first(path: Path) -> str:
    return f"run the study first: `moelib study run {path.name}`"
