"""Files of a release site: downloaded with limits on size and time, checked against their pins, and unpacked.

Only HTTPS and loopback are asked.
"""

import tarfile
import time
import zlib
from pathlib import Path

import httpx

from moelib.base import files
from moelib.base.bar import tqdm
from moelib.catalogue import params

CONNECT_S, SILENT_S, LIMIT_S = 5.0, 20.0, 3600.0
TRIES = 3  # of a download that is interrupted


class ArchiveError(params.UserError):
    """A release archive cannot be used; the message says why."""


class Unreachable(ArchiveError):
    """The release site does not answer."""


def check_url(url: str, source: str) -> None:
    """Raise ArchiveError, which names the `source` of the address, unless it is one by HTTPS or on loopback."""
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as err:
        raise ArchiveError(f"{source} names {url!r}, which is not a URL: {err}") from None
    local = address.scheme == "http" and address.host in ("127.0.0.1", "localhost", "::1")
    if address.scheme != "https" and not local:
        raise ArchiveError(f"{source} names {url!r}: give an address that begins with https://, or one on loopback")


def _client(url: str) -> httpx.Client:
    """A client for the site of `url`, also through the environment's proxy. Raises Unreachable."""
    try:
        return httpx.Client(
            timeout=httpx.Timeout(SILENT_S, connect=CONNECT_S),
            follow_redirects=True,
            trust_env=httpx.URL(url).scheme == "https",
            headers={"Accept-Encoding": "identity"},  # the size and the hash are those of the file as it is stored
            event_hooks={"request": [lambda request: check_url(str(request.url), "the release site")]},
        )
    except (ValueError, ImportError) as err:
        raise Unreachable(f"the proxy of the environment cannot be used: {err}") from None


def download(url: str, path: Path, nbytes: int, sha256: str) -> None:
    """Download the file that has this size and hash. Raises Unreachable, ArchiveError."""
    for attempt in range(TRIES):
        try:
            with _client(url) as client:
                _receive(client, url, path, nbytes)
            break
        except httpx.HTTPError as err:
            if attempt == TRIES - 1 or not path.exists():  # it never began to answer
                why = str(err) or type(err).__name__
                raise Unreachable(f"{httpx.URL(url).host} cannot be reached: {why}") from None
    if (found := files.sha256(path)) != sha256:
        raise ArchiveError(
            f"{path.name} has SHA-256 {found[:12]}..., but {sha256[:12]}... is pinned; it was deleted; run again, or "
            "compare the pin with the release's page"
        )


def _receive(client: httpx.Client, url: str, path: Path, nbytes: int) -> None:
    """Write what the site sends, at most `nbytes`. Raises ArchiveError; httpx.HTTPError if it is interrupted."""
    deadline = time.monotonic() + LIMIT_S
    bar = tqdm(total=nbytes, desc=path.name, unit="B", unit_scale=True, disable=None, leave=False)
    with client.stream("GET", url) as answer, path.open("wb") as f, bar:
        if answer.status_code != 200:
            raise ArchiveError(f"{path.name} cannot be downloaded: the release site answers {answer.status_code}")
        for chunk in answer.iter_raw():
            if f.tell() + len(chunk) > nbytes:
                raise ArchiveError(f"{path.name} is longer than the {nbytes} bytes that are pinned; it was deleted")
            if time.monotonic() > deadline:
                raise ArchiveError(f"{path.name} did not arrive in {LIMIT_S / 60:.0f} minutes; run again")
            f.write(chunk)
            bar.update(len(chunk))


def extract(archive: Path, folder: Path) -> None:
    """Unpack an archive whose hash was checked: files, folders and links inside `folder` alone. Raises ArchiveError."""
    if not hasattr(tarfile, "data_filter"):
        raise ArchiveError("unpacking an archive safely needs Python 3.11.4 or newer: update Python")
    try:
        with tarfile.open(archive, "r:gz") as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, zlib.error, EOFError, KeyError, ValueError, OverflowError) as err:
        raise ArchiveError(f"{archive.name} cannot be unpacked: {err}") from None
