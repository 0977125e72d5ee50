"""Requests, counter and meter of a board: each invariant of a cell's energy has a cell that breaks it."""

from dataclasses import replace

from test_cells import cell_of, flagged, with_seen

from moelib.measure.nvml import Counters


def test_energy_is_steady():
    def spent(r, joules):
        return with_seen(r, requests=tuple(replace(q, energy_joule=joules) for q in r.observed.requests))

    runs = [spent(r, 10.0) for r in cell_of()]
    assert flagged(runs) == set()
    for joules, right in ((16.0, True), (16.1, False), (6.3, True), (6.2, False)):
        assert (flagged([spent(runs[0], joules), *runs[1:]]) == set()) == right
    # where the board draws 10 W, its counter may tell 7 J of two requests later than they were drawn
    metered = [with_seen(r, counters=(Counters(0.1, power_watt=10.0),)) for r in runs]
    for joules, right in ((19.4, True), (19.6, False)):
        assert (flagged([spent(metered[0], joules), *metered[1:]]) == set()) == right


def test_long_requests_take_the_power_that_the_meter_reads():
    """Requests of 2 s at 100 W."""

    def drawn(r, watts):
        long = tuple(
            replace(
                q,
                token_s=(0.1, *(0.1 + 0.05 * i for i in range(1, 40))),
                energy_joule=205.0,
                started_s=0.2 + 3 * q.index,
            )
            for q in r.observed.requests
        )
        counters = tuple(Counters(t, power_watt=watts) for t in (0.1, 2.3, 5.3))
        return with_seen(r, requests=long, counters=counters)

    # 12 requests: within 6 % and 0.2 / sqrt(12)
    for watts, right in ((100.0, True), (113.0, True), (115.0, False), (90.0, True), (88.0, False)):
        flags = flagged([drawn(r, watts) for r in cell_of()])
        assert ("energy-as-metered" not in flags) == right


def boards(joules=60.0, meter=100.0, between=10.0, seconds=0.4):
    """A cell whose requests of `seconds` take so many joules each; 0.1 s before and after each the counter moves by
    `between`."""

    def counted(r):
        asked, counters, total, t = [], [Counters(0.1, 1000.0, power_watt=meter)], 1000.0, 0.2
        for q in r.observed.requests:
            step = seconds / len(q.token_s)
            times = tuple(round(step * (i + 1), 6) for i in range(len(q.token_s)))
            asked.append(replace(q, token_s=times, energy_joule=joules, started_s=t))
            total += joules + between
            t += seconds + 0.1
            counters.append(Counters(round(t - 0.05, 6), total, power_watt=meter))
        return with_seen(r, requests=tuple(asked), counters=tuple(counters))

    return [counted(r) for r in cell_of()]


def test_an_arms_requests_take_the_meters_power():
    """Requests of 0.4 s, 6 an arm: too short for a reading to be of them alone, but not in the median of all."""
    for meter, right in ((100.0, True), (81.0, True), (79.0, False), (117.0, True), (119.0, False)):
        flags = flagged(boards(joules=40.0, meter=meter, between=5.0))
        assert ("energy-as-metered" not in flags) == right


def test_a_board_that_waits_draws_less_than_in_a_request_and_more_than_nothing():
    """6 requests an arm, 0.25 s a run between them and 100 W in them: -7 to 123 J, as 37 J may come late."""
    for between, right in ((5.0, True), (20.4, True), (20.6, False), (-1.1, True), (-1.2, False)):
        flags = flagged(boards(joules=40.0, between=between))
        assert ("energy-between-requests" not in flags) == right
    assert "energy-between-requests" not in flagged(boards(joules=20.0, between=40.0, seconds=0.2))  # it cannot tell
