"""A study: its plan, its folder of products, and what of it is done.

The plan is written before anything else and never changes. What is done is what has a verified record; everything
else is done again, whenever and however often the study was interrupted.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moelib import audit, files, params, record, run


class StudyError(RuntimeError):
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
    def specs(self) -> list[run.Spec]:
        return [s for block in self.blocks for s in block]


def plan(study: params.Study) -> list[Cell]:
    """The cells in seeded random order, each with its blocks, the runs of a block in seeded random order."""
    cells = []
    for model in study.models:
        for quant in study.quants:
            shuffled = random.Random(f"{study.seed}/{model}/{quant}")
            blocks = []
            for b in range(study.blocks):
                arms = list(study.arms)
                shuffled.shuffle(arms)
                blocks.append(tuple(_spec(study, model, quant, arm, b, i) for i, arm in enumerate(arms)))
            cells.append(Cell(model, quant, tuple(blocks)))
    random.Random(study.seed).shuffle(cells)
    return cells


def _spec(study: params.Study, model: str, quant: str, arm: params.Arm, block: int, order: int) -> run.Spec:
    return run.Spec(
        study=study.name,
        model=model,
        weights=study.weights,
        scale=study.scale,
        quant=quant,
        placement=arm.placement,
        load_mode=arm.load_mode,
        block=block,
        order=order,
        workloads=study.workloads,
        requests=study.requests,
        context=study.context,
        device=study.device,
        seed=study.seed,
    )


def outputs() -> Path:
    """Where studies are kept: $MOELIB_OUTPUTS or `outputs/`."""
    return Path(os.environ.get("MOELIB_OUTPUTS") or params.root() / "outputs")


class Folder:
    """A study's folder of products, opened by name. Opening writes the plan if there is none.

    Raises params.ParamsError for an unknown study, StudyError if the plan in the folder is another one.
    """

    def __init__(self, name: str):
        self.study = params.study(name)
        self.path = outputs() / name
        self.cells = plan(self.study)
        self._write_plan()

    def _write_plan(self) -> None:
        path = self.path / "plan.json"
        data = {
            "schema_version": record.SCHEMA_VERSION,
            "study": self.study.model_dump(mode="json"),
            "workloads": {w: params.workload(w).model_dump(mode="json") for w in self.study.workloads},
            "cells": [
                {"model": c.model, "quant": c.quant, "blocks": [[asdict(s) for s in b] for b in c.blocks]}
                for c in self.cells
            ],
        }
        if path.exists():
            there = json.loads(path.read_text())
            there.pop("digest", None)
            if there != json.loads(files.canonical(data)):
                raise StudyError(
                    f"{path} is the plan of a study with other parameters; give the changed study another name, "
                    f"or move {self.path} away"
                )
            return
        files.write_json(path, {**data, "digest": files.digest(data)})

    def cell(self, model: str, quant: str) -> Cell:
        """The cell of `model` and `quant`. Raises ParamsError naming what the study has."""
        params.quant(quant)
        params.model(model).at_scale(self.study.scale)
        for c in self.cells:
            if (c.model, c.quant) == (model, quant):
                return c
        known = ", ".join(sorted(c.name for c in self.cells))
        raise params.ParamsError(f"study {self.study.name} has no cell {model}/{quant}; it has {known}")

    @property
    def work(self) -> Path:
        """Scratch: logs of running tools, locks. Git-ignored, safe to delete between runs."""
        return self.path / "work"

    def records(self, set_aside: bool = False) -> list[record.Record]:
        return record.read_all(self.path, set_aside)[0]

    def sheet(self, cell: Cell) -> dict[str, Any] | None:
        path = self.path / "quants" / f"{cell.model}-{cell.quant}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def status(self, cell: Cell) -> Status:
        return Status.of(cell, self.records())

    def notebook(self, cell: Cell) -> Path:
        return self.path / "notebooks" / f"{cell.model}-{cell.quant}.ipynb"


@dataclass(frozen=True)
class Status:
    """What a cell has: the record that stands for each run, and what is missing or wrong."""

    blocks: tuple[tuple[record.Record, ...], ...]
    """Records of whole, valid blocks."""
    problems: tuple[str, ...]
    """Every planned run or block without a valid result, with the reason."""
    planned: int

    @classmethod
    def of(cls, cell: Cell, records: list[record.Record]) -> Status:
        latest = standing(records)
        blocks, problems = [], []
        for b, specs in enumerate(cell.blocks):
            found = [latest.get(record.spec_key(s)) for s in specs]
            for s, r in zip(specs, found, strict=True):
                what = f"{cell.name} {s.arm} block {b + 1}"
                if r is None:
                    problems.append(f"{what}: not run")
                elif not r.done:
                    problems.append(f"{what}: {r.status} ({', '.join(r.reasons)})")
            if all(r is not None and r.done for r in found):
                failed = [c for c in audit.block(found) if not c.passed]
                if failed:
                    problems += [f"{cell.name} block {b + 1}: {c.id}: {c.measured}" for c in failed]
                else:
                    blocks.append(tuple(found))
        return cls(tuple(blocks), tuple(problems), len(cell.specs))

    @property
    def complete(self) -> bool:
        return not self.problems


def standing(records: list[record.Record]) -> dict[str, record.Record]:
    """The record that stands for each run: the last one that is done, else the last attempt."""
    found: dict[str, record.Record] = {}
    for r in sorted(records, key=lambda r: r.attempt):
        if r.done or not (r.key in found and found[r.key].done):
            found[r.key] = r
    return found


@dataclass(frozen=True)
class Results:
    """A study's folder as evidence: read from its plan, sheets and records alone, whatever `params/` says now."""

    name: str
    study: params.Study
    workloads: dict[str, params.Workload]
    cells: tuple[Cell, ...]
    records: tuple[record.Record, ...]
    sheets: tuple[dict[str, Any], ...]
    damaged: tuple[str, ...]

    @cached_property
    def statuses(self) -> dict[str, Status]:
        """Status of every planned cell, in the study's order of models and quants."""
        found = {c.name: Status.of(c, list(self.records)) for c in self.cells}
        return {f"{m}/{q}": found[f"{m}/{q}"] for m in self.study.models for q in self.study.quants}

    @property
    def blocks(self) -> list[tuple[record.Record, ...]]:
        return [b for s in self.statuses.values() for b in s.blocks]

    @property
    def problems(self) -> list[str]:
        return [p for s in self.statuses.values() for p in s.problems] + [f"damaged: {d}" for d in self.damaged]


