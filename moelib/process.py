"""Supervised children: own log file, deadline, clean end, and no orphan however the parent dies.

Also what the machine says of itself, as every record names it.
"""

import contextlib
import functools
import json
import os
import platform
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from moelib import __version__, params

POLL_S = 0.005
GRACE_S = 10.0  # for a tool to end by itself when told to

ENV_ALLOWED = ("PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "LANG", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
"""What a child may inherit. llama.cpp applies every LLAMA_ARG_* variable silently, so nothing else gets through."""

# Runs between fork and the tool, in a fresh interpreter: code in a forked copy of a threaded parent can deadlock.
# PR_SET_PDEATHSIG (1) survives exec; the parent is checked after setting it, as it may have died just before.
_LAUNCH = (
    "import ctypes,os,signal,sys\n"
    "if sys.platform=='linux':\n"
    "    ctypes.CDLL(None).prctl(1,int(signal.SIGKILL))\n"
    "    if os.getppid()!=int(sys.argv[1]): sys.exit(1)\n"
    "    if sys.argv[2]: os.sched_setaffinity(0,map(int,sys.argv[2].split(',')))\n"
    "os.execv(sys.argv[3],sys.argv[3:])\n"
)


class ProcessError(params.UserError):
    """A child did not do what was expected. `reason` is a code for the record, the message is for people."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Exit:
    code: int | None
    killed: bool
    """True if it did not end by itself or by SIGTERM within the grace time."""


def inherited() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k in ENV_ALLOWED}


def environment(scratch: Path, extra: dict[str, str] | None = None) -> dict[str, str]:
    """A child's environment: the allow-list, empty configuration folders, and `extra`."""
    own = {name: scratch / name.lower() for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
    for folder in own.values():
        folder.mkdir(parents=True, exist_ok=True)
    return {**inherited(), **{k: str(v) for k, v in own.items()}, **(extra or {})}


class Child(AbstractContextManager):
    """One running tool. Use as a context manager: leaving it ends the tool. `cpus`: the only ones it may use."""

    def __init__(self, argv: list[str], log: Path, env: dict[str, str], cpus: Sequence[int] = ()):
        self.argv, self.log, self.exit = argv, log, None
        log.parent.mkdir(parents=True, exist_ok=True)
        launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), ",".join(map(str, cpus)), *argv]
        self.started = time.monotonic()
        with log.open("wb") as out:
            # a session of its own: Ctrl-C reaches us alone, and we end the child in order
            self._popen = subprocess.Popen(
                launch, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        self.pid = self._popen.pid
        self._note = log.with_suffix(".child.json")
        try:
            self._note.write_text(json.dumps({"child": _identity(self.pid), "parent": _identity(os.getpid())}))
        except BaseException:  # a full disk, Ctrl-C: nobody has this object yet to end the tool
            self._popen.kill()
            self._popen.wait()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def name(self) -> str:
        return Path(self.argv[0]).name

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def tail(self, lines: int = 8) -> str:
        return "\n".join(self.text().splitlines()[-lines:])

    def running(self) -> bool:
        return self._popen.poll() is None

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """The first match of `pattern` in the child's log. Raises ProcessError at its end or the deadline."""
        return self._until(lambda: re.search(pattern, self.text()), "was not ready", timeout_s)

    def wait_listening(self, port: int, timeout_s: float) -> None:
        """Wait until the child itself listens on `port`: on a taken port another server would answer."""

        def look() -> bool:
            with contextlib.suppress(psutil.Error):  # one that just died has no connections to be asked for
                tcp = psutil.Process(self.pid).net_connections("tcp")
                return ("LISTEN", port) in {(c.status, c.laddr.port) for c in tcp}
            return False

        self._until(look, "did not listen", timeout_s)

    def wait_end(self, timeout_s: float) -> None:
        """Wait until the child ends by itself. Raises ProcessError at the deadline."""
        deadline = time.monotonic() + timeout_s
        while self.running():
            if time.monotonic() > deadline:
                raise ProcessError("engine-timeout", f"{self.name} did not end in {timeout_s:g} s:\n{self.tail()}")
            time.sleep(POLL_S)

    def _until(self, look: Callable[[], Any], failed: str, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (found := look()):
            if not self.running():
                ended = f"{self.name} ended with {self._popen.returncode}"
                raise ProcessError("engine-ended", f"{ended}; its log ends:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ProcessError("engine-timeout", f"{self.name} {failed} in {timeout_s:g} s:\n{self.tail()}")
            time.sleep(POLL_S)
        return found

    def stop(self, grace_s: float = GRACE_S) -> Exit:
        """End the child: SIGTERM, `grace_s` seconds, SIGKILL. Safe to call again."""
        grace_s = patience(grace_s)
        if self.exit is None:
            killed = False
            if self.running():
                os.killpg(self.pid, signal.SIGTERM)  # its own session: what it started ends with it
                os.killpg(self.pid, signal.SIGCONT)  # a stopped process takes no notice until it goes on
                try:
                    self._popen.wait(grace_s)
                except BaseException as err:  # Ctrl-C too: nobody else ends it
                    killed = True
                    os.killpg(self.pid, signal.SIGKILL)
                    self._popen.wait(grace_s)
                    if not isinstance(err, subprocess.TimeoutExpired):
                        raise
            self.exit = Exit(self._popen.returncode, killed)
            self._note.unlink(missing_ok=True)
        return self.exit


def _identity(pid: int) -> list[float]:
    """Process id and start time: together they name one process, whatever is reused."""
    return [pid, psutil.Process(pid).create_time()]


def _running(identity: list[float]) -> psutil.Process | None:
    try:
        process = psutil.Process(int(identity[0]))
        return process if process.create_time() == identity[1] else None
    except psutil.NoSuchProcess:
        return None


def _proc(name: str, pattern: str) -> str | None:
    """What `pattern` captures first in a file of /proc; None where there is no such file or line."""
    try:
        m = re.search(pattern, Path("/proc", name).read_text(), re.M)
    except OSError:
        return None
    return m[1].strip() if m else None


def peak_rss(pid: int) -> int | None:
    """The system's own record of a process's peak RSS; None where it keeps none."""
    kib = _proc(f"{pid}/status", r"^VmHWM:\s+(\d+) kB")
    return int(kib) * 1024 if kib else None


def sweep(folder: Path) -> list[int]:
    """End children that a dead parent left behind under `folder`, by their recorded identity; return their ids."""
    ended = []
    for note in sorted(folder.rglob("*.child.json")):
        # a note cut short by a kill: its child died with the parent
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError, OSError, psutil.NoSuchProcess):
            data = json.loads(note.read_text())
            if _running(data["parent"]):
                continue
            if child := _running(data["child"]):
                child.kill()
                ended.append(child.pid)
        note.unlink(missing_ok=True)
    return ended


def free_port() -> int:
    """A loopback port that was free a moment ago; whoever uses it must check that it got it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def cpu_ids() -> list[int]:
    """CPUs that this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def usable_cpus() -> int:
    """How many CPUs this process may use: affinity and the cgroup's quota, not the host's count."""
    n = len(cpu_ids())
    try:
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
    except (OSError, ValueError):  # no cgroup, or "max": no quota
        return n
    return min(n, max(1, quota // period))


PATIENCE = (0.001, 1000.0)


def patience(seconds: float) -> float:
    """A limit of a wait, times $MOELIB_PATIENCE: more on a very slow machine, less where faults are provoked.

    Raises ParamsError if the variable is no such number.
    """
    told = os.environ.get("MOELIB_PATIENCE", "1")
    try:
        factor = float(told)
    except ValueError:
        factor = float("nan")
    if not PATIENCE[0] <= factor <= PATIENCE[1]:  # what is not a number is not between either
        least, most = PATIENCE
        raise params.ParamsError(
            f"MOELIB_PATIENCE={told!r} is no number from {least:g} to {most:g}; unset it, or set 1"
        )
    return seconds * factor


def new_key() -> str:
    """An api key for one server process; it travels in the environment and is never written down."""
    return secrets.token_hex(16)


PRODUCTS = ("outputs", "docs")
"""Folders of the clone that measuring writes to: a change there is no change of what measures."""


def _git(*args: str) -> str | None:
    """What git says of the clone; None where it fails, as it does without one."""
    argv = ["git", *args]
    try:
        return subprocess.check_output(argv, cwd=params.root(), stderr=subprocess.DEVNULL, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def facts() -> dict[str, Any]:
    """CPU, RAM, system and moelib's commit. `commit` and `dirty` are None outside a git clone; the latter says
    whether tracked files other than products differ from the commit."""
    commit = _git("rev-parse", "HEAD")
    differ = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{p}" for p in PRODUCTS))
    return {
        "cpu": _proc("cpuinfo", r"^model name[^:\n]*:(.*)") or platform.processor() or None,
        "cpus": usable_cpus(),
        "ram_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "moelib": __version__,
        "commit": commit and commit.strip(),
        "dirty": None if differ is None else bool(differ),
    }
