"""One run: a fresh server process, one placement, the workloads' requests; nothing is judged here."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from moelib.base import files
from moelib.base.files import stored
from moelib.base.schema import Bytes, Count, Index, Seconds, Sha256
from moelib.catalogue import params
from moelib.catalogue import placement as placements
from moelib.engine.buffers import Report
from moelib.engine.client import Answer, Request, RunError
from moelib.engine.engine import EngineError
from moelib.machine import host, monitor, pagecache, process
from moelib.measure import device as devices
from moelib.measure.memory import Memory, Trace, reconcile
from moelib.measure.nvml import Counters
from moelib.measure.runner import Job, Prompt, Runner, Server
from moelib.models.quantize import Quantised

UNCOUNTED = {"disk_read_bytes": "no account was kept of what the server read from disks"}
LOAD_S, LOAD_BYTES_PER_S = 120.0, 50e6  # a cold disk and a slow link at the very worst


@stored
class Spec:
    """What defines a run, before anything is made or measured."""

    study: str
    model: str
    weights: str
    scale: str
    quant: str
    placement: str
    load_mode: str
    block: Index
    """From 0; the runs of a block are compared with each other."""
    order: Index
    """Position within the block's random order."""
    workloads: tuple[str, ...]
    requests: Count
    context: Count
    device: str
    seed: Count

    @property
    def placed(self) -> placements.Placement:
        """Placement and load mode as a value."""
        return placements.Placement.parse(self.placement, self.load_mode)

    @property
    def label(self) -> str:
        return f"{self.placement}/{self.load_mode}"

    @property
    def context_tokens(self) -> int:
        """The placement's own context, else the one that all have."""
        return self.placed.context or self.context


@stored
class Placement:
    """What the file's header says of a placement."""

    moved_tensors: Count
    moved_blocks: Count
    moved_bytes: Bytes
    """Expert weights that the placement keeps on the CPU."""
    device_bytes: Bytes
    """Weights that must then be on the device."""
    device_read_bytes: Bytes
    """Of them, those that decoding one token must read: the used share of the experts, all of the rest."""
    host_read_bytes: Bytes
    """The same of the experts on the CPU."""


@stored
class PromptTraffic:
    """What went over the bus while the warm server processed a prompt, in a request of its own after the timed ones:
    looking at the bus that often would slow them."""

    workload: str
    prompt_tokens: Count
    received_bytes: Bytes | None
    """By the GPU; None where its counter may have turned over unseen."""
    sent_bytes: Bytes | None


@stored
class Observation:
    """Everything that one run showed."""

    load_s: Seconds | None
    """Start of the server process to ready for requests; None where it was not started by the run."""
    wall_s: Seconds
    """The whole run, device process and clean end included."""
    argv: tuple[str, ...]
    """The server's command line, with the model's file name alone."""
    env: tuple[str, ...]
    """Names of its environment variables."""
    file_sha256: Sha256
    """Of the file, read from disk since this process began to measure it, and unchanged since. Of one that is measured
    as it is, or in a run of its own: read when its size and times, which have not changed, were noted."""
    device_kind: str
    """cuda, loopback or none."""
    threads: Count
    build_info: str | None
    report: Report
    placement: Placement
    requests: tuple[Request, ...]
    top_logprobs: tuple[float | None, ...]
    """Log-probabilities of the likeliest next tokens after the first prompt, best first; None is not a number."""
    memory: Memory
    counters: tuple[Counters, ...]
    """Clocks, energy and traffic of the GPU, before the first request and at the end of each; empty without one."""
    absent: dict[str, str]
    """Counters that are not there -> why."""
    host: host.Use
    host_rss_peak_bytes: Bytes | None
    """Peak RSS of llama-server, mapped file pages included; None where the system keeps none."""
    exit_code: int | None
    exit_killed: bool
    pcie_received_bytes: Bytes | None = None
    """Over the whole run, in records made before prompts were watched alone."""
    pcie_sent_bytes: Bytes | None = None
    prompt_traffic: tuple[PromptTraffic, ...] = ()
    """Of each workload's prompt; empty where there is no bus to look at."""
    watch_cpu_s: Seconds | None = None
    """CPU seconds that watching took while the server was up; None in records of earlier code."""
    engine_files: dict[str, str] | None = None
    """SHA-256 of every program and library of the engine that llama-server had mapped after its last request, by name;
    None in records of schema 2, and where the system does not say (`absent` has why)."""
    device_files: dict[str, str] | None = None
    """The same of the process that plays the device; None where none does."""
    system_files: dict[str, str] | None = None
    """The same of what llama-server had mapped of the system: C library, driver."""
    host_locked_bytes: Bytes | None = None
    """Memory that llama-server had locked, for load mode mlock; None in records of earlier code, and where the system
    does not say."""
    cached_bytes: Bytes | None = None
    """Of the file, in the system's page cache just before the server was started; None in records of earlier code, and
    where the system does not tell (`absent` has why)."""
    disk_read_bytes: Bytes | None = None
    """What llama-server had the system read from disks until its last request; None in records of earlier code, and
    where the system keeps no account of it (`absent` has why)."""

    @property
    def engine_digest(self) -> str | None:
        """One value for the engine's files, the device's process included; None in records of schema 2."""
        return None if self.engine_files is None else files.digest([self.engine_files, self.device_files])

    @property
    def engine_s(self) -> float:
        """Seconds that the engine itself accounts for: load, prompts, generation."""
        return (self.load_s or 0) + sum((r.engine_prompt_s or 0) + (r.engine_predicted_s or 0) for r in self.requests)


