"""One measurement at a time on a device, whoever asks, from whichever clone and TMPDIR: two would slow each other.

On Linux a device is claimed by a name of the kernel's own, an abstract socket with the GPU's id in it, which belongs to
no folder and no user and is free as soon as its owner is dead. It is seen by all who share the network namespace; a
lock file in a folder of this user's is held beside it, for systems without such names and for containers of one user.
"""

import contextlib
import errno
import os
import re
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moelib import files

ROOT = Path("/tmp")  # not TMPDIR, of which one machine has many
HOST = "host"  # what plays the device where no GPU does
PREFIX = "moelib-device-"
_PEER = struct.Struct("iII")  # struct ucred: process, user, group (socket(7), SO_PEERCRED)


@contextmanager
def device(uuid: str | None, what: str, wait_s: float) -> Iterator[None]:
    """Hold the GPU with that id, or the host where it is None.

    Waits `wait_s` for another's last run, then raises FileError, which names the other as well as can be.
    """
    files.need_locks()
    name = PREFIX + re.sub(r"[^A-Za-z0-9-]", "_", uuid or HOST)
    deadline = time.monotonic() + wait_s
    with ExitStack() as held:
        if sys.platform == "linux":
            held.enter_context(_named(name, what, wait_s))
        folder = _own_folder(ROOT / f"moelib-{os.getuid()}")
        left_s = max(0.0, deadline - time.monotonic())
        held.enter_context(files.lock(folder / f"{name}.lock", what, left_s))
        yield


@contextmanager
def _named(name: str, what: str, wait_s: float) -> Iterator[None]:
    """Hold an abstract socket of that name (unix(7)); nobody is served on it, it tells who has it."""
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
                    owner = _owner(name)
                    raise files.FileError(f"{what} is in use by {owner}; wait for it to end, then run again") from None
                time.sleep(0.05)
        with contextlib.suppress(OSError):
            mine.listen(1)  # from here on who connects is told this process and its user
        yield


def _owner(name: str) -> str:
    """Who holds the name, as the kernel tells it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asks:
        asks.setblocking(False)
        try:
            asks.connect(f"\0{name}")
            pid, uid, _ = _PEER.unpack(asks.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        except OSError:
            return "another process"
    who = f"process {pid}" if pid else "a process of another container"
    return who if uid == os.getuid() else f"another user's process ({who}, user {_user(uid)})"


def _user(uid: int) -> str:
    import pwd  # Windows has none, and is told so before

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _own_folder(folder: Path) -> Path:
    """A folder that nobody else can write to or plant anything in. Raises FileError."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
    except OSError as err:
        raise files.FileError(f"{folder} cannot be made: {err.strerror}; remove what stands in its way") from None
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
        whose = _user(about.st_uid)
        raise files.FileError(
            f"{folder} is not a folder of this user's, but of {whose}; have it removed, then run again"
        )
    if about.st_mode & 0o077:
        folder.chmod(0o700)  # one that an older moelib made
    return folder
