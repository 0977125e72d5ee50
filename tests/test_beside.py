"""Two runners on the same files, side by side."""

from dataclasses import replace

import pytest
from conftest import REPO

from moelib.answers import beside
from moelib.catalogue.facts import SHIMMY
from moelib.evidence import beside as shown_beside
from moelib.study.study import Study

DEMO = REPO / "docs/example/demo"


@pytest.fixture(scope="module")
def demo():
    return Study.read(DEMO)


def served(study, change=lambda r: r, **of_study):
    """The study as if its parameters were others, and each record changed."""
    parameters = study.parameters.model_copy(update=of_study)
    plan = study.plan.model_copy(update={"study": parameters})
    made = Study(study.path, plan, study.contents)
    made.__dict__["used"] = [change(r) for r in study.used]
    return made


def with_requests(r, change):
    return r.model_copy(update={"observed": replace(r.observed, requests=tuple(map(change, r.observed.requests)))})


def test_the_same_runs_agree_in_all(demo):
    every = list(beside.pairs(demo, demo))
    assert len(every) == 20, "two models, six files, their placements"
    for p in every:
        assert p.same_file
        assert p.same_text == (4, 4)
        assert p.proven == (True, True)
        mine, its = p.whole_s("prose")
        assert mine == its
        assert mine.n == 3
    assert beside.unmeasured(demo) == []
    assert shown_beside.shown(demo) == []


def test_what_differs_is_counted(demo):
    def other_words(r):
        return with_requests(r, lambda q: replace(q, text="x") if q.workload == "prose" and not q.index else q)

    changed = served(demo, other_words)
    assert {p.same_text for p in beside.pairs(changed, demo)} == {(3, 4)}
    elsewhere = served(demo, lambda r: r.model_copy(update={"sheet": r.sheet.model_copy(update={"sha256": "0" * 64})}))
    assert not any(p.same_file for p in beside.pairs(elsewhere, demo))
    broken = [replace(c, passed=False) if c.id == "placement-moves" else c for c in demo.used[0].audit]
    unproven = served(demo, lambda r: r.model_copy(update={"audit": tuple(broken)}))
    assert {p.proven for p in beside.pairs(unproven, demo)} == {(False, True)}


def test_what_cannot_be_measured_is_said_with_its_reason(demo):
    def at_once(r):
        return with_requests(
            r, lambda q: replace(q, token_n=(), token_s=tuple(q.total_s + 1e-5 * i for i in range(len(q.token_s))))
        )

    told = beside.unmeasured(served(demo, at_once, runner=SHIMMY))
    assert told[0] == "TTFT and tokens/s, as shimmy sends an answer's tokens all at once when the last one is made"
    assert told[-1].startswith("and shimmy does not report how long prompt and generation took by its own clock, ")


def test_the_document_has_a_sentence_and_a_table_or_says_why_not(demo):
    _, missing = shown_beside.shown(served(demo, beside="nowhere"))
    assert "Study nowhere, of the other runner, was not measured here" in missing.text
    _, said, table = shown_beside.shown(served(demo, beside="demo", runner=SHIMMY))
    assert "both put the experts where they were asked to in 20 of 20 files and placements" in said.text
    assert "wrote the same text in 80 of 80 requests" in said.text
    assert "`llama-server -m trained-" in said.text
    assert len(table.rows) == 20
    assert {row["placement proven"] for row in table.rows} == {"by both"}
    assert {"shimmy, s", "llama-server, s"} <= set(table.rows[0])
    assert all(any(name.startswith("demo/") for name in sources) for sources in table.row_sources)
