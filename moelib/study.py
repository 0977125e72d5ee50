"""A study: its plan, its folder of products, and what of it is done.

The plan is written before anything else and never changes. What is done is what has a verified record; everything
else is done again, whenever and however often the study was interrupted.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moelib import audit, files, harness, params, record, run
from moelib.facts import Manifest
from moelib.gather import Evidence, gather, standing_for


class StudyError(params.UserError):
    """The study cannot go on, or is not whole; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Cell:
    """One (model, quant): what one executed notebook tells."""

    model: str
    quant: str
    blocks: tuple[tuple[run.Spec, ...], ...]

    @property
    def name(self) -> str:
        return f"{self.model}/{self.quant}"

    @property
    def file_name(self) -> str:
        return f"{self.model}-{self.quant}"

    @property
    def specs(self) -> list[run.Spec]:
        return [s for block in self.blocks for s in block]


class Plan(params.Strict):
    """What `plan.json` holds."""

    schema_version: int = record.SCHEMA_VERSION
    study: params.Study
    workloads: dict[str, params.Workload]
    cells: list[Cell]


def plan(study: params.Study) -> list[Cell]:
    """The cells in seeded random order, each with its blocks, the runs of a block in seeded random order."""
    names = {"weights", "scale", "workloads", "requests", "context", "device", "seed"}
    same = {"study": study.name, **study.model_dump(include=names)}
    cells = []
    for model, quant in itertools.product(study.models, study.quants):
        shuffled, blocks = random.Random(f"{study.seed}/{model}/{quant}"), []
        for b in range(study.blocks):
            arms = [arm.model_dump() for arm in study.arms]
            shuffled.shuffle(arms)
            common = {"model": model, "quant": quant, "block": b, **same}
            blocks.append(tuple(run.Spec(order=i, **arm, **common) for i, arm in enumerate(arms)))
        cells.append(Cell(model, quant, tuple(blocks)))
    random.Random(study.seed).shuffle(cells)
    return cells


def outputs() -> Path:
    """Where studies are kept: $MOELIB_OUTPUTS or `outputs/`."""
    return Path(os.environ.get("MOELIB_OUTPUTS") or params.root() / "outputs")


