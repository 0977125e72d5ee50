"""The record of which experts the tokens of a text used: one JSON file, with its own digest, its trace beside it.

What is stored is counted; balance and hits are computed from it whenever they are shown.
"""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationError

from moelib.audit.record import MAX_BYTES, Check, RecordError
from moelib.base import files, neutral
from moelib.base.files import stored
from moelib.base.schema import Seconds, Sha256
from moelib.catalogue import params
from moelib.catalogue.facts import DeviceFacts, EngineFacts, HostFacts, Manifest
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


class Routed(params.Strict):
    """What was asked, of which file, engine, device and host, what was counted, and its checks."""

    model_config = ConfigDict(allow_inf_nan=False)

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    run_id: str
    attempt: Annotated[int, Field(ge=1, le=10_000)]
    status: Literal["valid", "invalid", "failed"]
    reasons: tuple[str, ...]
    message: str | None
    spec: Spec
    sheet: Manifest
    engine: EngineFacts
    """Its build; the tool that counts is llama-imatrix of the same."""
    device: DeviceFacts
    host: HostFacts
    started_utc: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")]
    found: Found | None
    audit: tuple[Check, ...]
    raw: dict[Annotated[str, Field(pattern=r"^[\w.=,-]+\.(log|csv)\.gz$")], Sha256]
    """Compressed logs, and the trace, in raw/ beside the record: file name -> SHA-256."""
    digest: str = ""

    @property
    def done(self) -> bool:
        return self.status == "valid"

    @property
    def key(self) -> str:
        return spec_key(self.spec)

    @property
    def cited(self) -> dict[str, str]:
        """Its path in the study's folder -> its digest, for provenance."""
        return {f"{FOLDER}/{self.run_id}.json": self.digest}

    @property
    def line(self) -> str:
        """One line for people who wait."""
        s = self.spec
        what = f"{s.model} {s.quant}, {s.corpus}: {self.status}"
        return neutral.plain(what + (f" ({', '.join(self.reasons)})" if self.reasons else ""))


def spec_key(spec: Spec) -> str:
    """Digest of what defines it; attempts at the same share it."""
    return files.digest({name: getattr(spec, name) for name in Spec.__dataclass_fields__})[:12]


def run_id(s: Spec, attempt: int) -> str:
    return f"{s.model}_{s.quant}_{s.corpus}_{spec_key(s)}_a{attempt}"


def write(folder: Path, routed: Routed) -> Routed:
    """Write it with its digest to `folder`/routing/ and return it. Raises RecordError if it is there already, or holds
    what `read` would refuse."""
    path = folder / FOLDER / f"{routed.run_id}.json"
    data = routed.model_dump(mode="json")
    try:
        Routed.model_validate_json(files.canonical(data), strict=True)
    except ValueError as err:
        raise RecordError(f"{path.name} would not be read back: {' '.join(str(err).split())[:300]}") from None
    if path.exists():
        raise RecordError(f"{path.name} exists; records are never overwritten")
    files.write_bytes(path, files.sealed(data))
    return routed.model_copy(update={"digest": files.own_digest(data)})


def read(path: Path) -> Routed:
    """The record at `path`, verified, its evidence too. Raises RecordError."""
    try:
        raw = files.head(path, MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise RecordError(f"more than {MAX_BYTES >> 20} MiB are no record")
        loaded = Routed.model_validate_json(raw, strict=True)
        if not files.is_sealed(raw, loaded.digest):
            raise RecordError("its digest does not fit its content")
        if loaded.run_id != path.stem or loaded.run_id != run_id(loaded.spec, loaded.attempt):
            raise RecordError(f"it is the record of {loaded.run_id}")
        for name, sha256 in loaded.raw.items():
            if files.sha256(path.parent / "raw" / name) != sha256:
                raise RecordError(f"raw/{name} is not what it names")
    except (OSError, ValueError, ValidationError, RecursionError) as err:
        raise RecordError(f"{path.name}: {' '.join(str(err).split())[:300]}") from None
    return loaded


def read_all(folder: Path) -> tuple[list[Routed], list[str]]:
    """All records of a study's folder, by id, and what was wrong with the others."""
    good, damaged = [], []
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            good.append(read(path))
        except RecordError as err:
            damaged.append(str(err))
    return good, damaged


def standing(every: Sequence[Routed]) -> dict[str, Routed]:
    """The record that stands for what was asked, by its key: the last one that is valid, else the last attempt."""
    return {r.key: r for r in sorted(every, key=lambda r: (r.done, r.attempt))}


def next_attempt(folder: Path, spec: Spec) -> int:
    """The number of an attempt that has no file yet, of a record that can be read or not."""
    stem = run_id(spec, 1).removesuffix("1")
    made = [p.stem.removeprefix(stem) for p in (folder / FOLDER).glob("*.json") if p.stem.startswith(stem)]
    return 1 + max((int(n) for n in made if n.isascii() and n.isdigit()), default=0)


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
