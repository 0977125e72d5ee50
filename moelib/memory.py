"""Device memory of a run as a reconciled value: four accounts, what each must lie between, and why it is not known.

The accounts: the driver's list of processes, the device's growth over its idle state, the engine's own buffers, and
the weights that the file's header puts on the device. A value is never a bare number: it has a status, a method and
reasons from a closed list. What cannot be told apart from something else is None, never 0.
"""

import math
from collections.abc import Iterable, Sequence

from moelib.engine import Report
from moelib.files import stored

REASONS = {
    # invalid: the accounts contradict each other, or something disturbed them
    "no-samples": "nothing could be read of the run's memory",
    "gpu-lost": "the driver lost the GPU",
    "unstable-baseline": "the idle device's memory was moving before the run",
    "not-returned": "the device's memory did not come back to its idle state after the run",
    "foreign-changed": "another process came to the device, left it or grew on it while the run lasted",
    "accounts-disagree": "the process list and the device's growth differ by more than 64 MiB and 1 %, page tables of "
    "pinned host memory left aside",
    "below-engine-buffers": "less was read than a context and what buffers the engine says it holds",
    "below-header-weights": "less was read than the weights that the file's header puts on the device",
    "above-ceiling": "more was read than the engine's buffers and a context can explain",
    # degraded: an account is missing; there is a value where what is left still proves it
    "no-device": "the run had no device, so it has no device memory",
    "process-not-listed": "the driver lists no process of the run, so its share of the device's growth is not known; "
    "in a container, share the host's process ids",
    "list-unsupported": "the driver could not list processes, so the run's share of the device's growth is not known",
    "host-pid": "the driver lists the run's process by the host's id; it is known by coming and going with the run",
    "bytes-not-listed": "the driver lists the run's process without its bytes; the value is the device's growth, where "
    "the run was alone on it and pinned too little host memory for its page tables to matter",
    "device-total-unknown": "the device's own total could not be read; the value is the process list's alone",
    "foreign-process": "another process was on the device, and kept still",
    "engine-silent": "the engine reported no buffers to hold the value against",
    "context-unmeasured": "the size of an empty context could not be measured; a wide bound was used",
    "sampled-peak": "the system keeps no peak; the value is the highest sample",
}
INVALID = tuple(REASONS)[:9]

AGREE_BYTES, AGREE_SHARE = 64 << 20, 0.01  # two exact NVML accounts were seen to differ by 9 MiB, the rest is margin
TABLE_ENTRY_BYTES, PAGE_BYTES = 8, 4096  # on the device, for pinned host memory; 80 MiB for 39.8 GiB seen on an H200
SETTLED_BYTES = 16 << 20  # idle GPUs were seen to move by 0; a desktop moves by more, and then growth proves nothing
LEAST_CONTEXT_BYTES = 64 << 20  # no CUDA context is smaller: 518 MiB seen on an H200
CONTEXTS, SHARE = 1.5, 0.01  # context, then cuBLAS workspace, pool and graphs: 1.35 contexts in all seen
UNMEASURED_CONTEXT_BYTES = 4 << 29  # 2 GiB, where no context could be measured
PROCESS_BYTES = 64 << 20  # code and heap of a loopback device's process: 12 MiB seen
HEADER_SHARE, HEADER_BYTES = 0.001, 1 << 20  # the engine prints MiB with two decimals and pads tensors


@stored
class Reading:
    """One look at the device, `t_s` seconds after the run's start."""

    t_s: float
    process_bytes: int | None
    """Memory of the run's processes on every GPU, by the driver's list; RSS of a loopback device."""
    device_bytes: int | None
    """Memory in use on the whole device."""
    listed: bool = False
    """Whether the driver listed a process of the run, with or without its bytes."""
    others: tuple[tuple[int, int | None], ...] = ()
    """(process id, bytes) of the other processes on the device."""
    errors: tuple[str, ...] = ()
    """What could not be read: gpu-lost, list-unsupported, memory-unsupported."""


