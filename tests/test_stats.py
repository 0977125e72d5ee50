import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelib.base import stats


@pytest.mark.parametrize(
    ("values", "mean", "quantile", "deviation"),
    [([1, 2, 3], 2, 4.302653, 1), ([1, 3], 2, 12.706205, math.sqrt(2))],
)
def test_known_mean_and_interval(values, mean, quantile, deviation):
    """ppf(0.975, n - 1) by scipy's documentation of t."""
    e = stats.mean(values)
    half = quantile * deviation / math.sqrt(len(values))
    assert (e.value, e.n) == (mean, len(values))
    assert (e.low, e.high) == pytest.approx((mean - half, mean + half), rel=1e-6)


def test_known_ratio():
    e = stats.ratio([(1, 2), (10, 20), (5, 10)])
    assert (e.value, e.low, e.high) == pytest.approx((2, 2, 2))
    assert stats.ratio([(1, 4), (1, 1)]).value == pytest.approx(2)
    assert stats.geometric_mean([1, 10, 100]).value == pytest.approx(10)


def test_one_value_has_no_interval():
    assert stats.mean([5.0]) == stats.Estimate(5.0, None, None, 1)
    assert stats.ratio([(2.0, 1.0)]) == stats.Estimate(0.5, None, None, 1)


@pytest.mark.parametrize("values", [[], [float("nan")], [1, float("inf")]])
def test_no_number_comes_of_no_numbers(values):
    with pytest.raises(ValueError, match="finite"):
        stats.mean(values)


@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (-1, 2)])
def test_a_ratio_needs_positive_values(pair):
    with pytest.raises(ValueError, match="positive"):
        stats.ratio([pair])


@given(st.lists(st.floats(0.1, 1e6), min_size=2, max_size=8), st.floats(0.01, 100))
def test_laws_of_means(values, factor):
    e, g = stats.mean(values), stats.geometric_mean(values)
    assert e.low <= e.value <= e.high
    assert 0 < g.low <= g.value * (1 + 1e-9)
    assert g.value <= e.value * (1 + 1e-9)
    assert stats.geometric_mean([v * factor for v in values]).value == pytest.approx(g.value * factor)


def test_noisier_data_give_wider_intervals():
    rng = np.random.default_rng(1)
    noise = rng.normal(size=5)
    widths = [(e := stats.geometric_mean(list(np.exp(s * noise)))).high / e.low for s in (0.01, 0.05, 0.2)]
    assert widths == sorted(widths)


@pytest.mark.parametrize("n", [3, 5])
def test_a_95_percent_interval_covers_95_percent(n):
    """3000 studies of n blocks with 5 % noise in run and block: the true ratio is inside in 95 % of them."""
    rng = np.random.default_rng(20261123)
    truth, inside = 0.4, 0
    for _ in range(3000):
        drift = np.exp(rng.normal(0, 0.05, n))
        pairs = [(100 * d * np.exp(rng.normal(0, 0.03)), 100 * truth * d * np.exp(rng.normal(0, 0.03))) for d in drift]
        e = stats.ratio(pairs)
        inside += e.low <= truth <= e.high
    assert 0.938 < inside / 3000 < 0.962


E = stats.Estimate
MIB, GIB = 2.0**20, 2.0**30
TEXTS = [
    (stats.number, [1234.6], "1235"),
    (stats.number, [123.46], "123"),
    (stats.number, [12.346], "12.3"),
    (stats.number, [0.0123], "0.0123"),
    (stats.number, [0], "0"),
    (stats.number, [999.6], "1000"),
    (stats.number, [99.0], "99.0"),
    (stats.number, [99.96], "100"),
    (stats.size, [3 * GIB], "3.00 GiB"),
    (stats.size, [MIB], "1.00 MiB"),
    (stats.size, [GIB - 1], "1024.00 MiB"),
    (stats.size, [-GIB], "-1.00 GiB"),
    (stats.percent, [0.12345], "12.3 %"),
    (stats.percent, [1], "100.0 %"),
    (stats.estimate, [E(2.0, 1.0, 3.0, 3)], "2.00 [1.00, 3.00]"),
    (stats.estimate, [E(0.002, 0.001, 0.003, 3), 1000], "2.00 [1.00, 3.00]"),
    (stats.estimate, [E(2.0, None, None, 1)], "2.00 (n = 1)"),
    (stats.sizes, [E(2 * MIB, MIB, 3 * MIB, 3)], "2.00 [1.00, 3.00] MiB"),
    (stats.sizes, [E(-GIB, -2 * GIB, -GIB / 2, 3)], "-1.00 [-2.00, -0.50] GiB"),
    (stats.sizes, [E(MIB, None, None, 1)], "1.00 MiB (n = 1)"),
    (stats.close, [E(0.99876, 0.99, 1.01, 3)], "0.9988 [0.9900, 1.0100]"),
    (stats.span, [[2.0, 1.0, 3.0], stats.number], "1.00 to 3.00"),
    (stats.span, [[2.0, 2.001], stats.number], "2.00"),
    *[(f, [None], "n/a") for f in (stats.number, stats.size, stats.percent, stats.estimate, stats.sizes, stats.close)],
]


@pytest.mark.parametrize(("function", "arguments", "text"), TEXTS, ids=lambda v: getattr(v, "__name__", None))
def test_numbers_as_people_read_them(function, arguments, text):
    assert function(*arguments) == text


def test_an_estimate_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.mean([1, 2, 3]).value = 7


def coverage(groups, rounds, short=None, families=1, tries=1200):
    """Share of pooled 95 % intervals that hold the true ratio, of worlds in which rounds differ and values vary alike.

    short: rounds of every second group, where those are fewer.
    """
    chance, held, every = np.random.default_rng([groups, rounds, short or 0, families]), 0, 0
    for _ in range(tries):
        tables, of = [], []
        for family in range(families):
            noise = np.exp(0.05 * chance.normal(size=(groups + 1, rounds)) + 0.3 * chance.normal(size=rounds))
            for g in range(1, groups + 1):
                n = short if short and g % 2 else rounds
                tables.append({r: (float(noise[0, r]), 2 * float(noise[g, r])) for r in range(n)})
                of.append(family)
        for e in stats.pooled_ratios(tables, of) or ():
            every += 1
            held += e.low <= 2 <= e.high
    return held / every


@pytest.mark.parametrize(
    ("groups", "rounds", "short", "families"),
    [(3, 3, None, 1), (8, 3, None, 1), (2, 5, None, 2), (8, 5, None, 1), (6, 5, 3, 1), (4, 3, None, 3)],
)
def test_pooled_intervals_of_ratios_with_one_baseline_cover(groups, rounds, short, families):
    assert 0.935 <= coverage(groups, rounds, short, families) <= 0.97


def test_pooled_ratios_of_a_whole_table_are_those_of_its_two_way_analysis():
    chance = np.random.default_rng(2)
    logs = chance.normal(size=(5, 4)) + 3 * chance.normal(size=4)  # baseline first
    groups = [{r: (math.exp(logs[0, r]), math.exp(logs[g, r])) for r in range(4)} for g in range(1, 5)]
    found = stats.pooled_ratios(groups, ["b"] * 4)
    rest = logs - logs.mean(1, keepdims=True) - logs.mean(0) + logs.mean()
    half = stats.student(12) * math.sqrt(2 * (rest**2).sum() / 12 / 4)
    for g, e in enumerate(found, 1):
        centre = (logs[g] - logs[0]).mean()
        assert (e.value, e.low, e.high) == pytest.approx(tuple(map(math.exp, (centre, centre - half, centre + half))))
