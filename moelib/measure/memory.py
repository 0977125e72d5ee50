"""VRAM of a run (memory of the loopback device): four accounts, reconciled into one value with its bounds.

The accounts are the driver's list of processes, the growth of the device's memory over its idle state, the engine's
own buffers, and the weights that the file's header puts on the device. A value is never a bare number: it has a status,
a method and reasons from a closed list. What cannot be separated from other use is None, never 0.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from moelib.base.files import stored
from moelib.base.schema import Bytes, Seconds

CONTRADICTIONS = {
    "no-samples": "there is no reading of the run's VRAM",
    "gpu-lost": "the driver lost the GPU",
    "unstable-baseline": "memory use of the idle device changed before the run, and no account of the run is valid "
    "despite that",
    "not-returned": "memory use of the device did not return to its idle state after the run, and no account of the "
    "run is valid despite that",
    "foreign-changed": "another process started, ended or grew on the device during the run, and the driver's list "
    "does not separate its memory from the run's",
    "accounts-disagree": "the process list and the device's growth differ by more than 64 MiB and 1 %, apart from page "
    "tables of pinned host memory",
    "below-engine-buffers": "the reading is below an empty context plus the buffers that the engine reports",
    "below-header-weights": "the reading is below the weights that the file's header puts on the device",
    "above-ceiling": "the reading is above what the engine's buffers and a context can explain",
}
"""Reason -> meaning, of the reasons that make the VRAM invalid: accounts contradict each other, or were disturbed.
Records list reasons in this order."""
DOUBTS = {
    "no-device": "the run had no device, so it has no VRAM",
    "process-not-listed": "the driver lists no process of the run, so its share of the device's growth is unknown; in "
    "a container, share the host's process ids",
    "running-before": "the server was running before the run, so the device's idle state is not known; the value is "
    "the process list's alone, and at least the weights that the file's header puts on the device",
    "list-unsupported": "the driver could not list processes, so the run's share of the device's growth is unknown",
    "host-pid": "the driver lists the run's process by the host's id; it is identified because it started and ended "
    "with the run",
    "bytes-not-listed": "the driver lists the run's process without its bytes; the value is the device's growth, if "
    "the run was alone on it and pinned too little host memory for page tables to matter. Programs that are not "
    "listed, such as those of Windows under WSL2, may be included: `bound_bytes` is the largest possible error",
    "device-total-unknown": "the device's own total could not be read; the value is the process list's alone",
    "foreign-process": "another process that can compute was on the device: the list separates its memory from the "
    "run's, but its work may have slowed the run",
    "engine-silent": "the engine reported no buffers to compare the value with",
    "context-unmeasured": "the size of an empty context could not be measured; a wide bound was used",
    "sampled-peak": "the system records no peak; the value is the highest sample",
    "memory-shared": "the device's memory is the host's RAM, and its total counts what the whole host uses; the value "
    "is the process list's alone",
    "unseen-change": "memory use of the device changed before or during the run by more than the driver's list "
    "explains; the accounts agree despite that, or `bound_bytes` is the largest possible error",
    "buffers-unknown": "the engine reported a buffer whose name is known neither as a device's nor as the host's, so "
    "its device buffers have no sum to compare the value with",
}
"""Those that make it degraded: an account is missing; the value is given where the others still prove it."""
REASONS = CONTRADICTIONS | DOUBTS
INVALID = tuple(CONTRADICTIONS)

AGREE_BYTES, AGREE_SHARE = 64 << 20, 0.01  # two exact NVML accounts differed by up to 9 MiB, the rest is margin
TABLE_ENTRY_BYTES, PAGE_BYTES = 8, 4096  # on the device, for pinned host memory; 80 MiB for 39.8 GiB seen on an H200
SETTLED_BYTES = 16 << 20  # idle GPUs did not change at all; a desktop changes by more, and then growth proves nothing
LEAST_CONTEXT_BYTES = 64 << 20  # no CUDA context is smaller: 518 MiB seen on an H200
CONTEXTS, SHARE = 1.5, 0.01  # context, then cuBLAS workspace, pool and graphs: 1.35 contexts in all seen
UNMEASURED_CONTEXT_BYTES = 4 << 29  # 2 GiB, where no context could be measured
PROCESS_BYTES = 64 << 20  # code and heap of a loopback device's process: 12 MiB seen
# upper limit of untouched pages in the graph's buffer, as a share of a loopback device's value: at most 53 % seen, with
# 17 architectures and a prompt of 8 tokens in a context of 8,192
UNTOUCHED_SHARE = 1.0
HEADER_SHARE, HEADER_BYTES = 0.001, 1 << 20  # the engine prints MiB with two decimals and pads tensors


@stored
class Reading:
    """One reading of the device's memory, `t_s` seconds after the run's start."""

    t_s: Seconds
    process_bytes: Bytes | None
    """Memory of the run's processes on every GPU, by the driver's list; RSS of a loopback device."""
    device_bytes: Bytes | None
    """Memory in use on the whole device."""
    listed: bool = False
    """Whether the driver listed a process of the run, with or without its bytes."""
    others: tuple[tuple[int, int | None], ...] = ()
    """(process id, bytes) of the other processes on the device."""
    errors: tuple[str, ...] = ()
    """What could not be read: gpu-lost, list-unsupported, memory-unsupported, memory-shared."""
    drawing: tuple[int, ...] = ()
    """Those of `others` that only draw: they are in the driver's graphics list and not in its compute list."""


