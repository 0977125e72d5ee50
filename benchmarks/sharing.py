"""What it costs to measure two cells at once on a host with two GPUs, from committed studies of one such host each.

    python benchmarks/sharing.py > docs/SHARING.md

Of each pair, the cells of the first study (`exclusive: device`) ran beside each other, those of the second one
(`exclusive: host`) one after another. Everywhere else moelib refuses to compare such runs; here their difference is the
question.
"""

import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from moelib.audit.record import Record
from moelib.base import stats
from moelib.base.stats import Estimate
from moelib.study import frames
from moelib.study.study import Study

OUTPUTS = Path(__file__).resolve().parent.parent / "outputs"


class Pair(NamedTuple):
    together: str
    alone: str
    title: str
    sides: dict[str, str]
    """Placement together -> the one alone that it is compared with."""
    threads: dict[str, str]
    """Placement with fewer threads -> the same with one for every CPU, both alone."""


PAIRS = (
    Pair(
        "two-gpus",
        "two-gpus-alone",
        "Each with a thread for every CPU, as moelib did before it divided them",
        {"baseline": "baseline", "cpu-moe": "cpu-moe"},
        {"cpu-moe,threads=16": "cpu-moe"},
    ),
    Pair(
        "two-gpus-divided",
        "two-gpus-lone",
        "Each with its part of the CPUs",
        {"baseline": "baseline", "cpu-moe": "cpu-moe,threads=16"},
        {},
    ),
)
WORKLOAD = "mixed-512"
SIDE = ["quant", "placement"]
MEASURES = {
    "tokens/s": (f"tokens_per_s/{WORKLOAD}", 1.0),
    "TTFT, ms": (f"ttft_warm_s/{WORKLOAD}", 1e3),
    "load, s": ("load_s", 1.0),
}


class SharingError(Exception):
    """The studies do not answer the question; the message says why."""


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
        raise SharingError(f"{alone.name} and {together.name} were measured on {len(hosts)} hosts: measure both on one")
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


class Row(NamedTuple):
    quant: str
    placement: str
    """Together, and alone where that is another one."""
    measure: str
    alone: Estimate
    together: Estimate
    ratio: Estimate
    """Of together to alone."""


def rows(alone: pd.DataFrame, together: pd.DataFrame, sides: dict[str, str]) -> Iterator[Row]:
    """A row for each quant, placement and measure. sides: placement together -> that alone."""
    of = [dict(iter(frame.groupby(SIDE, sort=False))) for frame in (alone, together)]
    for quant in dict.fromkeys(alone["quant"]):
        for placement, lone in sides.items():
            name = placement if lone == placement else f"{placement}; alone {lone}"
            for measure, (column, _) in MEASURES.items():
                a, b = (x[quant, p][column].dropna().tolist() for x, p in zip(of, (lone, placement), strict=True))
                before, after = map(stats.geometric_mean, (a, b))
                yield Row(quant, name, measure, before, after, stats.apart(a, b))


def verdicts(of: Sequence[Row]) -> Iterator[str]:
    """What tokens/s of two at once are to those of one alone, a sentence for each placement."""
    rates = [r for r in of if r.measure == "tokens/s"]
    for placement in dict.fromkeys(r.placement for r in rates):
        here = [r for r in rates if r.placement == placement]
        told = ", ".join(f"{stats.estimate(r.ratio)} ({r.quant})" for r in here)
        if any(r.ratio.high is None for r in here):
            said = "one round, so without an interval"
        else:
            slower = sum(r.ratio.high is not None and r.ratio.high < 1 for r in here)
            said = f"slower at {slower} of {len(here)} quants, beyond doubt at 95 %"
        yield f"- `{placement}`: of the tokens/s that it has alone {told}: {said}."


def section(pair: Pair, outputs: Path) -> Iterator[str]:
    """What one pair of studies tells. Raises SharingError where it does not."""
    alone, together = (Study.read(outputs / name) for name in (pair.alone, pair.together))
    require_one_host(alone, together)
    facts, others = alone.used[0], [r.observation.host.foreign_share for r in together.used]
    frame = frames.runs(alone.used)
    of = list(rows(frame, frames.runs(together.used), pair.sides))
    threads = sorted({r.observation.threads for r in together.used if r.spec.placement in pair.sides})
    yield f"## {pair.title}"
    yield ""
    yield (
        f"`{pair.together}` beside `{pair.alone}`, on one host: {facts.host.cpus} CPUs ({facts.host.cpu}), RAM read at "
        f"{stats.number(facts.host.ram_read_bytes_per_s, 1e-9)} GB/s, {facts.device.name}. Each server of two at once "
        f"had {' or '.join(map(str, threads))} threads. {len(together.used)} and {len(alone.used)} runs, of "
        f"{facts.spec.model}, geometry twins (random weights, real shapes) at scale {facts.spec.scale}."
    )
    yield ""
    yield from verdicts(of)
    if all(s.tally["usable"] == s.tally["planned"] for s in (alone, together)):
        took = [lasted(s.used) for s in (alone, together)]
        yield f"- All cells took {stats.number(took[1])} s two at once, {stats.number(took[0])} s one after another."
    for few, many in pair.threads.items():
        fewer = [r for r in rows(frame, frame, {few: many}) if r.measure == "tokens/s"]
        told = ", ".join(f"{stats.estimate(r.ratio)} ({r.quant})" for r in fewer)
        yield f"- Alone, `{few}` has of the tokens/s of `{many}`: {told}: what fewer threads cost by themselves."
    yield ""
    yield "| quant | placement | measure | alone | two at once | two at once / alone |"
    yield "| --- | --- | --- | ---: | ---: | ---: |"
    for r in of:
        told = " | ".join(stats.estimate(e, MEASURES[r.measure][1]) for e in (r.alone, r.together))
        told = f"{told} | {stats.estimate(r.ratio)}"
        yield f"| {r.quant} | {r.placement} | {r.measure} | {told} |"
    yield ""
    yield (
        f"Both cells were being measured in {overlap(together.used):.0%} of the time; of the host's CPU time "
        f"{min(others):.0%} to {max(others):.0%} went to others while a run lasted."
    )
    yield ""


def page(outputs: Path = OUTPUTS) -> Iterator[str]:
    """The page, of the pairs that were measured. Raises SharingError where one does not answer."""
    yield "# Two cells at once on one host"
    yield ""
    yield (
        "Experts on the CPU are read from RAM and computed by CPUs that all runs of a host share. So a cell with "
        "experts on the CPU has its host alone by default, and moelib refuses to compare tokens/s or TTFT of runs that "
        "shared a host with those of others. A study with `exclusive: device` has its cells beside each other, each on "
        "a GPU of its own and with its part of the CPUs: for VRAM, quality and whatever else does not depend on time."
    )
    yield ""
    for pair in PAIRS:
        if all((outputs / name).is_dir() for name in (pair.together, pair.alone)):
            yield from section(pair, outputs)
        else:
            yield f"## {pair.title}"
            yield ""
            yield f"Not measured: it takes `{pair.together}` and `{pair.alone}` on one host with two GPUs."
            yield ""
    yield (
        f"Requests of {WORKLOAD}, the warm ones for TTFT; geometric means [95 % intervals] over rounds, ratios by "
        "Welch's t on logarithms. A cell loads files and starts servers between requests, so a request does not always "
        "meet one of the other cell: a neighbour that never rests costs more. `moelib report` of a study lists its "
        "records."
    )


if __name__ == "__main__":
    try:
        print("\n".join(page()))
    except SharingError as err:
        sys.exit(str(err))
