"""The host during a run: CPU time by owner, the server's page faults, jumps of the clock; and the host's identity."""

import contextlib
import hashlib
import hmac
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from moelib import process
from moelib.files import stored
from moelib.ranges import Count, Cpus, Elapsed, Seconds, Step

READ_BYTES = 1 << 30  # over all CPUs together; more than any cache holds
READ_S = 0.5
KEY = b"moelib: which host measured"  # fixed, so that a host has the same id in every study
UNIDENTIFIED = "the system tells neither a boot's id nor a machine's"
"""The reason recorded for a host without identity."""


@stored
class Use:
    """The host over one run."""

    elapsed_s: Elapsed
    cpus: Cpus
    """CPUs of the whole host, over which `busy_s` is summed."""
    busy_s: Seconds
    """CPU seconds of all processes on the host, including time stolen by a hypervisor."""
    own_s: Seconds
    """CPU seconds of this process, the server and the device's process."""
    minor_faults: Count | None
    """Page faults of the server for pages that were already in memory."""
    major_faults: Count | None
    """Page faults of the server for pages that had to be read from disk."""
    clock_step_s: Step
    """By how much the wall clock was set or slewed, relative to the monotonic clock."""
    suspended_s: Step
    """Time for which the host was suspended."""

    @property
    def foreign_share(self) -> float:
        """Share of the host's CPU time that other processes used."""
        return max(0.0, self.busy_s - self.own_s) / (self.elapsed_s * self.cpus)


class Watch:
    """Measures clocks and CPU times from its construction to `stop`.

    Both raise ProcessError (monitor-failed) if the system does not report a time; a missing time is never taken as 0.
    """

    def __init__(self) -> None:
        self._start = _clocks()
        self._busy, self._own = _measured(_busy_s), _measured(_cpu_s, os.getpid())

    def stop(self, server_pid: int, device_pid: int | None) -> Use:
        """Call it while the processes are still running: their CPU times are lost when they end."""
        children = sum(_measured(_cpu_s, pid) for pid in (server_pid, device_pid) if pid is not None)
        own = _measured(_cpu_s, os.getpid()) - self._own + children
        busy, now = _measured(_busy_s) - self._busy, _clocks()
        wall, elapsed, boot = (b - a for a, b in zip(self._start, now, strict=True))
        minor, major = _faults(server_pid)
        return Use(
            elapsed_s=round(elapsed, 6),
            cpus=_measured(_all_cpus),
            busy_s=round(busy, 3),
            own_s=round(own, 3),
            minor_faults=minor,
            major_faults=major,
            clock_step_s=round(wall - boot, 6),
            suspended_s=round(boot - elapsed, 6),
        )


def _measured(read: Callable[..., float], *about: int) -> float:
    try:
        return read(*about)
    except (psutil.Error, OSError, ValueError) as err:
        quantity = f"the CPU time of process {about[0]}" if about else "the host's CPU time"
        raise process.ProcessError(
            "monitor-failed",
            f"{quantity} could not be read ({err}), so it is unknown whether the run had the host to itself: run again",
        ) from None


def _clocks() -> tuple[float, float, float]:
    """(wall clock, monotonic clock, monotonic clock that includes suspension)."""
    # on macOS time.monotonic() stops during sleep and CLOCK_MONOTONIC does not (clock_gettime(3))
    with_sleep = time.CLOCK_MONOTONIC if sys.platform == "darwin" else time.CLOCK_BOOTTIME
    return time.time(), time.monotonic(), time.clock_gettime(with_sleep)


def _all_cpus() -> int:
    if (cpus := psutil.cpu_count()) is None:
        raise ValueError("the system does not tell how many CPUs it has")
    return cpus


def _busy_s() -> float:
    t = psutil.cpu_times()
    return t.user + t.system + sum(getattr(t, name, 0.0) for name in ("nice", "irq", "softirq", "steal"))


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    t = psutil.Process(pid).cpu_times()
    return t.user + t.system


def _faults(pid: int) -> tuple[int | None, int | None]:
    """(minor, major) page faults of a process; None if the system does not report them (proc(5), stat: 10 and 12)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return int(fields[7]), int(fields[9])
    except (OSError, IndexError, ValueError):
        return None, None


def read_bandwidth() -> float:
    """Highest rate in bytes per second at which all usable CPUs read RAM: the upper bound for experts on the CPU.

    Each thread sums its own array, which numpy does without the interpreter's lock. Other users of the RAM can only
    make a measurement slower, so the highest is taken.
    """
    import numpy as np

    cpus, rates = process.usable_cpus(), []
    parts = [np.ones(READ_BYTES // 8 // cpus, np.int64) for _ in range(cpus)]
    with ThreadPoolExecutor(cpus) as pool:
        begun = time.perf_counter()
        while len(rates) < 4 or time.perf_counter() - begun < READ_S:
            started = time.perf_counter()
            list(pool.map(np.sum, parts))
            rates.append(sum(p.nbytes for p in parts) / (time.perf_counter() - started))
    return max(rates[1:])  # the first also maps the pages


def tree(pid: int | None) -> set[int]:
    """The ids of a process and all its descendants; empty for None.

    Linux lists each thread's children (proc_pid_task_children(5)), which takes under a millisecond for a tree; a child
    that starts meanwhile may be missed until the next call. Without that list, all processes of the host are searched,
    which takes tens of milliseconds on a large host.
    """
    if pid is None:
        return set()
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        try:
            return {pid, *(c.pid for c in psutil.Process(pid).children(recursive=True))}
        except psutil.NoSuchProcess:
            return {pid}
    processes, pending = set(), [pid]
    while pending:
        current = pending.pop()
        if current not in processes:
            processes.add(current)
            pending += _children(current)
    return processes


def _children(pid: int) -> list[int]:
    """The children of all threads of a process; empty if it has ended."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):  # the thread has just ended
                children += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_bytes().split())
    return children


def identity() -> str | None:
    """16 hex digits that identify this host since its last boot, and reveal nothing else; None: UNIDENTIFIED.

    A keyed hash of the boot's id and the machine's id (boot_id of random(4), machine-id(5)). The boot's id differs
    between clones of one image and is the same in all containers of a host. After a reboot the host counts as another
    one, as its memory or clocks may have changed. Virtual machines resumed from one snapshot share both ids and
    cannot be distinguished.
    """
    ids = [_first_line(p) for p in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id")]
    if sys.platform == "darwin":
        ids = [_answer("sysctl", "-n", "kern.bootsessionuuid"), _answer("sysctl", "-n", "kern.uuid")]
    if not any(ids):
        return None
    return hmac.new(KEY, "\n".join(i or "" for i in ids).encode(), hashlib.sha256).hexdigest()[:16]


def _first_line(path: str) -> str | None:
    """The content of a system file; None if it cannot be read or is not yet initialised."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return text if text and text != "uninitialized" else None


def _answer(*argv: str) -> str | None:
    try:
        done = subprocess.run(argv, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True)
        return done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
