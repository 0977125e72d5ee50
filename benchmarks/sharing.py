"""What it costs to measure two cells at once on a host with two GPUs, from two committed studies of one such host.

    python benchmarks/sharing.py > docs/SHARING.md

The cells of `two-gpus` (`exclusive: device`) ran beside each other, those of `two-gpus-alone` (`exclusive: host`) one
after another. Everywhere else moelib refuses to compare such runs; here their difference is the question.
"""

import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import ttest_ind

from moelib.audit.record import Record
from moelib.base import stats
from moelib.base.stats import Estimate
from moelib.study import frames
from moelib.study.study import Study

OUTPUTS = Path(__file__).resolve().parent.parent / "outputs"
TOGETHER, ALONE = "two-gpus", "two-gpus-alone"
WORKLOAD = "mixed-512"
SIDE = ["quant", "placement"]
MEASURES = {
    "tokens/s": (f"tokens_per_s/{WORKLOAD}", 1.0),
    "TTFT, ms": (f"ttft_warm_s/{WORKLOAD}", 1e3),
    "load, s": ("load_s", 1.0),
}


class SharingError(Exception):
    """The studies do not answer the question; the message says why."""


def change(alone: Sequence[float], together: Sequence[float]) -> Estimate:
    """together / alone, of geometric means, with the interval of Welch's t on logarithms."""
    a, b = np.log(alone), np.log(together)
    ratio, n = float(np.exp(b.mean() - a.mean())), min(len(a), len(b))
    if n < 2 or np.ptp(a) + np.ptp(b) == 0:
        return Estimate(ratio, None, None, n)
    low, high = ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    return Estimate(ratio, float(np.exp(low)), float(np.exp(high)), n)


def spans(records: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Cell -> when its first run started and its last one ended, in seconds."""
    of: dict[str, tuple[float, float]] = {}
    for r in records:
        start = datetime.fromisoformat(r.started_utc).timestamp()
        first, last = of.get(r.cell, (start, start))
        of[r.cell] = min(first, start), max(last, start + r.observation.wall_s)
    return of


def require_one_host(alone: Study, together: Study) -> None:
    """Raise SharingError unless each cell of both studies ran on one and the same host, beside each other in one study
    and not in the other."""
    hosts = {r.host.host_id for s in (alone, together) for r in s.used}
    if len(hosts) != 1 or None in hosts:
        raise SharingError(f"{ALONE} and {TOGETHER} were measured on {len(hosts)} hosts: measure both on one")
    for study, shared in ((alone, False), (together, True)):
        if any(bool(r.host.shared) != shared for r in study.used):
            raise SharingError(f"{study.name} has runs that {'had the host alone' if shared else 'shared the host'}")


def lasted(records: Sequence[Record]) -> float:
    """Seconds from the first start to the last end."""
    of = spans(records).values()
    return max(end for _, end in of) - min(start for start, _ in of)


def overlap(records: Sequence[Record]) -> float:
    """Share of that time in which every cell was being measured."""
    of = spans(records).values()
    return max(0.0, min(end for _, end in of) - max(start for start, _ in of)) / lasted(records)


def table(alone: pd.DataFrame, together: pd.DataFrame) -> Iterator[str]:
    """A row for each quant, placement and measure, and how much of the host's CPU time others used."""
    yield "| quant | placement | measure | alone | two at once | two at once / alone |"
    yield "| --- | --- | --- | ---: | ---: | ---: |"
    sides = [dict(iter(frame.groupby(SIDE, sort=False))) for frame in (alone, together)]
    for side in sides[0]:
        for name, (column, scale) in MEASURES.items():
            a, b = (of[side][column].dropna().tolist() for of in sides)
            means = (stats.estimate(stats.geometric_mean(x), scale) for x in (a, b))
            yield f"| {side[0]} | {side[1]} | {name} | {' | '.join(means)} | {stats.estimate(change(a, b))} |"


def answers(alone: pd.DataFrame, together: pd.DataFrame) -> Iterator[str]:
    """What tokens/s of two at once are to those of one alone, a sentence for each placement."""
    column = MEASURES["tokens/s"][0]
    sides = [dict(iter(frame.groupby(SIDE, sort=False)[column])) for frame in (alone, together)]
    for placement in alone["placement"].unique():
        of = {side[0]: change(*(x[side].tolist() for x in sides)) for side in sides[0] if side[1] == placement}
        lower = all(r.high is not None and r.high < 1 for r in of.values())
        told = ", ".join(f"{stats.estimate(r)} ({quant})" for quant, r in of.items())
        verdict = "two at once are slower" if lower else "not every quant is shown to be slower"
        yield f"- `{placement}`: {verdict}. Of the tokens/s that it has alone: {told}."


def page(outputs: Path = OUTPUTS) -> Iterator[str]:
    """The page. Raises SharingError where the studies do not answer."""
    alone, together = (Study.read(outputs / name) for name in (ALONE, TOGETHER))
    require_one_host(alone, together)
    a, b = (frames.runs(s.used) for s in (alone, together))
    facts, others = alone.used[0], [r.observation.host.foreign_share for r in together.used]
    took = [lasted(s.used) for s in (alone, together)]
    yield "# Two cells at once on one host"
    yield ""
    yield (
        f"Both cells of `{TOGETHER}` ran beside each other, each on a GPU of its own; those of `{ALONE}` one after "
        f"another, on the same host: {facts.host.cpus} CPUs ({facts.host.cpu}), RAM read at "
        f"{stats.number(facts.host.ram_read_bytes_per_s, 1e-9)} GB/s, {facts.device.name}. {len(a)} and {len(b)} runs "
        f"usable, of {facts.spec.model}, geometry twins (random weights, real shapes) at scale {facts.spec.scale}."
    )
    yield ""
    yield "## What it costs"
    yield ""
    yield from answers(a, b)
    yield (
        f"- All runs took {stats.number(took[1])} s two at once and {stats.number(took[0])} s one after another: "
        f"{stats.number(took[0] / took[1])} times as long."
    )
    yield ""
    yield (
        "So a cell with experts on the CPU has its host alone by default, and moelib refuses to compare tokens/s or "
        "TTFT of runs that shared a host with those of others. `exclusive: device` is for VRAM, quality and whatever "
        "else does not depend on time."
    )
    yield ""
    yield "## In numbers"
    yield ""
    yield from table(a, b)
    yield ""
    yield (
        f"Requests of {WORKLOAD}, the warm ones for TTFT; geometric means [95 % intervals], of the last column by "
        f"Welch's t on logarithms. Both cells were being measured in {overlap(together.used):.0%} of the time; of the "
        f"host's CPU time {min(others):.0%} to {max(others):.0%} went to others while a run lasted, by which such runs "
        "are marked. A cell loads files and starts servers between requests, so a request does not always meet one of "
        "the other cell: a neighbour that never rests costs more. `moelib report` of either study lists its records."
    )


if __name__ == "__main__":
    try:
        print("\n".join(page()))
    except SharingError as err:
        sys.exit(str(err))
