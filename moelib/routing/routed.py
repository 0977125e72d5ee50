"""The record of which experts the tokens of a text used: one JSON file, with its own digest, its trace beside it.

What is stored is counted; balance and hits are computed from it whenever they are shown.
"""

import gzip
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import Field

from moelib.audit import record
from moelib.audit.record import RecordError
from moelib.base import files, neutral
from moelib.base.files import stored
from moelib.base.schema import Seconds, Sha256
from moelib.catalogue.facts import Manifest
from moelib.catalogue.placement import Placement
from moelib.routing import trace as traces
from moelib.routing.passes import Experts, Selections
from moelib.routing.trace import Trace

SCHEMA_VERSION = 1
FOLDER = "routing"
TRACE = ".trace.csv.gz"
TRACE_BYTES = 1 << 28  # of a trace, unpacked: 4,096 tokens of 64 layers are 10 MB


@stored
class Spec:
    """What is asked: the counts of a text's chunks, and the trace of its first tokens."""

    study: str
    model: str
    quant: str
    weights: str
    scale: str
    corpus: str
    corpus_sha256: Sha256
    context: Annotated[int, Field(ge=1, le=1 << 16)]
    """Tokens of a chunk, each of which begins anew."""
    chunks: Annotated[int, Field(ge=1, le=10_000)]
    tokens: Annotated[int, Field(ge=1, le=4096)]
    """Of the trace."""
    device: str
    placement: str
    load_mode: str

    @property
    def placed(self) -> Placement:
        return Placement.parse(self.placement, self.load_mode)


@stored
class Found:
    """What was counted."""

    experts: Experts
    counts: Selections
    """Over all chunks, in the engine's usual batches."""
    whole: Selections
    """Over the trace's tokens, as one chunk in the usual batches: the trace's second account."""
    argv: tuple[tuple[str, ...], ...]
    """Command lines of the two and of the trace's last pass, with names of files alone."""
    seconds: Seconds
    """All passes together."""


class Routed(record.Beside):
    """What was asked, of which file, engine, device and host, what was counted, and its checks. The engine is told by
    its server; the tool that counts is llama-imatrix of the same build. The trace is in raw/."""

    FOLDER = FOLDER

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    spec: Spec
    sheet: Manifest
    found: Found | None

    @property
    def own_id(self) -> str:
        return run_id(self.spec, self.attempt)

    @property
    def key(self) -> str:
        return spec_key(self.spec)

    @property
    def line(self) -> str:
        """One line for people who wait."""
        s = self.spec
        what = f"{s.model} {s.quant}, {s.corpus}: {self.status}"
        return neutral.plain(what + (f" ({', '.join(self.reasons)})" if self.reasons else ""))


def spec_key(spec: Spec) -> str:
    """Digest of what defines it; attempts at the same share it."""
    return files.digest(asdict(spec))[:12]


def run_id(s: Spec, attempt: int) -> str:
    return f"{s.model}_{s.quant}_{s.corpus}_{spec_key(s)}_a{attempt}"


write, standing = record.write, record.standing


def read(path: Path) -> Routed:
    """The record at `path`, verified, its evidence too. Raises RecordError."""
    return record.read_beside(Routed, path)


def read_all(folder: Path) -> tuple[list[Routed], list[str]]:
    """All of a study's folder, by id, and what was wrong with the others."""
    return record.all_beside(Routed, folder)


def next_attempt(folder: Path, spec: Spec) -> int:
    """The number of an attempt that has no file yet."""
    return record.next_attempt(folder / FOLDER, run_id(spec, 1))


def keep_trace(folder: Path, name: str, trace: Trace, experts: Experts) -> dict[str, str]:
    """Write the trace to `folder`/routing/raw/; file name -> SHA-256."""
    path = folder / FOLDER / "raw" / f"{name}{TRACE}"
    files.write_bytes(path, gzip.compress(traces.written(trace, experts.layers).encode(), mtime=0))
    return {path.name: files.sha256(path)}


def trace(folder: Path, routed: Routed) -> Trace:
    """The trace, from the file beside the record. Raises RecordError where there is none that fits."""
    names = [n for n in routed.raw if n.endswith(TRACE)]
    try:
        if routed.found is None or len(names) != 1:
            raise ValueError("it has no trace")
        path = folder / FOLDER / "raw" / names[0]
        if files.sha256(path) != routed.raw[names[0]]:
            raise ValueError(f"{names[0]} is not what it names")
        with gzip.open(path, "rb") as f:
            text = f.read(TRACE_BYTES + 1)
        if len(text) > TRACE_BYTES:
            raise ValueError(f"{names[0]} is too large for a trace")
        return traces.read(text.decode(), routed.found.experts, routed.spec.tokens)
    except (OSError, ValueError, EOFError) as err:
        raise RecordError(f"{routed.run_id}: {' '.join(str(err).split())[:300]}") from None
