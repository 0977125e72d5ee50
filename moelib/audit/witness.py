"""The engine's kept log as the second witness of a run: every number that both hold must be the same one.

A forger of a record must forge the log as well, and both in every detail; more no folder can prove.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moelib.audit.bounds import COPIED_TOKENS
from moelib.audit.invariants import Faults, Finding, holds, strained
from moelib.audit.record import Record
from moelib.base import files
from moelib.engine import logs
from moelib.engine.client import Request, RunError
from moelib.measure.memory import AGREE_BYTES, AGREE_SHARE
from moelib.measure.runner import QUANTITIES, untold
from moelib.runners import shimmy

DIGITS = 0.003  # the log has four digits of a file's parameters, three of its bits per weight
HEAD_BYTES, HEAD_SHARE, SMALL_HEAD = 32 << 20, 0.01, 0.05  # of a file: metadata and vocabulary, 2.4 MB at most seen
STRAINED = 10  # times these limits, where others worked on the host: such a run is flagged
ENDED_S = 0.5  # from the end of the last request to the end of the watched time: 0.01 to 0.08 s seen
PRINTED_S = 6e-6  # the log has milliseconds with two decimals
LAUNCH_S = 2.0  # from the start of the process to the log's first instant: 0.02 to 0.07 s seen
TAKEN_UP_S = 0.050  # between the requests' distances here and in the log: 2.4 ms seen
ANSWERED_S, ANSWERED_SHARE = 0.025, 0.002  # first to last instant of a request, here and in the log: 4.7 ms seen
MAX_BATCH, UBATCH, KV = 2048, 512, "f16"  # llama.cpp's defaults, b6666 to b11669
CONTEXT_STEP = 256  # newer builds round a context up
LOCKED_SHARE = 0.001  # sizes of buffers are printed with two decimals
REPORTED = ("buffers", "offloaded_layers", "total_layers", "graph_splits", "built")


class Witnessed(NamedTuple):
    """A record and the log that its run left."""

    record: Record
    log: logs.Log | None
    problems: tuple[str, ...]
    """What is not as it was kept."""

    @property
    def engine_log(self) -> logs.Log:
        """The log, where there is one: the first of these invariants is that, and the others follow it."""
        if self.log is None:
            raise RuntimeError(f"{self.record.run_id} has no log to be held against")
        return self.log


def call(folder: Path, record: Record) -> Witnessed:
    """Read the logs that `record` names, in the study's `folder`."""
    log, problems, kept, has_log = None, [], folder / "raw", "log" not in untold(record.engine.runner)
    for name, sha256 in record.raw.items():
        try:
            packed = files.head(kept / name, logs.MAX_BYTES)
            if hashlib.sha256(packed).hexdigest() != sha256:
                problems.append(f"{name} was changed: its SHA-256 is not the record's")
            elif name.endswith(logs.SERVER):
                unpacked = logs.unpack(packed, name)
                log = unpacked if has_log or unpacked.tasks or unpacked.report.buffers else None
            elif name.endswith(shimmy.LOG) and record.observed:
                text = logs.unpacked(packed, name).decode("utf-8", "replace")
                if shimmy.report_of(text, Path(record.sheet.file_name)) != record.observed.report:
                    problems.append(f"{name} tells of another load than the record")
        except OSError as err:
            problems.append(f"{name} cannot be read: {err.strerror}")
        except (logs.LogError, RunError) as err:
            problems.append(str(err))
    if has_log and record.observed and not log and not problems:
        problems.append("the record names no log of llama-server")
    return Witnessed(record, log, tuple(problems))


@holds("log", "there, with the record's SHA-256")
def log_kept(run: Witnessed) -> Finding:
    """The logs that the record names are there, unchanged and readable: evidence that is not looked at is none."""
    if run.record.observed and not run.log and not run.problems:
        return None, f"{run.record.engine.runner} does not report {QUANTITIES['log']}"
    return not run.problems, "; ".join(run.problems) or f"{len(run.record.raw)} logs"


def _tasks(run: Witnessed) -> list[tuple[str, Request, logs.Task]]:
    requests = run.record.observation.requests
    return [(f"{r.workload}[{r.index}]", r, t) for r, t in zip(requests, run.engine_log.tasks, strict=False)]


@holds("log", "equal")
def log_tells_the_load(run: Witnessed) -> Finding:
    """Buffers, layers, graph splits and build are those that the engine's log reports."""
    logged, recorded = run.engine_log.report, run.record.observation.report
    differ = [name for name in REPORTED if getattr(logged, name) != getattr(recorded, name)]
    if recorded.unused_tensors is not None and logged.unused_tensors != recorded.unused_tensors:
        differ.append("unused_tensors")
    return bool(logged.buffers) and not differ, ", ".join(differ) or f"{len(logged.buffers)} buffers"