@stored
class Trace:
    """Readings of the idle device, of the run, and of the device after the run's end."""

    before: tuple[Reading, ...]
    during: tuple[Reading, ...]
    """The last one is taken after the last request, while the server still runs: memory pools never shrink."""
    after: tuple[Reading, ...] = ()


@stored
class Memory:
    value_bytes: Bytes | None
    """Peak VRAM (or memory of the loopback device) of the run's processes; None, with a reason, where unknown."""
    status: str
    """valid, degraded or invalid."""
    method: str | None
    """rss-peak, rss-samples, nvml-process, nvml-growth."""
    reasons: tuple[str, ...]
    process_bytes: Bytes | None
    """Account 1: peak of the run's processes by the system's list."""
    growth_bytes: Bytes | None
    """Account 2: peak of the device over its idle state; None on loopback. Unlike account 1 it includes the page tables
    through which the device reads pinned host memory: 2 MiB for each GiB."""
    engine_bytes: Bytes | None
    """Account 3: device buffers by the engine's own report; part of the value."""
    weights_bytes: Bytes
    """Account 4: weights on the device by the file's header; part of account 3."""
    context_bytes: Bytes | None
    """An empty context on this device, measured."""
    trace: Trace
    bound_bytes: int | None = None
    """Largest possible error of the value, either way, where it is the device's growth, which may include programs that
    the driver does not list: the true value lies between the engine's buffers plus the smallest possible context and
    plus the largest. None where the value is a process's own."""

    @property
    def residual_bytes(self) -> int | None:
        """What the engine's report does not explain: context, workspaces, code."""
        if self.value_bytes is None or self.engine_bytes is None:
            return None
        return self.value_bytes - self.engine_bytes


def _known(values: Iterable[int | None]) -> list[int]:
    return [n for n in values if n is not None]


def _peak(values: Iterable[int | None]) -> int | None:
    return max((v for v in values if v), default=None)  # a reading of exactly 0 is a failed reading


def _agree(process: int, growth: int, tables: int) -> bool:
    apart = growth - process
    return abs(apart - min(max(apart, 0), tables)) <= max(AGREE_BYTES, AGREE_SHARE * max(process, growth))


def _still(values: Sequence[int]) -> bool:
    """Whether the values differ by no more than those of an idle device."""
    return max(values, default=0) - min(values, default=0) <= SETTLED_BYTES


