"""A model's files in the system's page cache: how much of them is there, read in, and dropped. Load times depend on it.

mincore(2) tells it of a mapping that nobody touches. Linux tells only those who may write to a file, and says to all
others that everything is cached (since 5.2); systems that only imitate Linux may say so to everybody.
"""

import ctypes
import functools
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path

import psutil

from moelib.base.bar import tqdm

CACHED, COLD = 0.99, 0.01
"""Shares of a file from which on it counts as cached, and up to which as cold."""
PIECE_BYTES = 64 << 20  # of a file, looked at in one call
READ_BYTES = 8 << 20


class NotTold(Exception):
    """The system does not tell what of a file is cached; the message says why."""


def state(share: float | None) -> str:
    """In words, the share of a file that was cached when its load began; None or not a number: nobody looked."""
    if share is None or math.isnan(share):
        return "not recorded"
    return "cached" if share >= CACHED else "cold" if share <= COLD else f"{share:.0%} cached"


def cached_bytes(paths: Sequence[Path]) -> int:
    """Bytes of these files that are in the page cache now; nothing is read for it. Raises NotTold, OSError."""
    for path in paths:
        if why := _untold(path):
            raise NotTold(why)
    return sum(cached for path in paths for _, _, _, cached in _pieces(path))


def warm(paths: Sequence[Path]) -> None:
    """Read what is not cached of these files, with a progress bar; all of them where it is not told. Raises OSError.

    Files that RAM has no room for are left as they are: their end would take the place of their beginning.
    """
    total = sum(path.stat().st_size for path in paths)
    if total > psutil.virtual_memory().available:  # which includes what is cached already
        return
    buffer = memoryview(bytearray(READ_BYTES))
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="page cache", delay=1, disable=None, leave=False)
    with bar:
        for path in paths:
            blind = _untold(path)
            for f, at, nbytes, cached in _pieces(path):
                if blind or cached < nbytes:
                    f.seek(at)
                    while f.tell() < at + nbytes and f.readinto(buffer):
                        pass
                bar.update(nbytes)


def drop(paths: Sequence[Path]) -> int:
    """Have the system forget what it holds of these files; bytes that it still holds. Raises NotTold, OSError.

    It keeps what a process has mapped and used, and files that are nowhere but in RAM (tmpfs).
    """
    cached_bytes(paths)  # where that is not told, nothing is dropped unseen
    for path in paths:
        with path.open("rb") as f:
            os.fsync(f.fileno())  # what is not on the disk yet cannot be forgotten
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_bytes(paths)


def _untold(path: Path) -> str | None:
    """Why the system does not tell what of a file is cached; None if it does."""
    if sys.platform != "linux" or not _truthful():
        return "this system does not tell what of a file is in its page cache"
    if path.stat().st_uid != os.geteuid() and not os.access(path, os.W_OK, effective_ids=True):
        return f"the system tells only who may write to {path.name} what of it is in the page cache"
    return None


def _pieces(path: Path) -> Iterator[tuple[FileIO, int, int, int]]:
    """(the open file, offset, bytes, bytes that are cached) of each piece of a file."""
    with path.open("rb", buffering=0) as f:
        size = os.fstat(f.fileno()).st_size
        for at in range(0, size, PIECE_BYTES):
            nbytes = min(PIECE_BYTES, size - at)
            with mmap.mmap(f.fileno(), nbytes, access=mmap.ACCESS_READ, offset=at) as piece:
                pages, last = _resident(piece)
            yield f, at, nbytes, pages * mmap.PAGESIZE - (-nbytes % mmap.PAGESIZE if last else 0)


@functools.cache
def _truthful() -> bool:
    """Whether the system says of memory that was never touched that it is not there."""
    with mmap.mmap(-1, mmap.PAGESIZE) as nothing:
        return _resident(nothing) == (0, False)


def _resident(mapping: mmap.mmap) -> tuple[int, bool]:
    """(how many pages of a mapping are in memory, whether the last one is), by mincore. Raises OSError."""
    import numpy as np

    pages = np.zeros(-(-len(mapping) // mmap.PAGESIZE), np.uint8)
    view = np.frombuffer(mapping, np.uint8)  # for its address: no page of it is touched
    failed = _mincore()(view.ctypes.data, len(mapping), pages.ctypes.data)
    del view  # or the mapping could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore: {os.strerror(ctypes.get_errno())}")
    there = pages & 1  # the other bits mean nothing
    return int(np.count_nonzero(there)), bool(there[-1])


@functools.cache
def _mincore() -> Callable[[int, int, int], int]:
    call = ctypes.CDLL(None, use_errno=True).mincore
    call.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    return call