@dataclass(frozen=True)
class Outcome:
    """An observation, or why there is none; and the logs."""

    observation: Observation | None
    reason: str | None
    message: str | None
    logs: tuple[Path, ...]


def execute(spec: Spec, quantised: Quantised, runner: Runner, device: devices.Device, work: Path) -> Outcome:
    """Carry out one run in the scratch folder `work`. Every failure of the runner becomes an Outcome with a reason."""
    logs = (work / runner.log, work / "device.log")
    try:
        with monitor.unhindered():
            return Outcome(_observe(spec, quantised, runner, device, work), None, None, logs)
    except process.ProcessError as err:
        return Outcome(None, err.reason, str(err), logs)
    except (EngineError, devices.DeviceError) as err:
        return Outcome(None, "engine-unusable", str(err), logs)


def _observe(spec: Spec, quantised: Quantised, runner: Runner, device: devices.Device, work: Path) -> Observation:
    started, monitor_host = time.monotonic(), host.Stopwatch()
    since = time.time()

    def now() -> float:
        return round(time.monotonic() - started, 4)

    with device.session(runner.tools, work) as session:
        readings, counters, idle = [], [], session.idle()
        job = Job(quantised.path, spec.placed, spec.context_tokens, spec.placed.threads or device.threads)
        cached, untold = _cached(spec, quantised)
        with runner.start(job, session, work) as server:
            read_before = 0
            if server.attached:  # the device's idle state is not seen, nor is the server's end
                idle = ()
                if server.pid is not None:
                    monitor_host.join(server.pid)
                    read_before = process.disk_reads(server.pid) or 0

            def count() -> None:
                if session.counters:
                    counters.append(session.counters(now()))

            count()
            with monitor.repeating(
                lambda: readings.append(session.read(server.pid, now())), devices.SAMPLE_S
            ) as monitoring:
                limit = process.patience(LOAD_S) + quantised.header.file_bytes / LOAD_BYTES_PER_S
                with server.serving(limit) as load_s:
                    prompts = server.prompts([params.workload(w) for w in spec.workloads], spec.context_tokens)
                    requests = []
                    for prompt in prompts:
                        for index in range(spec.requests):
                            requests.append(_request(server, prompt, index, started, session.energy))
                            count()
                    top = server.likeliest(prompts[0].content)
                    traffic, no_bus = _prompt_traffic(server, prompts, session, now)
            peak, rss = session.peak_bytes(), None if server.pid is None else process.peak_rss(server.pid)
            locked = None if server.pid is None else process.locked(server.pid)
            disk_reads = None if server.pid is None else process.disk_reads(server.pid)
            use = monitor_host.stop(server.pid, session.pid)
            digests, unread = server.files(session.pid, since)
            ended = server.stop()
            after = () if server.attached else monitor.once(lambda: session.settled(idle, server.pid, now))
            trace = Trace(idle, tuple(readings), after)
            report = server.report()
    try:
        sha256 = quantised.content.sha256()
    except OSError as err:
        raise RunError("file-gone", f"{quantised.path.name} went away while it ran: {err}") from None
    mapped = digests()
    header = quantised.header.as_loaded(report.unused_tensors)
    moved = header.moved(spec.placed)
    header_bytes = (header.moved_bytes(spec.placed), header.device_bytes(spec.placed))
    reads = header.read_bytes(spec.placed)
    buffers = report.device_by_kind, report.pinned_bytes
    return Observation(
        load_s=None if load_s is None else round(load_s, 6),
        wall_s=round(time.monotonic() - started, 6),
        argv=server.argv,
        env=server.env,
        file_sha256=sha256,
        device_kind=device.kind,
        threads=job.threads,
        build_info=server.build_info,
        report=report,
        placement=Placement(len(moved), len({t.block for t in moved}), *header_bytes, *reads),
        requests=tuple(requests),
        top_logprobs=top,
        memory=reconcile(device.kind, trace, *buffers, header_bytes[1], device.context_bytes, peak),
        counters=tuple(counters),
        absent=device.absent | no_bus | unread | untold | ({} if disk_reads is not None else UNCOUNTED),
        host=use,
        host_rss_peak_bytes=rss,
        exit_code=ended.code,
        exit_killed=ended.killed,
        prompt_traffic=traffic,
        watch_cpu_s=None if monitoring.cpu_s is None else round(monitoring.cpu_s, 6),
        engine_files=mapped.get("engine_files"),
        device_files=mapped.get("device_files"),
        system_files=mapped.get("system_files"),
        host_locked_bytes=locked,
        cached_bytes=cached,
        disk_read_bytes=None if disk_reads is None else disk_reads - read_before,
    )


