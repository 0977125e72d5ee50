"""Atomic writes, digests, locks that end with their process, and checks of disk space."""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, dataclass_transform

import psutil

from moelib.base import neutral
from moelib.base.schema import UserError

try:
    import fcntl
except ImportError:  # Windows: need_locks() reports it
    fcntl = None  # type: ignore[assignment]  # elsewhere it is a module

T = TypeVar("T")

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAKE_ROOM = (
    "free some space, or set MOELIB_MODELS (model files) or MOELIB_OUTPUTS (studies) to a folder on another disk, "
    "and run again"
)


class FileError(UserError):
    """Disk space, a lock or a file prevents the operation; the message says what to do."""


class InUse(FileError):
    """Another process has it: try again later."""


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def stored(cls: type[T]) -> type[T]:
    """A frozen dataclass that is stored on disk: when reading it, pydantic refuses unknown keys, NaN and infinity."""
    cls.__pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # type: ignore[attr-defined]  # pydantic's own name
    return dataclass(frozen=True, slots=True)(cls)


def canonical(data: Any) -> bytes:
    """The JSON bytes that `digest` hashes: sorted keys, no spaces, no NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(data: Any) -> str:
    return hashlib.sha256(canonical(data)).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in chunks."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def head(path: Path, most: int) -> bytes:
    """The first bytes of a file, at most `most`.

    Read in steps: a single read of `most` bytes would allocate all of them, however short the file is.
    """
    with open(path, "rb", buffering=0) as f:
        data = f.read(min(os.fstat(f.fileno()).st_size + 1, most))
        while data and len(data) < most and (more := f.read(min(1 << 20, most - len(data)))):  # it grew, or was cut
            data += more
        return data


def joint_sha256(hashes: dict[str, str]) -> str:
    """The digest of a model from those of its files by name: that of its only file, or one over all of them."""
    return next(iter(hashes.values())) if len(hashes) == 1 else digest(hashes)


class Hashed:
    """The SHA-256 of a file, or of all files of a model, computed once, and again whenever one has changed since.

    `known`: the digest of the present content, if the caller has just computed it.
    """

    def __init__(self, *paths: Path, known: str | None = None):
        self.paths, self._sha256, self._states = paths, known, [*map(state, paths)] if known else None

    def sha256(self) -> str:
        if (now := [*map(state, self.paths)]) != self._states or self._sha256 is None:
            self._sha256, self._states = joint_sha256({p.name: sha256(p) for p in self.paths}), now
        return self._sha256


def state(path: Path) -> dict[str, int]:
    """Size and times of a file. The modification time can be set back; the time of that change (ctime) cannot."""
    s = path.stat()
    return {"bytes": s.st_size, "mtime_ns": s.st_mtime_ns, "ctime_ns": s.st_ctime_ns}


@cache
def node() -> str:
    """This host's name as a part of a file's: of processes in a folder that hosts share, which are this one's."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", platform.node())[:60] or "host"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed over it on success, removed on failure.

    The name carries host and process, so that a partial file of a killed process is never mistaken for a good one and
    is swept by this host's next writer; of another host's processes nothing is known.
    """
    partial = path.with_name(f".{path.name}.{node()}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{path.name}.{node()}.*.partial"):
            owner = stale.name.split(".")[-2]
            if not (owner.isdigit() and psutil.pid_exists(int(owner))):
                stale.unlink(missing_ok=True)
        yield partial
        _to_disk(partial)
        os.replace(partial, path)
        _to_disk(path.parent)
    except OSError as err:
        if err.errno not in NO_SPACE:
            raise
        raise FileError(f"{path.name} cannot be written: {full(path.parent)}") from err
    finally:
        partial.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes(path: Path, data: bytes) -> None:
    """Write atomically: after a crash the file has its old or its new content, never a part."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_new(path: Path, data: bytes) -> bool:
    """Write atomically where there is no file yet; False where there is one by now. Of several hosts that share the
    folder one wins: a link to a name that exists fails on NFS too (open(2), O_EXCL)."""
    with TemporaryDirectory(dir=_made(path.parent), prefix=f".{path.name}.") as folder:
        write_bytes(whole := Path(folder) / path.name, data)
        try:
            os.link(whole, path)
        except FileExistsError:
            return False
        except OSError as err:
            if err.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            return _written_alone(path, data)  # a disk without links, which is no shared one
    return True


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _written_alone(path: Path, data: bytes) -> bool:
    if path.exists():
        return False
    write_bytes(path, data)
    return True


