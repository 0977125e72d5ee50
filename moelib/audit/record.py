"""The record of a run: one JSON file, checked against its schema, with its own digest, written whole or not at all.

A record is done when it parses, validates and carries its digest. Failed and invalid runs are records too.
"""

import contextlib
import gzip
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from moelib.base import files, schema
from moelib.base.schema import Sha256
from moelib.catalogue import params
from moelib.catalogue.facts import OLDEST, SCHEMA_VERSION, DeviceFacts, EngineFacts, HostFacts, Manifest
from moelib.measure.run import Observation, Spec

log = logging.getLogger(__name__)

DONE = ("valid", "degraded")
MAX_BYTES = 64 << 20  # of a record: 60 kB seen


class RecordError(params.UserError, ValueError):
    """The file is not a record that can be believed; the message says why."""


@files.stored
class Check:
    """One invariant of a run or a block, as `audit` found it."""

    id: str
    passed: bool | None
    """None: it cannot be checked, as the runner does not report what it rests on."""
    measured: str
    """The finding, with its limit or the other account; or why it cannot be checked."""

    @property
    def failed(self) -> bool:
        return self.passed is False


K = TypeVar("K", bound="Kept")
B = TypeVar("B", bound="Beside")


class Reaudit(params.Strict):
    """Readings audited again by later rules."""

    record: str
    """The one that has the first judgement."""
    digest: Sha256
    commit: str
    """Of the rules."""


class Kept(params.Strict):
    """What every record has, whatever it is of: who measured, when, and what is believed of it."""

    model_config = ConfigDict(allow_inf_nan=False)

    FOLDER: ClassVar[str]
    """Of a study's folder, where records of this kind are."""

    run_id: str
    attempt: Annotated[int, Field(ge=1, le=10_000)]
    status: str
    reasons: tuple[str, ...]
    """Ids of the checks that failed or could not be made, or the code of what ended a failed run."""
    message: str | None
    """What the engine or the harness said of a failure."""
    engine: EngineFacts
    device: DeviceFacts
    host: HostFacts
    started_utc: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")]
    audit: tuple[Check, ...]
    digest: str = ""

    @property
    def done(self) -> bool:
        return self.status in DONE

    @property
    def own_id(self) -> str:
        """The id that its content gives it."""
        raise NotImplementedError