@stored
class Trace:
    """Readings of the idle device, of the run, and of the device after the run's end."""

    before: tuple[Reading, ...]
    during: tuple[Reading, ...]
    """The last one is taken after the last request, with the server still up: pools never shrink."""
    after: tuple[Reading, ...] = ()


@stored
class Memory:
    value_bytes: int | None
    """Peak device memory of the run's processes; None with a reason where it is not known."""
    status: str
    """valid, degraded or invalid."""
    method: str | None
    """rss-peak, rss-samples, nvml-process, nvml-growth."""
    reasons: tuple[str, ...]
    process_bytes: int | None
    """Account 1: peak of the run's processes by the system's list."""
    growth_bytes: int | None
    """Account 2: peak of the device over its idle state; None on loopback. Unlike account 1 it holds the page tables
    through which the device reads pinned host memory: 2 MiB for each GiB."""
    engine_bytes: int | None
    """Account 3: device buffers by the engine's own report, a part of the value."""
    weights_bytes: int
    """Account 4: weights on the device by the file's header, a part of account 3."""
    context_bytes: int | None
    """An empty context on this device, measured."""
    trace: Trace

    @property
    def residual_bytes(self) -> int | None:
        """What the engine's report does not explain: context, workspaces, code."""
        if self.value_bytes is None or self.engine_bytes is None:
            return None
        return self.value_bytes - self.engine_bytes


def _peak(values: Iterable[int | None]) -> int | None:
    return max((v for v in values if v), default=None)  # a reading of exactly 0 is a failed reading


def _agree(process: int, growth: int, tables: int) -> bool:
    apart = growth - process
    return abs(apart - min(max(apart, 0), tables)) <= max(AGREE_BYTES, AGREE_SHARE * max(process, growth))


def _still(values: Sequence[int]) -> bool:
    """Within the bound of an idle device."""
    return max(values, default=0) - min(values, default=0) <= SETTLED_BYTES


def reconcile(
    kind: str,
    trace: Trace,
    report: Report,
    weights_bytes: int,
    context_bytes: int | None = None,
    peak_bytes: int | None = None,
) -> Memory:
    """The run's device memory from all accounts.

    kind: cuda, loopback or none. weights_bytes: what the header puts on the device. context_bytes: an empty context
    on this GPU, None where it could not be measured. peak_bytes: the system's own record of the loopback device's
    peak RSS, None where it keeps none.
    """
    engine = report.device_bytes()
    told = {"engine_bytes": engine, "weights_bytes": weights_bytes, "context_bytes": context_bytes, "trace": trace}
    if kind == "none":
        return Memory(None, "degraded", None, ("no-device",), None, None, **told)
    if kind == "loopback":
        process, growth = _peak([peak_bytes]), None
        value, method, reasons = process, "rss-peak", []
        if value is None:
            process = value = _peak(r.process_bytes for r in trace.during)
            method, reasons = "rss-samples", ["sampled-peak"]
        if value is None:
            reasons.append("no-samples")
        # untouched pages of caches and graphs do not count in RSS; weights are written, so they do
        floor, ceiling = report.device_bytes("model"), (engine or 0) + PROCESS_BYTES
    else:
        tables = report.pinned_bytes * TABLE_ENTRY_BYTES // PAGE_BYTES
        value, method, process, growth, reasons = _cuda(trace, tables)
        context = UNMEASURED_CONTEXT_BYTES if context_bytes is None else CONTEXTS * context_bytes
        if context_bytes is None:
            reasons.append("context-unmeasured")
        floor, ceiling = (engine or 0) + LEAST_CONTEXT_BYTES, (engine or 0) * (1 + SHARE) + context
    if engine is None:
        reasons.append("engine-silent")
        if growth is None or process is None:
            value = None  # one account with nothing to hold it against
        ceiling = math.inf
    if value is not None and not floor <= value <= ceiling:
        reasons.append("below-engine-buffers" if value < floor else "above-ceiling")
    if value is not None and value < weights_bytes * (1 - HEADER_SHARE) - HEADER_BYTES:
        reasons.append("below-header-weights")
    wrong = any(r in INVALID for r in reasons)
    status = "invalid" if wrong else "degraded" if reasons else "valid"
    ordered = tuple(r for r in REASONS if r in reasons)
    return Memory(None if wrong else value, status, method, ordered, process, growth, **told)


