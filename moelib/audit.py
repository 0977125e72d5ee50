"""The audit: every invariant of runs, blocks and studies, and the verdicts that follow.

A block's invariant that fails makes all of its runs invalid; a study's is told with the study.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from moelib.invariants import INVARIANTS, Finding, Measured, agrees, holds
from moelib.memory import AGREE_BYTES, AGREE_SHARE
from moelib.record import Check, Record
from moelib.run import Observation, Spec

SAME_SHARE = 1e-4  # measured shares of one block's requests differ by percents


def baseline(runs: Sequence[Record]) -> Record:
    """The run that the others of its block are compared with."""
    return next(r for r in runs if r.spec.placement == "baseline")


@holds("block", "one baseline and at least one more, each arm once")
def block_complete(runs: Sequence[Record]) -> Finding:
    """There is something to compare, and nothing twice."""
    arms = [r.spec.arm for r in runs]
    bases = [r for r in runs if r.spec.placement == "baseline"]
    whole = len(bases) == 1 < len(runs) and len(set(arms)) == len(arms) and all(r.observed for r in runs)
    return whole, ", ".join(arms) or "no runs"


@holds("block", "equal")
def block_alike(runs: Sequence[Record]) -> Finding:
    """Nothing but placement and load mode differs: same file, build, device, threads, requests."""

    def common(r: Record) -> dict[str, Any]:
        asked = [(q.workload, q.index, q.prompt_tokens, q.generate_tokens) for q in r.observed.requests]
        return {
            "file": r.sheet.get("sha256"),
            "engine": r.engine.get("server_sha256"),
            "device": (r.device.get("kind"), r.device.get("name"), r.device.get("uuid")),
            "threads": r.observed.threads,
            "context": r.spec.context,
            "prompts": asked,
        }

    first = common(runs[0])
    differs = sorted({k for r in runs[1:] for k, v in common(r).items() if v != first[k]})
    return not differs, f"differ in {', '.join(differs)}" if differs else f"{len(runs)} runs alike"


@holds("block", "0.1 % + 1 MiB, and more graph splits")
def block_placement(runs: Sequence[Record]) -> Finding:
    """What left the device between baseline and offload is what the header says the placement moves, and the graph
    was cut where the experts went: a flag that was accepted and ignored is caught here."""
    base, found = baseline(runs).observed, []
    for r in (r for r in runs if r.spec.placement != "baseline" and r.observed.device_kind != "none"):
        seen = r.observed
        on, off = base.report.device_bytes("model"), seen.report.device_bytes("model")
        if on is None or off is None or not agrees(on - off, seen.placement.moved_bytes):
            found.append(f"{r.spec.arm}: device weights {on} -> {off}, header moves {seen.placement.moved_bytes}")
        if max(seen.report.graph_splits, default=0) <= max(base.report.graph_splits, default=0):
            found.append(f"{r.spec.arm}: graph splits {base.report.graph_splits} -> {seen.report.graph_splits}")
    return not found, "; ".join(found) or "header and engine agree"


@holds("block", f"relative spread above {SAME_SHARE:g}")
def block_ttft_measured(runs: Sequence[Record]) -> Finding:
    """Time to first token is not a constant share of the total: then it was computed, not measured."""
    shares = [q.token_s[0] / q.total_s for r in runs for q in r.observed.requests if q.total_s]
    spread = (max(shares) - min(shares)) / max(shares) if shares else 0.0
    return spread > SAME_SHARE, f"spread {spread:.2g} over {len(shares)} requests"


class Matrix(NamedTuple):
    """What a study's invariants look at."""

    planned: Sequence[str]
    """Keys of the planned runs."""
    runs: Sequence[Record]
    """The record that stands for each run that has one in a whole, valid block."""


@holds("study", "every planned run")
def matrix_complete(study: Matrix) -> Finding:
    """A missing run is not seen in a mean."""
    missing = set(study.planned) - {r.key for r in study.runs}
    return bool(study.planned) and not missing, f"{len(missing)} of {len(study.planned)} missing"


@holds("study", "no equal timestamps")
def no_two_alike(study: Matrix) -> Finding:
    """Two runs with the same microseconds are one run, copied."""
    seen = defaultdict(set)
    for r in study.runs:
        for q in r.observed.requests:
            seen[q.token_s].add(r.run_id)
    copies = sorted({min(ids) for times, ids in seen.items() if len(times) > 2 and len(ids) > 1})
    return not copies, f"alike: {', '.join(copies[:3])}" if copies else f"{len(study.runs)} runs differ"


@holds("study", f"{AGREE_BYTES >> 20} MiB or {AGREE_SHARE:.0%} within a cell and arm")
def memory_steady(study: Matrix) -> Finding:
    """The same file in the same place takes the same memory in every block."""
    cells = defaultdict(list)
    for r in study.runs:
        if (value := r.observed.memory.value_bytes) is not None:
            cells[f"{r.cell} {r.spec.arm}"].append(value)
    wide = [k for k, v in cells.items() if max(v) - min(v) > max(AGREE_BYTES, AGREE_SHARE * max(v))]
    return not wide, f"spread: {', '.join(wide)}" if wide else f"{len(cells)} arms steady"


def _check(of: str, what: Any) -> Iterator[Check]:
    for i in INVARIANTS.values():
        if i.of == of:
            yield Check(i.id, *i.find(what))


def run(spec: Spec, seen: Observation, sheet: dict[str, Any]) -> tuple[Check, ...]:
    """Every invariant of a run, in order."""
    return tuple(_check("run", Measured(spec, seen, sheet)))


def verdict(checks: Sequence[Check]) -> tuple[str, tuple[str, ...]]:
    """(valid, degraded or invalid; the ids of the checks that failed). No checks at all is invalid."""
    failed = tuple(c.id for c in checks if not c.passed)
    if not checks:
        return "invalid", ("nothing-checked",)
    hard = [f for f in failed if not INVARIANTS[f].degrades]
    return "invalid" if hard else "degraded" if failed else "valid", failed


def block(runs: Sequence[Record]) -> tuple[Check, ...]:
    """Every invariant of a block; the later ones only of a complete block, as they compare its runs."""
    checks = []
    for check in _check("block", runs):
        checks.append(check)
        if not checks[0].passed:
            break
    return tuple(checks)


def study(planned: Sequence[str], runs: Sequence[Record]) -> tuple[Check, ...]:
    """Every invariant of a study, of its standing runs."""
    return tuple(_check("study", Matrix(planned, runs)))
