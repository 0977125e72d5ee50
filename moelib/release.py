"""Download files of a release site over HTTPS or from loopback, with resumption and limits on size and time.

A site that cannot be reached is given up within seconds.
"""

import socket
import threading
import time
import urllib.request
from pathlib import Path

import httpx

from moelib import files, params
from moelib.bar import tqdm

CONNECT_S, SILENT_S, LIMIT_S = 5.0, 20.0, 3600.0


class ArchiveError(params.UserError):
    """A release archive cannot be used; the message says why."""


class Unreachable(ArchiveError):
    """The release site does not answer."""


def unreachable(url: str, err: Exception) -> Unreachable:
    return Unreachable(f"{httpx.URL(url).host} cannot be reached: {err or type(err).__name__}")


def size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def allowed(url: str, who: str) -> None:
    try:
        at = httpx.URL(url)
    except httpx.InvalidURL as err:
        raise ArchiveError(f"{who} names {url!r}, which is not a URL: {err}") from None
    if at.scheme != "https" and not (at.scheme == "http" and at.host in ("127.0.0.1", "localhost", "::1")):
        raise ArchiveError(f"{who} names {url!r}: give an address that begins with https://, or one on loopback")


def client(url: str) -> httpx.Client:
    at = httpx.URL(url)
    local = at.scheme == "http"
    if not local and not urllib.request.getproxies():
        _resolve(at.host, at.port or 443)
    try:
        return httpx.Client(
            timeout=httpx.Timeout(SILENT_S, connect=CONNECT_S),
            follow_redirects=True,
            trust_env=not local,
            headers={"Accept-Encoding": "identity"},
            event_hooks={"request": [lambda request: allowed(str(request.url), "the release site")]},
        )
    except (ValueError, ImportError) as err:
        raise Unreachable(f"the proxy of the environment cannot be used: {err}") from None


def _resolve(host: str, port: int) -> None:
    """Raise Unreachable unless the name resolves within CONNECT_S; the system's look-up has no time limit."""
    outcome: list[str] = []

    def ask() -> None:
        try:
            socket.getaddrinfo(host, port)
            outcome.append("")
        except OSError as err:
            outcome.append(str(err))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_S)
    if why := (outcome or ["its name was not found in time"])[0]:
        raise Unreachable(f"{host} cannot be reached: {why}")


def receive(client: httpx.Client, url: str, part: Path, most: int, exactly: bool = True) -> None:
    """Download the rest of the file `part`. Raises httpx.HTTPError if the download is interrupted."""
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
                if f.tell() < total and length:
                    raise httpx.ReadError("the connection closed early")
        except OSError as err:
            if err.errno in files.NO_SPACE:
                raise files.FileError(f"{name} cannot be written: {files.full(part.parent)}") from None
            raise
