"""One file on one device: what all of its runs share, and a run made into an audited record."""

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import NamedTuple

import psutil

from moelib.audit import audit, record, witness
from moelib.base import files, stats
from moelib.base.neutral import markdown
from moelib.campaign import given
from moelib.catalogue import params
from moelib.catalogue.facts import ENDPOINT, LLAMA_SERVER, DeviceFacts, HostFacts, Manifest
from moelib.catalogue.placement import Placement
from moelib.engine import engine
from moelib.locks import claim, lease
from moelib.machine import host, pagecache, process
from moelib.measure import run
from moelib.measure.device import Device
from moelib.measure.runner import Runner
from moelib.models import quantize
from moelib.runners import pick
from moelib.runners.endpoint import ANY, Address
from moelib.study import gather
from moelib.study.plan import Cell, StudyError, outputs
from moelib.study.study import Study

CHOICES = 32  # of a device, while others take theirs
LOCK_S = 30.0  # for another process's last run on the device
CELL_S = 10.0  # for the kernel of a killed process, which ends with it
LEASES = "leases"
"""Folder of a study's in which a cell is held: no product."""
RUN_BYTES = 1 << 20  # a run's logs and record
WORKLOADS = ("plan-short", "long-512")
CONTEXT = 4096
"""Tokens that an endpoint is taken to serve."""
ANSWER = "ANSWER.md"
ALONE = "alone"
"""Name that stands for the study in the record of a run that belongs to none."""


class Bench(NamedTuple):
    """What the runs of a file share."""

    quantised: quantize.Quantised
    runner: Runner
    where: Device
    work: Path
    device: DeviceFacts
    host: HostFacts

    @classmethod
    def ready(
        cls, quantised: quantize.Quantised, runner: Runner, where: Device, work: Path, shared: bool = False
    ) -> "Bench":
        """Measure what is measured once: an empty context of the device, the speed of the host's RAM. shared: whether
        others may be measured on the host's other GPUs meanwhile."""
        where.calibrate(work)
        facts = HostFacts(
            **host.facts(),
            host_id=host.identity(),
            ram_read_bytes_per_s=host.read_bandwidth(),
            shared=shared and where.uuid is not None,
        )
        return cls(quantised, runner, where, work, DeviceFacts(**where.identity()), facts)

    def perform(self, folder: Path, spec: run.Spec, attempt: int = 1) -> record.Record:
        """Do one run, whatever comes of it: its record, audited and not written; its logs are kept in `folder`/raw."""
        name, private = record.run_id(spec, attempt), [self.quantised.path.parent]
        if self.runner.tools is not None:
            private.append(self.runner.tools.folder)
        # a full disk is said here: the engine's log would be cut short, and be taken for an engine that fails
        files.need_space(folder, RUN_BYTES, "a run")
        if not spec.placed.cold:  # so that all other runs load a cached file
            with suppress(OSError):  # the run says what became of the file
                pagecache.warm(self.quantised.content.paths)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        outcome = run.execute(spec, self.quantised, self.runner, self.where, self.work)
        result = record.Record(
            run_id=name,
            attempt=attempt,
            status="failed",
            reasons=(outcome.reason,) if outcome.reason else (),
            message=outcome.message,
            spec=spec,
            sheet=Manifest.model_validate(self.quantised.manifest),
            engine=self.runner.facts(),
            device=self.device,
            host=self.host,
            started_utc=started,
            observed=outcome.observation,
            audit=(),
            raw=record.keep_logs(folder, name, outcome.logs, private),
        )
        return result if result.observed is None else audited(folder, result)

    def measure(
        self,
        placement: str,
        load_mode: str = "mmap",
        workloads: Sequence[str] = WORKLOADS,
        requests: int = 2,
        context: int = 1024,
        keep: Path | None = None,
        block: int = 0,
        order: int = 0,
        attempt: int = 1,
    ) -> record.Record:
        """A run that belongs to no study; its record and logs are kept in the folder `keep`, or not.

        block, order: which repetition it is, and which run of it, where runs are repeated; attempt: at the same run, in
        the same folder. Raises PlacementError, QuantizeError where the placement moves nothing of the file.
        """
        quantize.refuse_senseless(self.quantised.header, [placement])
        of = {k: self.quantised.manifest[k] for k in ("model", "quant", "weights", "scale")}
        spec = run.Spec(
            study=ALONE,
            placement=placement,
            load_mode=load_mode,
            block=block,
            order=order,
            workloads=tuple(workloads),
            requests=requests,
            context=context,
            device=self.where.kind,
            seed=0,
            **of,
        )
        result = self.perform(keep or self.work, spec, attempt)
        return record.write(keep, result) if keep else record.sealed(result)


