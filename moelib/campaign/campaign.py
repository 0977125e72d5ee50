"""Measuring a study's cells: the file, then block by block the runs that have no valid record.

A run that fails is recorded and the rest go on; running again repeats nothing that is done.
"""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from moelib.audit import audit, record
from moelib.audit.invariants import reconciled
from moelib.base import files
from moelib.campaign import given, notebooks, preflight
from moelib.campaign.bench import Bench, audited, held
from moelib.catalogue import params
from moelib.catalogue.facts import Manifest
from moelib.engine import engine, quants
from moelib.machine import host, process
from moelib.measure import device
from moelib.measure.llama_server import LlamaServer
from moelib.models import quantize, remote, sources
from moelib.study import gather
from moelib.study.plan import Cell, StudyError
from moelib.study.status import Status
from moelib.study.study import Study, same_manifest

log = logging.getLogger(__name__)


Obtain = Callable[[engine.Engine, Path], quantize.Quantised]
"""What makes a cell's file, or finds it, given the engine and a folder for scratch."""


def measure(study: Study, cell: Cell, obtain: Obtain | None = None) -> Iterator[record.Record]:
    """Make the cell's file, then do every run that has no valid record; yield each run's record as it stands.

    obtain: what gives the file; by default it is that of the catalogue's model at the cell's quant. A run that fails is
    recorded and the next one goes on. A cell that is whole is read, and needs neither engine nor device. Raises what
    stands in the way of all runs: no engine, no device, no source, no disk.
    """
    evidence = study.evidence_now(cell)
    if _whole(study, cell, status := study.status_now(cell, evidence)):
        yield from (r for block in status.rounds for r in block)
        return
    if obtain is None:
        refuse_senseless(study, [cell])
    llama = engine.find()
    where = device.choose(study.parameters.device, llama)
    if where.kind == "none":
        raise StudyError(
            f"study {study.name} has no device ({where.note or 'it asks for none'}), so no offload of it could "
            "be valid: run `make engine` for a build with RPC or CUDA, or set `device: auto` in "
            f"params/studies/{study.name}.yaml"
        )
    if obtain is None:
        quants.check(llama, _to_make(study.parameters))
    study.begin()
    study.work.mkdir(parents=True, exist_ok=True)
    with held(where), _scratch(study) as work:
        process.sweep(study.work)
        quantised = (obtain or partial(_catalogued, study, cell))(llama, work)
        if study.manifest(cell) != Manifest.model_validate(quantised.manifest):
            files.write_json(study.manifest_path(cell), quantised.manifest)
        bench = Bench.ready(quantised, LlamaServer(llama), where, work)
        evidence = study.evidence_now(cell, set_aside=True)
        _same_setup([r for r in evidence.records if r.done], bench)
        last: Counter[str] = Counter()
        for r in evidence.records:
            last[r.key] = max(last[r.key], r.attempt)
        for specs in cell.blocks:
            standing = gather.standing_for(specs, evidence.standing)
            problems = [evidence.why_not(r) for r in standing]
            for spec, existing, to_do in zip(specs, standing, _to_do(standing, problems, _machine(bench)), strict=True):
                if to_do or existing is None:
                    attempt = 1 + last[record.spec_key(spec)]
                    existing = record.write(study.path, bench.perform(study.path, spec, attempt))
                yield existing


def _catalogued(study: Study, cell: Cell, llama: engine.Engine, work: Path) -> quantize.Quantised:
    if path := sources.file_of(cell.model):
        return given.catalogued(path, cell, llama)
    p = study.parameters
    if p.twins == "direct":
        return quantize.twin(*quantize.outline_of(cell.model, p.scale), cell.quant, scale=p.scale)
    source = sources.obtain(cell.model, p.weights, p.scale, needed=False)
    return quantize.make(source, cell.quant, llama, work)


def _to_make(parameters: params.Study) -> Sequence[str]:
    """The study's quants that llama-quantize must know: none where all models are files."""
    return () if all(params.model(m).file for m in parameters.models) else parameters.quants


def device_note(study: Study) -> str | None:
    """Why the study measures on what it does, where it names no device itself; None too where there is no engine, as
    each cell says that."""
    if study.parameters.device != "auto":
        return None
    try:
        return device.choose("auto", engine.find()).note
    except (engine.EngineError, device.DeviceError):
        return None


def _machine(source: Bench | record.Record) -> tuple[Any, ...]:
    """What the runs of a block must share beside engine and file, which a whole study shares."""
    return (source.device.uuid, source.device.driver, source.host.host_id, source.host.system)


def refuse_senseless(study: Study, cells: Sequence[Cell]) -> None:
    """Raise StudyError if a placement of a cell moves nothing of its model, or goes beyond it: by the catalogue, before
    anything is fetched, written or quantised. Of a model that is a file, by its header: QuantizeError, GGUFError."""
    for cell in cells:
        if file := sources.any_file_of(cell.model):
            given.refuse_other(remote.any_header(file), cell, study.parameters.weights)
            continue
        g = params.model(cell.model).at_scale(study.parameters.scale)
        blocks = range(g.leading_dense_block_count, g.block_count)
        for placed in dict.fromkeys(s.placed for s in cell.specs):
            if fault := placed.fault(g.block_count, blocks, g.context_length):
                raise StudyError(f"params/studies/{study.name}.yaml: {cell.model}: {fault}")


