"""What a cell of a study has: its whole rounds, what is missing or wrong, and how many runs are usable.

A run is *usable* if it is valid or degraded. The two are always counted separately, with the reasons of the degraded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from moelib.audit import audit, record
from moelib.base import neutral
from moelib.catalogue import params
from moelib.study.gather import Evidence, standing_for
from moelib.study.plan import Cell

KINDS = ("valid", "degraded", "invalid", "missing")


@dataclass(frozen=True)
class Status:
    """What a cell has: the record that stands for each run, and what is missing or wrong."""

    rounds: tuple[tuple[record.Record, ...], ...]
    """Records of whole, usable rounds."""
    problems: tuple[str, ...]
    """Every planned run, round or cell without a usable result, with the reason."""
    tally: Counter[str]
    """Runs by what they are: valid, degraded, invalid (with their round or cell, if it is), missing."""
    checks: tuple[record.Check, ...] = ()
    """The checks of every round whose runs are all there and usable, and of the cell."""
    flags: Counter[str] = field(default_factory=Counter)
    """Reason -> how many usable runs are degraded by it."""
    failed: int = 0
    """Of the invalid ones, runs that ended before they had a result."""
    apart: bool = False
    """Whether all its rounds are whole, and do not fit together."""

    @classmethod
    def of(cls, cell: Cell, evidence: Evidence, workloads: Mapping[str, params.Workload]) -> Status:
        rounds: list[tuple[record.Record, ...]] = []
        problems: list[str] = []
        checks: list[record.Check] = []
        tally: Counter[str] = Counter()
        failed = 0
        flagged: list[record.Record] = []
        for b, specs in enumerate(cell.blocks):
            runs = standing_for(specs, evidence.standing)
            failed += sum(r is not None and r.status == "failed" for r in runs)
            reasons = [evidence.why_not(r) for r in runs]
            faults = [
                f"{cell.name} {s.placement}, {s.load_mode}, round {b + 1}: {why}"
                for s, why in zip(specs, reasons, strict=True)
                if why
            ]
            usable = [r for r, why in zip(runs, reasons, strict=True) if r and not why]
            if faults:  # those that are valid one by one count where their round is not whole
                flagged += usable
            else:
                round_checks = audit.block(usable)
                checks += round_checks
                faults = [f"{cell.name} round {b + 1}: {c.id}: {c.measured}" for c in round_checks if c.failed]
                reasons = ["; ".join(faults)] * len(runs)
                if not faults:
                    rounds.append(tuple(usable))
            problems += faults
            tally.update(
                "missing" if not r else "invalid" if why else r.status for r, why in zip(runs, reasons, strict=True)
            )
        together, apart = [r for runs in rounds for r in runs], False
        if together:
            starts = {r.run_id: evidence.starts[r.run_id] for r in together if r.run_id in evidence.starts}
            cell_checks = audit.cell(audit.Cell(together, workloads, starts))
            checks += cell_checks
            if faults := [f"{cell.name}: {c.id}: {c.measured}" for c in cell_checks if c.failed]:
                # which of its runs is not what it says is not known, so none of them is used
                apart = not problems
                tally.subtract(r.status for r in together)
                tally["invalid"] += len(together)
                rounds, problems, together = [], problems + faults, []
        flags = Counter(neutral.plain(reason) for r in (*together, *flagged) for reason in r.reasons)
        return cls(tuple(rounds), tuple(problems), tally, tuple(checks), flags, failed, apart)

    @property
    def planned(self) -> int:
        return self.tally.total()

    @property
    def usable(self) -> int:
        return self.tally["valid"] + self.tally["degraded"]

    @property
    def complete(self) -> bool:
        return not self.problems

    def summary(self) -> str:
        return summary(self.tally, self.flags)


def summary(tally: Mapping[str, int], flags: Mapping[str, int]) -> str:
    """`90 of 90 runs usable: 57 valid, 33 degraded (host-quiet in 33)`, then what is invalid or missing.

    `tally` as that of a study or a cell; `flags`: reason -> how many degraded runs have it.
    """
    counts = {k: tally[k] for k in KINDS}
    n_usable, planned = counts["valid"] + counts["degraded"], sum(counts.values())
    text = f"{n_usable} of {planned} runs usable"
    if n_usable:
        why = ", ".join(f"{reason} in {n}" for reason, n in sorted(flags.items()))
        text += f": {counts['valid']} valid, {counts['degraded']} degraded" + (f" ({why})" if why else "")
    rest = [f"{counts[k]} {k}" for k in ("invalid", "missing") if counts[k]]
    return "; ".join([text, *([", ".join(rest)] if rest else [])])
