"""Headers of GGUF files on the Hub, read with range requests: a few MB of a file, whatever its size.

A file is addressed as hf:OWNER/REPO/PATH[@REVISION]. Of a split model any file will do: the headers of all are read.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from moelib.base import neutral, stats
from moelib.catalogue.upstream import repository_name
from moelib.gguf import gguf_file
from moelib.gguf import outline as outlines
from moelib.gguf.outline import Outline
from moelib.models import hub

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hf:"
ELSEWHERE = ("http://", "https://", "hf://")
"""How addresses begin that are copied from elsewhere, and refused with how to write them."""
ADDRESS = re.compile(
    r"hf:(?P<repository>[^/@]+/[^/@]+)"
    r"(?:/(?P<path>.+?)?)?"
    r"(?:@(?P<revision>(?!.*\.gguf$)[^@]+))?",  # an @ may be part of a file's name
    re.IGNORECASE,
)
HOW = "hf:OWNER/REPO/PATH, with @ and a branch, tag or commit behind it if not main"
PREFIX_BYTES, MAX_PREFIX_BYTES = 1 << 20, 64 << 20  # read of a file for its header; a large vocabulary has 10 MB
LATER_PREFIX_BYTES = 1 << 16  # of the further files of a split model, which have no vocabulary
MAX_BYTES = 128 << 20  # read for one model's header
MAX_LISTED = 40  # models of a repository in a message


class AddressError(hub.HubError):
    """An address names no GGUF of the Hub; the message says what there is."""


@dataclass(frozen=True)
class Remote:
    """The header of a model on the Hub, and what was read for it."""

    header: gguf_file.Header
    repository: str
    commit: str
    received_bytes: int

    def __str__(self) -> str:
        read, size = stats.size(self.received_bytes), stats.size(self.header.file_bytes)
        return f"read {read} of {size}: the header alone, from {self.repository} at {self.commit[:12]}"


def is_address(given: str) -> bool:
    return given.lower().startswith((SCHEME, *ELSEWHERE))


def any_header(given: str | Path) -> gguf_file.Header:
    """The header of a model's file, here or at its address on the Hub. Raises GGUFError, HubError."""
    return header(str(given)).header if is_address(str(given)) else gguf_file.read_header(given)


def header(address: str, endpoint: str | None = None) -> Remote:
    """The header of the model at `address`, hf:OWNER/REPO/PATH[@REVISION]: of all its files, given any of them.

    Raises AddressError, GGUFError for what is no model, HubError, ParamsError for what is no repository's name.
    """
    header, reader, _ = _read(address, endpoint)
    return Remote(header, reader.repository, reader.commit, reader.received)


def outline(address: str, endpoint: str | None = None) -> Outline:
    """The outline of the model at `address`: what its twin is written from. Raises what `header` does."""
    header, reader, sizes = _read(address, endpoint)
    return outlines.from_bytes([(reader.first[name], nbytes) for name, nbytes in sizes.items()], header.path.name)


class Address(NamedTuple):
    """The parts of hf:OWNER/REPO/PATH[@REVISION]."""

    repository: str
    path: str | None
    revision: str | None


def parse(address: str) -> Address:
    """Raises AddressError, ParamsError for what is no repository's name."""
    if not (m := ADDRESS.fullmatch(address)):
        raise AddressError(f"{neutral.plain(address)!r} is not the address of a file on the Hub: write {HOW}")
    return Address(repository_name(m["repository"]), m["path"], m["revision"])


def _read(address: str, endpoint: str | None) -> tuple[gguf_file.Header, Reader, Mapping[str, int]]:
    """The model's header, its reader, and the sizes of its files by path."""
    repository, path, revision = parse(address)
    client = hub.api(endpoint)
    with hub.asking(f"looking for {repository}"):
        commit, siblings = listed(client, repository, revision or "main")
        sizes = {name: int(s.size or 0) for name, s in siblings.items() if name.lower().endswith(".gguf")}
    wanted = files_of(path, sizes, repository, revision)
    reader = Reader(client, repository, commit, MAX_BYTES, ranges=True)
    return gguf_file.model(reader.header(wanted)), reader, wanted


def listed(client: HfApi, repository: str, revision: str) -> tuple[str, dict[str, Any]]:
    """(commit, path -> the Hub's facts of a file) of a repository, to be called inside `hub.asking`."""
    info = client.model_info(repository, revision=revision, files_metadata=True)
    siblings = {s.rfilename: s for s in info.siblings or ()}
    if len(siblings) > hub.MAX_FILES or not info.sha or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
        raise TypeError(f"a commit {info.sha!r:.60} of {len(siblings)} files")
    return info.sha, siblings