@holds("log", "equal")
def log_tells_the_file(run: Witnessed) -> Faults:
    """The file that was loaded has the manifest's tensors."""
    log, manifest, rounded = run.engine_log, run.record.sheet, {"parameters": DIGITS, "bits_per_weight": DIGITS}
    types = {k.upper(): v for k, v in manifest.tensor_types.items()}
    if log.type_counts and log.type_counts != types:
        yield f"tensor types: log {log.type_counts}, record {types}"
    for name, share in rounded.items():
        logged, recorded = getattr(log, name), getattr(manifest, name)
        if logged is not None and abs(logged - recorded) > share * recorded:
            yield f"{name}: log {logged}, manifest {recorded}"
    weights = manifest.parameters * manifest.bits_per_weight / 8
    beside = manifest.file_bytes - weights
    if not -DIGITS * weights <= beside <= max(HEAD_SHARE * weights, min(HEAD_BYTES, SMALL_HEAD * weights)):
        yield f"a file of {manifest.file_bytes} bytes for {weights:.0f} bytes of weights"
    return f"{sum(log.type_counts.values())} tensors"


@holds("log", "ubatch, op-offload, KV type, threads, context and load mode as asked, or llama.cpp's default")
def log_tells_the_settings(run: Witnessed) -> Finding:
    """Every setting is active in the engine: one that was accepted and ignored, or cut down to what the engine allows,
    would put numbers under a wrong name."""
    if faults := [*_other_values(run), *_other_offload(run), *_other_load(run)]:
        return False, "; ".join(faults)
    if unseen := [*_unseen(run)]:
        return None, "; ".join(unseen)
    return True, f"{run.record.spec.label} is active"


