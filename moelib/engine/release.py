"""Files of a release site: downloaded with resumption and limits on size and time, and unpacked with limits on what.

Only HTTPS and loopback are asked. A site that cannot be reached is given up within seconds.
"""

import gzip
import socket
import tarfile
import threading
import time
import urllib.request
import zlib
from pathlib import Path
from typing import BinaryIO

import httpx

from moelib.base import files
from moelib.base.bar import tqdm
from moelib.catalogue import params

CONNECT_S, SILENT_S, LIMIT_S = 5.0, 20.0, 3600.0
MEMBERS, RATIO, ROOM = 10_000, 12, 64 << 20  # programs compress to a third or a quarter


class ArchiveError(params.UserError):
    """A release archive cannot be used; the message says why."""


class Unreachable(ArchiveError):
    """The release site does not answer."""


def unreachable(url: str, err: Exception) -> Unreachable:
    return Unreachable(f"{httpx.URL(url).host} cannot be reached: {str(err) or type(err).__name__}")


def size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def check_url(url: str, source: str) -> None:
    """Raise ArchiveError, which names the `source` of the address, unless it is one by HTTPS or on loopback."""
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as err:
        raise ArchiveError(f"{source} names {url!r}, which is not a URL: {err}") from None
    local = address.scheme == "http" and address.host in ("127.0.0.1", "localhost", "::1")
    if address.scheme != "https" and not local:
        raise ArchiveError(f"{source} names {url!r}: give an address that begins with https://, or one on loopback")


def client(url: str) -> httpx.Client:
    """A client for the site of `url`, also through the environment's proxy. Raises Unreachable."""
    address = httpx.URL(url)
    local = address.scheme == "http"
    if not local and not urllib.request.getproxies():
        _resolve(address.host, address.port or 443)
    try:
        return httpx.Client(
            timeout=httpx.Timeout(SILENT_S, connect=CONNECT_S),
            follow_redirects=True,
            trust_env=not local,
            headers={"Accept-Encoding": "identity"},  # the size and the hash are those of the file as it is stored
            event_hooks={"request": [lambda request: check_url(str(request.url), "the release site")]},
        )
    except (ValueError, ImportError) as err:
        raise Unreachable(f"the proxy of the environment cannot be used: {err}") from None


def _resolve(host: str, port: int) -> None:
    """Raise Unreachable unless the name resolves within CONNECT_S; the system's look-up has no time limit."""
    failures: list[OSError | None] = []

    def resolve() -> None:
        try:
            socket.getaddrinfo(host, port)
            failures.append(None)
        except OSError as err:
            failures.append(err)

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(CONNECT_S)
    if failures != [None]:
        raise Unreachable(
            f"{host} cannot be reached: {failures[0] if failures else 'its name did not resolve in time'}"
        )


def receive(client: httpx.Client, url: str, part: Path, most: int, exactly: bool = True) -> None:
    """Download the rest of the file `part`, which may have `most` bytes, or `exactly` so many.

    Raises ArchiveError; httpx.HTTPError if the download is interrupted; FileError if the disk is full.
    """
    had, deadline = size(part), time.monotonic() + LIMIT_S
    if had > most:
        part.unlink()
        had = 0
    if had == most:
        return
    name = url.rpartition("/")[2]
    with client.stream("GET", url, headers={"Range": f"bytes={had}-"} if had else {}) as answer:
        if answer.status_code not in (200, 206):
            raise ArchiveError(f"{name} cannot be downloaded: the release site answers {answer.status_code}")
        if answer.status_code == 200:
            had = 0  # the site sends the whole file
        elif not answer.headers.get("content-range", "").startswith(f"bytes {had}-"):
            raise ArchiveError(f"{name} cannot be downloaded: the release site sends another range than requested")
        length = answer.headers.get("content-length", "")
        total = had + int(length) if length.isdecimal() and len(length) < 16 else most
        if total > most or (exactly and total != most):
            part.unlink(missing_ok=True)
            raise ArchiveError(f"{name} has {total} bytes at the release site, not {most}; it was not downloaded")
        bar = tqdm(total=total, initial=had, desc=name, unit="B", unit_scale=True, disable=None, leave=False)
        try:
            with part.open("r+b" if had else "wb") as f, bar:
                f.seek(had)
                for chunk in answer.iter_raw():
                    if f.tell() + len(chunk) > most:
                        part.unlink()
                        raise ArchiveError(f"{name} is longer than {most} bytes; it was deleted")
                    if time.monotonic() > deadline:
                        raise ArchiveError(f"{name} did not arrive in {LIMIT_S / 60:.0f} minutes; run again to go on")
                    f.write(chunk)
                    bar.update(len(chunk))
        except OSError as err:
            if err.errno in files.NO_SPACE:
                raise files.FileError(f"{name} cannot be written: {files.full(part.parent)}") from None
            raise


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
    """Unpack an untrusted archive: files, folders and links inside `folder` alone, limited in number and size.

    Raises ArchiveError.
    """
    if not hasattr(tarfile, "data_filter"):
        raise ArchiveError("unpacking an archive safely needs Python 3.11.4 or newer: update Python")
    most, total = RATIO * part.stat().st_size + ROOM, 0
    try:
        with part.open("rb") as raw, tarfile.open(fileobj=_Metered(raw, part.name, most), mode="r|") as tar:  # type: ignore[call-overload]  # it only reads
            for count, member in enumerate(tar):
                total += member.size  # of a sparse file more than the stream holds
                if count >= MEMBERS or total > most:
                    raise ArchiveError(f"{part.name} unpacks to too much: it is not a release of llama.cpp")
                tar.extract(member, folder, filter="data")
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile, KeyError, ValueError, OverflowError) as err:
        raise ArchiveError(f"{part.name} cannot be unpacked: {err}") from None
