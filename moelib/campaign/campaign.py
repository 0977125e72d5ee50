"""Measuring a study's cells: the file, then block by block the runs that have no valid record.

A run that fails is recorded and the rest go on; running again repeats nothing that is done.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moelib.audit import audit, record
from moelib.audit.invariants import reconciled
from moelib.base import files
from moelib.campaign import assess, given, notebooks, preflight
from moelib.campaign.bench import Bench, alone, audited, held, require_free, scratch
from moelib.catalogue import params
from moelib.catalogue.facts import Manifest
from moelib.engine import engine, quants
from moelib.machine import host
from moelib.measure import device, run
from moelib.measure.llama_server import LlamaServer
from moelib.models import quantize, remote, sources
from moelib.runners import pick, shimmy
from moelib.study import gather
from moelib.study.plan import Cell, StudyError
from moelib.study.status import Status
from moelib.study.study import Study, same_manifest

log = logging.getLogger(__name__)

EVERY = "all"
"""Stands for every quant of a model, as a parameter of a notebook."""


Obtain = Callable[[Cell, engine.Engine, Path], quantize.Quantised]
"""What makes a cell's file, or finds it, given the engine and a folder for scratch."""


def measure(study: Study, cells: Sequence[Cell], obtain: Obtain | None = None) -> Iterator[record.Record]:
    """Make the cells' files, then do every run that has no valid record; yield each run's record as it stands.

    Cells that are whole are read first, and need neither engine nor device. Of the others every round is done in the
    plan's order, in which the quants of a model may take turns: all their files are made first. A run that fails is
    recorded and the next one goes on. obtain: what gives a file; by default it is that of the catalogue's model at the
    cell's quant. Raises what stands in the way of all runs: no engine, no device, no source, no disk.
    """
    left = []
    for cell in cells:
        if _whole(study, cell, status := study.status_now(cell)):
            yield from (r for block in status.rounds for r in block)
        else:
            left.append(cell)
    if not left:
        return
    if obtain is None:
        refuse_senseless(study, left)
    llama = engine.find()
    runner = pick.of_study(study.parameters, llama)
    choose = partial(pick.device_for, runner, study.parameters.device, llama)
    where, shared = choose(), study.parameters.shares_host
    if where.kind == "none" and isinstance(runner, LlamaServer):
        raise StudyError(
            f"study {study.name} has no device ({where.note or 'it asks for none'}), so no offload of it could "
            "be valid: run `make engine` for a build with RPC or CUDA, or set `device: auto` in "
            f"params/studies/{study.name}.yaml"
        )
    if obtain is None:
        quants.check(llama, _to_make(study.parameters))
        obtain = partial(given.of_cell, study)
    study.begin()
    study.work.mkdir(parents=True, exist_ok=True)
    with alone(study, left) as leases, held(where, choose, shared) as where, scratch(study) as work:
        begun: dict[str, _Begun] = {}
        for cell in left:
            quantised = obtain(cell, llama, work)
            first = next((b.bench for b in begun.values()), None)  # device and host are measured once
            bench = first or Bench.ready(quantised, runner, where, work, shared)
            begun[cell.name] = _begin(study, cell, bench._replace(quantised=quantised))
        for cell, b in study.plan.turns(left):
            for lease in leases:
                lease.require()
            yield from begun[cell.name].round(cell.blocks[b])


def _begin(study: Study, cell: Cell, bench: Bench) -> "_Begun":
    """Note the cell's file. Raises StudyError if there are runs of another one, or of another engine or device."""
    manifest = bench.quantised.manifest
    if study.manifest(cell) != Manifest.model_validate(manifest):
        files.write_json(study.manifest_path(cell), manifest)
    evidence = study.evidence_now(cell, set_aside=True)
    _same_setup([r for r in evidence.records if r.done], bench)
    return _Begun(study, bench, evidence, study.status_now(cell, evidence).apart)


@dataclass(frozen=True)
class _Begun:
    """A cell whose runs can be done: its file on a device, and what there is of it."""

    study: Study
    bench: Bench
    evidence: gather.Evidence
    anew: bool
    """Whether its rounds are all whole and do not fit together: then, as with a round's runs, all are done again."""

    @cached_property
    def last(self) -> Counter[str]:
        """Run -> its last attempt."""
        last: Counter[str] = Counter()
        for r in self.evidence.records:
            last[r.key] = max(last[r.key], r.attempt)
        return last

    def round(self, specs: Sequence[run.Spec]) -> Iterator[record.Record]:
        """Do what is not done of one round."""
        standing = gather.standing_for(specs, self.evidence.standing)
        problems = [self.evidence.why_not(r) for r in standing]
        left = [True] * len(specs) if self.anew else _to_do(standing, problems, _machine(self.bench))
        for spec, existing, to_do in zip(specs, standing, left, strict=True):
            if to_do or existing is None:
                attempt = 1 + self.last[record.spec_key(spec)]
                existing = record.write(self.study.path, self.bench.perform(self.study.path, spec, attempt))
            yield existing


def prepare(study: Study, cells: Sequence[Cell]) -> Iterator[quantize.Quantised]:
    """Make the cells' files where they are not there, and measure nothing: where there is no GPU, too.

    Raises what `measure` does of engine and files.
    """
    refuse_senseless(study, cells)
    llama = engine.find()
    quants.check(llama, _to_make(study.parameters))
    for cell in cells:
        with TemporaryDirectory(prefix="moelib-files-") as work:
            yield given.of_cell(study, cell, llama, Path(work))