def results(path: Path) -> Results:
    """Read a study's folder. Raises StudyError if there is no plan, or no record that stands."""
    try:
        data = json.loads((path / "plan.json").read_text())
        told = data.pop("digest")
    except (OSError, ValueError, KeyError):
        raise StudyError(f"{path} holds no plan; run the study first: `moelib study run {path.name}`") from None
    if told != files.digest(data):
        raise StudyError(f"{path}/plan.json was changed: its digest does not fit")
    cells = tuple(
        Cell(c["model"], c["quant"], tuple(tuple(_read_spec(s) for s in b) for b in c["blocks"])) for c in data["cells"]
    )
    records, damaged = record.read_all(path)
    if not any(r.done for r in records):
        raise StudyError(f"{path} holds no valid record; run the study first: `moelib study run {path.name}`")
    sheets = tuple(json.loads(p.read_text()) for p in sorted((path / "quants").glob("*.json")))
    return Results(
        path.name,
        params.Study.model_validate(data["study"]),
        {k: params.Workload.model_validate(v) for k, v in data["workloads"].items()},
        cells,
        tuple(records),
        sheets,
        tuple(damaged),
    )


def _read_spec(data: dict[str, Any]) -> run.Spec:
    return run.Spec(**{**data, "workloads": tuple(data["workloads"])})
