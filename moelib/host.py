"""What the host did during a run: whose time the CPUs took, the server's page faults, and whether a clock jumped."""

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from moelib import process
from moelib.files import stored

READ_BYTES = 1 << 30  # over all CPUs: more than any cache


@stored
class Use:
    """The host over one run."""

    elapsed_s: float
    cpus: int
    """CPUs of the whole host, which `busy_s` is counted over."""
    busy_s: float
    """CPU seconds of everything on the host, time stolen by a hypervisor included."""
    own_s: float
    """CPU seconds of this process, the server and the device's process."""
    minor_faults: int | None
    """Of the server: pages that were in memory already."""
    major_faults: int | None
    """Of the server: pages that had to be read."""
    clock_step_s: float
    """By how much the wall clock was set or slewed against the monotonic one."""
    suspended_s: float
    """Time that the host slept."""

    @property
    def foreign_share(self) -> float:
        """Share of the host's CPU time that others took."""
        return max(0.0, self.busy_s - self.own_s) / (self.elapsed_s * self.cpus)


class Watch:
    """Clocks and CPU times from now on; `stop` tells what became of them."""

    def __init__(self) -> None:
        self._start = _clocks()
        self._busy, self._own = _busy_s(), _cpu_s(os.getpid())

    def stop(self, server_pid: int, device_pid: int | None) -> Use:
        """Call it while the processes are still there: their times end with them."""
        own = _cpu_s(os.getpid()) - self._own + _cpu_s(server_pid) + _cpu_s(device_pid)
        busy, now = _busy_s() - self._busy, _clocks()
        wall, elapsed, boot = (b - a for a, b in zip(self._start, now, strict=True))
        minor, major = _faults(server_pid)
        return Use(
            elapsed_s=round(elapsed, 6),
            cpus=psutil.cpu_count() or 1,
            busy_s=round(busy, 3),
            own_s=round(own, 3),
            minor_faults=minor,
            major_faults=major,
            clock_step_s=round(wall - boot, 6),
            suspended_s=round(boot - elapsed, 6),
        )


def _clocks() -> tuple[float, float, float]:
    """(wall clock, monotonic, monotonic with sleep)."""
    monotonic = time.monotonic()
    boot = time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else monotonic
    return time.time(), monotonic, boot


def _busy_s() -> float:
    t = psutil.cpu_times()
    return t.user + t.system + sum(getattr(t, name, 0.0) for name in ("nice", "irq", "softirq", "steal"))


def _cpu_s(pid: int | None) -> float:
    """CPU seconds of a process so far; 0 for one that is not there."""
    with contextlib.suppress(psutil.Error):
        t = psutil.Process(pid).cpu_times() if pid else None
        return t.user + t.system if t else 0.0
    return 0.0


def _faults(pid: int) -> tuple[int | None, int | None]:
    """(minor, major) page faults of a process; None where the system does not say (proc(5), stat: 10 and 12)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[7]), int(fields[9])
    except (OSError, IndexError, ValueError):
        return None, None


def read_bandwidth() -> float:
    """Bytes per second that all usable CPUs together read from RAM, best of 3: the bound of experts on the CPU.

    Each thread sums its own part, which numpy does without the interpreter's lock.
    """
    import numpy as np

    cpus = process.usable_cpus()
    parts, best = [np.ones(READ_BYTES // 8 // cpus, np.int64) for _ in range(cpus)], 0.0
    with ThreadPoolExecutor(cpus) as pool:
        for _ in range(4):  # the first brings the pages in
            started = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, sum(p.nbytes for p in parts) / (time.perf_counter() - started))
    return best


def tree(pid: int | None) -> set[int]:
    """A process and what it started, by id; empty for None."""
    if pid is None:
        return set()
    try:
        return {pid, *(c.pid for c in psutil.Process(pid).children(recursive=True))}
    except psutil.NoSuchProcess:
        return {pid}
