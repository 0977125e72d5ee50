"""A study's plan: its cells, their rounds and runs in seeded random order, and the plan's file.

The plan is written before anything else of a study, and never changes.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from moelib.audit import record
from moelib.base import files
from moelib.base.schema import Bytes
from moelib.catalogue import params
from moelib.measure import run


class StudyError(params.UserError):
    """The study cannot go on, or is not whole; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Cell:
    """One (model, quant): what one executed notebook shows."""

    model: str
    quant: str
    blocks: tuple[tuple[run.Spec, ...], ...]
    """Its rounds, by the name that plans and records have for them."""

    @property
    def name(self) -> str:
        return f"{self.model}/{self.quant}"

    @property
    def file_name(self) -> str:
        return f"{self.model}-{self.quant}"

    @property
    def specs(self) -> list[run.Spec]:
        return [s for block in self.blocks for s in block]


class Card(params.Strict):
    """What placements were planned for."""

    name: str | None
    vram_bytes: Bytes
    """That may be used, of the GPU or less."""
    ram_bytes: Bytes | None
    """None of a machine that is not known."""


class Foreseen(params.Strict):
    """What a placement was predicted to need, before anything was run."""

    vram_bytes: Bytes
    ram_bytes: Bytes


class Plan(params.Strict):
    """What `plan.json` holds."""

    schema_version: int = record.SCHEMA_VERSION
    study: params.Study
    workloads: dict[str, params.Workload]
    cells: list[Cell]
    card: Card | None = None
    """Only of a study whose placements are planned where it runs."""
    foreseen: dict[str, dict[str, Foreseen]] = Field(default_factory=dict)
    """Cell -> placement and load mode -> what it was planned to need; only of such a study."""

    @model_validator(mode="after")
    def _holds_together(self) -> Plan:
        planned = {f"{m}/{q}" for m, q in itertools.product(self.study.models, self.study.quants)}
        if {c.name for c in self.cells} != planned or self.workloads.keys() != set(self.study.workloads):
            raise ValueError("its cells or workloads are not those of its study")
        return self

    def turns(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, int]]:
        """The order in which rounds are run: (cell, round from 0); where the quants take turns, in seeded order."""
        if not self.study.interleaved:
            yield from ((cell, b) for cell in cells for b in range(len(cell.blocks)))
            return
        for b in range(self.study.blocks):
            shuffled = sorted(cells, key=lambda cell: cell.name)
            random.Random(f"{self.study.seed}/{b}").shuffle(shuffled)
            yield from ((cell, b) for cell in shuffled)

    def asks_for_the_runs_of(self, other: Plan) -> bool:
        """Whether both ask for the same runs; the number of the records' schema is not of the plan's own."""
        return self.model_copy(update={"schema_version": other.schema_version}) == other

    def fits(self, parameters: params.Study) -> bool:
        """Whether it is one of a study whose placements are planned where it runs, whatever was planned."""
        workloads = {w: params.workload(w) for w in parameters.workloads}
        return self.study.model_copy(update={"arms": ()}) == parameters and self.workloads == workloads


def of(study: params.Study, planned: Mapping[str, Sequence[params.PlacementMode]] | None = None) -> Plan:
    """The plan of a study: cells in seeded random order, and the runs of a round in seeded random order.

    planned: cell -> its placements, where they are planned for each file; then the cells are in the study's order, so
    that the first one is done first.
    """
    names = {"weights", "scale", "workloads", "requests", "context", "device", "seed"}
    same = {"study": study.name, **study.model_dump(include=names)}
    cells = []
    for model, quant in itertools.product(study.models, study.quants):
        shuffled, blocks = random.Random(f"{study.seed}/{model}/{quant}"), []
        placements = planned[f"{model}/{quant}"] if planned else study.placements_of(model, quant)
        for b in range(study.blocks):
            modes = [mode for mode in placements if mode.is_in(b)]
            shuffled.shuffle(modes)
            common = {"model": model, "quant": quant, "block": b, **same}
            sides = enumerate((mode.placement, mode.load_mode) for mode in modes)
            blocks.append(tuple(run.Spec(order=i, placement=p, load_mode=load, **common) for i, (p, load) in sides))
        cells.append(Cell(model, quant, tuple(blocks)))
    if not planned:
        random.Random(study.seed).shuffle(cells)
    return Plan(study=study, workloads={w: params.workload(w) for w in study.workloads}, cells=cells)


def outputs() -> Path:
    """Where studies are kept: $MOELIB_OUTPUTS or `outputs/`."""
    return Path(os.environ.get("MOELIB_OUTPUTS") or params.root() / "outputs")


def folders() -> dict[str, Path]:
    """Name -> folder of every study that has a plan: in `outputs()`, then the committed example."""
    places = (outputs(), params.root() / "docs" / "example")
    found = [p.parent for place in places for p in sorted(place.glob("*/plan.json"))]
    return {folder.name: folder for folder in reversed(found)}


def measured() -> dict[str, Path]:
    """Of `folders()` those that hold a run's record: in others there is nothing to load."""
    return {name: folder for name, folder in folders().items() if any((folder / "records").glob("*.json"))}


def write(path: Path, plan: Plan) -> None:
    """Write the plan to `path` with its digest, if there is none. Raises StudyError where another process, maybe of
    another host, has written another plan there."""
    if not path.exists():
        data = plan.model_dump(mode="json")
        if files.write_new(path, files.pretty({**data, "digest": files.digest(data)})):
            return
    if not read(path).asks_for_the_runs_of(plan):
        raise StudyError(
            f"{path} was written with other parameters by now: give the changed study another name, or take the "
            f"params/ that the others have"
        )


def read(path: Path) -> Plan:
    """The plan at `path`. Raises StudyError if it is not what was written."""
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
        return Plan.model_validate(data)
    except ValueError as err:
        raise StudyError(
            f"{path} is no plan of this moelib ({' '.join(str(err).split())[:200]}); {next_step}"
        ) from None
