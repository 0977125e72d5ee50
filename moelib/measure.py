"""Measuring a study's cells: the file, then block by block the runs that have no valid record.

A run that fails is recorded and the rest go on; running again repeats nothing that is done.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from moelib import audit, device, engine, files, gguf_file, host, models, params, process, quantize, record, run, study


def measure(folder: study.Folder, cell: study.Cell, engine_path: str | None = None) -> Iterator[record.Record]:
    """Make the cell's file, then do every run that has no valid record; yield each run's record as it stands.

    A run that fails is recorded and the next one goes on. Raises what stands in the way of all of them: no engine,
    no device, no source, no disk.
    """
    llama = engine.find(engine_path)
    where = device.choose(folder.study.device, llama)
    folder.work.mkdir(parents=True, exist_ok=True)
    # one measurement at a time on a device, whichever clone or study asks: they would slow each other
    held = Path(tempfile.gettempdir()) / f"moelib-{os.getuid()}" / f"{where.identity()['uuid'] or 'host'}.lock"
    with files.lock(held, f"device {where.kind}", wait_s=30), scratch(folder) as work:
        process.sweep(folder.work)
        quantised = prepare(folder, cell, llama, work)
        records = folder.records(set_aside=True)
        _same_setup(records, cell, llama, where, quantised)
        for specs in cell.blocks:
            yield from _measure_block(folder, specs, records, quantised, llama, where, work)


@contextmanager
def scratch(folder: study.Folder) -> Iterator[Path]:
    """A working folder of this process, removed at the end."""
    work = folder.work / str(os.getpid())
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def prepare(folder: study.Folder, cell: study.Cell, llama: engine.Engine, work: Path) -> quantize.Quantised:
    """The cell's quantised file, made if need be, and its sheet in the study's folder."""
    source = models.make_twin(cell.model, folder.study.scale)
    quantised = quantize.make(source, cell.quant, llama, work)
    path = folder.path / "quants" / f"{cell.model}-{cell.quant}.json"
    if folder.sheet(cell) != quantised.sheet:
        files.write_json(path, quantised.sheet)
    return quantised


def _measure_block(
    folder: study.Folder,
    specs: tuple[run.Spec, ...],
    records: list[record.Record],
    quantised: quantize.Quantised,
    llama: engine.Engine,
    where: device.Device,
    work: Path,
) -> Iterator[record.Record]:
    latest = study.standing(records)
    found = [latest.get(record.spec_key(s)) for s in specs]
    whole = all(r is not None and r.done for r in found)
    # runs that are valid one by one but do not fit together are all done again
    again = whole and not all(c.passed for c in audit.block(found))
    for spec, there in zip(specs, found, strict=True):
        if there is not None and there.done and not again:
            yield there
            continue
        made = perform(folder, spec, quantised, llama, where, work, records)
        records.append(made)
        yield made


def perform(
    folder: study.Folder,
    spec: run.Spec,
    quantised: quantize.Quantised,
    llama: engine.Engine,
    where: device.Device,
    work: Path,
    records: list[record.Record],
) -> record.Record:
    """Do one run and write its record, whatever comes of it."""
    attempt = 1 + max((r.attempt for r in records if r.key == record.spec_key(spec)), default=0)
    name = record.run_id(spec, attempt)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    outcome = run.execute(spec, quantised, llama, where, work)
    checks: tuple[audit.Check, ...] = ()
    status, reasons = "failed", (outcome.reason,) if outcome.reason else ()
    if outcome.observation is not None:
        checks = audit.run(spec, outcome.observation)
        status, reasons = audit.verdict(checks)
    made = record.Record(
        run_id=name,
        attempt=attempt,
        status=status,
        reasons=reasons,
        message=outcome.message,
        spec=spec,
        sheet=quantised.sheet,
        engine={"build": llama.build, "version": llama.version, "server_sha256": llama.server_sha256},
        device=where.identity(),
        host=host.facts(),
        started_utc=started,
        observed=outcome.observation,
        audit=checks,
        raw=record.keep_logs(folder.path, name, outcome.logs),
    )
    return record.write(folder.path, made)


def _same_setup(
    records: list[record.Record],
    cell: study.Cell,
    llama: engine.Engine,
    where: device.Device,
    quantised: quantize.Quantised,
) -> None:
    """Refuse to add runs to those of another engine, device or file: they could not be compared."""
    here = {"engine": llama.server_sha256, "device": where.identity()["name"], "file": quantised.sheet["sha256"]}
    for r in records:
        if not r.done or (r.spec.model, r.spec.quant) != (cell.model, cell.quant):
            continue
        there = {"engine": r.engine["server_sha256"], "device": r.device["name"], "file": r.sheet["sha256"]}
        if there != here:
            differ = ", ".join(k for k in here if here[k] != there[k])
            raise study.StudyError(
                f"the study has runs with another {differ} ({r.run_id}); finish it with that one, "
                "or move the study's folder away and start anew"
            )


USABLE_ERRORS = (
    study.StudyError,
    engine.EngineError,
    device.DeviceError,
    files.FileError,
    quantize.QuantizeError,
    gguf_file.GGUFError,
    params.ParamsError,
    process.ProcessError,
    record.RecordError,
)
"""What measuring raises with a message meant for people."""


def require_complete(status: study.Status) -> None:
    """Raise StudyError naming every planned run that has no valid record."""
    if not status.complete:
        raise study.StudyError(
            "not everything that was planned is valid; run again to retry:\n" + "\n".join(status.problems)
        )
