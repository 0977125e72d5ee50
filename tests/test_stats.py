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


def test_machines_are_a_factor_by_hand():
    """Means 2 and 6 of three and two rounds: mean squares 19.2 between and 4/3 within, n0 = 5 - 13/5 = 2.4, so that
    machines have a variance of 67/9, of which the mean has 13/25; t is 12.706205 and 2.776445 (its tables)."""
    values, machines = [1, 2, 3, 5, 7], "aaabb"
    between, within = stats.components(values, machines)
    assert between == pytest.approx((math.sqrt(67 / 9), 25 / 13, 1))
    assert within == pytest.approx((math.sqrt(4 / 3), 5, 4))
    half = math.sqrt(12.706205**2 * 67 / 9 * 13 / 25 + 2.776445**2 * 4 / 3 / 5)
    e = stats.mean(values, machines)
    assert (e.low, e.value, e.high, e.n) == (pytest.approx(3.6 - half), 3.6, pytest.approx(3.6 + half), 5)
    shuffled = stats.mean([5, 1, 3, 7, 2], "baaba")
    assert (shuffled.low, shuffled.high) == pytest.approx((e.low, e.high))
    logs = stats.geometric_mean([math.exp(x) for x in values], machines)
    assert (math.log(logs.low), math.log(logs.high)) == pytest.approx((e.low, e.high))
    assert stats.ratio([(2, 2 * math.exp(x)) for x in values], machines).high == pytest.approx(logs.high)


@pytest.mark.parametrize("values", [[1.1, 2.3, 2.9], [3.0, 3.0], [0.1, 0.2, 0.4, 0.8, 1.6]])
def test_one_machine_or_one_round_on_each_is_the_plain_interval(values):
    plain = stats.mean(values)
    assert stats.mean(values, ["a"] * len(values)) == plain
    assert stats.mean(values, range(len(values))) == plain
    assert stats.geometric_mean(values, ["a"] * len(values)) == stats.geometric_mean(values)
    assert stats.mean([5.0], ["a"]) == stats.mean([5.0])
    assert stats.mean([2.0] * 5, "aaabb").interval is None


def test_machines_that_agree_change_nothing_and_others_widen_without_a_jump():
    rounds = [1.0, 2.0, 3.0, 1.5, 2.5]
    assert stats.mean(rounds, "aaabb") == stats.mean(rounds)
    apart = [[*rounds[:3], *(x + by for x in rounds[3:])] for by in np.arange(0, 5, 0.01)]
    widths = [(e := stats.mean(x, "aaabb")).high - e.low for x in apart]
    assert widths == sorted(widths)
    assert max(np.diff(widths)) < widths[0] / 2
    assert widths[-1] > 4 * ((plain := stats.mean(apart[-1])).high - plain.low)


HELD = {
    (3, 2): (96.9, 95.2, 92.2, 89.8, 91.5),
    (3, 3): (96.8, 94.5, 91.1, 89.2, 91.6),
    (5, 5): (96.7, 92.2, 88.2, 88.6, 92.1),
    (2, 2, 1): (96.9, 96.1, 94.7, 93.7, 94.3),
    (5, 5, 5): (96.8, 93.2, 91.8, 93.1, 94.5),
}
"""Rounds on each machine -> percent of 95 % intervals that hold the truth, in 600,000 studies each, where machines vary
0, 0.5, 1, 2 and 5 times as much as rounds."""


@pytest.mark.parametrize("rounds", HELD, ids=str)
def test_how_many_intervals_over_machines_hold_the_truth(rounds):
    chance, studies = np.random.default_rng(20261128), 1500
    where = np.repeat(range(len(rounds)), rounds)
    for factor, percent in zip((0, 0.5, 1, 2, 5), HELD[rounds], strict=True):
        inside = 0
        for _ in range(studies):
            values = chance.normal(0, factor, len(rounds))[where] + chance.normal(0, 1, len(where))
            e = stats.mean(values.tolist(), where.tolist())
            inside += e.low <= 0 <= e.high
        share = percent / 100
        assert inside / studies == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / studies))
    least, most = (round(of(p for row in HELD.values() for p in row)) / 100 for of in (min, max))
    assert (least, most) == stats.COVERED


