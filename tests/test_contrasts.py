"""Contrasts between quants: known values, what is equal, different and undecided, and how often that is wrong."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from moelib.answers import contrasts

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
    return {(c.first, c.second): c.outcome for c in contrasts.of_ratios(frame, RATE)}


def test_quants_that_keep_the_same_share_are_equal_and_others_differ():
    alike = outcomes(frame_of(dict.fromkeys(QUANTS, 0.2)))
    assert set(alike.values()) == {"equal"}
    assert len(alike) == 3
    apart = outcomes(frame_of({"Q4_K_M": 0.2, "Q2_K": 0.3, "Q8_0": 0.2}))
    assert apart == {("Q4_K_M", "Q2_K"): "different", ("Q4_K_M", "Q8_0"): "equal", ("Q2_K", "Q8_0"): "different"}
    assert set(outcomes(frame_of(dict.fromkeys(QUANTS, 0.2), noise=0.2)).values()) == {"undecided"}


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
    (paired,) = contrasts.of_ratios(frame, RATE)
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
    (alone,) = contrasts.of_ratios(frame.assign(machine=None), RATE)
    expected = scipy_stats.ttest_ind(logs["Q4_K_M"], logs["Q2_K"], equal_var=False)
    assert not alone.paired
    assert alone.p == pytest.approx(expected.pvalue)
    assert math.log(alone.ratio.high) == pytest.approx(expected.confidence_interval(0.95).high)


def test_rounds_on_several_machines_are_not_paired():
    frame = frame_of(dict.fromkeys(QUANTS, 0.2))
    frame.loc[(frame["quant"] == "Q2_K") & (frame["round"] > 3), "machine"] = "b"
    assert not any(c.paired for c in contrasts.of_ratios(frame, RATE))
    frame.loc[frame["round"] > 3, "machine"] = "b"
    assert all(c.paired for c in contrasts.of_ratios(frame, RATE))


def test_the_spread_of_all_is_used_where_they_are_alike_and_not_where_one_is_wild():
    assert all(c.pooled for c in contrasts.of_ratios(frame_of(dict.fromkeys(QUANTS, 0.2)), RATE))
    frame = frame_of(dict.fromkeys(QUANTS, 0.2), noise=0.001)
    wild = (frame["quant"] == "Q2_K") & (frame["placement"] == "cpu-moe")
    frame.loc[wild, RATE] *= np.exp(np.random.default_rng(5).normal(0, 0.2, wild.sum()))
    assert not any(c.pooled for c in contrasts.of_ratios(frame, RATE))


def test_holm_by_hand():
    assert contrasts._holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert contrasts._holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert contrasts._holm([]) == []


def test_how_often_it_is_wrong():
    """Of families whose sides lie exactly on the margin at most 5 % are called equal; of such without a difference at
    most 5 % have one that is called different; the 95 % interval covers the truth. Drift of a round is paired away."""
    n, drift, called_equal, called_different, covered = 150, 0.1, 0, 0, 0
    for seed in range(n):
        edge = contrasts.of_ratios(frame_of({"a": 0.2, "b": 0.22}, noise=0.02, drift=drift, seed=seed), RATE)
        called_equal += any(c.outcome == "equal" for c in edge)
        (c,) = edge
        covered += c.ratio.low <= 0.2 / 0.22 <= c.ratio.high
        null = contrasts.of_ratios(frame_of(dict.fromkeys(QUANTS, 0.2), noise=0.1, drift=drift, seed=seed), RATE)
        called_different += any(c.outcome == "different" for c in null)
    assert called_equal / n <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)
    assert called_different / n <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)
    assert covered / n == pytest.approx(0.95, abs=3 * math.sqrt(0.05 * 0.95 / n))