def reconcile(
    kind: str,
    trace: Trace,
    buffers: Mapping[str, int | None],
    pinned_bytes: int,
    weights_bytes: int,
    context_bytes: int | None = None,
    peak_bytes: int | None = None,
) -> Memory:
    """The run's VRAM (or memory of the loopback device) from all accounts.

    kind: cuda, loopback or none. buffers: kind of buffer -> bytes in device memory by the engine's report, None where
    it names a buffer that is known neither as a device's nor as the host's; empty where it reports none. pinned_bytes:
    host buffers that the device reads directly. weights_bytes: what the header puts on the device. context_bytes: an
    empty context on this GPU, None where it could not be measured. peak_bytes: the loopback device's peak RSS as the
    system recorded it, None where the system records none.
    """
    sizes = _known(buffers.values())
    engine = sum(sizes) if sizes and len(sizes) == len(buffers) else None
    accounts = (engine, weights_bytes, context_bytes, trace)
    floor, ceiling = 0.0, math.inf
    if kind == "none":
        return Memory(None, "degraded", None, ("no-device",), None, None, *accounts)
    if kind == "loopback":
        process, growth = _peak([peak_bytes]), None
        value, method, reasons = process, "rss-peak", []
        if value is None:
            process = value = _peak(r.process_bytes for r in trace.during)
            method, reasons = "rss-samples", ["sampled-peak"]
        if value is None:
            reasons.append("no-samples")
        floor, ceiling = _resident(buffers, trace, engine, method), (engine or 0) + PROCESS_BYTES
    else:
        tables = pinned_bytes * TABLE_ENTRY_BYTES // PAGE_BYTES
        value, method, process, growth, reasons = _cuda(trace, tables)
        context = UNMEASURED_CONTEXT_BYTES if context_bytes is None else CONTEXTS * context_bytes
        if context_bytes is None:
            reasons.append("context-unmeasured")
        floor, ceiling = (engine or 0) + LEAST_CONTEXT_BYTES, (engine or 0) * (1 + SHARE) + context
    if engine is None:
        reasons.append("buffers-unknown" if buffers else "engine-silent")
        if (growth is None or process is None) and "running-before" not in reasons:
            value = None  # one account, and nothing to check it against
        ceiling = math.inf
    if value is not None and not floor <= value <= ceiling:
        reasons.append("below-engine-buffers" if value < floor else "above-ceiling")
    if value is not None and value < weights_bytes * (1 - HEADER_SHARE) - HEADER_BYTES:
        reasons.append("below-header-weights")
    contradicted = any(r in INVALID for r in reasons)
    status = "invalid" if contradicted else "degraded" if reasons else "valid"
    ordered = tuple(r for r in REASONS if r in reasons)
    value = None if contradicted else value
    bound = math.ceil(max(value - floor, ceiling - value)) if method == "nvml-growth" and value is not None else None
    return Memory(value, status, method, ordered, process, growth, *accounts, bound)


def _resident(buffers: Mapping[str, int | None], trace: Trace, engine: int | None, method: str) -> float:
    """The least memory that a loopback device's process can hold: weights, which are written, caches, which are
    cleared, and, for a peak, what it held before. Untouched pages of the graph's buffer are limited by
    UNTOUCHED_SHARE."""
    written = sum(buffers.get(kind) or 0 for kind in ("model", "KV", "RS"))
    idle = min((r.process_bytes for r in trace.before if r.process_bytes), default=0) if method == "rss-peak" else 0
    return max(idle + written, (engine or 0) / (1 + UNTOUCHED_SHARE))


def _cuda(trace: Trace, tables: int) -> tuple[int | None, str, int | None, int | None, list[str]]:
    """(value, method, process list's peak, growth, reasons) from the driver's readings alone.

    tables: upper limit for the bytes of page tables of pinned host memory; the driver charges them to no process.
    """
    readings = [*trace.before, *trace.during, *trace.after]
    errors = {e for r in readings for e in r.errors}
    if "gpu-lost" in errors or not trace.during:
        return None, "nvml-process", None, None, ["gpu-lost" if "gpu-lost" in errors else "no-samples"]
    reasons = []
    run_bytes, own_pid = [r.process_bytes for r in trace.during], None
    if not any(r.listed for r in trace.during) and (own_pid := _newcomer(trace)) is not None:
        run_bytes = [dict(r.others).get(own_pid) for r in trace.during]
        reasons.append("host-pid")
    process, others = _peak(run_bytes), _others(readings, own_pid) or [{}]
    # the list gives bytes for the run and for every other process: their shares are known exactly
    explained = process is not None and all(None not in o.values() for o in others)

    growth, doubts = _growth(trace, own_pid, explained, process, tables)
    reasons += doubts
    changed = any(o.keys() != others[0].keys() for o in others) or not all(
        _still(_known(o[pid] for o in others)) for pid in others[0]
    )
    if changed and not explained:
        reasons.append("foreign-changed")
    elif any(others) and not (explained and _only_draw(readings, own_pid)):
        reasons.append("foreign-process")

    if process is not None and growth is not None:
        if not _agree(process, growth, tables):
            reasons.append("accounts-disagree")
        return process, "nvml-process", process, growth, reasons
    if run_bytes[-1]:  # a list that ended early may have missed the peak
        if not trace.before:
            reasons = ["running-before" if r == "device-total-unknown" else r for r in reasons]
        return process, "nvml-process", process, None, reasons
    # the growth is the run's if no other process is listed; while the list failed, another may have been running
    if "list-unsupported" in errors:
        reasons.append("list-unsupported")
    elif trace.during[-1].listed:
        alone = not any(others) and tables <= AGREE_BYTES - SETTLED_BYTES
        return growth if alone else None, "nvml-growth", process, growth, [*reasons, "bytes-not-listed"]
    else:
        reasons.append("process-not-listed")
    return None, "nvml-growth", process, growth, reasons