def _to_make(parameters: params.Study) -> Sequence[str]:
    """The study's quants that llama-quantize must know: none where all models are files."""
    named = [params.plain(q) for q in parameters.quants]
    return () if all(params.model(m).file for m in parameters.models) else named


def device_note(study: Study) -> str | None:
    """Why the study measures on what it does, where it names no device itself; None too where there is no engine, as
    each cell says that."""
    if study.parameters.device != "auto":
        return None
    try:
        return preflight.here(study.parameters).note
    except (engine.EngineError, device.DeviceError, shimmy.ShimmyError):
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


def require_complete(statuses: Iterable[Status]) -> None:
    """Raise StudyError naming every planned run of some cells that has no valid record."""
    if problems := [p for status in statuses for p in status.problems]:
        raise StudyError("not everything that was planned is valid; run again to retry:\n" + "\n".join(problems))


def select(
    name: str, cell: str | None = None, room: preflight.Room | None = None, runner: str | None = None
) -> tuple[Study, list[Cell]]:
    """The study's folder and its cells, or the one named MODEL/QUANT, or all of MODEL; planned for this machine, or for
    `room`, where it is to fit. runner: that of the study, or of the one that is named NAME-RUNNER. Raises ParamsError,
    and what `preflight.of` does."""
    study = preflight.of(served_by(name, runner), room)
    if cell is None:
        return study, study.cells
    model, _, quant = cell.partition("/")
    names = study.parameters.quants if quant in ("", EVERY) else [quant]
    return study, [study.cell(model, q) for q in names]


def served_by(name: str, runner: str | None) -> str:
    """The study `name` if that is its runner, else the one named NAME-RUNNER: the runs of a study have one runner.

    Raises ParamsError where there is none.
    """
    if not runner or params.study(name).runner == runner:
        return name
    other = f"{name}-{runner}"
    if other in params.study_names() and params.study(other).runner == runner:
        return other
    raise params.ParamsError(
        f"study {name} is served by {params.study(name).runner}: for {runner} write params/studies/{other}.yaml with "
        f"`runner: {runner}`, as in demo-shimmy.yaml"
    )


def _whole(study: Study, cell: Cell, status: Status) -> bool:
    """Every run is valid, and the cell's manifest is the one that they name."""
    return status.complete and same_manifest(study.manifest(cell), status.rounds[0][0].sheet)


class CellsTaken(files.InUse):
    """Other processes have some of the cells: what is left of the others was done. `problems`: what has no valid result
    of these."""

    def __init__(self, taken: Sequence[files.InUse], problems: list[str]):
        super().__init__("\n".join(dict.fromkeys(map(str, taken))))
        self.problems = problems


def run_cells(study: Study, cells: list[Cell], say: Callable[[str], object] = log.info) -> list[str]:
    """Execute the notebook of every cell that is not done; a cell that fails, or that another process has, leaves the
    rest running.

    `say` is told of each cell as its turn comes. Returns what has no valid result, run by run, with reasons. Raises
    StudyError for placements that make no sense, ParamsError for a quant that the engine does not make; CellsTaken at
    the end.
    """
    statuses = {c.name: study.status_now(c) for c in cells}
    refuse_senseless(study, [c for c in cells if not _whole(study, c, statuses[c.name])])
    with suppress(engine.EngineError):  # cells that are done need none, and the others say so
        quants.check(engine.find(), _to_make(study.parameters))
    problems, taken = list[str](), list[files.InUse]()
    study.begin()
    groups = together(study, cells)
    for i, (name, group) in enumerate(groups):
        out = study.path / "notebooks" / f"{name.replace('/', '-')}.ipynb"
        done = all(_whole(study, c, statuses[c.name]) for c in group) and not assess.missing(study, group)
        shown = [r.digest for c in group for block in statuses[c.name].rounds for r in block]
        if not (done and notebooks.is_whole(out, shown)):
            say(f"{name} ({i + 1} of {len(groups)})")
            quant = group[0].quant if len(group) == 1 else EVERY
            failed = None
            try:
                require_free(study, group)
                parameters = {"study": study.name, "model": group[0].model, "quant": quant}
                notebooks.execute("run", out, parameters, progress=False)
            except files.InUse as err:
                taken.append(err)
                continue
            except notebooks.NotebookError as err:
                log.error("%s: %s", name, err)
                failed = err
            statuses |= {c.name: study.status_now(c) for c in group}
            without = assess.missing(study, group)
            problems += without
            if failed and not without and all(statuses[c.name].complete for c in group):
                problems.append(f"{name}: its runs are valid, its notebook is not: {failed}")
        problems += [p for c in group for p in statuses[c.name].problems]
    if taken:
        raise CellsTaken(taken, problems)
    return problems


def together(study: Study, cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    """The cells of each notebook, which one process measures: one, or all of a model where its quants take turns; and
    what it is called, which `study run --cell` takes."""
    if not study.parameters.interleaved:
        return [(cell.name, [cell]) for cell in cells]
    models = dict.fromkeys(cell.model for cell in cells)
    groups = [[cell for cell in cells if cell.model == model] for model in models]
    return [(group[0].name if len(group) == 1 else group[0].model, group) for group in groups]
