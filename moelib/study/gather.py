"""The records of a study: each read once, audited once with its log as a witness, and what stands of them."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moelib.audit import audit, record, witness
from moelib.machine.monitor import uncollected
from moelib.measure import run

MANY = 1000  # records; fewer take no time
NOT_RUN = "not run"
"""Why a run that nobody tried has no result."""


@dataclass(frozen=True)
class Evidence:
    """The records of a study, each read and audited once, with its log."""

    records: list[record.Record]
    damaged: list[str]
    """What is wrong with the files that are no records."""
    problems: dict[str, str]
    """Run -> why it has no result that stands; the others have one."""
    starts: dict[str, float]
    """Run -> seconds from the start of its process to its log's first instant."""
    set_aside: tuple[str, ...] = ()
    """Runs whose damaged records were moved away."""
    checks: dict[str, tuple[tuple[str, bool | None], ...]] = field(default_factory=dict)
    """Run -> (invariant, whether it held, None where it cannot be told) by the rules of today, of the runs that
    observed something."""

    @cached_property
    def standing(self) -> dict[str, record.Record]:
        return standing(self.records)

    def why_not(self, r: record.Record | None) -> str | None:
        """Why a planned run has no result that stands."""
        return self.problems.get(r.run_id) if r else NOT_RUN


def gather(folder: Path, prefix: str = "", set_aside: bool = False, light: bool = False) -> Evidence:
    """Read and audit the records in a study's `folder`, those whose names begin with `prefix`, and their logs.

    light: keep of each what a study's tables need. set_aside: move damaged records away.
    """
    problems, starts, lighten = {}, {}, record.Lightener()
    checks: dict[str, tuple[tuple[str, bool | None], ...]] = {}
    once: dict[Any, Any] = {}  # the runs of a study share a few outcomes

    def look(r: record.Record) -> record.Record:
        witnessed = witness.call(folder, r)
        today = audit_today(r, witnessed)
        if (why := why_not(r, witnessed, today)) is not None:
            problems[r.run_id] = why
        if today:
            outcome = tuple((c.id, c.passed) for c in today)
            checks[r.run_id] = once.setdefault(outcome, outcome)
        if r.observed and r.observed.load_s is not None and witnessed.log and witnessed.log.ready_s is not None:
            starts[r.run_id] = r.observed.load_s - witnessed.log.ready_s
        return lighten(r) if light else r

    # records hold no cycles, and Python would look for them in all that was read, again and again
    with uncollected():
        records, damaged = record.read_all(folder, set_aside, prefix, look)
        if len(records) >= MANY:
            gc.freeze()  # nor are they to be searched later on: a tenth of a command's time
    away = tuple(p.name.partition(".json")[0] for p in sorted((folder / "records" / "damaged").glob(f"{prefix}*")))
    return Evidence(records, damaged, problems, starts, away, checks)


def audit_today(r: record.Record, witnessed: witness.Witnessed | None = None) -> tuple[record.Check, ...]:
    """Every invariant of a run and of its log, by the rules of today; empty where it observed nothing."""
    if r.observed is None:
        return ()
    return audit.run(audit.measured(r)) + (audit.log(witnessed) if witnessed else ())


def why_not(
    r: record.Record, witnessed: witness.Witnessed | None = None, today: Sequence[record.Check] | None = None
) -> str | None:
    """Why a run has no result that stands; its audit is done again, so that no record vouches for itself.

    A record may carry a flag of its day's rules that today's would not give, and it keeps it; it may not lack one. Nor
    does a flag excuse what makes a run invalid.
    `witnessed`: the record with its log, if that was read; `today`: their audit by the rules of today, if it is known.
    """
    if not r.done:
        return f"{r.status} ({', '.join(r.reasons)})"
    if r.observed is None:
        return f"{r.status}, but it observed nothing"
    if audit.verdict(r.audit) != (r.status, r.reasons):
        return f"{r.status}, but its own checks say {' '.join(map(str, audit.verdict(r.audit)))}"
    checks = audit_today(r, witnessed) if today is None else today
    failed = [c for c in checks if not c.passed and (c.id not in r.reasons or audit.verdict([c])[0] == "invalid")]
    if not failed:
        return None
    return f"{r.status}, but its audit says {audit.verdict(checks)[0]}: " + "; ".join(
        f"{c.id}: {c.measured}" for c in failed[:3]
    )


def standing(records: Sequence[record.Record]) -> dict[str, record.Record]:
    """The record that stands for each run: the last one that is done, else the last attempt."""
    return {r.key: r for r in sorted(records, key=lambda r: (r.done, r.attempt))}


def standing_for(specs: Sequence[run.Spec], latest: dict[str, record.Record]) -> list[record.Record | None]:
    """The record that stands for each of `specs`, by `standing`; None where there is none."""
    return [latest.get(record.spec_key(s)) for s in specs]