def _growth(
    trace: Trace, own_pid: int | None, explained: bool, process: int | None, tables: int
) -> tuple[int | None, list[str]]:
    """(growth of the device over its idle state, reasons to doubt it), less what the list gives to other processes."""
    lists = _others((*trace.before, *trace.during, *trace.after), own_pid) if explained else [{}]
    sums = {sum(_known(o.values())) for o in lists}

    def total(r: Reading) -> int | None:
        if not explained or (len(sums) == 1 and "list-unsupported" in r.errors):
            listed = next(iter(sums), 0)
        elif "list-unsupported" in r.errors:
            return None
        else:
            listed = sum(_known(n for pid, n in r.others if pid != own_pid))
        return None if r.device_bytes is None else r.device_bytes - listed

    totals = [list(map(total, part)) for part in (trace.before, trace.during, trace.after[-1:])]
    idle, used, end = map(_known, totals)
    # the last reading of the run holds the peak, so it must exist; 0 with a process on the device is a failed reading
    if not idle or None in [*totals[0], totals[1][-1], *totals[2]] or trace.during[-1].device_bytes == 0:
        shared = any("memory-shared" in r.errors for r in trace.during)
        return None, ["memory-shared" if shared else "device-total-unknown"]
    high, peak = max(idle), max(used)
    growth = peak - high if peak > high else None
    doubt = "unstable-baseline" if not _still(idle) else "not-returned" if not end or not _still([high, *end]) else None
    if doubt is None:  # if a process held memory, the device's memory must have grown
        held = process is not None or trace.during[-1].listed
        return growth, ["accounts-disagree"] if growth is None and held else []
    if not end or (process is None and not (trace.during[-1].listed and growth)):
        return None, [doubt]
    if process is None:
        return growth, ["unseen-change"]
    low, high = min([*idle, *end]), max([*idle, *end])
    # the idle state was somewhere between the two: the list's value must fit one of them
    fits = _agree(process, min(max(process, peak - high), peak - low), tables)
    return None, ["unseen-change" if fits else doubt]


def _only_draw(readings: Iterable[Reading], own_pid: int | None) -> bool:
    """Whether no other process can compute."""
    return all(pid in r.drawing for r in readings for pid, _ in r.others if pid != own_pid)


def _others(readings: Iterable[Reading], own_pid: int | None = None) -> list[dict[int, int | None]]:
    """The other processes of each reading whose list could be read: a failed list is not an empty one."""
    lists = [dict(r.others) for r in readings if "list-unsupported" not in r.errors]
    return [{pid: n for pid, n in processes.items() if pid != own_pid} for processes in lists]


def _newcomer(trace: Trace) -> int | None:
    """The only process that appeared after the idle readings, with its bytes, and was gone at the end."""
    before, during, after = map(_others, (trace.before, trace.during, trace.after))
    idle_pids = {pid for processes in (*before, *after[-1:]) for pid in processes}
    arrivals = {pid: n for processes in during for pid, n in processes.items() if pid not in idle_pids}
    return next(iter(arrivals)) if len(arrivals) == 1 and before and after and all(arrivals.values()) else None