def pairs(logs, runs=""):
    return {f"{runs}{i}": (10.0, 10 * math.exp(x)) for i, x in enumerate(logs)}


def test_ratios_that_share_no_run_are_pooled_as_independent_ones():
    """Variances 1, 4 and 9 of three values each: 14/3 by 6 degrees of freedom, at which t is 2.446912 (its tables)."""
    groups = [pairs((1 - s, 1, 1 + s), runs=s) for s in (1, 2, 3)]
    told = stats.pooled_ratios(groups)
    half = 2.446912 * math.sqrt(14 / 3 / 3)
    for e in told:
        assert (math.log(e.low), math.log(e.value), math.log(e.high)) == pytest.approx(
            (1 - half, 1, 1 + half), rel=1e-6
        )
        assert e.n == 3
    assert stats.pooled_ratios(groups[:2]) is None
    assert stats.pooled_ratios([*groups, pairs((1, 2), "few")]) is None
    assert stats.pooled_ratios([*groups, pairs((1, 1, 1), "constant")]) is None
    assert stats.pooled_ratios([*groups, pairs((1, 1.0001, 1.0002), "unlike")]) is None


def test_ratios_to_the_same_runs_tell_less_of_their_spread():
    """Three that rise and fall together have the two degrees of freedom of one, at which t is 4.302653; three that do
    not, with the least correlation of a half, 6**2 / (6 + 12 / 4) = 4, at which it is 2.776445 (its tables)."""
    together = stats.pooled_ratios([pairs((0, 1, 2)), pairs((1, 2, 3)), pairs((2, 3, 4))])
    assert [math.log(e.high / e.value) for e in together] == pytest.approx([4.302653 / math.sqrt(3)] * 3, rel=1e-6)
    apart = stats.pooled_ratios([pairs((0, 1, 2)), pairs((2, 1, 0)), pairs((0, 1, 2))])
    assert [math.log(e.high / e.value) for e in apart] == pytest.approx([2.776445 / math.sqrt(3)] * 3, rel=1e-6)
    lame = stats.pooled_ratios([pairs((0, 1, 2, 3)), pairs((1, 2, 3)), pairs((2, 3, 4))])
    assert [e.n for e in lame] == [4, 3, 3], "one was run in fewer rounds"


def placements(chance, quants, placements, rounds, baseline, common):
    """Pairs of each placement of each quant by the baseline's run, all true ratios 1: noise of 3 % in each placement,
    of `baseline` in the baseline, of `common` in all placements of a round, and 5 % of drift in all of the round."""
    groups = []
    for quant in range(quants):
        drift, shared = chance.normal(0, 0.05, rounds), chance.normal(0, common, rounds)
        base = np.exp(drift + chance.normal(0, baseline, rounds))
        for _ in range(placements):
            moved = np.exp(drift + shared + chance.normal(0, 0.03, rounds))
            groups.append({f"{quant}-{n}": (base[n], moved[n]) for n in range(rounds)})
    return groups


ALIKE = (0.03, 0.0, 0.93, 0.97)
WORLDS = (ALIKE, (0.006, 0.0, 0.92, 0.98), (0.09, 0.0, 0.92, 0.98), (0.01, 0.06, 0.92, 0.98))
"""(noise of the baseline, noise that placements have in common, least and most that a 95 % interval may cover)."""


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize(
    ("k", "quants", "world"),
    [
        *((k, 3 if k == 2 else 1, ALIKE) for k in range(2, 9)),
        *((k, 3 if k == 2 else 1, w) for k in (2, 8) for w in WORLDS[1:]),
    ],
)
def test_a_pooled_95_percent_interval_covers_95_percent(k, quants, n, world):
    """k placements of one file, or of three files where k is 2, against one baseline in each of n rounds."""
    baseline, common, least, most = world
    chance, studies, inside, pooled = np.random.default_rng(20261127), 500, 0, 0
    for _ in range(studies):
        groups = placements(chance, quants, k, n, baseline, common)
        told = stats.pooled_ratios(groups)
        pooled += told is not None
        inside += sum(e.low <= 1 <= e.high for e in told or [stats.ratio(list(g.values())) for g in groups])
    assert least < inside / (studies * k * quants) < most
    assert pooled / studies > 0.85


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