def _other_values(run: Witnessed) -> Iterator[str]:
    """Settings whose values the engine prints, where it prints others or none."""
    log, spec, placed = run.engine_log, run.record.spec, run.record.spec.placed
    contexts = {spec.context_tokens, -(-spec.context_tokens // CONTEXT_STEP) * CONTEXT_STEP}
    threads = {placed.threads or run.record.observation.threads}
    ubatches = {placed.ubatch} if placed.ubatch else {min(UBATCH, context) for context in contexts}
    for name, active, right, limits in (
        ("context", log.context, contexts, ""),
        ("ubatch", log.ubatch, ubatches, f" (it takes {MAX_BATCH} at most, and no more than the context)"),
        ("threads", log.threads, threads, ""),
        ("threads for prompts", log.batch_threads, threads, ""),
    ):
        if active not in right:
            cut = limits if active is not None and active < min(right) else ""
            yield f"{name}: {min(right)} is not active, the engine has {active}{cut}"
    kv, cached = placed.kv or KV, any(b.kind == "KV" for b in log.report.buffers)
    if (placed.kv or log.kv_types or cached) and log.kv_types != {kv}:
        yield f"kv: {kv} is not active, the engine has {', '.join(sorted(log.kv_types)) or 'no such cache'}"


def _offload_matters(run: Witnessed) -> bool:
    """Whether op-offload makes a difference: a GPU in use, weights on the CPU, batches large enough to copy them."""
    o, log = run.record.observation, run.engine_log
    used = o.device_kind == "cuda" and any(b.on_device and b.kind == "model" for b in log.report.buffers)
    return used and o.placement.moved_bytes > 0 and (log.ubatch is None or log.ubatch >= COPIED_TOKENS)


def _other_offload(run: Witnessed) -> Iterator[str]:
    """A prompt's graph is cut more often than a token's where weights are copied for it, and only there: so in all of
    151 runs of nine models with op-offload on GPUs, and in none of eight without."""
    splits, on = run.engine_log.splits, run.record.spec.placed.op_offload
    if _offload_matters(run) and (splits is None or (splits[0] > splits[1]) != on):
        cuts = f"{splits[0]} for a prompt and {splits[1]} for a token" if splits else "not there"
        yield f"op-offload: {'on' if on else 'off'} is not active, the engine's graph splits are {cuts}"


def _other_load(run: Witnessed) -> Iterator[str]:
    """The load mode by its name, in builds that print it, and by what it does to buffers and memory."""
    log, mode = run.engine_log, run.record.spec.load_mode
    maps = any(b.kind == "model" and b.name.endswith("_Mapped") for b in log.report.buffers)
    named = log.mapped == (mode == "mmap") if log.load_mode is None else log.load_mode == mode
    if not named or maps != (mode == "mmap"):
        has = log.load_mode or {True: "mmap", False: "another one than mmap"}.get(bool(log.mapped))
        yield f"load mode: {mode} is not active, the engine has {has}, {'with' if maps else 'without'} mapped buffers"
    if mode != "mlock":
        return
    locked, system = run.record.observation.host_locked_bytes, run.record.host.system
    in_ram = [b for b in log.report.buffers if b.kind == "model" and not b.on_device]
    weights = sum(b.size_bytes for b in in_ram if not b.name.endswith("_Host"))  # which a GPU's driver has pinned
    if log.unlocked:
        yield f"load mode: mlock is not active, {log.unlocked}; raise `ulimit -l`, or take none"
    elif locked is None and system.startswith("Linux"):
        yield "load mode: mlock is not shown to be active, the record does not say what was locked"
    elif locked is not None and locked < weights * (1 - LOCKED_SHARE):
        repacked = any(b.name == "CPU_REPACK" for b in in_ram)
        why = "; the engine does not lock weights that it repacks for the CPU, take none" if repacked else ""
        yield f"load mode: mlock is not active, {locked} bytes are locked of {weights} bytes of weights in RAM{why}"


def _unseen(run: Witnessed) -> Iterator[str]:
    """What was asked and shows neither in the log nor elsewhere, with the reason."""
    spec, observation = run.record.spec, run.record.observation
    if not spec.placed.op_offload and not _offload_matters(run):
        gpu = observation.device_kind == "cuda"
        why = "no weights would be copied for a batch" if gpu else "this device never gets copies of weights"
        yield f"op-offload: off shows nowhere, as {why}"
    if spec.load_mode == "mlock" and observation.host_locked_bytes is None:
        yield "load mode: mlock shows nowhere, as this system does not say what a process has locked"


@holds("log", "exact")
def log_tells_the_reads(run: Witnessed) -> Finding:
    """The weights that a token reads follow from the file's experts, and from how many of them the engine uses."""
    placement, experts = run.record.observation.placement, run.record.sheet.expert_bytes
    if run.engine_log.experts is None:
        return True, "this build does not print its experts"
    count, used = run.engine_log.experts
    dense = placement.device_bytes + placement.moved_bytes - experts
    share = [dense + (experts - placement.moved_bytes) * used // count, placement.moved_bytes * used // count]
    recorded = [placement.device_read_bytes, placement.host_read_bytes]
    return recorded == share, f"device, host {recorded}, by {used} of {count} experts {share}"


@holds("log", "as printed")
def log_tells_the_requests(run: Witnessed) -> Faults:
    """Each request's token counts and the engine's own times are those that its log prints."""
    logged, recorded = len(run.engine_log.tasks), len(run.record.observation.requests)
    if logged < recorded:
        yield f"{logged} requests in the log, {recorded} in the record"
    for name, r, t in _tasks(run):
        if (r.prompt_n, r.predicted_n) != (t.prompt_n, t.predicted_n):
            yield f"{name}: {t.prompt_n} and {t.predicted_n} tokens"
        for phase, seconds, printed in (
            ("prompt", r.engine_prompt_s, t.prompt_s),
            ("decode", r.engine_predicted_s, t.predicted_s),
        ):
            if seconds is None or abs(seconds - printed) > PRINTED_S:
                yield f"{name}: {phase} {seconds} s, the log has {printed:.5f} s"
    return f"{len(run.engine_log.tasks)} requests"


@holds("log", f"{TAKEN_UP_S * 1000:g} ms; {ANSWERED_S * 1000:g} ms + {ANSWERED_SHARE:.1%}; load within {LAUNCH_S:g} s")
def log_tells_the_times(run: Witnessed) -> Faults:
    """Load, the requests' beginnings and their ends lie as far apart in the engine's log as they do here."""
    o = run.record.observation
    patience = STRAINED if strained(o) else 1
    load, ready = o.load_s, run.engine_log.ready_s
    if ready is not None and (load is None or not -0.001 <= load - ready <= LAUNCH_S):
        yield f"ready after {load} s, by the log {ready:.3f} s"
    first: float | None = None
    for name, r, t in _tasks(run):
        if t.launched_s is None or t.ended_s is None or r.total_s is None:
            continue
        apart = t.launched_s - r.started_s
        first = apart if first is None else first
        if abs(apart - first) > TAKEN_UP_S * patience:
            yield f"{name}: begun {apart - first:+.3f} s from where the log has it"
        took = t.ended_s - t.launched_s
        if abs(took - r.total_s) > (ANSWERED_S + ANSWERED_SHARE * took) * patience:
            yield f"{name}: took {r.total_s:.4f} s, by the log {took:.4f} s"
    if first is not None and (ended := run.engine_log.tasks[-1].ended_s) is not None:
        after = o.host.elapsed_s - (ended - first)
        if not -TAKEN_UP_S * patience <= after <= ENDED_S * patience:
            yield f"watched until {after:+.3f} s after the last request's end"
    return f"{len(run.engine_log.tasks)} requests"


@holds("log", f"{AGREE_BYTES >> 20} MiB or {AGREE_SHARE:.0%}")
def log_tells_the_memory(run: Witnessed) -> Finding:
    """What the device had in use at the server's end is the same by the engine as by the driver."""
    used, last = run.engine_log.device_used_bytes, run.record.observation.memory.trace.during[-1:]
    if used is None or not last or last[0].device_bytes is None:
        return True, "the log or the driver reports no memory in use"
    driver = last[0].device_bytes
    return abs(used - driver) <= max(AGREE_BYTES, AGREE_SHARE * driver), f"driver {driver}, engine {used} bytes"
