"""Run child processes with a log file, a deadline and a clean end; none survives its parent, however that dies.

A log is read with bounded memory and work, however much is written to it.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from moelib.catalogue import params

LOG_BYTES = 64 << 20  # a normal run's log is under 1 MiB
KEPT_BYTES = 1 << 20  # kept of a log over its limit: its start, which holds the reason
LINE_BYTES = 1 << 16  # longest line, and longest end of a log, that is read
CHUNK_BYTES = 1 << 20
POLL_S = 0.005
GRACE_S = 10.0  # time for a tool to end after SIGTERM
GUARD_S = 0.05  # between checks of a log's size (5 us each); a disk can take some 100 MB in that time

ENV_ALLOWED = ("PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "LANG", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
"""Variables that a child inherits, and no others: llama.cpp silently applies every LLAMA_ARG_* variable."""

# Runs between fork and the tool, in a fresh interpreter: code in a forked copy of a threaded parent can deadlock.
# PR_SET_PDEATHSIG (1) survives exec; the parent is checked after setting it, as it may have died just before.
_LAUNCH = (
    "import ctypes,os,signal,sys\n"
    "try:\n"
    "    if sys.platform=='linux':\n"
    "        ctypes.CDLL(None).prctl(1,int(signal.SIGKILL))\n"
    "        if os.getppid()!=int(sys.argv[1]): sys.exit(1)\n"
    "        if sys.argv[2]: os.sched_setaffinity(0,map(int,sys.argv[2].split(',')))\n"
    "    os.execv(sys.argv[3],sys.argv[3:])\n"
    "except (OSError,AttributeError) as err: sys.exit(f'{sys.argv[3]} cannot be run: {err}')\n"
)


class ProcessError(params.UserError):
    """A child process failed. `reason` is a code for the record, the message is for people."""

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


class Log:
    """The log at `path`, which may hold `limit` bytes."""

    def __init__(self, path: Path, limit: int = LOG_BYTES):
        self.path, self.limit = path, limit

    def size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:  # not written yet, or removed
            return 0

    def flooded(self) -> bool:
        return self.size() > self.limit

    def cut(self) -> None:
        """Truncate to the first KEPT_BYTES, after its writer has ended."""
        os.truncate(self.path, KEPT_BYTES)

    def text(self) -> str:
        """The log's text, up to its limit."""
        with self.path.open("rb") as f:
            return f.read(self.limit).decode("utf-8", "replace")

    def tail(self, lines: int) -> str:
        """The last lines, at most LINE_BYTES."""
        with self.path.open("rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - LINE_BYTES))
            last = f.read(LINE_BYTES).decode("utf-8", "replace")
        return "\n".join(last.splitlines()[-lines:])

    def looking_for(self, pattern: str) -> Callable[[], re.Match[str] | None]:
        """A function that returns the first match of `pattern` within a line, or None if it is not written yet.

        Each call reads only what was written since the previous one.
        """
        searched, at, line = re.compile(pattern), 0, b""

        def look() -> re.Match[str] | None:
            nonlocal at, line
            with self.path.open("rb") as f:
                f.seek(at)
                for chunk in iter(lambda: f.read(CHUNK_BYTES), b""):
                    at += len(chunk)
                    text = line + chunk
                    if match := searched.search(text.decode("utf-8", "replace")):
                        return match
                    line = text[text.rfind(b"\n") + 1 :][-LINE_BYTES:]
                    if at > self.limit:
                        break
            return None

        return look


class Child(AbstractContextManager["Child"]):
    """A running tool. Use it as a context manager: leaving it ends the tool and its child processes.

    `cpus`: the CPUs that it may use. A tool whose log grows beyond `log_bytes` is ended. `errors`: a file for what it
    writes to standard error, which is not in the log then.
    """

    def __init__(
        self,
        argv: list[str],
        log: Path,
        env: dict[str, str],
        cpus: Sequence[int] = (),
        log_bytes: int = LOG_BYTES,
        cwd: Path | None = None,
        errors: Path | None = None,
    ):
        self.argv, self.log, self._log = argv, log, Log(log, log_bytes)
        self.exit: Exit | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), ",".join(map(str, cpus)), *argv]
        self.started, self.started_wall = time.monotonic(), time.time()
        separate = errors.open("wb") if errors else contextlib.nullcontext(subprocess.STDOUT)
        with log.open("wb") as out, separate as err:
            # in its own session: Ctrl-C reaches only this process, which then ends the child in order
            self._popen = subprocess.Popen(
                launch, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, start_new_session=True, cwd=cwd,
            )  # fmt: skip
        self.pid = self._popen.pid
        self._note = log.with_suffix(".child.json")
        self._over, self._ending, self._flooded = threading.Event(), threading.Lock(), False
        try:
            identities = json.dumps({"child": _identity(self.pid), "parent": _identity(os.getpid())})
            self._note.write_text(identities, encoding="utf-8")
            threading.Thread(target=self._guard, daemon=True).start()
        except BaseException:  # a full disk, Ctrl-C: no caller has this object yet to end the tool
            self._popen.kill()
            self._popen.wait()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def name(self) -> str:
        return Path(self.argv[0]).name

    def text(self) -> str:
        """The log, up to its limit."""
        return self._log.text()

    def tail(self, lines: int = 8) -> str:
        return self._log.tail(lines)

    def running(self) -> bool:
        return ended(self._popen) is None

    def _guard(self) -> None:
        """End the child if its log grows beyond its limit. Runs in its own thread."""
        while not self._over.wait(GUARD_S):
            if self._log.flooded():
                with self._ending:
                    if self._popen.returncode is None:
                        os.killpg(self.pid, signal.SIGKILL)
                return

    def check_log(self) -> None:
        """Raise ProcessError if the child was ended because of the size of its log."""
        if self._flooded or self._log.flooded():
            self._flooded = True
            self.stop(grace_s=0)
            self._log.cut()
            cause = f"{self.name} wrote more than {self._log.limit >> 20} MiB to its log and was ended"
            raise ProcessError("engine-log-flood", f"{cause}; use another build; the log begins:\n{self.text()[:400]}")

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """The first match of `pattern` in the child's log. Raises ProcessError if it ends first, or at the deadline."""
        return self._until(self._log.looking_for(pattern), "was not ready", timeout_s)

    def wait_listening(self, port: int, timeout_s: float) -> None:
        """Wait until the child itself listens on `port`; on a port in use, another server would answer."""

        def look() -> bool:
            with contextlib.suppress(psutil.Error):  # the process has just ended
                tcp = psutil.Process(self.pid).net_connections("tcp")
                return ("LISTEN", port) in {(c.status, c.laddr.port) for c in tcp}
            return False

        self._until(look, "did not listen", timeout_s)

    def wait_end(self, timeout_s: float) -> None:
        """Wait until the child ends. Raises ProcessError at the deadline."""
        self._until(lambda: not self.running(), "did not end", timeout_s)
        self.check_log()

    def _until(self, look: Callable[[], Any], failure: str, timeout_s: float) -> Any:
        """The first true result of `look`. Raises ProcessError if the child ends without one, or at the deadline."""
        deadline = time.monotonic() + timeout_s
        while True:
            running = self.running()  # before the look, so that the last words of a child that ends are read
            if result := look():
                return result
            self.check_log()
            if not running:
                cause = f"{self.name} ended with {ended(self._popen)}"
                raise ProcessError("engine-ended", f"{cause}; its log ends:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ProcessError("engine-timeout", f"{self.name} {failure} in {timeout_s:g} s:\n{self.tail()}")
            time.sleep(POLL_S)

    def stop(self, grace_s: float = GRACE_S) -> Exit:
        """End the child and its group: SIGTERM, `grace_s` seconds, SIGKILL. Safe to call again."""
        deadline = time.monotonic() + patience(grace_s)
        if self.exit is None:
            try:
                if self.running():
                    os.killpg(self.pid, signal.SIGTERM)  # the whole group, with its child processes
                    os.killpg(self.pid, signal.SIGCONT)  # a stopped process handles SIGTERM only after SIGCONT
                while self.running() and time.monotonic() < deadline:
                    time.sleep(POLL_S)
            finally:  # also after Ctrl-C, because nothing else ends it
                killed = self.running()
                with self._ending:
                    end_group(self._popen, alive=killed)
                self._over.set()
            self.exit = Exit(self._popen.returncode, killed)
            self._note.unlink(missing_ok=True)
        return self.exit


def ended(child: subprocess.Popen[bytes]) -> int | None:
    """A child's exit code, negative for a signal; None while it runs.

    If the system allows it, the child is not reaped: until it is, no other process can get its id or its group's.
    """
    if child.returncode is None and hasattr(os, "waitid"):  # macOS has it from Python 3.13 on
        end = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return end and (end.si_status if end.si_code == os.CLD_EXITED else -end.si_status)
    return child.poll()


def end_group(leader: subprocess.Popen[bytes], alive: bool) -> None:
    """Kill the session of `leader`, and if it is alive its children in other sessions; then reap it."""
    if leader.returncode is not None:  # reaped: its id may belong to another process by now
        return
    started = []
    with contextlib.suppress(psutil.Error):
        started = psutil.Process(leader.pid).children(recursive=True) if alive else []
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses if only ended processes are left
        os.killpg(leader.pid, signal.SIGKILL)
    for p in started:
        with contextlib.suppress(psutil.Error):
            p.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # in an uninterruptible system call
        leader.wait(GRACE_S)


def _identity(pid: int) -> list[float]:
    """Process id and start time, which together identify a process even if its id is reused."""
    return [pid, psutil.Process(pid).create_time()]


def _running(identity: list[float]) -> psutil.Process | None:
    try:
        process = psutil.Process(int(identity[0]))
        return process if process.create_time() == identity[1] else None
    except psutil.NoSuchProcess:
        return None


def peak_rss(pid: int) -> int | None:
    """A process's peak RSS as recorded by the system; None if it does not record it."""
    return _memory(pid, "VmHWM")


def locked(pid: int) -> int | None:
    """Bytes of its memory that a process has locked; None if the system does not say."""
    return _memory(pid, "VmLck")


def disk_reads(pid: int) -> int | None:
    """Bytes that a process had the system read from disks, as its own or as a mapped file's; None if the system does
    not say (proc_pid_io(5))."""
    read = re.search(r"^read_bytes: (\d+)$", system_text(f"/proc/{pid}/io"), re.M)
    return int(read[1]) if read else None


def _memory(pid: int, key: str) -> int | None:
    kib = re.search(rf"^{key}:\s+(\d+) kB", system_text(f"/proc/{pid}/status"), re.M)
    return int(kib[1]) * 1024 if kib else None


def system_text(path: str | Path) -> str:
    """The text of a system file; empty where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def sweep(folder: Path) -> list[int]:
    """End the children of dead parents, by their identity noted under `folder`; return their ids."""
    ended = []
    for note in sorted(folder.rglob("*.child.json")):
        # a note cut short by a kill is skipped: its child died with the parent
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError, OSError, psutil.NoSuchProcess):
            data = json.loads(note.read_text(encoding="utf-8"))
            if _running(data["parent"]):
                continue
            if child := _running(data["child"]):
                for p in (*child.children(recursive=True), child):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        p.kill()
                ended.append(child.pid)
        note.unlink(missing_ok=True)
    return ended


def free_port() -> int:
    """A loopback port that was free just now; the caller must check that it could bind it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


PATIENCE = (0.001, 1000.0)


def patience(seconds: float) -> float:
    """A time limit, multiplied by $MOELIB_PATIENCE: larger on a very slow machine, smaller in tests of faults.

    Raises ParamsError if the variable is not a number in the allowed range.
    """
    setting = os.environ.get("MOELIB_PATIENCE", "1")
    try:
        factor = float(setting)
    except ValueError:
        factor = float("nan")
    if not PATIENCE[0] <= factor <= PATIENCE[1]:  # NaN fails this comparison too
        least, most = PATIENCE
        raise params.ParamsError(
            f"MOELIB_PATIENCE={setting!r} is not a number from {least:g} to {most:g}; unset it, or set it to 1"
        )
    return seconds * factor


def new_key() -> str:
    """An API key for one server process; it is passed in the environment and never stored."""
    return secrets.token_hex(16)
