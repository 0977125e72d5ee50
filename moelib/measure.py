"""Measuring a study's cells: the file, then block by block the runs that have no valid record.

A run that fails is recorded and the rest go on; running again repeats nothing that is done.
"""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from moelib import (
    audit,
    claim,
    device,
    engine,
    files,
    gather,
    host,
    notebook,
    params,
    process,
    quantize,
    record,
    run,
    sources,
    study,
    witness,
)
from moelib.facts import DeviceFacts, EngineFacts, HostFacts, Manifest
from moelib.invariants import reconciled

log = logging.getLogger(__name__)

LOCK_S = 30.0  # for another study's last run on the device
RUN_BYTES = 1 << 20  # a run's logs and record


class Setup(NamedTuple):
    """What the runs of a cell share."""

    quantised: quantize.Quantised
    llama: engine.Engine
    where: device.Device
    work: Path
    device: DeviceFacts
    host: HostFacts


def measure(folder: study.Folder, cell: study.Cell) -> Iterator[record.Record]:
    """Make the cell's file, then do every run that has no valid record; yield each run's record as it stands.

    A run that fails is recorded and the next one goes on. A cell that is whole is read, and needs neither engine nor
    device. Raises what stands in the way of all runs: no engine, no device, no source, no disk.
    """
    evidence = folder.evidence(cell)
    if _whole(folder, cell, status := folder.status(cell, evidence)):
        yield from (r for block in status.blocks for r in block)
        return
    refuse_senseless(folder.study)
    llama = engine.find()
    where = device.choose(folder.study.device, llama)
    if where.kind == "none":
        raise study.StudyError(
            f"study {folder.study.name} has no device ({where.note or 'it asks for none'}), so no offload of it could "
            "be valid: run `make engine` for a build with RPC or CUDA, or set `device: auto` in "
            f"params/studies/{folder.study.name}.yaml"
        )
    folder.write_plan()
    folder.work.mkdir(parents=True, exist_ok=True)
    with claim.device(where.uuid, f"device {where.kind}", process.patience(LOCK_S)), _scratch(folder) as work:
        process.sweep(folder.work)
        source = sources.obtain(cell.model, folder.study.weights, folder.study.scale, needed=False)
        placements = [a.placement for a in folder.study.arms]
        if source.path.exists():
            quantize.refuse_senseless(source.header, placements)
        quantised = quantize.make(source, cell.quant, llama, work)
        if folder.manifest(cell) != Manifest.model_validate(quantised.sheet):
            files.write_json(folder.manifest_path(cell), quantised.sheet)
        where.calibrate(work)
        host_facts = HostFacts(**host.facts(), host_id=host.identity(), ram_read_bytes_per_s=host.read_bandwidth())
        setup = Setup(quantised, llama, where, work, DeviceFacts(**where.identity()), host_facts)
        evidence = folder.evidence(cell, set_aside=True)
        _same_setup([r for r in evidence.records if r.done], setup)
        last = Counter()
        for r in evidence.records:
            last[r.key] = max(last[r.key], r.attempt)
        for specs in cell.blocks:
            standing = gather.standing_for(specs, evidence.standing)
            problems = [evidence.why_not(r) for r in standing]
            for spec, existing, to_do in zip(specs, standing, _to_do(standing, problems, _machine(setup)), strict=True):
                yield _perform(folder, spec, 1 + last[record.spec_key(spec)], setup) if to_do else existing


def device_note(folder: study.Folder) -> str | None:
    """Why the study measures on what it does, where it names no device itself; None too where there is no engine, as
    each cell says that."""
    if folder.study.device != "auto":
        return None
    try:
        return device.choose("auto", engine.find()).note
    except (engine.EngineError, device.DeviceError):
        return None


def _machine(source: Setup | record.Record) -> tuple[Any, ...]:
    """What the runs of a block must share beside engine and file, which a whole study shares."""
    return (source.device.uuid, source.device.driver, source.host.host_id, source.host.system)


def refuse_senseless(parameters: params.Study) -> None:
    """Raise StudyError if a placement moves nothing of a model, or goes beyond it: by the catalogue, before anything is
    fetched, written or quantised."""
    for name in parameters.models:
        g = params.model(name).at_scale(parameters.scale)
        blocks = range(g.leading_dense_block_count, g.block_count)
        for arm in parameters.arms:
            if fault := arm.placed.fault(g.block_count, blocks):
                raise study.StudyError(f"params/studies/{parameters.name}.yaml: {name}: {fault}")


def _to_do(
    records: Sequence[record.Record | None], problems: Sequence[str | None], machine: tuple[Any, ...]
) -> list[bool]:
    """Which runs of a block are still to be done, given the records that stand for them.

    They are compared with each other, so a block is finished on one machine, as it is `here`: with what is missing goes
    what another device, host, driver or kernel ran; and runs that are valid one by one but do not fit together are all
    done again.
    """
    if not any(problems) and all(c.passed for c in audit.block(records)):
        return [False] * len(records)
    to_do = [bool(w) or _machine(r) != machine for r, w in zip(records, problems, strict=True)]
    return to_do if any(to_do) else [True] * len(records)


