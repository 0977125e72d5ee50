"""Allow one measurement at a time on a device, across users, clones and values of TMPDIR: two would slow each other.

On Linux a device is claimed with an abstract socket whose name contains the GPU's id. It belongs to no folder and no
user, and the kernel frees it when its owner ends. It is visible within a network namespace. A lock file in a folder of
this user is held as well, for systems without abstract sockets and for several containers of one user.
"""

import contextlib
import errno
import os
import random
import re
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moelib.base import files

ROOT = Path("/tmp")  # not TMPDIR, which differs between users and jobs of one machine
HOST = "host"
PREFIX = "moelib-device-"
_PEER = struct.Struct("iII")  # struct ucred: process, user, group (socket(7), SO_PEERCRED)


@contextmanager
def device(uuid: str | None, subject: str, wait_s: float, shared: bool = False) -> Iterator[None]:
    """Hold the GPU with that id and its host, or the host if it is None.

    shared: hold the GPU alone, while others measure on other GPUs of the host; what shares nothing is refused beside
    it, and it beside that. Waits `wait_s` for another process to end its run, then raises InUse, which names that
    process if it is known.
    """
    files.need_locks()
    deadline = time.monotonic() + wait_s
    while True:
        with ExitStack() as stack:
            try:
                if uuid is None or not shared:
                    stack.enter_context(_held(HOST, subject, deadline))
                if uuid is not None:
                    stack.enter_context(_held(uuid, subject, deadline))
                _require_alone(uuid, subject, shared, deadline)
            except _Busy as err:
                busy = err
            else:
                yield
                return
        # nothing is held while it waits: else this process and one that wants the host would wait for each other
        if time.monotonic() >= deadline:
            raise files.in_use(subject, _owner(busy.name))
        time.sleep(random.uniform(0.02, 0.2))


class _Busy(Exception):
    """The host is held whole by another process."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def _require_alone(uuid: str | None, subject: str, shared: bool, deadline: float) -> None:
    """Raise _Busy for a GPU whose host is held whole; for a host, InUse if its GPUs are still held in the end."""
    if shared and uuid is not None:
        if _name(HOST) in _claims():
            raise _Busy(_name(HOST))
        return
    mine = {_name(HOST), *([_name(uuid)] if uuid else [])}
    while others := sorted(_claims() - mine):
        if time.monotonic() >= deadline:
            raise files.in_use(subject, _owner(others[0]))
        time.sleep(0.05)


def _claims() -> set[str]:
    """The names that are held on this host, by whoever it is (proc(5), net/unix)."""
    try:
        text = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux, and no abstract names
        return set()
    return set(re.findall(rf"@({PREFIX}\S+)", text))


def _name(what: str) -> str:
    return PREFIX + re.sub(r"[^A-Za-z0-9-]", "_", what)


@contextmanager
def _held(what: str, subject: str, deadline: float) -> Iterator[None]:
    """Hold a GPU or the host, by its name in the kernel and by a lock file. Raises InUse."""
    with ExitStack() as stack:
        if sys.platform == "linux":
            stack.enter_context(_named(_name(what), subject, max(0.0, deadline - time.monotonic())))
        folder = _own_folder(ROOT / f"moelib-{os.getuid()}")
        left_s = max(0.0, deadline - time.monotonic())
        stack.enter_context(files.lock(folder / f"{_name(what)}.lock", subject, left_s))
        yield


def is_free(uuid: str) -> bool:
    """Whether nobody holds that GPU now."""
    try:
        with _held(uuid, "", 0.0):
            return True
    except files.InUse:
        return False


@contextmanager
def _named(name: str, subject: str, wait_s: float) -> Iterator[None]:
    """Hold an abstract socket of that name (unix(7)). It accepts no connections; it only identifies its owner."""
    deadline = time.monotonic() + wait_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as mine:
        while True:
            try:
                mine.bind(f"\0{name}")
                break
            except OSError as err:
                if err.errno != errno.EADDRINUSE:  # a sandbox without such names: the file alone holds the device
                    break
                if time.monotonic() >= deadline:
                    raise files.in_use(subject, _owner(name)) from None
                time.sleep(0.05)
        with contextlib.suppress(OSError):
            mine.listen(
                1024
            )  # from here on, a process that connects can read this one's id and user: so often, as none
        yield


def _owner(name: str) -> str:
    """The process that holds the name, from the kernel's credentials of the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        try:
            connection.connect(f"\0{name}")
            pid, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        except OSError:
            return "another process"
    who = f"process {pid}" if pid else "a process of another container"
    return who if uid == os.getuid() else f"another user's process ({who}, user {_user(uid)})"


def _user(uid: int) -> str:
    import pwd  # missing on Windows, which need_locks() has refused before

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _own_folder(folder: Path) -> Path:
    """Make a folder that no other user can write to. Raises FileError."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
    except OSError as err:
        raise files.FileError(f"{folder} cannot be made: {err.strerror}; remove what blocks its path") from None
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
        whose = _user(about.st_uid)
        raise files.FileError(
            f"{folder} is not a folder of this user but belongs to {whose}; have it removed, then run again"
        )
    if about.st_mode & 0o077:
        folder.chmod(0o700)  # made by an older moelib
    return folder