def pretty(data: Any) -> bytes:
    """JSON for people and for merges: sorted keys, one per line."""
    text = json.dumps(data, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    return (neutral.escaped(text) + "\n").encode()


def write_json(path: Path, data: Any) -> None:
    write_bytes(path, pretty(data))


def own_digest(data: dict[str, Any]) -> str:
    """The digest that JSON of records carries of itself: of all but the key `digest`."""
    return digest({k: v for k, v in data.items() if k != "digest"})


def sealed(data: dict[str, Any]) -> bytes:
    """JSON with its own digest. One line a top-level key: a table of contents for people, and measurements that do not
    fill screens."""
    data = {**data, "digest": own_digest(data)}
    lines = [f" {json.dumps(k)}: {canonical(v).decode()}" for k, v in sorted(data.items())]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def is_sealed(raw: bytes, with_digest: str) -> bool:
    """Whether JSON has that digest of its own."""
    return with_digest == _digest_as_written(raw) or with_digest == own_digest(json.loads(raw))


def _digest_as_written(raw: bytes) -> str | None:
    """The digest of a file that has the layout of `sealed`, whose lines are canonical already; None for another."""
    if not (raw.startswith(b"{\n ") and raw.endswith(b"\n}\n")):
        return None
    lines = [line.removesuffix(b",")[1:].replace(b'": ', b'":', 1) for line in raw[2:-3].split(b"\n")]
    content = b",".join(line for line in lines if not line.startswith(b'"digest":'))
    return hashlib.sha256(b"{" + content + b"}").hexdigest()


OWNER = b"process "


def _open_lock(path: Path) -> int:
    """Open the lock file, and refuse a link or a file that moelib did not write. Raises FileError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as err:
        if err.errno in NO_SPACE:
            raise FileError(f"{path} cannot be made: {full(path.parent)}") from err
        why = "it is a symbolic link" if err.errno == errno.ELOOP else err.strerror
        raise FileError(f"the lock {path} cannot be used: {why}; remove it, or whatever blocks its path") from None
    about = os.fstat(fd)
    ours = stat.S_ISREG(about.st_mode) and about.st_nlink == 1 and OWNER.startswith(os.pread(fd, len(OWNER), 0))
    if not ours:  # locking it would do no harm, but writing the owner into it would
        os.close(fd)
        raise FileError(f"{path} is needed as a lock file, but moelib did not write it; move it elsewhere")
    return fd


def need_locks() -> None:
    """Raise FileError where the system has no locks."""
    if fcntl is None:
        raise FileError("moelib needs the file locks of Linux and macOS; on Windows, run it under WSL2")


def in_use(subject: str, owner: str) -> InUse:
    return InUse(f"{subject} is in use by {owner}; wait for it to end, then run again")


@contextmanager
def lock(path: Path, subject: str, wait_s: float = 10.0) -> Iterator[None]:
    """Hold an exclusive flock on `path`; the kernel releases it however its owner ends.

    Waits `wait_s` for another owner to end, then raises FileError with the owner's name. Links are not followed, and
    only a lock file of moelib is written to.
    """
    need_locks()
    fd = _open_lock(path)
    try:
        deadline = time.monotonic() + wait_s
        while not _locked(fd):
            if time.monotonic() >= deadline:
                owner = os.pread(fd, 100, 0).decode(errors="replace").strip() or "another process"
                raise in_use(subject, owner)
            time.sleep(0.05)
        os.ftruncate(fd, 0)
        os.pwrite(fd, OWNER + str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as err:
        raise FileError(f"the disk has no file locks ({err.strerror}); use a folder on another disk") from None
    return True


def need_space(folder: Path, nbytes: int, subject: str) -> None:
    """Raise FileError if the disk of `folder`, which may not be there yet, has less than `nbytes` plus 64 MiB free."""
    free = free_bytes(folder)
    if free < nbytes + (64 << 20):
        raise FileError(
            f"{subject} needs {nbytes / 2**30:.2f} GiB in {folder.name}/, {free / 2**30:.2f} GiB are free; {MAKE_ROOM}"
        )


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which may not be there yet."""
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def full(folder: Path) -> str:
    """The message after a write to `folder` ran out of space: the cause and the next step."""
    free = free_bytes(folder)  # making the folder may be what failed
    return f"no space is left on the disk of {folder} ({free / 2**20:.0f} MiB free, or a quota); {MAKE_ROOM}"
