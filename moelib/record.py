"""The record of a run: one JSON file, checked against its schema, with its own digest, written whole or not at all.

A record is done when it parses, validates and carries its digest. Failed and invalid runs are records too.
"""

import gzip
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from moelib import files, params
from moelib.run import Observation, Spec

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
DONE = ("valid", "degraded")


class RecordError(params.UserError, ValueError):
    """The file is not a record that can be believed; the message says why."""


@files.stored
class Check:
    """One invariant of a run or a block, as `audit` found it."""

    id: str
    passed: bool
    measured: str
    """What was found, with what it was held against."""


class Record(params.Strict):
    schema_version: Literal[SCHEMA_VERSION] = SCHEMA_VERSION
    run_id: str
    attempt: int
    status: Literal["valid", "degraded", "invalid", "failed"]
    reasons: tuple[str, ...]
    """Ids of the checks that failed, or the code of what ended a failed run."""
    message: str | None
    """What the engine or the harness said of a failure."""
    spec: Spec
    sheet: dict[str, Any]
    """The quantised file, as its sheet describes it; empty if it could not be made."""
    engine: dict[str, Any]
    device: dict[str, Any]
    host: dict[str, Any]
    started_utc: str
    observed: Observation | None
    audit: tuple[Check, ...]
    raw: dict[str, str]
    """Compressed logs beside the record: file name -> SHA-256."""
    judged: dict[str, str] | None = None
    """Of readings judged again by later rules: the `record` that has the first judgement, its `digest`, and the
    `commit` of the rules."""
    digest: str = ""

    @property
    def done(self) -> bool:
        return self.status in DONE

    @property
    def cell(self) -> str:
        return f"{self.spec.model}/{self.spec.quant}"

    @property
    def key(self) -> str:
        return spec_key(self.spec)

    @property
    def line(self) -> str:
        """One line for people who wait."""
        what = f"{self.spec.model} {self.spec.quant} {self.spec.arm} block {self.spec.block + 1}"
        return f"{what}: {self.status}" + (f" ({', '.join(self.reasons)})" if self.reasons else "")


def spec_key(spec: Spec) -> str:
    """Digest of what defines a run; attempts at the same run share it."""
    return files.digest(asdict(spec))[:12]


def run_id(s: Spec, attempt: int) -> str:
    return f"{s.model}_{s.quant}_{s.placement}_{s.load_mode}_b{s.block}_{spec_key(s)}_a{attempt}"


def _digest(data: dict[str, Any]) -> str:
    return files.digest({k: v for k, v in data.items() if k != "digest"})


def write(folder: Path, record: Record) -> Record:
    """Write the record with its digest to `folder/records/` and return it. Raises RecordError if it is there."""
    data = record.model_dump(mode="json")
    data["digest"] = _digest(data)
    path = folder / "records" / f"{record.run_id}.json"
    if path.exists():
        raise RecordError(f"{path.name} exists; records are never overwritten")
    # one line a top-level key: a table of contents for people, and measurements that do not fill screens
    lines = [f" {json.dumps(k)}: {files.canonical(v).decode()}" for k, v in sorted(data.items())]
    files.write_bytes(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    return record.model_copy(update={"digest": data["digest"]})


def read(path: Path) -> Record:
    """The record at `path`, verified. Raises RecordError."""
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or data.get("digest") != _digest(data):
            raise RecordError("its digest does not fit its content")
        found = Record.model_validate(data)
    except (OSError, ValueError, ValidationError) as err:
        raise RecordError(f"{path.name}: {str(err)[:300]}") from None
    if found.run_id != path.stem:
        raise RecordError(f"{path.name}: it is the record of {found.run_id}")
    return found


def read_all(folder: Path, set_aside: bool = False) -> tuple[list[Record], list[str]]:
    """All records under `folder/records/`, by run id, and what was wrong with the others.

    set_aside: move damaged files to `records/damaged/`, so that their runs are done again.
    """
    records, damaged = [], []
    for path in sorted((folder / "records").glob("*.json")):
        try:
            records.append(read(path))
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
