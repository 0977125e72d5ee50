"""Unpack an untrusted archive: only plain members inside one folder, with limits on their number and size."""

import gzip
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from moelib.release import ArchiveError

MEMBERS, RATIO, ROOM = 10_000, 12, 64 << 20  # programs compress to a third or a quarter


class _Metered:
    """A gzip stream that raises ArchiveError instead of producing more than `most` bytes."""

    def __init__(self, raw: BinaryIO, name: str, most: int):
        self._stream, self._name, self._left = gzip.GzipFile(fileobj=raw), name, most

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._left:
            raise ArchiveError(f"{self._name} unpacks to too many bytes: it is not a release of llama.cpp")
        data = self._stream.read(size)
        self._left -= len(data)
        return data


def extract(part: Path, folder: Path) -> None:
    """Write an archive's members, each checked first: only files, folders and links inside the folder are allowed."""
    if not hasattr(tarfile, "data_filter"):
        raise ArchiveError("unpacking an archive safely needs Python 3.11.4 or newer: update Python")
    most, count, total = RATIO * part.stat().st_size + ROOM, 0, 0
    try:
        with part.open("rb") as raw, tarfile.open(fileobj=_Metered(raw, part.name, most), mode="r|") as tar:
            for member in tar:
                count, total = count + 1, total + member.size
                name = PurePosixPath(member.name)
                plain = member.isreg() or member.isdir() or member.issym() or member.islnk()
                if not plain or member.issparse() or name.is_absolute() or ".." in name.parts:
                    raise ArchiveError(f"{part.name} holds {member.name[:80]!r}, which no release of llama.cpp does")
                if count > MEMBERS or total > most:
                    raise ArchiveError(f"{part.name} unpacks to too much: it is not a release of llama.cpp")
                tar.extract(member, folder, filter="data")
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile, KeyError, ValueError, OverflowError) as err:
        raise ArchiveError(f"{part.name} cannot be unpacked: {err}") from None