def audited(folder: Path, r: record.Record) -> record.Record:
    """The record with what the present rules say of it, its log in `folder`/raw being its witness."""
    checks = gather.audit_today(r, witness.call(folder, r))
    status, reasons = audit.verdict(checks)
    return r.model_copy(update={"status": status, "reasons": reasons, "audit": checks})


@contextmanager
def held(where: Device, choose: Callable[[], Device], shared: bool = False) -> Iterator[Device]:
    """The device for this process alone, or the one that `choose` gives where another process was quicker: several
    begin at once on a host with several GPUs. shared: while others are measured on these, with its part of the CPUs.
    Raises InUse, which names the process that has it."""
    with ExitStack() as stack:
        for _ in range(CHOICES):
            try:
                stack.enter_context(claim.device(where.uuid, f"device {where.kind}", 0.0, shared))
                break
            except files.InUse:
                other = choose()
                if other.uuid == where.uuid:
                    wait_s = process.patience(LOCK_S)
                    stack.enter_context(claim.device(where.uuid, f"device {where.kind}", wait_s, shared))
                    break
                where = other
        else:
            raise files.in_use("every GPU here", "other processes")
        if shared:
            where.share()
        yield where


@contextmanager
def scratch(study: Study) -> Iterator[Path]:
    """A working folder of this process, removed at the end. What killed processes of this host left is swept."""
    mine = f"{files.node()}."
    for left in study.work.glob(f"{mine}*"):
        process.sweep(left)
        pid = left.name.removeprefix(mine)
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    work = study.work / f"{mine}{os.getpid()}"
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def alone(study: Study, cells: Iterable[Cell]) -> Iterator[tuple[lease.Lease, ...]]:
    """The cells for this process alone, among all hosts that share the study's folder. Raises InUse, which names who
    has one of them."""
    with ExitStack() as stack:
        yield tuple(stack.enter_context(lease.hold(*_leased(study, c))) for c in sorted(cells, key=lambda c: c.name))


def require_free(study: Study, cells: Iterable[Cell]) -> None:
    """Raise InUse if another process has one of the cells now."""
    for cell in cells:
        lease.require_free(*_leased(study, cell))


def _leased(study: Study, cell: Cell) -> tuple[Path, str, str | None, float]:
    path, wait_s = study.path / LEASES / cell.file_name, process.patience(CELL_S)
    return path, f"{cell.name} of study {study.name}", host.identity(), wait_s


@contextmanager
def opened(
    given_files: Sequence[Path],
    device_kind: str = "auto",
    runner: str = LLAMA_SERVER,
    endpoints: Mapping[str, Address] | None = None,
) -> Iterator[list[Bench]]:
    """A bench for each GGUF, for runs that belong to no study; the device is measured once, and held until the end.

    endpoints: addresses by placement, where the runner is an endpoint. Raises GGUFError, EngineError, ShimmyError,
    EndpointError, DeviceError, and QuantizeError for a file that was changed since it was
    made or that the engine cannot load.
    """
    llama = engine.find()
    quantised = [given.measurable(file, llama) for file in given_files]
    server = pick.of(runner, llama, endpoints)
    choose = partial(pick.device_for, server, device_kind, llama)
    with TemporaryDirectory(prefix="moelib-run-") as scratch, held(choose(), choose) as where:
        first = Bench.ready(quantised[0], server, where, Path(scratch))
        yield [first._replace(quantised=q) for q in quantised]


def one(
    file: Path,
    placement: str,
    load_mode: str = "mmap",
    workloads: Sequence[str] = WORKLOADS,
    requests: int = 2,
    context: int = 1024,
    device_kind: str = "auto",
    keep: Path | None = None,
    attempt: int = 1,
    runner: str = LLAMA_SERVER,
    endpoint: str | None = None,
) -> record.Record:
    """One run of any GGUF; its record and logs are kept in the folder `keep`, or not. See `opened`, `Bench.measure`.

    endpoint: the address of a server that runs already, which then is the runner.
    """
    at = {ANY: Address.of(endpoint)} if endpoint else None
    Placement.parse(placement, load_mode)
    for name in workloads:
        params.workload(name)
    with opened([file], device_kind, ENDPOINT if at else runner, at) as (ready,):
        return ready.measure(placement, load_mode, workloads, requests, context, keep, attempt=attempt)


