"""The folders of one study, of several machines, made into one: every record verified and audited, united by its id.

The result is the same whatever the order of the folders, byte for byte. What is made from records (documents, figures,
cards) is left out: `moelib report` makes it. Nothing is written before all was read and fits together.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moelib.audit import record
from moelib.base import files
from moelib.merge import setups
from moelib.quality.comparison import Comparison
from moelib.routing.routed import Routed
from moelib.study import plan as plans
from moelib.study import study as studies
from moelib.study.gather import gather, standing
from moelib.study.overhead import FOLDER as OVERHEAD
from moelib.study.plan import Plan, StudyError

if TYPE_CHECKING:
    from moelib.catalogue.facts import Manifest

PLAN, RECORDS, RAW, QUANTS, NOTEBOOKS = "plan.json", "records", "raw", "quants", "notebooks"
ANALYSIS = "analysis.ipynb"
"""Made by `moelib report`."""


class MergeError(StudyError):
    """The folders cannot be made into one; the message says which, and why."""


@dataclass(frozen=True)
class Merged:
    """What came of a merge."""

    records: int
    new: int
    """Files that INTO did not have."""
    setups: list[setups.Setup]


@dataclass(frozen=True)
class _Folder:
    """A study's folder, read and verified."""

    path: Path
    plan: Plan
    records: tuple[record.Record, ...]
    files: dict[str, Path]
    """Path in the folder -> file, of records and what they name."""
    manifests: dict[str, Manifest]


def merge(into: Path, sources: Sequence[Path]) -> Merged:
    """Bring what `sources` hold into `into`, which may be there, with records of its own, or not.

    Raises MergeError for folders of other plans, a folder with itself, one that is half-copied or damaged, records that
    contradict each other, and runs of machines that cannot be compared.
    """
    folders = [_read(path) for path in _apart(into, sources)]
    first = folders[0]
    for other in folders[1:]:
        if not other.plan.asks_for_the_runs_of(first.plan):
            raise MergeError(f"{other.path} is of another plan than {first.path} ({_differ(first.plan, other.plan)})")
    united = _united(folders)
    runs = {r.run_id: r for f in folders for r in f.records}
    standing_now = [r for r in standing(list(runs.values())).values() if r.done]
    if wrong := list(setups.faults(standing_now)):
        more = f" ({len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise MergeError(f"these folders are not one study: {wrong[0]}{more}; take the runs of one machine alone")
    new = _write(into, united | _manifests(folders) | _notebooks(folders, standing_now))
    return Merged(len(runs), new, setups.setups(standing_now))


def _apart(into: Path, sources: Sequence[Path]) -> list[Path]:
    """The folders to read, by name; `into` too where it is a study's. Raises MergeError."""
    for path in sources:
        if not (path / PLAN).is_file():
            what = "is not there" if not path.exists() else "has no plan.json: it is no study's folder, or half-copied"
            raise MergeError(f"{path} {what}")
    known = [*sources, *([into] if (into / PLAN).exists() else [])]
    if not (into / PLAN).exists() and into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise MergeError(f"{into} is there and no study's folder: name another one")
    seen: dict[tuple[int, int], Path] = {}
    for path in known:
        s = path.stat()
        if other := seen.get((s.st_dev, s.st_ino)):
            raise MergeError(f"{path} is {other}: a folder is not merged with itself")
        seen[s.st_dev, s.st_ino] = path
    return sorted(known, key=lambda p: str(p.resolve()))


def _differ(a: Plan, b: Plan) -> str:
    """In what two plans differ."""
    mine, others = a.study.model_dump(), b.study.model_dump()
    names = [name for name in mine if mine[name] != others.get(name)]
    return f"they differ in {', '.join(names)}" if names else "its workloads or the order of its runs differ"


def _read(path: Path) -> _Folder:
    """A folder with every record verified, with what it names, and audited. Raises MergeError."""
    plan = plans.read(path / PLAN)
    evidence = gather(path)
    if wrong := [*evidence.damaged, *_lost(path)]:
        raise MergeError(f"{path} is half-copied or damaged: {wrong[0]}; copy it again")
    named: dict[str, Path] = {PLAN: path / PLAN}
    planned = {record.spec_key(s) for cell in plan.cells for s in cell.specs}
    for r in evidence.records:
        if r.key not in planned:
            raise MergeError(f"{path}: {r.run_id} is none of its plan's runs")
        named |= _with_raw(path, record.Record.FOLDER, RAW, r.run_id, r.raw)
        if r.done and (why := evidence.problems.get(r.run_id)):
            raise MergeError(f"{path}: {r.run_id} is {why}")
    for kind in (Comparison, Routed):
        beside, damaged = record.all_beside(kind, path)
        if damaged:
            raise MergeError(f"{path} is half-copied or damaged: {damaged[0]}; copy it again")
        for b in beside:
            named |= _with_raw(path, kind.FOLDER, f"{kind.FOLDER}/{RAW}", b.run_id, b.raw)
    named |= {f"{OVERHEAD}/{p.name}": p for p in sorted((path / OVERHEAD).glob("*.json"))}
    manifests = {}
    for p in sorted((path / QUANTS).glob("*.json")):
        if (manifest := studies.read_manifest(p)) is None:
            raise MergeError(f"{path} is half-copied or damaged: {QUANTS}/{p.name} is no manifest; copy it again")
        manifests[p.name] = manifest
    return _Folder(path, plan, tuple(evidence.records), named, manifests)


