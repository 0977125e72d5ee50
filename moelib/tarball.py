"""Unpacking an archive that somebody else made: plain members inside one folder, and no more of them than may be."""

import gzip
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from moelib.release import ArchiveError

MEMBERS, RATIO, ROOM = 10_000, 12, 64 << 20  # programs shrink to a third or a quarter, and not to a hundredth


class _Metered:
    """A gzip stream that raises ArchiveError before it has become more than `most` bytes."""

    def __init__(self, raw: BinaryIO, name: str, most: int):
        self._stream, self._name, self._left = gzip.GzipFile(fileobj=raw), name, most

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._left:
            raise ArchiveError(f"{self._name} unpacks to more than it may: it is no release of llama.cpp")
        data = self._stream.read(size)
        self._left -= len(data)
        return data


def extract(part: Path, folder: Path) -> None:
    """Write an archive's members, each checked first: inside the folder, plain files, folders and links in it only."""
    if not hasattr(tarfile, "data_filter"):
        raise ArchiveError("unpacking safely needs Python 3.11.4 or newer")
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
                    raise ArchiveError(f"{part.name} unpacks to more than it may: it is no release of llama.cpp")
                tar.extract(member, folder, filter="data")
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile, KeyError, ValueError, OverflowError) as err:
        raise ArchiveError(f"{part.name} cannot be unpacked: {err}") from None
