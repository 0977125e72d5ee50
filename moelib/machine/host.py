"""The host: what it is, and over a run its CPU time by owner, the server's page faults and jumps of the clock."""

import functools
import hashlib
import hmac
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import psutil

from moelib import __version__
from moelib.base.files import stored
from moelib.base.schema import Count, Cpus, Elapsed, Seconds, Step
from moelib.catalogue import params
from moelib.machine import process

READ_BYTES = 1 << 30  # over all CPUs together; more than any cache holds
READ_S = 0.5
KEY = b"moelib: which host measured"  # fixed, so that a host has the same id in every study
UNIDENTIFIED = "the system tells neither a boot's id nor a machine's"
"""The reason recorded for a host without identity."""
N = TypeVar("N", int, float)


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


class Stopwatch:
    """Measures clocks and CPU times from its construction to `stop`.

    Both raise ProcessError (monitor-failed) if the system does not report a time; a missing time is never taken as 0.
    """

    def __init__(self) -> None:
        self._start = _clocks()
        self._busy, self._own = _measured(_busy_s), _measured(_cpu_s, os.getpid())
        self._faults: tuple[int | None, int | None] = (0, 0)

    def join(self, pid: int) -> None:
        """Leave out what a server that runs already has spent before."""
        self._own += _measured(_cpu_s, pid)
        self._faults = _faults(pid)

    def stop(self, server_pid: int | None, device_pid: int | None) -> Use:
        """Call it while the processes are still running: their CPU times are lost when they end."""
        children = sum(_measured(_cpu_s, pid) for pid in (server_pid, device_pid) if pid is not None)
        own = _measured(_cpu_s, os.getpid()) - self._own + children
        busy, now = _measured(_busy_s) - self._busy, _clocks()
        wall, elapsed, boot = (b - a for a, b in zip(self._start, now, strict=True))
        minor, major = map(_since, _faults(server_pid), self._faults)
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


def _measured(read: Callable[..., N], *about: int) -> N:
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


def _faults(pid: int | None) -> tuple[int | None, int | None]:
    """(minor, major) page faults of a process; None if the system does not report them (proc(5), stat: 10 and 12)."""
    fields = process.system_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(fields[7]), int(fields[9])) if fields else (None, None)


def _since(now: int | None, before: int | None) -> int | None:
    return None if now is None or before is None else now - before