def _lost(path: Path) -> list[str]:
    """Records that the folder's own document was made from, and that are not there."""
    try:
        named = sorted(json.loads((path / "provenance.json").read_bytes())["sources"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no document yet
        return []
    records = [name if "/" in name else f"{RECORDS}/{name}.json" for name in named]
    return [f"{name} is missing, which its document names" for name in records if not (path / name).is_file()]


def _with_raw(path: Path, of: str, raw: str, name: str, digests: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """A record and the files that it names. Raises MergeError for one that is not there or another."""
    for log, sha256 in digests.items():
        file = path / raw / log
        try:
            fits = files.sha256(file) == sha256
        except OSError:
            fits = False
        if not fits:
            raise MergeError(f"{path} is half-copied or damaged: {raw}/{log} is not what {name} names; copy it again")
        yield f"{raw}/{log}", file
    yield f"{of}/{name}.json", path / of / f"{name}.json"


def _united(folders: Sequence[_Folder]) -> dict[str, Path]:
    """The files of all folders by their place. Raises MergeError where two say something else under one name."""
    united: dict[str, Path] = {}
    for folder in folders:
        for name, file in folder.files.items():
            other = united.setdefault(name, file)
            if other is file or (mine := file.read_bytes()) == (theirs := other.read_bytes()):
                continue
            if name == PLAN:  # of another version, for the same runs
                united[name] = file if mine < theirs else other
            else:
                raise MergeError(
                    f"{name} of {folder.path} and of {other.parents[1]} are two with one name: the same run was "
                    "measured twice, or one of them was changed; leave one folder out"
                )
    return united


def _manifests(folders: Sequence[_Folder]) -> dict[str, Path]:
    """Of each cell, the manifest; of several of one file, which took other times to make, the quickest one's.

    Raises MergeError for those of other files.
    """
    of_cell: dict[str, list[tuple[Manifest, Path]]] = defaultdict(list)
    for folder in folders:
        for name, manifest in folder.manifests.items():
            of_cell[f"{QUANTS}/{name}"].append((manifest, folder.path / QUANTS / name))
            if not studies.same_manifest(of_cell[f"{QUANTS}/{name}"][0][0], manifest):
                raise MergeError(
                    f"{QUANTS}/{name} of {folder.path} is of another file than that of "
                    f"{of_cell[f'{QUANTS}/{name}'][0][1].parents[1]}: all must measure the same file of a cell"
                )
    return {name: min(of, key=lambda m: (m[0].quantize_s or 0.0, m[1].read_bytes()))[1] for name, of in of_cell.items()}


def _notebooks(folders: Sequence[_Folder], runs: Sequence[record.Record]) -> dict[str, Path]:
    """Executed notebooks that show every run of their cells, by now: others would tell of a part as of the whole, and
    `moelib study run` executes them again without measuring anything."""
    cells = {(s.model, s.quant) for s in (r.spec for r in runs)}
    shown: dict[str, list[str]] = defaultdict(list)
    for model, quant in cells:
        digests = [r.digest for r in runs if (r.spec.model, r.spec.quant) == (model, quant)]
        for name in (f"{model}-{quant}.ipynb", f"{model}.ipynb"):  # as campaign names them
            shown[name] += digests
    found: dict[str, Path] = {}
    for name, digests in shown.items():
        copies = [p for f in folders if (p := f.path / NOTEBOOKS / name).is_file()]
        whole = [p for p in copies if all(d in p.read_text(encoding="utf-8", errors="replace") for d in digests)]
        if whole:
            found[f"{NOTEBOOKS}/{name}"] = min(whole, key=Path.read_bytes)
    return found


def _write(into: Path, united: dict[str, Path]) -> int:
    """Put the files in their places, a record after what it names; how many there were not yet."""
    begun = (into / PLAN).exists()
    place = into if begun else into.with_name(f".{into.name}.{files.node()}.{os.getpid()}.merging")
    files.need_space(into.parent, sum(p.stat().st_size for p in united.values()), f"merging into {into.name}")
    new = 0
    for name in sorted(united, key=lambda n: (n.startswith(RECORDS), n)):
        target, source = place / name, united[name]
        if target.exists() and (target.samefile(source) or target.read_bytes() == source.read_bytes()):
            continue
        new += not target.exists()
        with files.replacing(target) as partial:
            shutil.copyfile(source, partial)
    for stale in (place / NOTEBOOKS).glob("*.ipynb"):
        if stale.name != ANALYSIS and f"{NOTEBOOKS}/{stale.name}" not in united:
            stale.unlink()
    if not begun:
        if into.exists():
            into.rmdir()
        os.rename(place, into)
    return new
