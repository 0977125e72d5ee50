"""Pin an official release archive of llama.cpp in `params/engine.yaml`: download its files, hash them, write that down.

    python tools/pin_engine.py linux-x86_64/cuda-12.8 --build 11194 ARCHIVE.tar.gz RUNTIME.tar.gz

The names are those that the release's page lists. The downloaded files are believed: compare the printed SHA-256 with
the page's before you commit the pins.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
from ruamel.yaml import YAML

from moelib.base import files
from moelib.catalogue import params
from moelib.engine import archive, release

MOST_BYTES = 4 << 30
GLIBC = "2.39"  # of the newest Ubuntu that releases are made on: a machine with an older one builds from source


def download(build: int, assets: list[str], work: Path) -> dict[str, dict[str, int | str]]:
    """Name -> bytes and SHA-256 of each file. Raises ArchiveError where one cannot be had or they hold no tools."""
    pinned: dict[str, dict[str, int | str]] = {}
    for asset in assets:
        url, part = f"{archive.base_url()}/b{build}/{asset}", work / asset
        try:
            with release.client(url) as client:
                release.receive(client, url, part, MOST_BYTES, exactly=False)
        except httpx.HTTPError as err:
            raise release.unreachable(url, err) from None
        release.extract(part, work / "unpacked")
        pinned[asset] = {"bytes": part.stat().st_size, "sha256": files.sha256(part)}
    if not list((work / "unpacked").glob("**/llama-server")):
        raise release.ArchiveError(f"{', '.join(assets)}: there is no llama-server in it; name the tools' archive too")
    return pinned


def pin(name: str, build: int, assets: list[str], glibc: str | None) -> archive.Pin:
    """Write the pin, comments and order kept, once all of it is right. Raises ArchiveError, ParamsError."""
    book, text = YAML(), io.BytesIO()
    book.width, book.preserve_quotes = 1000, True
    entries = book.load(archive.path())
    glibc = glibc or entries["pins"].get(name, {}).get("glibc") or GLIBC
    filler = {"bytes": 1, "sha256": "0" * 64}
    archive.check({"url": entries["url"], "pins": {name: _entry(build, glibc, dict.fromkeys(assets, filler))}})
    with tempfile.TemporaryDirectory() as work:
        entries["pins"][name] = _entry(build, glibc, download(build, assets, Path(work)))
    book.dump(entries, text)
    pins = archive.check(YAML(typ="safe").load(text.getvalue()))
    files.write_bytes(archive.path(), text.getvalue())
    return pins.pins[name]


def _entry(build: int, glibc: str, entries: dict[str, Any]) -> dict[str, Any]:
    return {"build": build, "glibc": glibc, "files": entries}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("name", help="SYSTEM/BACKEND, such as linux-x86_64/cuda-12.8")
    p.add_argument("assets", nargs="+", help="names of the release's files, the tools' first")
    p.add_argument("--build", type=int, required=True, help="llama.cpp's build number")
    p.add_argument("--glibc", help=f"oldest C library that it starts with (default: as pinned, or {GLIBC})")
    a = p.parse_args()
    for asset, file in pin(a.name, a.build, a.assets, a.glibc).files.items():
        print(f"{asset}: {file.bytes} bytes, SHA-256 {file.sha256}")
    print(f"written to {archive.path()}; compare with the page of release b{a.build}")


if __name__ == "__main__":
    try:
        main()
    except params.UserError as err:
        sys.exit(f"moelib: {err}")
