"""Official release archives of llama.cpp: pinned in `params/engine.yaml`, downloaded, verified, unpacked and cached.

An archive's size and hash are checked before it is opened. It is unpacked in a temporary folder that is then renamed,
so that it is complete or absent. It is used only after a successful trial run
on this machine (`moelib.measure.trial`).
"""

import contextlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from moelib.base import files
from moelib.base.schema import build
from moelib.catalogue import params
from moelib.engine import release
from moelib.engine.release import ArchiveError
from moelib.machine import gpus, host

log = logging.getLogger(__name__)

URL = "MOELIB_ENGINE_URL"
MANIFEST, TRIED = ".manifest.json", ".tried.json"


class File(params.Strict):
    bytes: PositiveInt
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Pin(params.Strict):
    """The files for one system and backend, all unpacked into one folder."""

    build: PositiveInt
    """llama.cpp's build number."""
    glibc: str = Field(pattern=r"^[0-9]+\.[0-9]+$")
    """The oldest version of glibc that the tools run with."""
    files: Annotated[dict[Annotated[str, Field(pattern=r"^\w[\w.+-]*\.tar\.gz$")], File], Field(min_length=1)]
    """Name in the release -> expected size and hash; the tools first, then the CUDA runtime if it is separate."""


class Pins(params.Strict):
    url: str = Field(pattern=r"^https://|^http://127\.0\.0\.1[:/]")
    pins: dict[Annotated[str, Field(pattern=r"^[a-z]+-[a-z0-9_]+/[a-z]+(-[0-9]+\.[0-9]+)?$")], Pin]
    """System/backend, such as `linux-x86_64/cuda-12.8`."""


def read() -> Pins:
    """The pinned archives. Raises ParamsError."""
    return build(Pins, "params/engine.yaml", params.entries("engine.yaml"))


@dataclass(frozen=True)
class Archive:
    """A pinned archive and its place in the cache."""

    backend: str
    """`cpu`, or `cuda` with its version."""
    pin: Pin

    @property
    def folder(self) -> Path:
        name = files.digest([self.pin.build, {k: f.sha256 for k, f in self.pin.files.items()}])[:12]
        return cache() / f"llama.cpp-b{self.pin.build}-{self.backend}-{name}"

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.pin.files.values())

    def __str__(self) -> str:
        return next(iter(self.pin.files))

    def tools(self) -> Path | None:
        """The folder of the tools, if the archive is unpacked."""
        return _tools(self.folder)


def _tools(folder: Path) -> Path | None:
    """The folder of tools in an unpacked archive, the uppermost if there are several; None without one."""
    servers = folder.glob("**/llama-server")
    return min((p.parent for p in servers), key=lambda p: (len(p.parts), p), default=None)


def cache() -> Path:
    """The folder in which this user's engines are cached. Raises ArchiveError for a user without a home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    except RuntimeError:
        raise ArchiveError(
            "this user has no home folder to store an engine in: set XDG_CACHE_HOME to a folder"
        ) from None
    return base / "moelib"


def system() -> str:
    return f"{platform.system()}-{platform.machine()}".lower()


def fitting() -> tuple[list[Archive], list[str]]:
    """(archives that should run here, best first; reasons why the others for this system do not)."""
    usable, passed_over, cuda = [], [], gpus.driver_cuda()
    libc, version = platform.libc_ver()
    for name, pin in read().pins.items():
        where, _, backend = name.partition("/")
        needs = _numbers(backend.partition("-")[2])
        if where != system() or (needs and cuda is None):
            continue
        if needs and cuda and needs > cuda:
            passed_over.append(f"{backend} needs a newer driver: this one supports CUDA {'.'.join(map(str, cuda))}")
        elif where.startswith("linux") and (libc != "glibc" or _numbers(version) < _numbers(pin.glibc)):
            passed_over.append(
                f"{name} needs glibc {pin.glibc}, but this system has {libc or 'another C library'} {version}".strip()
            )
        else:
            usable.append((needs, Archive(backend, pin)))
    return [a for _, a in sorted(usable, key=lambda f: f[0], reverse=True)], passed_over


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def installed() -> Path | None:
    """The tools' folder of the best archive that is unpacked and passed its trial on this machine; None without one."""
    try:
        if not any(Archive(name.partition("/")[2], pin).tools() for name, pin in read().pins.items()):
            return None
        return next((a.tools() for a in fitting()[0] if a.tools() and _tried(a.folder) == _machine()), None)
    except (params.UserError, OSError):
        return None


