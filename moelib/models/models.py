"""Source files to quantise and their notes; geometry twins, written on demand and kept under `models/`.

Next to each file is a note with its SHA-256, size and times. A file whose size or times differ from its note is hashed
again, and made again if its content changed.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moelib.base import files
from moelib.catalogue import params
from moelib.gguf import gguf_file, twin
from moelib.locks import lease
from moelib.machine import host

LOCK_S = 3600.0  # for another process that makes the file
log = logging.getLogger(__name__)

SEED = 0  # of twins
NO_NOTE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Errors when reading a note that is missing, damaged, not JSON or of another form; it then counts as missing."""


@dataclass(frozen=True)
class Source:
    """An unquantised file and what it is."""

    model: str
    weights: str
    """twin: random weights in the model's geometry; real: the published weights."""
    scale: str
    path: Path
    """The file may have been deleted after its quants were made; `whole` makes it again."""
    sha256: str
    """SHA-256 of the file, or of the hashes of its files if there are several."""
    origin: str
    """Where it came from, as in the manifests of its quants."""

    @cached_property
    def header(self) -> gguf_file.Header:
        return gguf_file.read_header(self.path)


def folder() -> Path:
    """The folder of source files: $MOELIB_MODELS, or `models/` in the clone."""
    return Path(os.environ.get("MOELIB_MODELS") or params.root() / "models")


def twin_folder(model: str, scale: str) -> Path:
    return folder() / model / f"twin-{scale}"


def note(path: Path) -> Path:
    """The path of the note on the file at `path`."""
    return path.with_name(path.name + ".json")


def once(
    path: Path, expected: dict[str, Any], make: Callable[[], dict[str, Any]], needed: bool = True
) -> dict[str, Any]:
    """The facts in the note on the file at `path`, if they include `expected` and the file is unchanged; else call
    `make`, which writes the file and returns its facts. The facts include its `sha256`.

    With `needed` false, the file itself may be missing.
    """
    place = note(path)
    with keeping(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    with alone(path):
        try:
            noted = _read_note(path)
            intact = noted["digest"] == files.digest(noted["facts"])
            valid = intact and expected.items() <= noted["facts"].items()
            valid = valid and (_unchanged(path, noted) if needed or path.exists() else True)
        except NO_NOTE:
            noted, valid = {}, False
        facts = noted["facts"] if valid else make()
        if (
            path.exists()
            and (now := {"facts": facts, "file": files.state(path), "digest": files.digest(facts)}) != noted
        ):
            files.write_json(place, now)
    return facts


def _read_note(path: Path) -> dict[str, Any]:
    """The note on the file at `path`. Raises one of NO_NOTE if it cannot be read."""
    noted = json.loads(note(path).read_text(encoding="utf-8"))
    return noted if isinstance(noted, dict) and isinstance(noted["facts"], dict) else {}


def noted(path: Path) -> dict[str, Any] | None:
    """The facts in the note on the file at `path`; None without a note that is whole. The file itself is not read."""
    try:
        read = _read_note(path)
        return read["facts"] if read["digest"] == files.digest(read["facts"]) else None
    except NO_NOTE:
        return None


def alone(path: Path) -> AbstractContextManager[lease.Lease]:
    """The file at `path` for this process alone, among all hosts that share its folder; waits for another one to end.
    Raises InUse."""
    return lease.hold(path.with_suffix(".lock"), path.name, host.identity(), LOCK_S)


@contextmanager
def keeping(where: Path) -> Iterator[None]:
    """Turn an OSError about the folder `where` into a FileError with the next step."""
    try:
        yield
    except OSError as err:
        if err.errno in files.NO_SPACE:
            raise files.FileError(f"{where.name} cannot be written: {files.full(where)}") from None
        raise files.FileError(
            f"{err.filename or where} cannot be read or written ({err.strerror or err}): correct its permissions, or "
            "set MOELIB_MODELS to a folder of your own"
        ) from None


def _unchanged(path: Path, noted: dict[str, Any]) -> bool:
    """Whether the file is unchanged since it was noted; it is hashed if its size or times differ."""
    if files.state(path) != noted["file"]:
        log.info("%s changed on disk since it was made; checking its hash", path.name)
        if files.sha256(path) != noted["facts"]["sha256"]:
            forget(path)
            return False
    return True


def untouched(path: Path) -> bool:
    """Whether the file's size and times are those of its note, so that it need not be hashed."""
    try:
        return bool(_read_note(path)["file"] == files.state(path))
    except NO_NOTE:
        return False


def kept(path: Path) -> bool:
    """Whether the file exists and agrees with its note."""
    try:
        return _unchanged(path, _read_note(path))
    except NO_NOTE:
        return False


def forget(path: Path) -> None:
    """Delete the note on the file at `path`, so that the file is made again when it is next needed."""
    log.warning("%s is not the file that was made (its SHA-256 differs); making it again", path.name)
    note(path).unlink(missing_ok=True)


def make_twin(model: str, scale: str, needed: bool = True) -> Source:
    """The twin of a catalogued model at `scale`, written unless it exists, or once existed and is not `needed`.

    Raises params.ParamsError for an unknown or excluded model, files.FileError if the disk is too small.
    """
    entry = params.model(model)
    geometry = entry.at_scale(scale)
    path = twin_folder(model, scale) / f"{model}-F16.gguf"
    facts = {"model": model, "title": entry.title, "seed": SEED, "geometry": geometry.model_dump(), "weights": "twin"}

    def make() -> dict[str, Any]:
        return {**facts, "sha256": twin.write(path, geometry, title=entry.title, seed=SEED)}

    sha256 = once(path, facts, make, needed)["sha256"]
    return Source(model, "twin", scale, path, sha256, f"geometry twin written by moelib, seed {SEED}")
