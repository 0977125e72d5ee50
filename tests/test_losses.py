"""What a study says of quality: its answers, tables, sentences and figure, of comparisons that are known."""

import math
from dataclasses import replace

import compared
import pytest
from conftest import REPO

from moelib.answers import claims, points, quality, verdicts
from moelib.base import stats
from moelib.evidence.table import Table
from moelib.figures import losses
from moelib.publish import cards
from moelib.quality import checks
from moelib.report import quality as tables
from moelib.report import results
from moelib.study.study import Study

MODELS = ("phi-3.5-moe", "deepseek-moe-16b")
USUAL = {"Q8_0": (1e-3, 1.001), "Q4_K_M": (1e-2, 1.01), "Q2_K": (0.1, 1.08)}


@pytest.fixture(scope="module")
def full():
    return Study.read(REPO / "outputs/h100-twins")


def world(full, usual=USUAL, **how):
    return compared.with_quality(full, {(m, q): usual[q] for m in MODELS for q in usual}, **how)


def test_a_loss_is_that_of_its_tokens(full):
    found = quality.by_file(world(full))
    assert set(found) == {(m, q) for m in MODELS for q in USUAL}
    one = found["phi-3.5-moe", "Q2_K"]
    tokens = compared.scores(*USUAL["Q2_K"])
    assert one.divergence.value == pytest.approx(tokens.kld.mean())
    means = stats.mean([float(x) for x in tokens.kld.mean(1)])
    assert (one.divergence.low, one.divergence.high) == (means.low, means.high)
    assert one.perplexity_ratio.value == pytest.approx(1.08)
    assert [found["phi-3.5-moe", q].is_good for q in ("Q8_0", "Q4_K_M", "Q2_K")] == [True, True, False]


def test_the_answers_say_what_quality_is_worth(full):
    study = world(full)
    told = {a.asked: a for a in (ask(study) for ask in verdicts.ANSWERS)}
    spot = told["Is there a sweet spot for local use?"]
    assert (spot.verdict, spot.headline) == ("yes", "Q4_K_M is the smallest file of good quality.")
    assert any("1.0800 at Q2" in s.replace("\\", "") for s in spot.because)
    claimed = {a.asked: a.verdict for a in claims.hypotheses(study)}
    assert claimed["H2: Q4_K_M is a good balance of quality and VRAM"] == "supported"
    assert claimed["H3: Q8_0 has the highest quality"] == "supported"


def test_worlds_in_which_a_hypothesis_is_wrong_refute_it(full):
    bad = {a.asked: a.verdict for a in claims.hypotheses(world(full, USUAL | {"Q4_K_M": (0.05, 1.06)}))}
    assert bad["H2: Q4_K_M is a good balance of quality and VRAM"] == "refuted"
    fine = {a.asked: a.verdict for a in claims.hypotheses(world(full, USUAL | {"Q2_K": (0.005, 1.002)}))}
    assert fine["H2: Q4_K_M is a good balance of quality and VRAM"] == "refuted"  # a smaller one is as good
    odd = {a.asked: a.verdict for a in claims.hypotheses(world(full, USUAL | {"Q8_0": (0.2, 1.1)}))}
    assert odd["H3: Q8_0 has the highest quality"] == "refuted"
    alike = {a.asked: a.verdict for a in claims.hypotheses(world(full, USUAL | {"Q8_0": USUAL["Q4_K_M"]}))}
    assert alike["H3: Q8_0 has the highest quality"] == "undecided"


def test_without_comparisons_quality_stays_open(full):
    claimed = {a.asked: a.verdict for a in claims.hypotheses(full)}
    assert claimed["H2: Q4_K_M is a good balance of quality and VRAM"] == "open"
    assert claimed["H3: Q8_0 has the highest quality"] == "open"
    assert tables.lost(full) == tables.same(full) == tables.sameness(full) == []
    assert "were not measured" in results.limits(full).text


def test_what_is_slower_but_better_is_not_dominated(full):
    def dominated(study):
        found = [p for p in points.measured(study, "long-512") if p.model == "phi-3.5-moe"]
        return {(p.quant, p.placement.label) for p, by in points.front(found).items() if by}

    assert ("Q8_0", "cpu-moe, mmap") in dominated(full)
    assert ("Q8_0", "cpu-moe, mmap") not in dominated(world(full))


