"""The table as llama.cpp publishes it: the tool's own numbers from its log, and the same from the tokens."""

import sys

import numpy as np
import pytest
import scoreboard
from conftest import REPO

from moelib.answers import quality
from moelib.quality import checks, comparison
from moelib.study.study import Study

DEMO = REPO / "docs/example/demo"


@pytest.fixture(scope="module")
def demo():
    return Study.read(DEMO)


def test_both_computations_of_the_committed_demo_agree(demo):
    every = list(scoreboard.rows(DEMO, demo))
    assert len(every) == 6
    assert [w for _, _, wrong in every for w in wrong] == []
    assert {row["quantization"] for _, row, _ in every} == {"Q4_K_M", "Q2_K", "Q8_0"}
    assert all("±" in row[c] for _, row, _ in every for c in scoreboard.PRINTED)


def test_a_number_that_the_log_has_otherwise_is_named(demo, monkeypatch):
    known = scoreboard.printed
    monkeypatch.setattr(scoreboard, "printed", lambda *a: known(*a) | {"KLD": (9.9, 0.1)})
    wrong = [w for _, _, found in scoreboard.rows(DEMO, demo) for w in found]
    assert len([w for w in wrong if "9.9 by the tool" in w]) == 6
    monkeypatch.setattr(scoreboard, "printed", lambda *a: {k: v for k, v in known(*a).items() if k != "PPL"})
    wrong = [w for _, _, found in scoreboard.rows(DEMO, demo) for w in found]
    assert wrong[0].endswith("no PPL in the log")


def test_the_estimators_are_those_of_independent_tokens(demo):
    loss = quality.losses(demo)[0]
    s = comparison.tokens(DEMO, loss.comparison)
    again, n = scoreboard.again(s), s.kld.size
    assert again["KLD"][1] == pytest.approx(s.kld.ravel().std(ddof=1) / np.sqrt(n), rel=1e-6)
    chance = np.random.default_rng(1)
    q, p = s.nll.ravel(), s.base_nll.ravel()
    drawn = [np.exp(q[i].mean()) - np.exp(p[i].mean()) for i in (chance.integers(0, n, n) for _ in range(2000))]
    assert again["ΔPPL"][1] == pytest.approx(np.std(drawn), rel=0.15)
    square = 1e4 * s.p_diff.ravel() ** 2
    drawn = [np.sqrt(square[i].mean()) for i in (chance.integers(0, n, n) for _ in range(2000))]
    assert again["RMS Δp, %"][1] == pytest.approx(np.std(drawn), rel=0.15)


@pytest.mark.parametrize("damaged", [False, True])
def test_the_command_prints_the_tables_and_ends_with_1_where_they_differ(damaged, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scoreboard.py", str(DEMO)])
    if damaged:
        monkeypatch.setattr(scoreboard, "LAST_DIGITS", {"KLD": -1})
        with pytest.raises(SystemExit, match="1"):
            scoreboard.main()
    else:
        scoreboard.main()
    out = capsys.readouterr().out
    assert "72 with the errors" in out
    assert ("Both print the same" in out) is not damaged
    assert ("differ.**" in out) is damaged


def test_the_cpu_says_what_an_h100_says_but_for_rounding():
    found = [c for c in comparison.read_all(REPO / "outputs/h100-trained")[0] if c.done]
    judged = {(x.comparison.spec.model, x.comparison.spec.other.quant): x for x in checks.sameness(found) if x.nmse}
    assert len(judged) == 8, "two models, F16 and three quants: with op-offload=off alone the CPU computes a batch"
    assert {x.comparison.spec.other.placement for x in judged.values()} == {"cpu-moe,op-offload=off"}
    assert {x.verdict for x in judged.values()} == {"rounding"}
    times = {k: x.nmse / max(map(checks.nmse, x.floors)) for k, x in judged.items()}
    assert 1.5 < max(times.values()) < 1.6, "half of what is allowed"


def test_the_committed_table_is_that_of_the_committed_records(monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "argv", ["scoreboard.py", "outputs/trained", "outputs/h100-trained"])
    scoreboard.main()
    assert capsys.readouterr().out == (REPO / "docs/QUALITY.md").read_text(encoding="utf-8")