@contextmanager
def _scratch(folder: study.Folder) -> Iterator[Path]:
    """A working folder of this process, removed at the end."""
    for left in folder.work.glob("[0-9]*"):  # by a process that was killed
        if left.name.isdigit() and not psutil.pid_exists(int(left.name)):
            shutil.rmtree(left, ignore_errors=True)
    work = folder.work / str(os.getpid())
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _perform(folder: study.Folder, spec: run.Spec, attempt: int, setup: Setup) -> record.Record:
    """Do one run and write its record, whatever comes of it."""
    name, llama = record.run_id(spec, attempt), setup.llama
    # a full disk is said here: the engine's log would be cut short, and be taken for an engine that fails
    files.need_space(folder.path, RUN_BYTES, "a run")
    started = datetime.now(UTC).isoformat(timespec="seconds")
    outcome = run.execute(spec, setup.quantised, llama, setup.where, setup.work)
    result = record.Record(
        run_id=name,
        attempt=attempt,
        status="failed",
        reasons=(outcome.reason,) if outcome.reason else (),
        message=outcome.message,
        spec=spec,
        sheet=Manifest.model_validate(setup.quantised.sheet),
        engine=EngineFacts(build=llama.build, version=llama.version, server_sha256=llama.server_sha256),
        device=setup.device,
        host=setup.host,
        started_utc=started,
        observed=outcome.observation,
        audit=(),
        raw=record.keep_logs(folder.path, name, outcome.logs, (setup.quantised.path.parent, llama.folder)),
    )
    if result.observed is not None:
        result = _audited(folder, result)
    return record.write(folder.path, result)


def _audited(folder: study.Folder, r: record.Record) -> record.Record:
    """The record with what the present rules say of it, its log being called as a witness."""
    checks = gather.audit_today(r, witness.call(folder.path, r))
    status, reasons = audit.verdict(checks)
    return r.model_copy(update={"status": status, "reasons": reasons, "audit": checks})


def reaudit(folder: study.Folder) -> list[record.Record]:
    """Judge runs without a valid result by the present rules, from the readings that their records kept.

    Of each run the first attempt that is valid by now becomes a record of its own, which names the first one; nothing
    is measured, and nothing overwritten. Raises StudyError in a clone with changes: the rules must be a commit's.
    """
    records, rules = folder.records(), host.facts()
    if rules["dirty"] or not rules["commit"]:
        raise study.StudyError("the rules must be a commit's: commit what you changed, then judge again")
    reaudited, standing = [], gather.standing(records)
    for r in sorted(records, key=lambda r: r.attempt):
        if r.observed is None or standing[r.key].done:
            continue
        observation = replace(r.observed, memory=reconciled(r.observed))
        candidate = _audited(folder, r.model_copy(update={"observed": observation}))
        if candidate.done:
            attempt = 1 + max(other.attempt for other in records if other.key == r.key)
            first = record.Reaudit(record=r.run_id, digest=r.digest, commit=rules["commit"])
            changes = {"attempt": attempt, "run_id": record.run_id(r.spec, attempt), "judged": first}
            standing[r.key] = record.write(folder.path, candidate.model_copy(update=changes))
            reaudited.append(standing[r.key])
    return reaudited


def _same_setup(done: list[record.Record], setup: Setup) -> None:
    """Refuse to add runs to those of another engine, device or file: they could not be compared."""
    expected = (setup.llama.server_sha256, setup.where.name, setup.quantised.sheet["sha256"])
    for r in done:
        recorded = (r.engine.server_sha256, r.device.name, r.sheet.sha256)
        if recorded != expected:
            parts = zip(("engine", "device", "file"), expected, recorded, strict=True)
            differ = ", ".join(part for part, a, b in parts if a != b)
            raise study.StudyError(
                f"the study has runs with another {differ} ({r.run_id}); finish it with that one, "
                "or move the study's folder away and start anew"
            )


def require_complete(status: study.Status) -> None:
    """Raise StudyError naming every planned run that has no valid record."""
    if not status.complete:
        raise study.StudyError(
            "not everything that was planned is valid; run again to retry:\n" + "\n".join(status.problems)
        )


def select(name: str, cell: str | None = None) -> tuple[study.Folder, list[study.Cell]]:
    """The study's folder and its cells, or the one named MODEL/QUANT. Raises ParamsError."""
    folder = study.Folder(name)
    if cell is None:
        return folder, folder.cells
    model, _, quant = cell.partition("/")
    return folder, [folder.cell(model, quant)]


def done(folder: study.Folder, cells: list[study.Cell]) -> int:
    """How many of the cells' runs have a valid record."""
    names = {c.name for c in cells}
    # their number alone: who runs or shows them audits them
    records, _ = record.read_all(folder.path, each=record.Lightener())
    return sum(r.done and r.cell in names for r in gather.standing(records).values())


def _whole(folder: study.Folder, cell: study.Cell, status: study.Status) -> bool:
    """Every run is valid, and the cell's sheet is the one that they name."""
    return status.complete and study.same_manifest(folder.manifest(cell), status.blocks[0][0].sheet)


def run_cells(folder: study.Folder, cells: list[study.Cell], say: Callable[[str], object] = log.info) -> list[str]:
    """Execute the notebook of every cell that is not done; a cell that fails leaves the rest running.

    `say` is told of each cell as its turn comes. Returns what has no valid result, run by run, with reasons. Raises
    StudyError for placements that make no sense.
    """
    refuse_senseless(folder.study)
    problems = []
    folder.write_plan()
    for i, cell in enumerate(cells):
        out = folder.path / "notebooks" / f"{cell.file_name}.ipynb"
        status = folder.status(cell)
        if not (_whole(folder, cell, status) and notebook.is_whole(out)):
            say(f"{cell.name} ({i + 1} of {len(cells)})")
            try:
                parameters = {"study": folder.study.name, "model": cell.model, "quant": cell.quant}
                notebook.execute("run", out, parameters, progress=False)
                status = folder.status(cell)
            except notebook.NotebookError as err:
                log.error("%s: %s", cell.name, err)
                status = folder.status(cell)
                if status.complete:
                    problems.append(f"{cell.name}: its runs are valid, its notebook is not: {err}")
        problems += status.problems
    return problems
