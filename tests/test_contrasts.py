"""Contrasts between quants: known values, what is equal, different and undecided, and how often that is wrong."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from moelib.answers import claims, contrasts
from moelib.base import stats

QUANTS = ("Q4_K_M", "Q2_K", "Q8_0")
RATE = "tokens_per_s/w"
BASE, MOVED = ("baseline", "mmap"), ("cpu-moe", "mmap")


def frame_of(kept, rounds=5, noise=0.01, drift=0.0, seed=1, machine="a"):
    """Runs of one model: the share of the baseline's rate that each quant keeps with its experts on the CPU, with
    noise on logarithms and a drift that a round's runs have in common."""
    chance, rows = np.random.default_rng(seed), []
    common = chance.normal(0, drift, rounds)
    for quant, share in kept.items():
        for n in range(rounds):
            for side, rate in ((BASE, 100.0), (MOVED, 100.0 * share)):
                shaken = rate * math.exp(chance.normal(0, noise) + (common[n] if side is MOVED else 0.0))
                rows.append(("s", "m", quant, *side, n + 1, f"{quant}{side}{n}", "d", machine, shaken))
    head = ["study", "model", "quant", "placement", "load_mode", "round", "run_id", "digest", "machine", RATE]
    return pd.DataFrame(rows, columns=head)


def outcomes(frame):
    return {(c.first, c.second): c.outcome for c in contrasts.of_ratios(frame, RATE, MOVED)}


def test_quants_that_keep_the_same_share_are_equal_and_others_differ():
    alike = outcomes(frame_of(dict.fromkeys(QUANTS, 0.2)))
    assert set(alike.values()) == {"equal"}
    assert len(alike) == 3
    apart = outcomes(frame_of({"Q4_K_M": 0.2, "Q2_K": 0.3, "Q8_0": 0.2}))
    assert apart == {("Q4_K_M", "Q2_K"): "different", ("Q4_K_M", "Q8_0"): "equal", ("Q2_K", "Q8_0"): "different"}
    assert set(outcomes(frame_of(dict.fromkeys(QUANTS, 0.2), noise=0.2)).values()) == {"undecided"}


def test_the_family_is_the_placement_asked_for():
    """Other placements are another question: they do not make its correction stricter."""
    frame = frame_of({"Q4_K_M": 0.2, "Q2_K": 0.25, "Q8_0": 0.22}, noise=0.05)
    more = [frame[frame["placement"] == "cpu-moe"].assign(placement=f"n-cpu-moe={n}") for n in (1, 2, 3)]
    alone, among = (contrasts.of_ratios(f, RATE, MOVED) for f in (frame, pd.concat([frame, *more])))
    assert [c.corrected for c in among] == [c.corrected for c in alone]
    assert max(c.corrected / c.p for c in alone) == pytest.approx(3)


def test_an_interval_without_1_that_the_correction_leaves_undecided_says_so():
    (c, *_) = contrasts.of_ratios(frame_of({"Q4_K_M": 0.2, "Q2_K": 0.25}), RATE, MOVED)
    assert (c.is_told, c.told_alone) == (True, False)
    lost = replace(c, p=0.03, corrected=0.06)
    assert (lost.is_told, lost.told_alone) == (False, True)
    assert not replace(c, p=0.06, corrected=0.06).told_alone
    assert claims._facing(lost, "Q2_K")[0].endswith(", no longer told once corrected for the number of pairs.")
    assert claims._facing(c, "Q2_K")[0].endswith("].")


def test_one_round_decides_nothing():
    assert set(outcomes(frame_of({"Q4_K_M": 0.2, "Q2_K": 0.9}, rounds=1)).values()) == {"undecided"}


def test_what_does_not_vary_needs_no_interval():
    (same,) = contrasts.of_values(frame_of({"Q4_K_M": 0.2, "Q2_K": 0.21}, noise=0.0), RATE, MOVED)
    assert (same.outcome, same.ratio.low, same.p) == ("equal", None, None)
    assert same.ratio.value == pytest.approx(0.2 / 0.21)
    (other,) = contrasts.of_values(frame_of({"Q4_K_M": 0.2, "Q2_K": 0.4}, noise=0.0), RATE, MOVED)
    assert other.outcome == "different"


