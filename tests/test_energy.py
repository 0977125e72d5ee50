"""Requests, counter and meter of a board: each invariant of a cell's energy has a cell that breaks it."""

from dataclasses import replace

import pytest
from factory import with_observed
from test_cells import RUNS, changed, flagged

from moelib.measure.nvml import Counters


def spent(r, joules):
    return {"requests": tuple(replace(q, energy_joule=joules) for q in r.observed.requests)}


def steady(first, joules=10.0, **change):
    """The cell whose requests take 10 J each, and those of its first run so many."""
    runs = [with_observed(r, **spent(r, joules), **change) for r in RUNS]
    return changed(0, runs, **spent(RUNS[0], first))


def drawn(watts):
    """Requests of 2 s at 100 W, and a meter that reads so many."""

    def long(r):
        token_s = (0.1, *(0.1 + 0.05 * i for i in range(1, 40)))
        requests = tuple(
            replace(q, token_s=token_s, energy_joule=205.0, started_s=0.2 + 3 * q.index) for q in r.observed.requests
        )
        counters = tuple(Counters(t, power_watt=watts) for t in (0.1, 2.3, 5.3))
        return with_observed(r, requests=requests, counters=counters)

    return list(map(long, RUNS))


def board(joules, meter=100.0, between=5.0, seconds=0.4, of=1):
    """Runs whose requests of `seconds`, `of` times as many as usual, take so many joules each; 0.1 s before and after
    each the counter moves by `between`."""

    def counted(r):
        requests, counters, total, t = [], [Counters(0.1, 1000.0, power_watt=meter)], 1000.0, 0.2
        for q in r.observed.requests * of:
            step = seconds / len(q.token_s)
            times = tuple(round(step * (i + 1), 6) for i in range(len(q.token_s)))
            requests.append(replace(q, token_s=times, energy_joule=joules, started_s=t))
            total += joules + between
            t += seconds + 0.1
            counters.append(Counters(round(t - 0.05, 6), total, power_watt=meter))
        return with_observed(r, requests=tuple(requests), counters=tuple(counters))

    return list(map(counted, RUNS))


TEN_WATTS = (Counters(0.1, power_watt=10.0),)
CELLS = [
    *(("energy-steady", right, steady(j)) for j, right in ((10, True), (16, True), (16.1, False))),
    *(("energy-steady", right, steady(j)) for j, right in ((6.3, True), (6.2, False))),
    # where the board draws 10 W, its counter may tell 7 J of two requests later than they were drawn
    *(("energy-steady", right, steady(j, counters=TEN_WATTS)) for j, right in ((19.4, True), (19.6, False))),
    # 12 long requests: within 6 % and 0.2 / sqrt(12) of the meter's power
    *(("energy-as-metered", right, drawn(w)) for w, right in ((100, True), (113, True), (115, False))),
    *(("energy-as-metered", right, drawn(w)) for w, right in ((90, True), (88, False))),
    # of 0.4 s, 6 a placement after the first second: too short for a reading to be of them alone, but not in the median
    *(("energy-as-metered", right, board(40.0, w, of=2)) for w, right in ((100, True), (81, True), (79, False))),
    *(("energy-as-metered", right, board(40.0, w, of=2)) for w, right in ((117, True), (119, False))),
    # of runs that are over within a second, the meter has read the time before them too: 1.34 times seen
    ("energy-as-metered", True, board(40.0, 79)),
    # a board that waits: 0.25 s a run between 6 requests and 100 W in them are -7 to 123 J, as 37 J may come late
    *(("energy-between-requests", right, board(40.0, between=j)) for j, right in ((5.0, True), (20.4, True))),
    *(("energy-between-requests", right, board(40.0, between=j)) for j, right in ((20.6, False), (-1.1, True))),
    ("energy-between-requests", False, board(40.0, between=-1.2)),
    ("energy-between-requests", True, board(20.0, between=40.0, seconds=0.2)),  # it cannot tell
]


@pytest.mark.parametrize(("check", "right", "runs"), CELLS)
def test_a_limit_is_where_it_is_said_to_be(check, right, runs):
    assert (check not in flagged(runs)) == right
