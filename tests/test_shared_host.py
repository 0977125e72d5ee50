"""Runs that shared their host: what takes time is said to be so, and answers, advises and fits nothing; VRAM does."""

from collections import Counter
from dataclasses import replace

import factory
import pytest

from moelib.answers import claims, verdicts
from moelib.figures import curves, layout
from moelib.laws import speed
from moelib.publish import cards
from moelib.report import advice, findings, laws

LAST = "prompt-512"


def of(shared):
    made = factory.swept()
    made.__dict__["statuses"] = {
        name: replace(s, rounds=tuple(tuple(factory.with_facts(r, "host", shared=shared) for r in b) for b in s.rounds))
        for name, s in made.statuses.items()
    }
    return made


@pytest.fixture(scope="module")
def lone():
    return of(False)


@pytest.fixture(scope="module")
def shared():
    return of(True)


def test_questions_about_time_stay_open_and_that_of_vram_does_not(lone, shared):
    for ask in (verdicts.equally_well, verdicts.sweet_spot, verdicts.penalty):
        assert verdicts.SHARED not in ask(lone).because
        assert (ask(shared).verdict, ask(shared).because) == ("open", (verdicts.SHARED,))
    assert verdicts.least_vram(shared) == verdicts.least_vram(lone)


def test_so_do_hypotheses(lone, shared):
    before, after = (claims.hypotheses(s) for s in (lone, shared))
    changed = [a.asked for b, a in zip(before, after, strict=True) if a != b]
    assert changed == [
        "H1: Q2_K decodes fastest with offload",
        "H1: at Q2_K there is the least to move: TTFT is shortest with offload",
    ]
    assert Counter(a.verdict for a in after if a.asked in changed) == {"open": 2}


def test_no_file_is_advised_and_no_law_is_fitted(lone, shared):
    assert advice.of_model(lone, "deepseek-moe-16b") != advice.SHARED
    assert advice.what_to_run(shared) == [advice.SHARED]
    assert advice.of_model(shared, "deepseek-moe-16b") == advice.SHARED
    for fit in (speed.decode, speed.ttft):
        assert fit(lone.runs, LAST)
        assert fit(shared.runs, LAST) == []
    for table in (laws.decode_table, laws.ttft_table):
        assert table(lone, LAST).rows
        assert table(shared, LAST).why_empty == laws.SHARED
    assert laws.vram_table(shared).rows == laws.vram_table(lone).rows


def test_a_figure_says_it_in_its_title(lone, shared):
    titles = [curves.rate_over_vram(s, LAST).get_suptitle().replace("\n", " ") for s in (lone, shared)]
    assert ["machine shared with other runs)" in t.replace(layout.HARD, " ") for t in titles] == [False, True]


def test_a_document_says_it_in_its_first_lines_and_no_card_is_made(lone, shared):
    assert "Runs shared their host" not in findings.headline(lone).text
    assert "\n\n**Runs shared their host** with runs on its other GPUs" in findings.headline(shared).text
    with pytest.raises(cards.CardError, match="runs that shared their host: make cards of a study with `exclusive"):
        cards.build(shared, "acme")
