"""The programs and libraries that a running process has mapped, which identify the engine's code.

The hash of a launcher of 18 kB does not cover the libraries that do the work, and a library can be replaced between
two runs or under a running process. `/proc/PID/maps` names every file with its device and inode (proc_pid_maps(5)).
"""

import contextlib
import mmap
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moelib.base import files
from moelib.machine import host
from moelib.machine.process import ProcessError

OWN = re.compile(r"^lib(ggml|llama|mtmd)|^(llama|ggml|rpc)-", re.I)  # the engine's, in any folder
NO_MAPS = "this system does not say which files a process has mapped"
_LINE = re.compile(rb"^\S+ (\S+) \S+ (\S+) (\d+) +(/.*)$", re.M)
_NO_FILE = ("/dev/", "/memfd:", "/SYSV", "/anon_hugepage", "/[")
GONE = " (deleted)"


class NotListed(Exception):
    """The system does not list what a process has mapped; the message says why."""


@dataclass(frozen=True)
class Mapping:
    """A mapped file of code; `state` is the file's state, read while the process ran."""

    path: Path
    state: tuple[int, ...]
    own: bool
    """Whether it is part of the engine, not of the system."""


def look(pid: int, since: float, folders: Iterable[Path] = ()) -> tuple[Mapping, ...]:
    """Every ELF file that process `pid` and its descendants have mapped, by path. Quick: nothing is hashed.

    `since`: the wall clock at its start. Files in `folders`, and the process's program, are the engine's own.
    Raises NotListed; ProcessError "engine-changed" for a file that changed since it was mapped.
    """
    own, mappings = {str(f.resolve()) for f in folders}, {}
    program = _program(pid)
    for (path, device, inode), runs in _code(pid).items():
        file, now = Path(path), None
        with contextlib.suppress(FileNotFoundError), _open(file) as f:
            if f.read(4) != b"\x7fELF":
                continue
            now = os.fstat(f.fileno())
            # some file systems report another device in the map than in a file's state: compare with a map of our own
            if (now.st_dev, now.st_ino) != (device, inode) and _as_mapped(f.fileno(), path) != (device, inode):
                now = None
        if now is None and not runs:  # data whose file was removed
            continue
        if now is None or since < now.st_ctime <= time.time():
            raise ProcessError(
                "engine-changed",
                f"{file.name.removesuffix(GONE)} was replaced, removed or written to while a process had it mapped: "
                "do not change the engine during a study, and run again",
            )
        mine = path == program or str(file.parent) in own or OWN.search(file.name) is not None
        mappings[path] = Mapping(file, _state(now), mine)
    if not mappings:
        raise NotListed(f"{NO_MAPS}: process {pid} has ended")
    return tuple(mappings[path] for path in sorted(mappings))


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise
    except OSError as err:
        raise NotListed(f"{path.name}, which is mapped, cannot be read: {err.strerror}") from None


def _code(pid: int) -> dict[tuple[str, int, int], bool]:
    """(path, device, inode) of each file that a process and its descendants have mapped -> whether it is executable."""
    entries = _maps(pid)
    for child in host.tree(pid) - {pid}:
        with contextlib.suppress(NotListed):  # the process ended meanwhile
            entries = {**_maps(child), **entries}
    return entries


def _maps(pid: int) -> dict[tuple[str, int, int], bool]:
    """The same for one process. The path of a removed file ends in GONE, so that it cannot be opened."""
    try:
        text = Path(f"/proc/{pid}/maps").read_bytes()
    except OSError as err:
        raise NotListed(f"{NO_MAPS}: {err.strerror}") from None
    entries: dict[tuple[str, int, int], bool] = {}
    for rights, device, inode, name in _LINE.findall(text):
        path = os.fsdecode(name.replace(rb"\012", b"\n"))
        if not path.startswith(_NO_FILE):
            major, minor = (int(part, 16) for part in device.split(b":"))
            key = (path, os.makedev(major, minor), int(inode))
            entries[key] = entries.get(key, False) or b"x" in rights
    return entries


def _program(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/exe")
    return None


def _as_mapped(fd: int, path: str) -> tuple[int, int] | None:
    """(device, inode) of the file in this process's own map."""
    with mmap.mmap(fd, 1, access=mmap.ACCESS_READ):
        return next((key[1:] for key in _maps(os.getpid()) if key[0] == path), None)


def _state(s: os.stat_result) -> tuple[int, ...]:
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


Digests = dict[str, dict[str, str]]
"""Group of files -> name of a file -> SHA-256."""


class Hashes:
    """SHA-256 of mapped files, each read once as long as it does not change."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, tuple[int, ...]], str] = {}

    def of(self, mappings: Iterable[Mapping]) -> dict[str, str]:
        """File name -> SHA-256. A second file of the same name gets the suffix " (2)".

        Raises ProcessError "engine-changed" if a file changed since it was mapped.
        """
        hashes: dict[str, str] = {}
        for m in mappings:
            key = (m.path, m.state)
            try:
                if key not in self._known:
                    self._known[key] = files.sha256(m.path)
                same = _state(m.path.stat()) == m.state
            except OSError:
                same = False
            if not same:
                self._known.pop(key, None)
                raise ProcessError("engine-changed", f"{m.path.name} changed after the run: run again")
            name, n = m.path.name, 2
            while name in hashes:
                name, n = f"{m.path.name} ({n})", n + 1
            hashes[name] = self._known[key]
        return hashes