def _cuda(trace: Trace, tables: int) -> tuple[int | None, str, int | None, int | None, list[str]]:
    """(value, method, process list's peak, growth, reasons) by what the driver says alone.

    tables: bytes of the page tables of pinned host memory, at most; the driver charges them to no process.
    """
    every = [*trace.before, *trace.during, *trace.after]
    errors = {e for r in every for e in r.errors}
    if "gpu-lost" in errors or not trace.during:
        return None, "nvml-process", None, None, ["gpu-lost" if "gpu-lost" in errors else "no-samples"]
    reasons = []
    mine, others = [r.process_bytes for r in trace.during], _others(every) or [{}]
    if not any(r.listed for r in trace.during) and (ours := _newcomer(trace)) is not None:
        mine = [dict(r.others).get(ours) for r in trace.during]
        others = [{pid: n for pid, n in o.items() if pid != ours} for o in others]
        reasons.append("host-pid")
    process = _peak(mine)

    growth, used = None, [r.device_bytes for r in trace.during]
    idle, end = [r.device_bytes for r in trace.before], [r.device_bytes for r in trace.after[-1:]]
    # the last reading of the run must be there: it holds the peak
    if not idle or None in [*idle, used[-1], *end]:
        reasons.append("device-total-unknown")
    elif not _still(idle):
        reasons.append("unstable-baseline")
    elif not end or not _still([max(idle), *end]):
        reasons.append("not-returned")
    elif (peak := _peak(used)) is not None and peak > max(idle):
        growth = peak - max(idle)
    elif process is not None:
        reasons.append("accounts-disagree")  # a process holds memory and nothing grew

    if any(o.keys() != others[0].keys() for o in others) or not all(
        _still([o[pid] for o in others if o[pid] is not None]) for pid in others[0]
    ):
        reasons.append("foreign-changed")
    elif others[0]:
        reasons.append("foreign-process")

    if process is not None and growth is not None:
        if not _agree(process, growth, tables):
            reasons.append("accounts-disagree")
        return process, "nvml-process", process, growth, reasons
    if mine[-1]:  # a list that ended early may have missed the peak
        return process, "nvml-process", process, None, reasons
    if process is None and growth is None:
        return None, "nvml-growth", None, None, [*reasons, "no-samples"]
    # the device's growth is the run's where it is listed and no other is: while a list failed, one may have been there
    if "list-unsupported" in errors:
        reasons.append("list-unsupported")
    elif trace.during[-1].listed:
        alone = not others[0] and tables <= AGREE_BYTES - SETTLED_BYTES
        return growth if alone else None, "nvml-growth", process, growth, [*reasons, "bytes-not-listed"]
    else:
        reasons.append("process-not-listed")
    return None, "nvml-growth", process, growth, reasons


def _others(readings: Iterable[Reading]) -> list[dict[int, int | None]]:
    """The other processes by reading, where the list could be read: a list that failed is not an empty one."""
    return [dict(r.others) for r in readings if "list-unsupported" not in r.errors]


def _newcomer(trace: Trace) -> int | None:
    """The one process, bytes and all, that came after the idle readings and was gone at the end."""
    before, during, after = map(_others, (trace.before, trace.during, trace.after))
    there = {pid for processes in (*before, *after[-1:]) for pid in processes}
    came = {pid: n for processes in during for pid, n in processes.items() if pid not in there}
    return next(iter(came)) if len(came) == 1 and before and after and all(came.values()) else None
