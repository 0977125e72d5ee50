"""Requests, counter and meter of a board: each invariant of a cell's energy has a cell that breaks it."""

from dataclasses import replace

import pytest
from factory import with_observed
from test_cells import RUNS, changed, flagged

from moelib.measure.nvml import Counters


def spent(r, joules):
    return {"requests": tuple(replace(q, energy_joule=joules) for q in r.observed.requests)}


@pytest.mark.parametrize(("first", "right"), [(10.0, True), (16.0, True), (16.1, False), (6.3, True), (6.2, False)])
def test_energy_is_steady(first, right):
    runs = [with_observed(r, **spent(r, 10.0)) for r in RUNS]
    assert flagged(changed(0, runs, **spent(RUNS[0], first))) == (set() if right else {"energy-steady"})


@pytest.mark.parametrize(("first", "right"), [(19.4, True), (19.6, False)])
def test_energy_that_the_counter_may_tell_late_is_allowed_for(first, right):
    """Where the board draws 10 W, its counter may tell 7 J of two requests later than they were drawn."""
    runs = [with_observed(r, **spent(r, 10.0), counters=(Counters(0.1, power_watt=10.0),)) for r in RUNS]
    assert (flagged(changed(0, runs, **spent(RUNS[0], first))) == set()) == right


def drawn(r, watts):
    """Requests of 2 s at 100 W, and a meter that reads so many."""
    token_s = (0.1, *(0.1 + 0.05 * i for i in range(1, 40)))
    long = tuple(
        replace(q, token_s=token_s, energy_joule=205.0, started_s=0.2 + 3 * q.index) for q in r.observed.requests
    )
    return with_observed(r, requests=long, counters=tuple(Counters(t, power_watt=watts) for t in (0.1, 2.3, 5.3)))


@pytest.mark.parametrize(
    ("watts", "right"), [(100.0, True), (113.0, True), (115.0, False), (90.0, True), (88.0, False)]
)
def test_long_requests_take_the_power_that_the_meter_reads(watts, right):
    """12 requests: within 6 % and 0.2 / sqrt(12)."""
    assert ("energy-as-metered" not in flagged([drawn(r, watts) for r in RUNS])) == right


def board(r, joules, meter=100.0, between=10.0, seconds=0.4):
    """A run whose requests of `seconds` take so many joules each; 0.1 s before and after each the counter moves by
    `between`."""
    requests, counters, total, t = [], [Counters(0.1, 1000.0, power_watt=meter)], 1000.0, 0.2
    for q in r.observed.requests:
        step = seconds / len(q.token_s)
        times = tuple(round(step * (i + 1), 6) for i in range(len(q.token_s)))
        requests.append(replace(q, token_s=times, energy_joule=joules, started_s=t))
        total += joules + between
        t += seconds + 0.1
        counters.append(Counters(round(t - 0.05, 6), total, power_watt=meter))
    return with_observed(r, requests=tuple(requests), counters=tuple(counters))


@pytest.mark.parametrize(
    ("meter", "right"), [(100.0, True), (81.0, True), (79.0, False), (117.0, True), (119.0, False)]
)
def test_a_placements_requests_take_the_meters_power(meter, right):
    """Requests of 0.4 s, 6 a placement: too short for a reading to be of them alone, but not in the median of all."""
    runs = [board(r, 40.0, meter, between=5.0) for r in RUNS]
    assert ("energy-as-metered" not in flagged(runs)) == right


@pytest.mark.parametrize(
    ("joules", "between", "seconds", "right"),
    [
        (40.0, 5.0, 0.4, True),
        (40.0, 20.4, 0.4, True),
        (40.0, 20.6, 0.4, False),
        (40.0, -1.1, 0.4, True),
        (40.0, -1.2, 0.4, False),
        (20.0, 40.0, 0.2, True),  # it cannot tell
    ],
)
def test_a_board_that_waits_draws_less_than_in_a_request_and_more_than_nothing(joules, between, seconds, right):
    """6 requests a placement, 0.25 s a run between them and 100 W in them: -7 to 123 J, as 37 J may come late."""
    runs = [board(r, joules, between=between, seconds=seconds) for r in RUNS]
    assert ("energy-between-requests" not in flagged(runs)) == right