def test_by_hand_paired_and_by_welch():
    """Two quants have no pooled spread: scipy's own tests give the numbers."""
    frame = frame_of({"Q4_K_M": 0.2, "Q2_K": 0.22}, noise=0.03)
    (paired,) = contrasts.of_ratios(frame, RATE, MOVED)
    logs = {}
    for quant, runs in frame.groupby("quant"):
        sides = {p: r.set_index("round")[RATE] for p, r in runs.groupby("placement")}
        logs[quant] = np.log(sides["cpu-moe"] / sides["baseline"]).to_numpy()
    expected = scipy_stats.ttest_rel(logs["Q4_K_M"], logs["Q2_K"])
    assert paired.paired
    assert not paired.pooled
    assert paired.p == pytest.approx(expected.pvalue)
    assert math.log(paired.ratio.low) == pytest.approx(expected.confidence_interval(0.95).low)
    assert math.log(paired.inner[1]) == pytest.approx(expected.confidence_interval(0.90).high)
    (alone,) = contrasts.of_ratios(frame.assign(machine=None), RATE, MOVED)
    expected = scipy_stats.ttest_ind(logs["Q4_K_M"], logs["Q2_K"], equal_var=False)
    assert not alone.paired
    assert alone.p == pytest.approx(expected.pvalue)
    assert math.log(alone.ratio.high) == pytest.approx(expected.confidence_interval(0.95).high)


def test_rounds_on_several_machines_are_not_paired():
    frame = frame_of(dict.fromkeys(QUANTS, 0.2))
    frame.loc[(frame["quant"] == "Q2_K") & (frame["round"] > 3), "machine"] = "b"
    assert not any(c.paired for c in contrasts.of_ratios(frame, RATE, MOVED))
    frame.loc[frame["round"] > 3, "machine"] = "b"
    assert all(c.paired for c in contrasts.of_ratios(frame, RATE, MOVED))


def test_the_spread_of_all_is_used_where_they_are_alike_and_not_where_one_is_wild():
    assert all(c.pooled for c in contrasts.of_ratios(frame_of(dict.fromkeys(QUANTS, 0.2)), RATE, MOVED))
    frame = frame_of(dict.fromkeys(QUANTS, 0.2), noise=0.001)
    wild = (frame["quant"] == "Q2_K") & (frame["placement"] == "cpu-moe")
    frame.loc[wild, RATE] *= np.exp(np.random.default_rng(5).normal(0, 0.2, wild.sum()))
    assert not any(c.pooled for c in contrasts.of_ratios(frame, RATE, MOVED))


def test_holm_by_hand():
    assert contrasts._holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert contrasts._holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert contrasts._holm([]) == []


def on_two(frame, differ=(), factor=1.5, machine="b"):
    """The same with rounds 4 and 5 on another machine; these quants keep more with offload on one of both."""
    frame = frame.assign(machine=np.where(frame["round"] > 3, "b", "a"))
    changed = frame["quant"].isin(differ) & (frame["machine"] == machine) & (frame["placement"] == "cpu-moe")
    frame.loc[changed, RATE] *= factor
    return frame


def test_machines_are_a_factor_of_paired_rounds():
    """As `stats` does it with the differences; p and the bounds are those of one another."""
    frame = on_two(frame_of({"Q4_K_M": 0.2, "Q2_K": 0.22}, noise=0.03), differ=["Q2_K"], factor=1.2)
    (c,) = contrasts.of_ratios(frame, RATE, MOVED)
    rates = frame.set_index(["quant", "placement", "round"])[RATE].unstack("round")
    kept = {q: (rates.loc[q, "cpu-moe"] / rates.loc[q, "baseline"]).tolist() for q in ("Q4_K_M", "Q2_K")}
    expected = stats.ratio(list(zip(kept["Q2_K"], kept["Q4_K_M"], strict=True)), "aaabb")
    assert c.paired
    assert (c.ratio.low, c.ratio.value, c.ratio.high) == pytest.approx((expected.low, expected.value, expected.high))
    (plain,) = contrasts.of_ratios(frame.assign(machine="a"), RATE, MOVED)
    assert c.ratio.low < plain.ratio.low < plain.ratio.high < c.ratio.high
    parts = [stats.Component(1.0, 2.0, 1), stats.Component(0.5, 5.0, 4)]
    assert contrasts._p(stats.half(parts), parts) == pytest.approx(0.05)
    assert contrasts._p(0.0, parts) == 1
    assert contrasts._p(1e6, [stats.Component(1.0, 1.0, 9), stats.Component(1.0, 1.0, 99)]) < 1e-30