def files_of(path: str | None, sizes: Mapping[str, int], repository: str, revision: str | None) -> dict[str, int]:
    """Name -> bytes of all files of the model to which the file `path` belongs. Raises AddressError, GGUFError."""
    at = f"@{revision}" if revision else ""
    if not sizes:
        raise AddressError(f"{repository}{neutral.plain(at)} has no GGUF file: take a repository that has some")
    if path is None:
        lines = _models(sizes, repository, at)
        raise AddressError("\n  ".join([f"{repository} names no file; it has {len(lines)} to name:", *_some(lines)]))
    named = f"{neutral.plain(path)} of {repository}{neutral.plain(at)}"
    if path not in sizes:
        raise AddressError(f"there is no GGUF file {named}; {_near(path, sizes)}")
    names = [part.as_posix() for part in gguf_file.split_paths(Path(path))]
    if missing := [name for name in names if name not in sizes]:
        lacking = ", ".join(map(neutral.plain, _some(missing, 3)))
        raise AddressError(f"{named} is one of {len(names)} files of a model, and there is no {lacking}; take another")
    if any(sizes[name] <= 0 for name in names):
        raise AddressError(f"{named} has no size in the Hub's listing; take another file")
    return {name: sizes[name] for name in names}


def _models(sizes: Mapping[str, int], repository: str, at: str) -> list[str]:
    """A line for each model of a repository: its size, its address and the number of its files."""
    parts: dict[str, list[str]] = {}
    for name in sorted(sizes):
        parts.setdefault(gguf_file.SPLIT.sub("", name), []).append(name)
    lines = []
    for names in parts.values():
        size, files = stats.size(sum(sizes[n] for n in names)), f"  ({len(names)} files)" if len(names) > 1 else ""
        lines.append(neutral.plain(f"{SCHEME}{repository}/{names[0]}{at}") + f"  {size}{files}")
    return lines


def _near(path: str, sizes: Iterable[str]) -> str:
    """The names that are nearest to `path`, or all."""
    names = sorted(sizes)
    own = {name: PurePosixPath(name).name.lower() for name in names}
    asked = PurePosixPath(path).name.lower().removesuffix(".gguf")
    close = [name for name in names if asked and asked in own[name]]
    matches = difflib.get_close_matches(f"{asked}.gguf", own.values(), 3, 0.6)
    close = close or [name for match in dict.fromkeys(matches) for name in names if own[name] == match]
    shown = ", ".join(map(neutral.plain, _some(close or names, 5 if close else 12)))
    return f"did you mean {shown}?" if close else f"there are {shown}"


def _some(names: list[str], most: int = MAX_LISTED) -> list[str]:
    return [*names[:most], f"{len(names) - most} more"] if len(names) > most else names


class Reader:
    """Reads the headers of a repository's files at one commit, downloading only the beginning of each file.

    limit_bytes: for all of them together. ranges: refuse a server that sends a whole file where its beginning is asked
    for; otherwise it is cut off there.
    """

    def __init__(self, client: HfApi, repository: str, commit: str, limit_bytes: int, ranges: bool = False):
        self.client, self.repository, self.commit = client, repository, commit
        self.limit_bytes, self.ranges, self.received = limit_bytes, ranges, 0
        self.first: dict[str, bytes] = {}
        """Path -> the beginning of that file, as far as its header was read."""

    def header(self, sizes: Mapping[str, int]) -> gguf_file.Header:
        """The header of the model whose files are `sizes` (path -> bytes), in order. Raises GGUFError, HubError."""
        first = PREFIX_BYTES
        parts = []
        for name, nbytes in sizes.items():
            parts.append(self._part(name, nbytes, first))
            first = LATER_PREFIX_BYTES
        return gguf_file.joined(parts)

    def _part(self, name: str, nbytes: int, first: int) -> gguf_file.Header:
        """The header of one file, reading only as much of the file as needed."""
        data, location, upto = bytearray(), self._locate(name), min(first, nbytes)
        while True:
            data += self._piece(name, location, len(data), upto, nbytes)
            if len(data) < upto:
                got = f"the Hub sent only {len(data)} of the first {upto} bytes; try again later"
                raise gguf_file.GGUFError(f"{PurePosixPath(name).name}: {got}")
            try:
                header = gguf_file.from_bytes(bytes(data), PurePosixPath(name).name, nbytes)
                self.first[name] = bytes(data)
                return header
            except gguf_file.HeaderCut:
                if upto in (nbytes, MAX_PREFIX_BYTES):
                    raise
            upto = min(2 * upto, nbytes, MAX_PREFIX_BYTES)

    def _locate(self, name: str) -> tuple[str, dict[str, str]]:
        with hub.asking(f"looking for {neutral.plain(name)} of {self.repository}"):
            return hub.locate(self.client, self.repository, name, self.commit)

    def _piece(self, name: str, location: tuple[str, dict[str, str]], start: int, stop: int, nbytes: int) -> bytes:
        if self.received + stop - start > self.limit_bytes:
            limit = stats.size(self.limit_bytes)
            raise hub.HubError(f"the headers of {self.repository} are longer than {limit}: name one file of it")
        whole = not self.ranges or stop == nbytes
        with hub.asking(f"reading the header of {neutral.plain(name)} of {self.repository}", receives=stop - start):
            piece = b"".join(hub.download(*location, start, stop, whole=whole))
        self.received += len(piece)
        return piece
