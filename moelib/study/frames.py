"""Records as data frames, one row a run or a request, and the comparisons that all tables and figures are made from.

Units are in the names and SI: bytes, s, tokens per s. A value that was not measured is NaN, never 0. Values are
compared within rounds: each is paired with the baseline of its own round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moelib.audit.record import Record
from moelib.base import stats
from moelib.base.schema import UserError, near
from moelib.catalogue.placement import REFERENCE, Placement
from moelib.study.columns import REQUESTS, SETUP, WHERE, columns


class FrameError(UserError):
    """The frame cannot answer the question; the message says what is missing or what differs."""


def runs(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each record that holds an observation: WHERE, the measured columns, SETUP."""
    observed = [r for r in records if r.observed]
    workloads = dict.fromkeys(w for r in observed for w in r.spec.workloads)
    values: dict[str, Any] = {name: [get(r) for r in observed] for name, get in WHERE.items()}
    for name, column in columns(workloads).items():
        get = column.of(name.partition("/")[2])
        values[name] = pd.array([get(r) for r in observed], dtype="Float64").to_numpy("float64", na_value=float("nan"))
    values |= {name: [get(r) for r in observed] for name, get in SETUP.items()}
    return pd.DataFrame(values)


def requests(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each request of each record: WHERE, then REQUESTS."""
    pairs = [(r, q) for r in records if r.observed for q in r.observed.requests]
    values = {name: [get(r) for r, _ in pairs] for name, get in WHERE.items()}
    return pd.DataFrame(values | {name: [getattr(q, k) for _, q in pairs] for name, k in REQUESTS.items()})


CELL = ["study", "model", "quant"]
Side = tuple[str, str]
"""Placement and load mode."""


@dataclass(frozen=True)
class Comparison:
    """A column of one placement and load mode against another of the same rounds; None where no round has both."""

    study: str
    model: str
    quant: str
    side: Side
    against: Side
    before: pd.DataFrame
    """The runs that it is compared with, one a round."""
    after: pd.DataFrame
    """The runs of `side` in the same rounds."""
    baseline: stats.Estimate | None = None
    value: stats.Estimate | None = None
    ratio: stats.Estimate | None = None
    """value / baseline, paired within rounds; None where one of them is not above 0."""
    difference: stats.Estimate | None = None
    """baseline - value, paired within rounds."""

    @property
    def placement(self) -> Placement:
        return Placement.parse(*self.side)

    @property
    def sources(self) -> dict[str, str]:
        return sources(self.before) | sources(self.after)


@dataclass(frozen=True)
class Summary:
    """A column of one placement and load mode; None where no run has it."""

    study: str
    model: str
    quant: str
    side: Side
    runs: pd.DataFrame
    """The runs that have it."""
    value: stats.Estimate | None
    """Arithmetic mean over them."""

    @property
    def sources(self) -> dict[str, str]:
        return sources(self.runs)


Pairs = Callable[[Sequence[Side]], Iterable[tuple[Side, Side]]]


def sources(frame: pd.DataFrame) -> dict[str, str]:
    """Run id -> digest of the records behind the rows of a frame."""
    return dict(zip(frame["run_id"], frame["digest"], strict=True))


def machines(frame: pd.DataFrame) -> list[str]:
    """On which machine each run was; those that are not known count as one."""
    if "machine" not in frame.columns:
        return ["unknown"] * len(frame)
    return list(frame["machine"].fillna("unknown").map(str))


def paired(first: pd.DataFrame, second: pd.DataFrame) -> list[tuple[str, str]]:
    """On which machines the two runs of each round were."""
    return list(zip(machines(first), machines(second), strict=True))


def reference(sides: Iterable[Side]) -> str:
    """The placement that the others are compared with: the baseline or, without one, that with most on the GPU."""
    return str(min((Placement.parse(*side) for side in sides), key=lambda p: p.rank))


def against(baseline: str | None = None) -> Pairs:
    """Pairs (baseline, other) for every side that is not the baseline; in the first load mode that it has."""

    def pairs(sides: Sequence[Side]) -> Iterator[tuple[Side, Side]]:
        placement = baseline or (reference(sides) if sides else None)
        base = next((side for side in sides if side[0] == placement), None)
        if base:
            yield from ((base, side) for side in sides if side != base)

    return pairs


EVERY = against()


def between(sides: Sequence[Side]) -> list[tuple[Side, Side]]:
    """Of `EVERY` those that keep the experts of some layers on the CPU, where another placement keeps all there."""
    every = [(pair, Placement.parse(*pair[1])) for pair in EVERY(sides)]
    ends = any(p.is_whole for _, p in every)
    return [pair for pair, p in every if ends and p.is_between]


def ends(sides: Sequence[Side]) -> list[tuple[Side, Side]]:
    """Of `EVERY` those that are not `between`."""
    return [pair for pair in EVERY(sides) if pair not in between(sides)]


def offloads(sides: Sequence[Side]) -> list[tuple[Side, Side]]:
    """(baseline, other) for every side that keeps experts on the CPU, in another placement; a cold one only where the
    baseline is, as it differs in nothing but its load."""
    every = [(base, side) for base, side in EVERY(sides) if base[0] != side[0]]
    placed = [(base, side, Placement.parse(*base), Placement.parse(*side)) for base, side in every]
    return [(base, side) for base, side, a, b in placed if not b.is_baseline and a.cold == b.cold]


def in_one_load_mode(sides: Sequence[Side]) -> list[tuple[Side, Side]]:
    """Those of `offloads` in the baseline's load mode, llama.cpp's default; all of them, if none is in that."""
    pairs = offloads(sides)
    return [(base, side) for base, side in pairs if base[1] == side[1]] or pairs


def load_modes(sides: Sequence[Side]) -> list[tuple[Side, Side]]:
    """(mmap, none) for every placement that has both load modes."""
    return [(side, (side[0], "none")) for side in sides if side[1] == "mmap" and (side[0], "none") in sides]


def _cells(frame: pd.DataFrame) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame, dict[Side, pd.DataFrame]]]:
    """(names, runs, runs of each side) of each cell, in the frame's order."""
    for names, cell in frame.groupby(CELL, sort=False):
        yield names, cell, dict(iter(cell.groupby(["placement", "load_mode"], sort=False)))


def comparisons(frame: pd.DataFrame, column: str, pairs: Pairs = EVERY) -> list[Comparison]:
    """`column` of every pair of sides of every cell, in the frame's order; one for each, known or not."""
    rows = []
    for names, _, sides in _cells(frame):
        for before, after in pairs(list(sides)):
            first, second = (sides[side].set_index("round", drop=False) for side in (before, after))
            first, second = first[first[column].notna()], second[second[column].notna()]
            rounds = [n for n in first.index if n in second.index]
            first, second = first.loc[rounds], second.loc[rounds]
            rows.append(Comparison(*names, after, before, first, second, *_estimates(first, second, column)))
    return rows


def _estimates(first: pd.DataFrame, second: pd.DataFrame, column: str) -> list[stats.Estimate | None]:
    if first.empty:
        return []
    pairs, both = list(zip(first[column], second[column], strict=True)), paired(first, second)
    sides = [(list(side[column]), machines(side)) for side in (first, second)]
    difference = stats.mean([a - b for a, b in pairs], both)
    if not all(v > 0 for pair in pairs for v in pair):
        return [*(stats.mean(*side) for side in sides), None, difference]
    return [*(stats.geometric_mean(*side) for side in sides), stats.ratio(pairs, both), difference]


def summaries(frame: pd.DataFrame, column: str) -> list[Summary]:
    """`column` of every side of every cell, in the frame's order; one for each, known or not."""
    rows = []
    for names, _, sides in _cells(frame):
        for side, its_runs in sides.items():
            known = its_runs[its_runs[column].notna()]
            value = stats.mean(list(known[column]), machines(known)) if len(known) else None
            rows.append(Summary(*names, side, known, value))
    return rows


def compare(frame: pd.DataFrame, column: str, baseline: str | None = None) -> pd.DataFrame:
    """`column` of every placement and load mode against `baseline`, paired within rounds; None: see `reference`.

    frame: as `runs` gives it. Returns one row for each study, model, quant, placement and load mode that has a value:
    geometric means of both sides (`baseline`, `value`), `ratio` (value / baseline) with its 95 % interval `low` to
    `high` (Student's t on logarithms; NaN where one round gives none, and where the ratio is the same in every round),
    and `n`, the number of rounds. Where a value is not above 0, means are arithmetic and there is no ratio. Raises
    FrameError for an unknown column, for runs that cannot be compared (what differs is said), and where no round has
    both sides.
    """
    _known(frame, column)
    for names, cell, sides in _cells(frame):
        _comparable(names, cell)
        for (placement, _), its_runs in sides.items():
            if its_runs["round"].duplicated().any():
                raise FrameError(f"{'/'.join(names)}: a round has two runs of {placement}: leave one of them out")
    rows = []
    for c in comparisons(frame, column, against(baseline)):
        if c.baseline and c.value and c.difference:
            n = len({*machines(c.before), *machines(c.after)})
            ratio = (c.ratio.value, *(c.ratio.interval or (None, None))) if c.ratio else (None, None, None)
            rows.append(
                (c.study, c.model, c.quant, *c.side, c.baseline.value, c.value.value, *ratio, c.difference.n, n)
            )
    if not rows:
        raise FrameError(
            f"no round has {column} of both {baseline or REFERENCE!r} and another placement; the frame has "
            f"{', '.join(sorted(frame['placement'].unique())) or 'no runs'}"
        )
    heads = [*CELL, "placement", "load_mode", "baseline", "value", "ratio", "low", "high", "n", "machines"]
    return pd.DataFrame(rows, columns=heads).astype({"ratio": float, "low": float, "high": float})


def _known(frame: pd.DataFrame, column: str) -> None:
    """Raise FrameError if the frame lacks what comparing takes."""
    if column not in frame.columns:
        numbers = [c for c in frame.select_dtypes("number").columns if c != "round"]
        raise FrameError(f"no column {column!r}{near(column, numbers)}")
    if missing := {"placement", "load_mode", "round", *CELL} - set(frame.columns):
        raise FrameError(
            f"the frame lacks {', '.join(sorted(missing))}: take one that moelib made, with all its columns"
        )


def _comparable(names: Sequence[str], cell: pd.DataFrame) -> None:
    """Raise FrameError if the runs of a cell differ in more than placement and round."""
    for column in SETUP:
        if column in cell.columns and len(values := cell[column].map(str).unique()) > 1:
            raise FrameError(
                f"{'/'.join(names)}: these runs cannot be compared, as they differ in {column}: {', '.join(values)}; "
                f"take those of one {column}"
            )