def _cached(spec: Spec, quantised: Quantised) -> tuple[int | None, dict[str, str]]:
    """(bytes of the file that are in the page cache as its server is about to start, why that is not known): all of it
    where RAM has room, or next to nothing, as the placement asks. Raises RunError where it cannot be dropped."""
    name, paths, cold = quantised.path.name, quantised.content.paths, spec.placed.cold
    try:
        if not cold:
            pagecache.warm(paths)  # again: a system may take back what nobody has used for seconds
        cached = pagecache.drop(paths) if cold else pagecache.cached_bytes(paths)
    except pagecache.NotTold as err:
        if cold:
            raise RunError("file-not-cold", f"cache=cold cannot be shown here, leave it out: {err}") from None
        return None, {"cached_bytes": str(err)}
    except OSError as err:
        raise RunError("file-gone", f"{name} cannot be read before the run: {err.strerror}") from None
    if cold and cached > pagecache.COLD * quantised.header.file_bytes:
        raise RunError(
            "file-not-cold",
            f"{cached / quantised.header.file_bytes:.0%} of {name} stays in the page cache when it is dropped: put "
            "$MOELIB_MODELS on a disk (/dev/shm is none), and see that no other process has the file mapped",
        )
    return cached, {}


def _request(server: Server, prompt: Prompt, index: int, started: float, energy: Callable[[], float | None]) -> Request:
    """One timed request. `started`: the run's start on the monotonic clock. `energy` reads the board's counter."""
    tokens = prompt.workload.generate_tokens
    server.connect()
    before = energy()
    sent, lines = server.ask(prompt.content, tokens)
    after = energy()
    answer = server.read(lines, tokens)
    return Request(
        **{f.name: getattr(answer, f.name) for f in fields(Answer)},
        workload=prompt.workload.name,
        index=index,
        prompt_tokens=prompt.tokens,
        generate_tokens=tokens,
        started_s=round(sent - started, 6),
        energy_joule=None if before is None or after is None else round(after - before, 3),
    )


def _prompt_traffic(
    server: Server, prompts: list[Prompt], session: devices.Session, now: Callable[[], float]
) -> tuple[tuple[PromptTraffic, ...], dict[str, str]]:
    """Each prompt's traffic, and what is not known of it -> why."""
    traffic: list[PromptTraffic] = []
    absent: dict[str, str] = {}
    if session.traffic is None:
        return (), absent
    for prompt in prompts:
        bus = session.traffic()
        bus.look(now())
        with monitor.repeating(lambda: bus.look(now()), devices.BUS_S):  # noqa: B023  # it ends with the block
            server.connect()
            server.read(server.ask(prompt.content, 1)[1], 1)
        if prompt.tokens is not None:
            traffic.append(PromptTraffic(prompt.workload.name, prompt.tokens, *(bus.totals or (None, None))))
        absent |= bus.absent()
    return tuple(traffic), absent