def _machine() -> dict[str, str]:
    """The facts that a trial's outcome depends on; several machines may share a home folder."""
    return {"cpu": str(host.cpu_name()), "libc": " ".join(platform.libc_ver()), "system": system()}


def _tried(folder: Path) -> dict[str, str] | None:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / TRIED).read_text(encoding="utf-8"))
    return None


def accept(archive: Archive) -> None:
    """Record that the trial on this machine succeeded."""
    files.write_json(archive.folder / TRIED, _machine())


def home(tools: Path) -> Path:
    """The unpacked archive's folder that contains a folder of tools."""
    return next((p for p in (tools, *tools.parents) if (p / MANIFEST).is_file()), tools)


def whole(folder: Path) -> bool:
    """Whether an unpacked folder is unchanged; reads every file."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8")) == _listing(folder)
    except (OSError, ValueError):
        return False


def _listing(folder: Path) -> dict[str, str]:
    """Every file and link -> its SHA-256, or the link's target."""
    listed = {}
    for p in sorted(folder.rglob("*")):
        name = str(p.relative_to(folder))
        if p.is_symlink():
            listed[name] = f"-> {os.readlink(p)}"
        elif p.is_file() and name not in (MANIFEST, TRIED):
            listed[name] = files.sha256(p)
    return listed


@contextlib.contextmanager
def alone(name: Path, subject: str) -> Iterator[None]:
    """Hold the lock on a folder of the cache; logs a warning while another process holds it.

    Raises ArchiveError if the cache cannot be written.
    """
    path = name.with_name(f"{name.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ArchiveError(f"{path.parent} cannot be written: set XDG_CACHE_HOME to a folder of yours")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.lock(path, subject, wait_s=0.2))
        except files.FileError:
            log.warning("waiting for another process that works on %s", subject)
            stack.enter_context(files.lock(path, subject, wait_s=release.LIMIT_S))
        yield


def fetch(archive: Archive) -> Path:
    """The tools' folder of an archive, downloaded and unpacked if it is missing or damaged.

    Raises Unreachable, ArchiveError, or FileError if the disk is too small.
    """
    folder = archive.folder
    with alone(folder, str(archive)):
        if not whole(folder):
            if folder.exists():
                log.warning("%s is damaged; unpacking it again", folder)
            shutil.rmtree(folder, ignore_errors=True)
            files.need_space(cache(), 5 * archive.bytes, f"the release archive {archive}")
            _unpack(archive, folder)
        if tools := archive.tools():
            return tools
    raise ArchiveError(f"{archive} holds no llama-server: pin the release's archive of tools in params/engine.yaml")


def base_url() -> str:
    """The address of the releases. Raises ArchiveError if it is neither HTTPS nor on loopback."""
    url = (os.environ.get(URL) or read().url).rstrip("/")
    release.check_url(url, URL if os.environ.get(URL) else "params/engine.yaml")
    return url


def _unpack(archive: Archive, folder: Path) -> None:
    """Download and unpack all files in a temporary folder, then rename it. Raises ArchiveError and leaves no partial
    folder."""
    partial = folder.with_name(f".{folder.name}.unpacking")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        for name, want in archive.pin.files.items():
            release.download(f"{base_url()}/b{archive.pin.build}/{name}", partial / name, want.bytes, want.sha256)
            release.extract(partial / name, partial)
            (partial / name).unlink()
        _together(partial)
        files.write_json(partial / MANIFEST, _listing(partial))
        os.replace(partial, folder)
    except OSError as err:
        if err.errno in files.NO_SPACE:
            raise files.FileError(f"{folder.name} cannot be written: {files.full(folder.parent)}") from None
        raise ArchiveError(f"{archive} cannot be unpacked: {err}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _together(folder: Path) -> None:
    """Move the libraries of a separate runtime next to the tools, where the loader searches for them."""
    tools = _tools(folder)
    if tools is None:
        return
    for p in sorted(folder.rglob("lib*.so*")):
        if p.parent != tools and not (tools / p.name).exists():
            os.replace(p, tools / p.name)
