"""Invariants of a cell's energy: requests, the board's counter and its meter show one course of power."""

from collections.abc import Iterable, Iterator
from statistics import median

from moelib.audit.bounds import COURSE_S, TICK_S, course
from moelib.audit.cells import Cell, by_placement
from moelib.audit.invariants import Faults, holds
from moelib.audit.record import Record

ENERGY_TIMES = 1.6  # a run's energy against the median of its placement: 1.48 seen
METER_S = 1.0  # the meter's reading is the mean power of the last second (NVML, GPUs since Ampere)
METER_SHARE = 0.06  # median over a cell's requests longer than that: 1.00 within 0.03 of 40 seen
METER_SPREAD = 0.2  # beside it, by the root of their number: single ones are 0.78 to 1.12
METER_TIMES = (0.85, 1.25)  # a placement's requests against the meter, which lags: medians of 0.88 to 1.17 seen
METER_REQUESTS = 5  # fewer have no such median
GAP_SHARES = (0.4, 1.15)  # between requests: of the lowest reading of the meter, and of the power in requests
GAP_S = 0.15  # of power, by the root of the number of requests: the counter moves every 0.1 s
GAP_REQUEST_S = 0.25  # of shorter requests, in the mean, the counter says nothing


@holds("cell", f"{ENERGY_TIMES:g} times the median of its placement")
def energy_steady(cell: Cell) -> Faults:
    """The same work takes about the same energy in every block."""
    for label, runs in by_placement(cell.runs).items():
        spent = {r.run_id: _spent(r) for r in runs if _known(r)}
        usual = median(spent.values()) if spent else 0.0
        # the counter moves every tenth of a second: of short requests it says little
        late = max((COURSE_S * w * len(r.observation.requests) for r in runs for w in _watts(r)), default=0.0)
        for name, joules in spent.items():
            if not usual / ENERGY_TIMES - late <= joules <= usual * ENERGY_TIMES + late:
                yield f"{label}: {joules:.0f} J in {name}, {usual:.0f} in the median"
    return "steady"


@holds(
    "cell", f"{METER_SHARE:.0%} of long requests' power, {METER_TIMES[0]:g} to {METER_TIMES[1]:g} times per placement"
)
def energy_as_metered(cell: Cell) -> Faults:
    """Requests take the power that the board's meter reads at their ends."""
    long = [share for lasted, share in _meter_shares(cell.runs) if lasted > METER_S]
    if long and abs(median(long) - 1) > METER_SHARE + METER_SPREAD / len(long) ** 0.5:
        yield f"long requests take {median(long):.2f} times the meter's power"
    for label, runs in by_placement(cell.runs).items():
        shares = [share for lasted, share in _meter_shares(runs) if lasted > COURSE_S]
        if len(shares) >= METER_REQUESTS and not METER_TIMES[0] <= median(shares) <= METER_TIMES[1]:
            yield f"{label}: requests take {median(shares):.2f} times the meter's power"
    return "as the meter reads"


@holds("cell", f"{GAP_SHARES[0]:g} times the meter's least to {GAP_SHARES[1]:g} times the power in requests")
def energy_between_requests(cell: Cell) -> Faults:
    """What the board's counter moves by and no request took was drawn between them: by a board that waits."""
    for label, runs in by_placement(cell.runs).items():
        measured = [(r, moved) for r in runs if _known(r) and _watts(r) and (moved := _moved(r)) is not None]
        lasted = [q.total_s or 0.0 for r, _ in measured for q in r.observation.requests]
        if not measured or sum(lasted) < GAP_REQUEST_S * len(lasted):
            continue
        spent, requested_s = sum(_spent(r) for r, _ in measured), sum(lasted)
        between, waited = sum(j for _, (j, _) in measured) - spent, sum(s for _, (_, s) in measured) - requested_s
        busy, idle = spent / requested_s, min(min(_watts(r)) for r, _ in measured)
        slack = GAP_S * max(busy, idle) * len(lasted) ** 0.5
        least, most = GAP_SHARES[0] * idle * waited - slack, GAP_SHARES[1] * busy * waited + slack
        if not least <= between <= most:
            yield f"{label}: {between:.0f} J in {waited:.2f} s between requests, {least:.0f} to {most:.0f} possible"
    return "a board that waits"


def _known(r: Record) -> bool:
    requests = r.observation.requests
    return bool(requests) and all(q.energy_joule is not None and q.total_s for q in requests)


def _spent(r: Record) -> float:
    return sum(q.energy_joule or 0.0 for q in r.observation.requests)


def _watts(r: Record) -> list[float]:
    return [c.power_watt for c in r.observation.counters if c.power_watt is not None]


def _moved(r: Record) -> tuple[float, float] | None:
    """(joules, seconds) by the board's counter from before the first request to after the last one."""
    first, last = r.observation.requests[0], r.observation.requests[-1]
    return course(r.observation.counters, first.started_s, last.started_s + (last.total_s or 0.0))


def _meter_shares(runs: Iterable[Record]) -> Iterator[tuple[float, float]]:
    """Of each request: its seconds; its mean power by its energy, over the meter's reading at its end. Without those
    that ended before the GPU had worked for a second, as the reading then has some of the time before."""
    for r in runs:
        for q in r.observation.requests:
            end_s = q.started_s + (q.total_s or 0.0)
            if end_s - r.observation.requests[0].started_s < METER_S:
                continue
            at_end = [c.power_watt for c in r.observation.counters if c.t_s >= end_s - TICK_S]
            if q.energy_joule and q.total_s and at_end and at_end[0]:
                yield q.total_s, q.energy_joule / q.total_s / at_end[0]