class Record(Kept):
    """One run: what was asked, of which file, engine, device and host, what was observed, and its audit."""

    FOLDER = "records"

    schema_version: Annotated[int, Field(ge=OLDEST, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    """See `facts.HISTORY`; records of an older one are read as they are."""
    status: Literal["valid", "degraded", "invalid", "failed"]
    spec: Spec
    sheet: Manifest
    observed: Observation | None
    raw: dict[Annotated[str, Field(pattern=r"^[\w.=,-]+\.log\.gz$")], Sha256]
    """Compressed logs beside the record: file name -> SHA-256."""
    judged: Reaudit | None = None

    def __repr__(self) -> str:
        return f"<Record {self.run_id}: {self.status}{' ' if self.reasons else ''}{', '.join(self.reasons)}>"

    @property
    def own_id(self) -> str:
        return run_id(self.spec, self.attempt)

    @property
    def observation(self) -> Observation:
        """What the run showed, where it showed something. Raises RuntimeError for a run that failed before."""
        if self.observed is None:
            raise RuntimeError(f"{self.run_id} observed nothing: leave out runs whose `observed` is None")
        return self.observed

    @property
    def cell(self) -> str:
        return f"{self.spec.model}/{self.spec.quant}"

    @cached_property
    def key(self) -> str:
        return spec_key(self.spec)

    @property
    def line(self) -> str:
        """One line for people who wait."""
        s = self.spec
        run_name = f"{s.model} {s.quant} {s.placement}, {s.load_mode}, round {s.block + 1}"
        return f"{run_name}: {self.status}" + (f" ({', '.join(self.reasons)})" if self.reasons else "")


@lru_cache(1 << 17)
def spec_key(spec: Spec) -> str:
    """Digest of what defines a run; attempts at the same run share it."""
    return files.digest({f.name: getattr(spec, f.name) for f in fields(spec)})[:12]


def run_id(s: Spec, attempt: int) -> str:
    return f"{s.model}_{s.quant}_{s.placement}_{s.load_mode}_b{s.block}_{spec_key(s)}_a{attempt}"


def sealed(record: K) -> K:
    """The record with its digest. Raises RecordError if it holds what reading would refuse."""
    data = record.model_dump(mode="json")
    try:
        data["digest"] = files.own_digest(data)
        type(record).model_validate_json(files.canonical(data), strict=True)
    except ValueError as err:
        raise RecordError(f"{record.run_id} would not be read back: {_words(err)}") from None
    return record.model_copy(update={"digest": data["digest"]})


def write(folder: Path, record: K) -> K:
    """Write the record with its digest to its place in a study's `folder` and return it.

    Raises RecordError if it is there, or holds what reading would refuse.
    """
    record = sealed(record)
    path = folder / record.FOLDER / f"{record.run_id}.json"
    if path.exists():
        raise RecordError(f"{path.name} exists; records are never overwritten")
    files.write_bytes(path, files.sealed(record.model_dump(mode="json")))
    return record


def verified(kind: type[K], path: Path) -> K:
    """The record of a kind at `path`: whole, with its own digest, under its own name. Raises RecordError."""
    try:
        raw = files.head(path, MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise RecordError(f"more than {MAX_BYTES >> 20} MiB are no record")
        loaded = kind.model_validate_json(raw, strict=True)
        if not files.is_sealed(raw, loaded.digest):
            raise RecordError("its digest does not fit its content")
        if loaded.run_id != path.stem or loaded.run_id != loaded.own_id:
            raise RecordError(f"it is the record of {loaded.run_id}")
    except (OSError, ValueError, ValidationError, RecursionError) as err:
        raise RecordError(f"{path.name}: {_words(err)}") from None
    return loaded


def _words(err: Exception) -> str:
    told = schema.faults(err) if isinstance(err, ValidationError) else str(err)
    return " ".join(told.split())[:300]


def read(path: Path) -> Record:
    """The record of a run at `path`, verified. Raises RecordError."""
    return verified(Record, path)


class Beside(Kept):
    """A record of something else than a run, with its evidence in raw/ beside it."""

    status: Literal["valid", "invalid", "failed"]
    raw: dict[Annotated[str, Field(pattern=r"^[\w.=,-]+\.(log|csv)\.gz$")], Sha256]
    """Compressed logs and values: file name -> SHA-256."""

    @property
    def key(self) -> str:
        """Attempts at the same share it."""
        raise NotImplementedError

    @property
    def cited(self) -> dict[str, str]:
        """Its path in the study's folder -> its digest, for provenance."""
        return {f"{self.FOLDER}/{self.run_id}.json": self.digest}


def read_beside(kind: type[B], path: Path) -> B:
    """The record of a kind at `path`, verified, its evidence too. Raises RecordError."""
    loaded = verified(kind, path)
    try:
        for name, sha256 in loaded.raw.items():
            if files.sha256(path.parent / "raw" / name) != sha256:
                raise RecordError(f"raw/{name} is not what it names")
    except (OSError, RecordError) as err:
        raise RecordError(f"{path.name}: {_words(err)}") from None
    return loaded


def all_beside(kind: type[B], folder: Path) -> tuple[list[B], list[str]]:
    """All records of a kind in a study's folder, by id, and what was wrong with the others."""
    good, damaged = [], []
    for path in sorted((folder / kind.FOLDER).glob("*.json")):
        try:
            good.append(read_beside(kind, path))
        except RecordError as err:
            damaged.append(str(err))
    return good, damaged


def standing(every: Iterable[B]) -> dict[str, B]:
    """The record that stands for what was asked, by its key: the last one that is valid, else the last attempt."""
    return {r.key: r for r in sorted(every, key=lambda r: (r.done, r.attempt))}


def next_attempt(folder: Path, first: str) -> int:
    """The number of an attempt that has no file yet in `folder`, of a record that can be read or not; `first`: the id
    of attempt 1."""
    stem = first.removesuffix("1")
    made = [p.stem.removeprefix(stem) for p in folder.glob("*.json") if p.stem.startswith(stem)]
    return 1 + max((int(n) for n in made if n.isascii() and n.isdigit()), default=0)


class Lightener:
    """Makes records small for a whole study's tables: what only one run's pictures need is left out, and what many
    records share is held once. A light record is not to be audited: its readings are gone."""

    def __init__(self) -> None:
        self._held: dict[Any, Any] = {}
        self._outcomes: dict[tuple[tuple[str, bool | None], ...], tuple[Check, ...]] = {}

    def _once(self, value: Any, key: Any = None) -> Any:
        held = self._held.setdefault(value if key is None else key, value)
        return held if held == value else value

    def __call__(self, r: Record) -> Record:
        """`r` itself, made small in place: as it was just read, nobody else has it. Copies of frozen parts, of which
        it has dozens, would take longer than to verify it."""
        small = object.__setattr__
        names = (("sheet", r.sheet.sha256), ("engine", r.engine.server_sha256), ("device", r.device.uuid))
        for k, name in (*names, ("host", r.host.host_id)):
            r.__dict__[k] = self._once(getattr(r, k), (k, name))
        outcome = tuple((c.id, c.passed) for c in r.audit)
        if outcome not in self._outcomes:
            self._outcomes[outcome] = tuple(Check(*id_and_passed, "") for id_and_passed in outcome)
        r.__dict__["audit"] = self._outcomes[outcome]
        if (o := r.observed) is not None:
            small(o.memory.trace, "during", o.memory.trace.during[-1:])
            for q in o.requests:
                small(q, "tokens", array("I", q.tokens))
                small(q, "token_s", array("d", q.token_s))
                small(q, "token_n", array("I", q.token_n))
            for k in ("argv", "env", "report", "placement", "top_logprobs"):
                small(o, k, self._once(getattr(o, k)))
            small(o, "absent", self._once(o.absent, tuple(o.absent.items())))
        return r


def each(folder: Path) -> Iterator[Record]:
    """The records under `folder/records/` that can be read, one after another."""
    for path in sorted((folder / "records").glob("*.json")):
        with contextlib.suppress(RecordError):
            yield read(path)


def read_all(
    folder: Path, set_aside: bool = False, prefix: str = "", each: Callable[[Record], Record] = lambda r: r
) -> tuple[list[Record], list[str]]:
    """All records under `folder/records/`, by run id, and what was wrong with the others.

    set_aside: move damaged files to `records/damaged/`, so that their runs are done again. of: what the names begin
    with. each: what is kept of a record, as it is read.
    """
    records, damaged = [], []
    for path in sorted((folder / "records").glob(f"{prefix}*.json")):
        try:
            records.append(each(read(path)))
        except RecordError as err:
            damaged.append(str(err))
            if set_aside:
                log.warning("setting aside a damaged record: %s", err)
                place = path.parent / "damaged"
                place.mkdir(exist_ok=True)
                path.rename(place / f"{path.name}.{len(list(place.glob(f'{path.name}*')))}")
    return records, damaged


def keep_logs(folder: Path, run: str, logs: Iterable[Path], private: Iterable[Path]) -> dict[str, str]:
    """Compress a run's logs into `folder/raw/`, the `private` folders' names left out; file name -> SHA-256."""
    # the longest first: one of the folders may lie inside another
    names = sorted({str(name) for p in private for name in (p, p.resolve())}, key=len, reverse=True)
    kept = {}
    for path in filter(Path.is_file, logs):
        target, text = folder / "raw" / f"{run}.{path.stem}.log.gz", path.read_bytes()
        for name in names:
            text = text.replace(f"{name}/".encode(), b"")
        files.write_bytes(target, gzip.compress(text, mtime=0))
        kept[target.name] = files.sha256(target)
    return kept