def stem(file: Path) -> str:
    """A file's name as a part of a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", file.stem.lower()).strip("-")[:60]


def at_endpoint(
    file: Path,
    url: str,
    placement: str = "cpu-moe",
    context: int | None = None,
    rounds: int = 3,
    beyond: bool = False,
    say: Callable[[str], object] = print,
) -> Path:
    """Measure a server that runs already with the file, in the placement that it is said to have; resumable.

    Returns the document, beside its records. Raises EndpointError for an address that cannot be measured, GGUFError,
    QuantizeError, EngineError, and StudyError where no run of it is usable.
    """
    at, asked = Address.of(url, beyond), (WORKLOADS, 2, context or CONTEXT)
    with opened([file], "auto", ENDPOINT, {ANY: at}) as (ready,):
        about = [ready.quantised.manifest["sha256"], at.url, placement, asked]
        folder = outputs() / f"endpoint-{stem(file)}-{files.digest(about)[:8]}"
        every = record.read_all(folder)[0]
        for i in range(rounds):
            tried = [r for r in every if r.spec.block == i]
            r = next((r for r in tried if r.done), None)
            if r is None:
                attempt = 1 + max((r.attempt for r in tried), default=0)
                r = ready.measure(placement, "mmap", *asked, folder, block=i, attempt=attempt)
                every.append(r)
            told = "; ".join(filter(None, (r.message, ", ".join(r.reasons))))
            say(f"{i + 1} of {rounds}: {r.status} {told}".rstrip())
    usable = [r for r in every if r.done][:rounds]
    if not usable:
        raise StudyError(f"no run of {at.url} is usable: the reasons are above, the records in {folder}")
    files.write_bytes(folder / ANSWER, "\n".join(seen(file, at, placement, usable)).encode() + b"\n")
    return folder / ANSWER


def seen(file: Path, at: Address, placement: str, usable: list[record.Record]) -> Iterator[str]:
    """What was measured of an endpoint, and what it does not tell."""
    import pandas as pd  # takes longer to import than a cell that is done to be looked at

    yield f"# {markdown(file.name)} at {at.url}"
    where = {f"{r.device.name or 'no device'} and {r.host.cpus} CPUs ({r.host.cpu})" for r in usable}
    weights = " The weights are random, in the model's shapes." if usable[0].sheet.weights == "twin" else ""
    yield f"\nMeasured on {markdown('; '.join(sorted(where)))}.{weights}"
    yield f"\n`{placement}` is what it is said to have: nothing that it tells proves that. {len(usable)} runs.\n"
    rows = []
    for w in WORKLOADS:
        warm = [[q for q in r.observation.requests if q.workload == w and q.index] for r in usable]
        rate = _over_runs([[q.tps for q in run] for run in warm])
        ttft = _over_runs([[q.ttft_s for q in run] for run in warm])
        rows.append((w, warm[0][0].prompt_tokens, stats.estimate(rate), stats.estimate(ttft, 1000)))
    yield pd.DataFrame(rows, columns=["prompt", "tokens", "tokens/s", "TTFT, ms"]).to_markdown(index=False)
    memory = [[r.observation.memory.value_bytes, r.observation.host_rss_peak_bytes] for r in usable]
    vram, ram = (max((n for n in c if n is not None), default=None) for c in zip(*memory, strict=True))
    yield f"\nVRAM: {stats.size(vram)}; RAM, the most that its process ever had: {stats.size(ram)}."
    yield "\nGeometric means [95 % intervals over runs] of warm requests. What cannot be checked, or does not hold:\n"
    doubts = defaultdict(list)
    for name, why in {c.id: c.measured for r in usable for c in r.audit if not c.passed}.items():
        doubts[why.split("; what can be checked")[0]].append(name)
    yield from (f"- {markdown(why)} ({', '.join(names)})" for why, names in doubts.items())
    yield "\nRecords:\n"
    yield from (f"- `{r.run_id}` {r.status} `{r.digest[:12]}`" for r in usable)


def _over_runs(values: Sequence[Sequence[float | None]]) -> stats.Estimate | None:
    """Of the runs' own means; None where a run has none."""
    means = [fmean(known) for run in values if (known := [x for x in run if x])]
    return stats.geometric_mean(means) if len(means) == len(values) else None