def read_plan(path: Path) -> dict[str, Any]:
    """The plan at `path`, without its digest. Raises StudyError if it is not what was written."""
    next_step = (
        "delete it and run the study: the plan is made again from params/, and the records that belong to it stand"
    )
    try:
        data = json.loads(path.read_bytes())
        digest = data.pop("digest")
        fits = digest == files.digest(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fits = False
    if not fits:
        raise StudyError(f"{path} was changed or damaged: its digest does not fit; {next_step}")
    try:
        parsed = Plan.model_validate(data)
    except ValueError as err:
        raise StudyError(
            f"{path} is no plan of this moelib ({' '.join(str(err).split())[:200]}); {next_step}"
        ) from None
    planned = {f"{m}/{q}" for m, q in itertools.product(parsed.study.models, parsed.study.quants)}
    if {c.name for c in parsed.cells} != planned or parsed.workloads.keys() != set(parsed.study.workloads):
        raise StudyError(
            f"{path} does not hold together: its cells or workloads are not those of its study; {next_step}"
        )
    return data


def same_plan(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two plans ask for the same runs; the number of the records' schema is not of the plan's own."""
    return {**a, "schema_version": None} == {**b, "schema_version": None}


def read_manifest(path: Path) -> Manifest | None:
    """The manifest at `path`; None if there is none that can be read."""
    try:
        return Manifest.model_validate_json(path.read_bytes(), strict=True)
    except (OSError, ValueError):
        return None


def same_manifest(a: Manifest | None, b: Manifest | None) -> bool:
    """Whether two manifests describe the same file; the time that quantising took may differ."""
    return a is not None and b is not None and a.model_copy(update={"quantize_s": b.quantize_s}) == b


class Folder:
    """A study's folder of products, opened by name; opening writes nothing.

    Raises params.ParamsError for an unknown study, StudyError if the plan in the folder is another one.
    """

    def __init__(self, name: str):
        self.study = params.study(name)
        self.path = outputs() / name
        self.work = self.path / "work"
        """Scratch: logs of running tools, locks. Git-ignored, safe to delete between runs."""
        self.cells = plan(self.study)
        self.workloads = {w: params.workload(w) for w in self.study.workloads}
        self._plan = Plan(study=self.study, workloads=self.workloads, cells=self.cells).model_dump(mode="json")
        path = self.path / "plan.json"
        if path.exists() and not same_plan(read_plan(path), self._plan):
            raise StudyError(
                f"{path} is the plan of a study with other parameters; give the changed study another name, "
                f"or move {self.path} away"
            )

    def write_plan(self) -> None:
        """Write the plan if there is none: what measuring does first, and nothing else does."""
        path = self.path / "plan.json"
        if not path.exists():
            files.write_json(path, {**self._plan, "digest": files.digest(self._plan)})

    def look(self) -> Results:
        """What is there of the study by now, be it nothing."""
        return _results(self.path, self._plan, gather(self.path, light=True))

    def cell(self, model: str, quant: str) -> Cell:
        """The cell of `model` and `quant`. Raises ParamsError naming what the study has."""
        params.quant(quant)
        params.model(model).at_scale(self.study.scale)
        cells, name = {c.name: c for c in self.cells}, f"{model}/{quant}"
        if name not in cells:
            raise params.ParamsError(f"study {self.study.name} has no cell {name}; it has {', '.join(sorted(cells))}")
        return cells[name]

    def records(self) -> list[record.Record]:
        """Every record that can be read, whole."""
        return record.read_all(self.path)[0]

    def evidence(self, cell: Cell | None = None, set_aside: bool = False, light: bool = False) -> Evidence:
        """What is there of the whole study, or of one cell."""
        return gather(self.path, f"{cell.model}_{cell.quant}_" if cell else "", set_aside, light)

    def manifest_path(self, cell: Cell) -> Path:
        return self.path / "quants" / f"{cell.file_name}.json"

    def manifest(self, cell: Cell) -> Manifest | None:
        return read_manifest(self.manifest_path(cell))

    def status(self, cell: Cell, evidence: Evidence | None = None) -> Status:
        """What `cell` has, by the study's `evidence`, or by its own records, read for this."""
        return Status.of(cell, evidence or self.evidence(cell, light=True), self.workloads)


@dataclass(frozen=True)
class Status:
    """What a cell has: the record that stands for each run, and what is missing or wrong."""

    blocks: tuple[tuple[record.Record, ...], ...]
    """Records of whole, usable blocks."""
    problems: tuple[str, ...]
    """Every planned run, block or cell without a usable result, with the reason."""
    tally: Counter[str]
    """Runs by what they are: valid, degraded, invalid (with their block or cell, if it is), missing."""
    checks: tuple[record.Check, ...] = ()
    """What was found of every block whose runs are all there and usable, and of the cell."""

    @classmethod
    def of(cls, cell: Cell, evidence: Evidence, workloads: Mapping[str, params.Workload]) -> Status:
        blocks, problems, checks, tally = [], [], [], Counter()
        for b, specs in enumerate(cell.blocks):
            runs = standing_for(specs, evidence.standing)
            reasons = [evidence.why_not(r) for r in runs]
            faults = [
                f"{cell.name} {s.placement}, {s.load_mode}, round {b + 1}: {w}"
                for s, w in zip(specs, reasons, strict=True)
                if w
            ]
            if not faults:
                block_checks = audit.block(runs)
                checks += block_checks
                faults = [f"{cell.name} round {b + 1}: {c.id}: {c.measured}" for c in block_checks if not c.passed]
                reasons = [w or bool(faults) for w in reasons]
            if not faults:
                blocks.append(tuple(runs))
            problems += faults
            tally.update(
                "missing" if not r else "invalid" if w else r.status for r, w in zip(runs, reasons, strict=True)
            )
        together = [r for b in blocks for r in b]
        if together:
            starts = {r.run_id: evidence.starts[r.run_id] for r in together if r.run_id in evidence.starts}
            block_checks = audit.cell(audit.Cell(together, workloads, starts))
            checks += block_checks
            if faults := [f"{cell.name}: {c.id}: {c.measured}" for c in block_checks if not c.passed]:
                # which of its runs is not what it says is not known, so none of them is used
                tally.subtract(r.status for r in together)
                tally["invalid"] += len(together)
                blocks, problems = [], problems + faults
        return cls(tuple(blocks), tuple(problems), tally, tuple(checks))

    @property
    def planned(self) -> int:
        return self.tally.total()

    @property
    def usable(self) -> int:
        return self.tally["valid"] + self.tally["degraded"]

    @property
    def complete(self) -> bool:
        return not self.problems


class Results(Plan):
    """A study's folder as evidence: read from its plan, manifests and records alone, whatever `params/` says now."""

    name: str
    records: list[record.Record]
    evidence: Evidence
    manifests: list[Manifest]
    accuracy: dict[str, harness.Harness]
    """How accurate the harness was found to be, by file; empty where nobody measured it."""

    @cached_property
    def statuses(self) -> dict[str, Status]:
        """Status of every planned cell, in the study's order of models and quants."""
        cells, order = {c.name: c for c in self.cells}, itertools.product(self.study.models, self.study.quants)
        return {name: Status.of(cells[name], self.evidence, self.workloads) for name in map("/".join, order)}

    @property
    def damaged(self) -> list[str]:
        return self.evidence.damaged

    @property
    def done(self) -> list[record.Record]:
        """The records of runs that came to a result, whole block or not."""
        return [r for r in self.records if r.done]

    @property
    def measured(self) -> dict[str, Status]:
        """The cells that have a whole, usable block."""
        return {name: s for name, s in self.statuses.items() if s.blocks}

    @property
    def blocks(self) -> list[tuple[record.Record, ...]]:
        return [b for s in self.statuses.values() for b in s.blocks]

    @property
    def problems(self) -> list[str]:
        problems = [p for s in self.statuses.values() for p in s.problems] + [f"damaged: {d}" for d in self.damaged]
        # a matrix that is not complete has said so, run by run
        return problems + [f"{c.id}: {c.measured}" for c in self.audit if not c.passed and c.id != "matrix-complete"]

    @cached_property
    def audit(self) -> tuple[record.Check, ...]:
        """The invariants of the study as a whole."""
        planned = [record.spec_key(s) for c in self.cells for s in c.specs]
        runs = [r for b in self.blocks for r in b]
        return audit.study(audit.Matrix(planned, runs, self.records, self.evidence.set_aside))

    @property
    def tally(self) -> dict[str, int]:
        """planned = usable + invalid + missing, and usable = valid + degraded, in runs."""
        count = sum((s.tally for s in self.statuses.values()), Counter())
        kinds = {k: count[k] for k in ("valid", "degraded", "invalid", "missing")}
        return {"planned": count.total(), "usable": kinds["valid"] + kinds["degraded"], **kinds}


def results(path: Path) -> Results:
    """Read a study's folder. Raises StudyError if there is no plan, or no record that stands."""
    data = _plan_of(path)
    evidence = gather(path, light=True)
    _require_done(path, evidence.records)
    return _results(path, data, evidence)


def require_results(path: Path) -> None:
    """Raise StudyError where `results` would; of the records no more are read than until one is done."""
    _plan_of(path)
    _require_done(path, record.each(path))


def _first(path: Path) -> str:
    return f"run the study first: `moelib study run {path.name}`"


def _plan_of(path: Path) -> dict[str, Any]:
    if not (path / "plan.json").exists():
        raise StudyError(f"{path} holds no plan; {_first(path)}")
    return read_plan(path / "plan.json")


def _require_done(path: Path, records: Iterable[record.Record]) -> None:
    if not any(r.done for r in records):
        raise StudyError(f"{path} holds no valid record; {_first(path)}")


def _results(path: Path, plan: dict[str, Any], evidence: Evidence) -> Results:
    manifests = {p.name: read_manifest(p) for p in sorted((path / "quants").glob("*.json"))}
    # a cell's manifest must be the one that its records name, if it has records: else another file was run
    recorded: dict[str, list[Manifest]] = {}
    for r in evidence.records:
        listed = recorded.setdefault(f"{r.spec.model}-{r.spec.quant}.json", [])
        if not any(r.sheet is m or r.sheet == m for m in listed):
            listed.append(r.sheet)
    mismatched = []
    for name, manifest in manifests.items():
        listed = recorded.get(name, [])
        if manifest is None or (listed and not any(same_manifest(manifest, m) for m in listed)):
            mismatched.append(name)
    damaged = [f"quants/{name}: not the manifest of its records" for name in mismatched]
    accuracy = {}
    for p in sorted((path / harness.FOLDER).glob("*.json")):
        try:
            accuracy[f"{harness.FOLDER}/{p.name}"] = harness.read(p)
        except files.FileError:
            damaged.append(f"{harness.FOLDER}/{p.name}: not what was written")
    evidence = replace(evidence, damaged=[*evidence.damaged, *damaged])
    return Results(
        name=path.name,
        **plan,
        records=evidence.records,
        evidence=evidence,
        manifests=[m for name, m in manifests.items() if name not in mismatched],
        accuracy=accuracy,
    )