def test_the_table_has_every_quant_by_bits_with_its_sources(full):
    study = world(full, corpora_named=("prose", "scripture"))
    first, second = tables.tables(study, "phi-3.5-moe")
    assert [r["quant"].replace("\\", "") for r in first.rows] == ["Q2_K", "Q4_K_M", "Q8_0"]
    shown = [t.name for t in tables.lost(study) if isinstance(t, Table)]
    assert shown == [f"quality-{corpus}-{m}" for corpus in ("prose", "scripture") for m in MODELS]
    assert first.rows[0]["perplexity ratio"] == "1.0800"  # nothing of it varies
    mean = quality.by_file(study)["phi-3.5-moe", "Q2_K"].divergence
    assert first.rows[0]["mean KLD"] == stats.estimate(mean)
    assert math.isclose(float(first.rows[0]["99 % KLD"]), 0.46, rel_tol=0.2)  # of an exponential of mean 0.1
    assert first.row_sources != second.row_sources
    assert "12 chunks of 50 scored tokens" in first.note
    assert "as one observation" in first.note


def test_offload_is_judged_by_rounding_in_a_sentence_and_a_table(full):
    study = world(full)
    (said,) = tables.same(study)
    assert "changed nothing but rounding** in 6 files and placements" in said.text
    _, table = tables.sameness(study)
    assert {row["verdict"] for row in table.rows} == {"rounding"}
    assert all(len(of) == 2 for of in table.row_sources)
    wrong = compared.compared(
        study, ("Q2_K", "baseline"), ("phi-3.5-moe", "Q2_K", "n-cpu-moe=9"), compared.scores(0.5, 1.0)
    )
    off = Study(study.path, study.plan, replace(study.contents, comparisons=(*study.comparisons, wrong)))
    (said,) = tables.same(off)
    assert "Offload changed what 1 of 7 files and placements say" in said.text
    assert any("n-cpu-moe=9" in p and "differs" in p for p in off.problems)


@pytest.mark.parametrize(("floor", "verdict"), [(1e-3, "rounding"), (1e-6, "differs"), (None, "rounding")])
def test_a_placement_is_judged_by_what_other_batches_change_of_its_file(full, floor, verdict):
    def at(placement, nmse):
        other, s = ("phi-3.5-moe", "Q8_0", placement), compared.scores(10 * nmse, 1.0)
        return compared.compared(full, ("Q8_0", "baseline"), other, s)

    floors = [] if floor is None else [at("baseline,ubatch=8", floor)]
    (judged,) = checks.sameness([at("cpu-moe", 1e-4), *floors])
    assert judged.nmse == pytest.approx(1e-4)
    assert judged.limit == {1e-3: pytest.approx(3e-3), 1e-6: checks.LEAST_LIMIT, None: checks.OWN_TOLERANCE}[floor]
    assert judged.verdict == verdict


def test_the_figure_shows_every_file_with_its_loss(full):
    figure = losses.loss_over_vram(world(full))
    figure.draw_without_rendering()
    assert [ax.get_title() for ax in figure.axes] == list(MODELS)
    for ax in figure.axes:
        assert {t.get_text() for t in ax.texts} == set(USUAL)
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    none = losses.loss_over_vram(full)
    assert "no data" in none.axes[0].texts[0].get_text()


def test_a_card_of_real_weights_has_quality_and_a_twins_has_none(full):
    pages = cards.build(world(full), "alice")
    root = next(text for name, text in pages.items() if name == "phi-3.5-moe-cpu-offload-gguf/README.md")
    assert "## Quality" in root
    assert "1.0800" in root
    assert not any("## Quality" in text for text in cards.build(full, "alice").values())


def test_the_floor_is_the_unquantised_file_against_itself_where_it_differs_most(full):
    study = world(full)
    assert quality.floors(study, "prose") == []
    made = [
        compared.compared(study, ("F16", "baseline"), ("phi-3.5-moe", "Q8_0", placement), compared.scores(off, 1.0))
        for placement, off in (("baseline,ubatch=64", 1e-6), ("baseline,ubatch=8", 2e-6))
    ]
    sides = [replace(c.spec.other, quant="F16") for c in made]
    both = [c.model_copy(update={"spec": replace(c.spec, other=other)}) for c, other in zip(made, sides, strict=True)]
    floored = Study(study.path, study.plan, replace(study.contents, comparisons=(*study.comparisons, *both)))
    (one,) = quality.floors(floored, "prose")
    assert one.comparison.spec.other.placement == "baseline,ubatch=8"
    assert quality.floors(floored, "scripture") == []
    (table,) = tables.tables(floored, "phi-3.5-moe")
    rows = table.rows
    assert [r["quant"].replace("\\", "") for r in rows] == ["Q2_K", "Q4_K_M", "Q8_0", tables.FLOOR]
    assert rows[-1]["mean KLD"] == stats.estimate(one.divergence)
    assert "8 tokens at a time instead of 512, over 12 chunks" in table.note
    assert len(quality.losses(floored)) == len(quality.losses(study)), "a floor is no loss of a quant"