def read_bandwidth() -> float:
    """Highest rate in bytes per second at which all usable CPUs read RAM: the upper bound for experts on the CPU.

    Each thread sums its own array, which numpy does without the interpreter's lock. Other users of the RAM can only
    make a measurement slower, so the highest is taken.
    """
    import numpy as np

    cpus, rates = usable_cpus(), list[float]()
    parts = [np.ones(READ_BYTES // 8 // cpus, np.int64) for _ in range(cpus)]
    with ThreadPoolExecutor(cpus) as pool:
        first_started = time.perf_counter()
        while len(rates) < 4 or time.perf_counter() - first_started < READ_S:
            started = time.perf_counter()
            list(pool.map(np.sum, parts))
            rates.append(sum(p.nbytes for p in parts) / (time.perf_counter() - started))
    return max(rates[1:])  # the first also maps the pages


def tree(pid: int) -> set[int]:
    """The ids of a process and all its descendants; takes tens of milliseconds on a large host."""
    try:
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    except psutil.Error:  # it has ended
        return {pid}


def identity() -> str | None:
    """16 hex digits that identify this host since its last boot, and reveal nothing else; None: UNIDENTIFIED.

    A keyed hash of the boot's id and the machine's id (boot_id of random(4), machine-id(5)). The boot's id differs
    between clones of one image and is the same in all containers of a host. After a reboot the host counts as another
    one, as its memory or clocks may have changed. Virtual machines resumed from one snapshot share both ids and
    cannot be distinguished.
    """
    ids = [_system_id(p) for p in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id")]
    if sys.platform == "darwin":
        ids = [_output("sysctl", "-n", "kern.bootsessionuuid"), _output("sysctl", "-n", "kern.uuid")]
    if not any(ids):
        return None
    return hmac.new(KEY, "\n".join(i or "" for i in ids).encode(), hashlib.sha256).hexdigest()[:16]


def _system_id(path: str) -> str | None:
    """The id in a system file; None if it cannot be read or is not yet initialised."""
    text = process.system_text(path)
    return text if text and text != "uninitialized" else None


def _output(*argv: str) -> str | None:
    """The output of a command; None if it fails, as git does outside a clone."""
    try:
        return subprocess.check_output(
            argv, stderr=subprocess.DEVNULL, encoding="utf-8", errors="replace", timeout=20
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str | None:
    """The CPU's model; None if the system does not tell it."""
    model = re.search(r"^model name[^:\n]*:(.*)", process.system_text("/proc/cpuinfo"), re.M)
    return (model[1].strip() if model else "") or platform.processor() or None


def cpu_ids() -> list[int]:
    """Ids of the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def usable_cpus() -> int:
    """How many CPUs this process may use, by its affinity and its cgroup's quota."""
    n = len(cpu_ids())
    try:
        quota, period = map(int, process.system_text("/sys/fs/cgroup/cpu.max").split())
    except ValueError:  # no cgroup, or "max": no quota
        return n
    return min(n, max(1, quota // period))


def all_cpus() -> int:
    """How many CPUs the host has, whoever may use them."""
    return psutil.cpu_count() or len(cpu_ids())


CPUS = Path("/sys/devices/system/cpu")


def cache_bytes() -> int | None:
    """The last-level cache of the CPUs that this process may run on, all of its instances; None if Linux does not tell.

    Sizes and who shares them: /sys/devices/system/cpu/cpuN/cache (sysfs-devices-system-cpu).
    """
    caches: dict[tuple[int, str], int] = {}
    for cpu in cpu_ids():
        for folder in (CPUS / f"cpu{cpu}/cache").glob("index[0-9]*"):
            level, size, shared = (process.system_text(folder / n) for n in ("level", "size", "shared_cpu_list"))
            if level.isdigit() and (m := re.fullmatch(r"(\d{1,12})K", size)):
                caches[int(level), shared] = int(m[1]) << 10
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last) or None


PRODUCTS = ("outputs", "docs")
"""Folders of the clone that hold results; changes in them do not make the measuring code differ from its commit."""


def _code(notebook: str | None) -> list[str] | None:
    """The sources of a notebook's code cells; None if it is none."""
    try:
        cells = json.loads(notebook or "")["cells"]
        return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError):
        return None


def _differs(git: tuple[str, ...]) -> bool | None:
    """Whether tracked files, except results, differ from the commit; of a notebook its code alone counts, as opening
    and saving one changes the rest. None outside a git clone."""
    products = (f":!{folder}" for folder in PRODUCTS)
    names = _output(*git, "diff", "HEAD", "--name-only", "-z", "--relative", "--no-renames", "--", ".", *products)
    for name in filter(None, (names or "").split("\0")):
        path = params.root() / name
        before = _code(_output(*git, "show", f"HEAD:./{name}")) if path.suffix == ".ipynb" else None
        if before is None or not path.is_file() or before != _code(process.system_text(path)):
            return True
    return None if names is None else False


@functools.cache
def facts() -> dict[str, Any]:
    """CPU, RAM, system and moelib's commit.

    `dirty`: whether tracked files, except results, differ from `commit`; notebooks by their code. Both are None outside
    a git clone.
    """
    git = ("git", "-C", str(params.root()))
    commit = _output(*git, "rev-parse", "HEAD")
    return {
        "cpu": cpu_name(),
        "cpus": usable_cpus(),
        "ram_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "moelib": __version__,
        "commit": commit,
        "dirty": _differs(git),
    }