def test_machines_on_which_quants_agree_change_nothing():
    frame = frame_of(dict.fromkeys(QUANTS, 0.2), noise=0.02)
    both = frame.copy()
    both.loc[both["round"] > 3, "machine"] = "b"
    both.loc[both["machine"] == "b", RATE] *= 2  # of all alike
    plain, over = (contrasts.of_ratios(f, RATE, MOVED) for f in (frame, both))
    assert [c.ratio.value for c in over] == pytest.approx([c.ratio.value for c in plain])
    assert all(c.pooled for c in over)
    assert max(c.ratio.high / c.ratio.low for c in over) < 1.3


def test_machines_widen_a_side_that_stands_alone():
    """Q2_K on one machine, Q4_K_M on two that differ: rounds by Welch, and the machines of one side."""
    frame = frame_of({"Q4_K_M": 0.2, "Q2_K": 0.22}, noise=0.02)
    frame = pd.concat([on_two(frame[frame["quant"] == "Q4_K_M"], differ=["Q4_K_M"]), frame[frame["quant"] == "Q2_K"]])
    (c,), (plain,) = (contrasts.of_ratios(f, RATE, MOVED) for f in (frame, frame.assign(machine="a")))
    assert not c.paired
    assert c.ratio.high / c.ratio.low > 3 * plain.ratio.high / plain.ratio.low
    (unknown,) = contrasts.of_ratios(frame.assign(machine=None), RATE, MOVED)
    assert unknown.ratio.high / unknown.ratio.low < c.ratio.high / c.ratio.low


def test_quants_over_machines_are_pooled_where_they_are_paired():
    """What each differs by on the other machine has two degrees of freedom, where two quants alone have one."""
    three = on_two(frame_of(dict.fromkeys(QUANTS, 0.2), noise=0.02), differ=["Q2_K"], factor=1.06)
    three = on_two(three, differ=["Q4_K_M"], factor=0.94)
    two = three[three["quant"] != "Q8_0"]
    (alone,) = contrasts.of_ratios(two, RATE, MOVED)
    pooled = next(
        c for c in contrasts.of_ratios(three, RATE, MOVED) if (c.first, c.second) == (alone.first, alone.second)
    )
    assert pooled.pooled
    assert pooled.ratio.value == pytest.approx(alone.ratio.value)
    assert pooled.ratio.high / pooled.ratio.low < alone.ratio.high / alone.ratio.low


@pytest.mark.parametrize("factor", [0, 1, 5])
def test_how_often_it_is_wrong_over_machines(factor):
    """Three quants on two machines, on which each differs by `factor` times the noise of rounds: in 600 of such worlds
    91 to 97 % of the 95 % intervals held the truth."""
    chance, inside, n = np.random.default_rng(20261128), 0, 150
    for seed in range(n):
        frame = frame_of(dict.fromkeys(QUANTS, 0.2), noise=0.02, drift=0.1, seed=seed)
        for quant, machine in itertools.product(QUANTS, "ab"):
            by = math.exp(chance.normal(0, factor * 0.02 * math.sqrt(2)))
            frame = on_two(frame, [quant], by, machine)
        inside += sum(c.ratio.low <= 1 <= c.ratio.high for c in contrasts.of_ratios(frame, RATE, MOVED))
    assert 0.88 < inside / n / 3 < 0.99


def test_how_often_it_is_wrong():
    """Of families whose sides lie exactly on the margin at most 5 % are called equal; of such without a difference at
    most 5 % have one that is called different; the 95 % interval covers the truth. Drift of a round is paired away."""
    n, drift, called_equal, called_different, covered = 150, 0.1, 0, 0, 0
    for seed in range(n):
        edge = contrasts.of_ratios(frame_of({"a": 0.2, "b": 0.22}, noise=0.02, drift=drift, seed=seed), RATE, MOVED)
        called_equal += any(c.outcome == "equal" for c in edge)
        (c,) = edge
        covered += c.ratio.low <= 0.2 / 0.22 <= c.ratio.high
        null = contrasts.of_ratios(frame_of(dict.fromkeys(QUANTS, 0.2), noise=0.1, drift=drift, seed=seed), RATE, MOVED)
        called_different += any(c.outcome == "different" for c in null)
    assert called_equal / n <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)
    assert called_different / n <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)
    assert covered / n == pytest.approx(0.95, abs=3 * math.sqrt(0.05 * 0.95 / n))
