"""Device memory of a run as a reconciled value: what was read, what it must lie between, and why it is not known.

A value is never a bare number: it has a status, a method and reasons from a closed list, and an unknown one is None.
"""

from moelib.engine import Report
from moelib.files import stored

REASONS = {
    "no-device": "the run had no device, so it has no device memory",
    "no-samples": "nothing could be read while the run lasted",
    "process-not-listed": "the driver did not list the run's processes; the value is the device's growth",
    "foreign-process": "another process used the device, so its growth is not this run's alone",
    "sampled-peak": "the system keeps no peak; the value is the highest sample",
    "engine-silent": "the engine reported no buffers to hold the value against",
    "below-engine-buffers": "less was read than the engine says it holds on the device",
    "above-ceiling": "more was read than the engine's buffers and a context can explain",
    "accounts-disagree": "the process list and the device's growth differ by more than 64 MiB and 1 %",
}

AGREE_BYTES, AGREE_SHARE = 64 << 20, 0.01  # what two exact NVML accounts were seen to differ by, and a margin
CONTEXT_BYTES = 2 << 30  # CUDA context, cuBLAS workspace and pools: 0.7 GiB seen on an H200
PROCESS_BYTES = 64 << 20  # code and heap of the device process itself: 12 MiB seen


@stored
class Reading:
    """One look at the device, `t_s` seconds after the run's start."""

    t_s: float
    process_bytes: int | None
    """Memory of the run's processes on the device."""
    device_bytes: int | None
    """Memory in use on the whole device."""
    foreign: int | None = None
    """Processes on the device that are not the run's."""


@stored
class Memory:
    value_bytes: int | None
    """Peak device memory of the run's processes; None with a reason where it is not known."""
    status: str
    """valid, degraded or invalid."""
    method: str | None
    """rss-peak, rss-samples, nvml-process, nvml-device."""
    reasons: tuple[str, ...]
    engine_bytes: int | None
    """Device buffers by the engine's own report: a part of the value."""
    idle_bytes: int | None
    """In use before the run: of the device process (loopback) or of the whole device (cuda)."""
    readings: tuple[Reading, ...]

    @property
    def residual_bytes(self) -> int | None:
        """What the engine's report does not explain: context, workspaces, code."""
        if self.value_bytes is None or self.engine_bytes is None:
            return None
        return self.value_bytes - self.engine_bytes


def _peak(values: list[int | None]) -> int | None:
    known = [v for v in values if v]  # a reading of exactly 0 is a failed reading
    return max(known) if known else None


def reconcile(kind: str, readings: list[Reading], idle: Reading, report: Report, peak_bytes: int | None) -> Memory:
    """The run's device memory from all accounts.

    kind: cuda, loopback or none. idle: a reading before the run. peak_bytes: the system's own record of the device
    process's peak (loopback), None where it keeps none.
    """
    engine, reasons = report.device_bytes(), []
    if kind == "none":
        return Memory(None, "degraded", None, ("no-device",), engine, None, ())
    if kind == "loopback":
        value, method, before = peak_bytes, "rss-peak", idle.process_bytes
        if value is None:
            value, method = _peak([r.process_bytes for r in readings]), "rss-samples"
            reasons.append("sampled-peak")
        # untouched pages of caches and graphs do not count in RSS; weights are written, so they do
        floor, ceiling = report.device_bytes("model"), (engine or 0) + PROCESS_BYTES
    else:
        before = idle.device_bytes
        value, method = _peak([r.process_bytes for r in readings]), "nvml-process"
        used = _peak([r.device_bytes for r in readings])
        growth = used - before if used is not None and before is not None and used > before else None
        foreign = any(r.foreign for r in [idle, *readings])
        if value is None:
            value, method = None if foreign else growth, "nvml-device"
            reasons.append("process-not-listed")
        elif growth is not None and not foreign and abs(growth - value) > max(AGREE_BYTES, AGREE_SHARE * value):
            reasons.append("accounts-disagree")
        if foreign:
            reasons.append("foreign-process")
        floor, ceiling = engine, (engine or 0) + CONTEXT_BYTES
    invalid = []
    if value is None:
        invalid = ["no-samples"]
    elif engine is None:
        reasons.append("engine-silent")
    elif not floor <= value <= ceiling:
        invalid = ["below-engine-buffers" if value < floor else "above-ceiling"]
    status = "invalid" if invalid else "degraded" if reasons else "valid"
    return Memory(None if invalid else value, status, method, (*invalid, *reasons), engine, before, tuple(readings))