def _to_do(
    records: Sequence[record.Record | None], problems: Sequence[str | None], machine: tuple[Any, ...]
) -> list[bool]:
    """Which runs of a block are still to be done, given the records that stand for them.

    They are compared with each other, so a block is finished on one machine, as it is `here`: with what is missing goes
    what another device, host, driver or kernel ran; and runs that are valid one by one but do not fit together are all
    done again.
    """
    kept = [r for r in records if r is not None]
    if not any(problems) and not any(c.failed for c in audit.block(kept)):
        return [False] * len(records)
    to_do = [bool(w) or r is None or _machine(r) != machine for r, w in zip(records, problems, strict=True)]
    return to_do if any(to_do) else [True] * len(records)


@contextmanager
def _scratch(study: Study) -> Iterator[Path]:
    """A working folder of this process, removed at the end."""
    for left in study.work.glob("[0-9]*"):  # by a process that was killed
        if left.name.isdigit() and not psutil.pid_exists(int(left.name)):
            shutil.rmtree(left, ignore_errors=True)
    work = study.work / str(os.getpid())
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def reaudit(study: Study) -> list[record.Record]:
    """Judge runs without a valid result by the present rules, from the readings that their records kept.

    Of each run the first attempt that is valid by now becomes a record of its own, which names the first one; nothing
    is measured, and nothing overwritten. Raises StudyError in a clone with changes: the rules must be a commit's.
    """
    records, rules = record.read_all(study.path)[0], host.facts()
    if rules["dirty"] or not rules["commit"]:
        raise StudyError("the rules must be a commit's: commit what you changed, then re-audit")
    reaudited, standing = [], gather.standing(records)
    for r in sorted(records, key=lambda r: r.attempt):
        if r.observed is None or standing[r.key].done:
            continue
        observation = replace(r.observed, memory=reconciled(r.observed))
        candidate = audited(study.path, r.model_copy(update={"observed": observation}))
        if candidate.done:
            attempt = 1 + max(other.attempt for other in records if other.key == r.key)
            first = record.Reaudit(record=r.run_id, digest=r.digest, commit=rules["commit"])
            changes = {"attempt": attempt, "run_id": record.run_id(r.spec, attempt), "judged": first}
            standing[r.key] = record.write(study.path, candidate.model_copy(update=changes))
            reaudited.append(standing[r.key])
    return reaudited


def _same_setup(done: list[record.Record], bench: Bench) -> None:
    """Refuse to add runs to those of another engine, device or file: they could not be compared."""
    engine_facts = bench.runner.facts()
    expected = ((engine_facts.runner, engine_facts.server_sha256), bench.where.name, bench.quantised.manifest["sha256"])
    for r in done:
        recorded = ((r.engine.runner, r.engine.server_sha256), r.device.name, r.sheet.sha256)
        if recorded != expected:
            parts = zip(("engine", "device", "file"), expected, recorded, strict=True)
            differ = ", ".join(part for part, a, b in parts if a != b)
            raise StudyError(
                f"the study has runs with another {differ} ({r.run_id}); finish it with that one, "
                "or move the study's folder away and start anew"
            )


def require_complete(status: Status) -> None:
    """Raise StudyError naming every planned run that has no valid record."""
    if not status.complete:
        raise StudyError("not everything that was planned is valid; run again to retry:\n" + "\n".join(status.problems))


def select(name: str, cell: str | None = None, room: preflight.Room | None = None) -> tuple[Study, list[Cell]]:
    """The study's folder and its cells, or the one named MODEL/QUANT; planned for this machine, or for `room`, where
    it is to fit. Raises ParamsError, and what `preflight.of` does."""
    study = preflight.of(name, room)
    if cell is None:
        return study, study.cells
    model, _, quant = cell.partition("/")
    return study, [study.cell(model, quant)]


def _whole(study: Study, cell: Cell, status: Status) -> bool:
    """Every run is valid, and the cell's manifest is the one that they name."""
    return status.complete and same_manifest(study.manifest(cell), status.rounds[0][0].sheet)


def run_cells(study: Study, cells: list[Cell], say: Callable[[str], object] = log.info) -> list[str]:
    """Execute the notebook of every cell that is not done; a cell that fails leaves the rest running.

    `say` is told of each cell as its turn comes. Returns what has no valid result, run by run, with reasons. Raises
    StudyError for placements that make no sense, ParamsError for a quant that the engine does not make.
    """
    statuses = {c.name: study.status_now(c) for c in cells}
    refuse_senseless(study, [c for c in cells if not _whole(study, c, statuses[c.name])])
    with suppress(engine.EngineError):  # cells that are done need none, and the others say so
        quants.check(engine.find(), _to_make(study.parameters))
    problems = []
    study.begin()
    for i, cell in enumerate(cells):
        out = study.path / "notebooks" / f"{cell.file_name}.ipynb"
        status = statuses[cell.name]
        if not (_whole(study, cell, status) and notebooks.is_whole(out)):
            say(f"{cell.name} ({i + 1} of {len(cells)})")
            try:
                parameters = {"study": study.name, "model": cell.model, "quant": cell.quant}
                notebooks.execute("run", out, parameters, progress=False)
                status = study.status_now(cell)
            except notebooks.NotebookError as err:
                log.error("%s: %s", cell.name, err)
                status = study.status_now(cell)
                if status.complete:
                    problems.append(f"{cell.name}: its runs are valid, its notebook is not: {err}")
        problems += status.problems
    return problems
