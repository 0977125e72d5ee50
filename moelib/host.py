"""What the host did during a run: whose time the CPUs took, the server's page faults, and whether a clock jumped; and
what tells one host from another."""

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

READ_BYTES = 1 << 30  # over all CPUs: more than any cache
READ_S = 0.5
KEY = b"moelib: which host measured"  # of the project, and fixed: the same host has the same id in every study
UNIDENTIFIED = "the system tells neither a boot's id nor a machine's"
"""Why a host has no identity, where it has none."""


@stored
class Use:
    """The host over one run."""

    elapsed_s: Elapsed
    cpus: Cpus
    """CPUs of the whole host, which `busy_s` is counted over."""
    busy_s: Seconds
    """CPU seconds of everything on the host, time stolen by a hypervisor included."""
    own_s: Seconds
    """CPU seconds of this process, the server and the device's process."""
    minor_faults: Count | None
    """Of the server: pages that were in memory already."""
    major_faults: Count | None
    """Of the server: pages that had to be read."""
    clock_step_s: Step
    """By how much the wall clock was set or slewed against the monotonic one."""
    suspended_s: Step
    """Time that the host slept."""

    @property
    def foreign_share(self) -> float:
        """Share of the host's CPU time that others took."""
        return max(0.0, self.busy_s - self.own_s) / (self.elapsed_s * self.cpus)


class Watch:
    """Clocks and CPU times from now on; `stop` tells what became of them.

    Both raise ProcessError (monitor-failed) where the system does not tell a time: none is taken for 0.
    """

    def __init__(self) -> None:
        self._start = _clocks()
        self._busy, self._own = _measured(_busy_s), _measured(_cpu_s, os.getpid())

    def stop(self, server_pid: int, device_pid: int | None) -> Use:
        """Call it while the processes are still there: their times end with them."""
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
        what = f"the CPU time of process {about[0]}" if about else "the host's CPU time"
        raise process.ProcessError(
            "monitor-failed", f"{what} could not be read ({err}): the run is not known to have had the host to itself"
        ) from None


def _clocks() -> tuple[float, float, float]:
    """(wall clock, monotonic, monotonic with sleep)."""
    # the name of the one that goes on in sleep: macOS's monotonic clock of time.monotonic() stops (clock_gettime(3))
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
    """(minor, major) page faults of a process; None where the system does not say (proc(5), stat: 10 and 12)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return int(fields[7]), int(fields[9])
    except (OSError, IndexError, ValueError):
        return None, None


def read_bandwidth() -> float:
    """Bytes per second that all usable CPUs together read from RAM, at best: the bound of experts on the CPU.

    Each thread sums its own part, which numpy does without the interpreter's lock. What others do with a shared RAM
    can only make a reading slower.
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
    return max(rates[1:])  # the first brings the pages in


def tree(pid: int | None) -> set[int]:
    """A process and what it started, by id; empty for None.

    Linux tells each thread's children (proc_pid_task_children(5), asked for a whole tree in under a millisecond; where
    they may change meanwhile, some can be missed, and the next call has them). Without that, and elsewhere, all
    processes of the host are looked through, which takes tens of milliseconds on a large one.
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
    """The children of a process, of whichever thread; none of one that is gone."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):  # a thread that just ended
                children += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_bytes().split())
    return children


def identity() -> str | None:
    """16 hex digits that tell this host, in this boot, from any other, and nothing else; None: UNIDENTIFIED.

    A keyed hash of the boot's and the machine's ids (boot_id of random(4), machine-id(5)). The boot's tells clones of
    one image apart and is the same in all containers of a host; the machine's, where it differs, tells more. After a
    reboot the host counts as another one: its memory and clocks may be. Virtual machines that are woken from one
    snapshot of a running one have both ids in common, and are not told apart.
    """
    ids = [_first_line(p) for p in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id")]
    if sys.platform == "darwin":
        ids = [_answer("sysctl", "-n", "kern.bootsessionuuid"), _answer("sysctl", "-n", "kern.uuid")]
    if not any(ids):
        return None
    return hmac.new(KEY, "\n".join(i or "" for i in ids).encode(), hashlib.sha256).hexdigest()[:16]


def _first_line(path: str) -> str | None:
    """What a file of the system says; None where it does not, or says that nothing is set yet."""
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
