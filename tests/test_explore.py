"""The board and its panels on the committed studies: what they show and refuse, and that their lines of code run."""

import math
import os
from dataclasses import replace
from pathlib import Path

import browser
import numpy as np
import pandas as pd
import pytest
from conftest import REPO

import moelib
from moelib.explore import board, draw, fits, runs, said, two, view
from moelib.explore.view import GB
from moelib.study import plan as plans
from moelib.study.frames import FrameError
from moelib.study.plan import StudyError
from moelib.study.study import Study, UnknownName

H100 = REPO / "outputs/h100-twins"
BEST = {"Q2_K": 28.4, "Q4_K_M": 20.0, "Q8_0": 12.7}
"""tokens/s of Phi's best placement with experts on the CPU, by the committed document."""


@pytest.fixture(scope="module", autouse=True)
def _here():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELIB_HOME", str(REPO))
        patch.delenv("MOELIB_OUTPUTS", raising=False)
        yield


@pytest.fixture(scope="module")
def h100():
    return Study.read(H100)


@pytest.fixture(scope="module")
def h200():
    return Study.read(REPO / "outputs/h200-twins")


@pytest.fixture(scope="module")
def trained():
    """The committed demo, as the lines of code read it."""
    return view.load("demo")


@pytest.fixture(scope="module")
def demo():
    return Study.read(REPO / "tests/fixtures/twins")


def test_a_view_is_of_what_the_study_has(h100):
    seen = view.at(h100)
    assert (seen.model, seen.quants) == ("phi-3.5-moe", ("Q4_K_M", "Q2_K", "Q8_0"))
    assert seen.vram_bytes == h100.runs["vram_needed_bytes"].max()
    assert view.at(h100, "deepseek-moe-16b", "Q8_0", 12).quants == ("Q8_0",)
    with pytest.raises(UnknownName, match="did you mean 'Q4_K_M'"):
        view.at(h100, quant="Q4_KM")
    with pytest.raises(UnknownName, match="there are phi-3.5-moe, deepseek-moe-16b"):
        view.at(h100, "mixtral")


def test_what_fits_has_measured_rows_within_the_budget_the_fastest_first(h100):
    seen = view.at(h100, vram_gb=12)
    fit = fits.what_fits(seen)
    assert fit.groupby("quant")["tokens/s"].max().to_dict() == BEST
    assert (fit["VRAM, GB"] <= 12).all()
    assert fit["tokens/s"].is_monotonic_decreasing
    assert set(fit["known by"]) == {"measured, n = 5"}
    assert fits.in_words(seen).startswith("Of phi-3.5-moe the fastest in 12.0 GB of VRAM: Q2_K cpu-moe")
    small = view.at(h100, vram_gb=1)
    assert fits.what_fits(small).empty
    said = "Nothing of phi-3.5-moe fits 1.00 GB of VRAM; Q2_K cpu-moe, mmap, takes least, 1.80 GB."
    assert fits.in_words(small) == said


def test_slower_ram_makes_estimates_that_say_so_and_leaves_what_is_on_the_gpu(h100):
    here, there = (view.at(h100, "deepseek-moe-16b", vram_gb=20, ram_gb_per_s=ram) for ram in (None, 50))
    before, after = (fits.what_fits(seen).set_index(["quant", "placement", "load mode"]) for seen in (here, there))
    on_gpu = after.index.get_level_values("placement") == "baseline"
    assert (after["tokens/s"][on_gpu] == before["tokens/s"][after.index[on_gpu]]).all()
    assert (after["tokens/s"][~on_gpu] < 0.7 * before["tokens/s"][after.index[~on_gpu]]).all()
    assert set(after["known by"][~on_gpu]) == {"estimated, RAM of 50 GB/s"}
    copied = after.index.get_level_values("load mode") == "none"
    assert after["TTFT, ms"][~on_gpu & ~copied].isna().all()
    assert after["TTFT, ms"][~on_gpu & copied].notna().all()
    assert (after["TTFT, ms"][on_gpu] == before["TTFT, ms"][after.index[on_gpu]]).all()
    assert here.notes == []
    rates, prompts = ([n for n in there.notes if n.startswith(what)] for what in ("tokens/s", "TTFT"))
    assert len(rates) == len(prompts) == 6
    assert all("estimated for RAM of 50 GB/s from a law fitted on NVIDIA H100" in note for note in rates)
    assert sum(note.endswith(f"mmap: not told: {view.NOT_COPIED}.") for note in prompts) == 3
    assert sum("none: estimated for a bus" in note for note in prompts) == 3


def test_other_ram_leaves_the_time_of_a_prompt_to_the_bus_unless_it_is_slower(h100, demo):
    """By hand: of the file's bytes over the bus, 1.08 are counted for each."""
    fast = view.at(h100, "deepseek-moe-16b", "Q8_0", ram_gb_per_s=200)
    law = fast.prompt_laws["Q8_0", "none"]
    (measured,) = [p for p in fast.measured if (p.moved_layers, p.placement.load_mode) == (27, "none")]
    told = fast.estimate_ttft("Q8_0", "none", 27)
    assert math.isclose(told.value, law.at(fast.model, "Q8_0", 27))
    assert math.isclose(told.value, measured.ttft.value, rel_tol=0.05)
    slow = view.at(h100, "deepseek-moe-16b", "Q8_0", ram_gb_per_s=20).estimate_ttft("Q8_0", "none", 27)
    on_gpu = law.at(fast.model, "Q8_0", 0)
    counted = fast.runs_of(measured)[f"bus_received_bytes/{fast.workload}"].mean()
    assert math.isclose(slow.value, on_gpu + counted / 1.08 / (20 * GB))
    assert "estimated for a bus that waits for RAM of 20 GB/s from a law fitted on NVIDIA H100" in slow.label
    loopback = view.at(demo, ram_gb_per_s=20)
    assert any("TTFT" in n and "not told: without a GPU no experts are copied to one" in n for n in loopback.notes)


def test_an_estimate_is_the_law_by_hand(h100):
    """Time on the GPU, and what the CPU adds to it, longer by the ratio of the speeds of RAM."""
    seen = view.at(h100, "deepseek-moe-16b", "Q8_0", ram_gb_per_s=50)
    law = seen.laws["Q8_0", "mmap"]
    on_gpu, on_cpu = law.at(seen.model, "Q8_0", 0), law.at(seen.model, "Q8_0", 27)
    slower = on_gpu + (on_cpu - on_gpu) * law.domain.ram_bytes_per_s / (50 * GB)
    assert math.isclose(seen.estimate("Q8_0", "mmap", 27).value, 1 / slower)


def test_what_no_law_tells_is_left_out_with_its_reason(h100):
    seen = view.at(h100, context=4096)
    assert seen.points == []
    assert fits.what_fits(seen).empty
    assert fits.in_words(seen) == "Nothing tells what phi-3.5-moe takes with these choices."
    assert seen.notes[0] == "VRAM of Q4_K_M at 4,096 tokens: not told: one context does not tell what another takes."
    one_side = view.at(h100, quant="Q2_K", ram_gb_per_s=50)
    one_side.__dict__["laws"] = one_side.__dict__["prompt_laws"] = {}
    assert one_side.notes[1] == f"TTFT of Q2_K, mmap: not told: {view.NO_LAW}."
    assert one_side.notes[0] == f"tokens/s of Q2_K, mmap: not told: {view.NO_LAW}."
    assert {p.point.moved_layers for p in one_side.placed} == {0}


def test_another_context_is_estimated_where_runs_of_two_tell_it(h100):
    """KV cache of 1,024 more tokens as in the runs made longer here; weights and the rest stay."""
    seen = view.at(h100, "deepseek-moe-16b", "Q2_K", context=4096)
    longer = seen.runs.assign(
        context_tokens=2048.0,
        vram_cache_bytes=2 * seen.runs["vram_cache_bytes"],
        vram_bytes=seen.runs["vram_bytes"] + seen.runs["vram_cache_bytes"],
    )
    seen.__dict__["vram_laws"] = {"Q2_K": view.vram(pd.concat([seen.runs, longer], ignore_index=True))[0]}
    cache = seen.runs["vram_cache_bytes"].iloc[0]
    assert math.isclose(seen.parts(seen.measured[0]).cache, 4 * cache)
    assert len(seen.points) == len(seen.measured) == 3
    assert (np.array([p.vram_bytes for p in seen.points]) > [p.vram_bytes for p in seen.measured]).any()
    assert all(known.endswith("VRAM estimated") for known in fits.what_fits(seen)["known by"])
    assert "estimated by a law of runs on NVIDIA H100" in seen.notes[0]


def test_the_dominated_are_named_with_what_dominates_them(h100):
    table = fits.pareto(view.at(h100)).set_index(["quant", "placement", "load mode"])["dominated by"]
    assert table["Q8_0", "cpu-moe", "none"] == "Q2_K cpu-moe, none"
    assert table[[("Q2_K", "cpu-moe", "mmap"), ("Q4_K_M", "baseline", "mmap")]].isna().all()


def test_the_parts_of_vram_are_all_of_it(h100):
    seen = view.at(h100)
    for p in seen.measured:
        parts = seen.parts(p)
        assert math.isclose(parts.total, seen.runs_of(p)["vram_bytes"].mean())
        assert parts.weights == seen.runs_of(p)["vram_weights_bytes"].iloc[0]


def test_two_studies_are_compared_side_by_side(h100, h200):
    seen = view.at(h100)
    memory = two.compare(seen, h200)
    assert len(memory) == 6
    assert ((memory["ratio"] - 1).abs() < 0.002).all()
    rate = two.compare(seen, h200, "tokens_per_s/long-512").set_index(["quant", "placement", "load_mode"])
    means = []
    for runs_of in (h100.runs, h200.runs):
        one = runs_of[(runs_of["model"] == seen.model) & (runs_of["quant"] == "Q8_0")]
        means.append(np.log(one[one["placement"] == "baseline"]["tokens_per_s/long-512"]).mean())
    assert two.short(memory, "vram_bytes")["h100-twins"].iloc[0] == 26.25
    base = rate.loc["Q8_0", "baseline", "mmap"]
    assert math.isclose(base["ratio"], math.exp(means[1] - means[0]))
    assert base["low"] < base["ratio"] < base["high"]
    # the monitoring of the older study slowed experts on the CPU
    offloaded = rate.drop([("Q4_K_M", "baseline", "mmap"), ("Q8_0", "baseline", "mmap")])
    assert offloaded["ratio"].isna().all()
    assert offloaded["why"].str.endswith("monitoring slowed the CPU in h200-twins").all()
    assert "gpu (NVIDIA H100 80GB HBM3; NVIDIA H200)" in two.differ(seen, h200)


def test_times_of_a_shared_host_are_not_compared_with_a_lone_ones(h100, h200):
    seen, beside = view.at(h100), Study(h200.path, h200.plan, h200.contents)
    beside.__dict__["runs"] = h200.runs.assign(host_shared=True)
    assert len(two.compare(seen, beside)) == 6, "VRAM is what it is"
    with pytest.raises(FrameError, match="cannot be compared, as they differ in host_shared: False and True"):
        two.compare(seen, beside, "tokens_per_s/long-512")


def test_two_studies_that_differ_in_more_are_refused_in_a_sentence(h100, h200, demo):
    seen = view.at(h100)
    with pytest.raises(FrameError, match="they differ in scale: full and tiny; choose studies that share it"):
        two.compare(seen, demo)
    with pytest.raises(FrameError, match="compared with itself"):
        two.compare(seen, h100)
    with pytest.raises(FrameError, match="h200-twins has no runs of phi-3.5-moe at these quants"):
        two.compare(view.at(h100, quant="Q2_K"), h200)
    with pytest.raises(FrameError, match="has no nothing"):
        two.compare(seen, h200, "nothing")


def test_a_run_leads_to_its_record_and_every_check(h200):
    seen = view.at(h200, "deepseek-moe-16b")
    table = runs.table(seen)
    assert len(table) == sum(r.spec.model == seen.model for r in h200.records)
    refused = next(r for r in h200.records if r.status == "invalid")
    seen = view.at(h200, refused.spec.model)
    assert runs.table(seen).set_index("run").loc[refused.run_id, "status"] == "invalid"
    facts = runs.facts(seen, refused.run_id).set_index("fact")["value"]
    assert facts["status"] == ", ".join(["invalid", *refused.reasons])
    assert facts["digest"] == refused.digest
    checks = runs.checks(seen, refused.run_id)
    whole = h200.record(refused.run_id)
    assert sorted(checks["check"]) == sorted(c.id for c in whole.audit)
    failed = {c.id for c in whole.audit if c.passed is False}
    assert set(checks["check"][checks["verdict"] == "FAILED"]) == failed
    assert (checks["verdict"].iloc[-1], checks["verdict"].iloc[0]) == ("passed", "FAILED" if failed else "passed")


def test_intervals_are_those_of_the_records_tokens(h100):
    seen = view.at(h100)
    run_id = str(seen.runs["run_id"].iloc[7])
    over = draw.intervals(seen, run_id).axes[0]
    requests = h100.record(run_id).observed.requests
    assert len(over.lines) == len(requests)
    assert np.allclose(over.lines[0].get_ydata(), 1000 * np.diff(requests[0].token_s))


def test_the_curves_have_every_point_the_law_and_the_estimate(h100):
    speed, memory = draw.curves(view.at(h100, quant="Q2_K", vram_gb=12)).axes
    assert sorted({float(x) for box in speed.containers for x in box[0].get_xdata()}) == [0, 32]
    assert [line.get_linestyle() for line in speed.lines].count("--") == 2
    assert any(set(line.get_ydata()) == {12.0} for line in memory.lines)
    more, _ = draw.curves(view.at(h100, quant="Q2_K", vram_gb=12, ram_gb_per_s=50)).axes
    assert len(more.lines) == len(speed.lines) + 2


PANELS = [
    (draw.curves,),
    (draw.front,),
    (draw.memory,),
    (draw.intervals, "phi-3.5-moe_Q2_K_cpu-moe_mmap_b0"),
    (fits.what_fits,),
    (fits.pareto,),
    (two.compare, "h200-twins", "vram_bytes"),
    (runs.facts, "phi-3.5-moe_Q2_K_cpu-moe_mmap_b0"),
    (runs.checks, "phi-3.5-moe_Q2_K_cpu-moe_mmap_b0"),
]


@pytest.mark.parametrize("panel", PANELS, ids=lambda p: p[0].__name__)
def test_the_three_lines_make_what_is_above_them(h100, panel):
    make, *args = panel
    if make is two.compare:
        seen = view.at(h100, vram_gb=12.0)
    else:
        seen = view.at(h100, quant="Q2_K", vram_gb=12.0, ram_gb_per_s=60)
    lines = view.code(seen, make, *args).splitlines()
    assert len(lines) == 3
    names = {}
    exec("\n".join(lines[:2]), names)
    again, made = eval(lines[2], names), make(seen, *args)
    if isinstance(made, pd.DataFrame):
        pd.testing.assert_frame_equal(again, made)
    else:
        assert draw.png(again) == draw.png(made)


@pytest.mark.parametrize("make", [said.lost, said.written])
def test_what_files_say_is_shown_by_three_lines_or_refused_with_the_reason(trained, h100, make):
    seen = view.at(trained, "trained-deepseek")
    names = {}
    lines = view.code(seen, make).splitlines()
    exec("\n".join(lines[:2]), names)
    pd.testing.assert_frame_equal(eval(lines[2], names), make(seen))
    with pytest.raises(said.NothingSaid, match="random"):
        make(view.at(h100))


def test_quality_has_a_row_a_quant_and_text_and_what_was_written_a_column_a_quant(trained):
    lost = said.lost(view.at(trained, "trained-phimoe"))
    assert list(zip(lost["text"], lost["quant"], strict=True)) == [("prose", q) for q in ("Q4_K_M", "Q2_K", "Q8_0")]
    assert (lost["mean KLD, low"] <= lost["mean KLD"]).all()
    assert lost.set_index("quant")["mean KLD"].idxmax() == "Q2_K"
    written = said.written(view.at(trained, "trained-phimoe", "Q2_K"))
    assert list(written.columns) == ["prompt", "Q2_K"]
    assert len(written) == 2
    assert written["Q2_K"].str.len().min() > 50
    bare = view.at(Study(trained.path, trained.plan, replace(trained.contents, comparisons=())))
    with pytest.raises(said.NothingSaid, match="`moelib quality NAME` does"):
        said.lost(bare)


@pytest.fixture
def shown():
    return board.show("demo")


def _panel(shown, name):
    shown.tab.selected_index = list(shown.panels).index(name)
    return shown.tab.children[shown.tab.selected_index].children


def test_the_board_offers_the_committed_studies_and_the_demo(shown):
    assert {"h100-twins", "h200-twins", "demo"} <= set(shown.study.options)
    assert shown.quant.options == ("all", "Q4_K_M", "Q2_K", "Q8_0")
    assert shown.vram.max < 0.1  # GB: the demo is small
    shown.study.value = "h100-twins"
    assert (shown.vram.value, shown.vram.max > 45) == (12.0, True)


def test_a_control_changes_the_figure_and_only_what_is_looked_at_is_made(shown):
    image, lines, said = _panel(shown, "Curves over N")
    assert "predicted from them, not measured" in said.value
    before = image.value
    shown.quant.value = "Q2_K"
    image, lines, _ = _panel(shown, "Curves over N")
    assert image.value != before
    assert "&#x27;Q2_K&#x27;" in lines.value
    assert shown.tab.children[3].children == ()


def test_every_panel_is_shown(shown):
    for name in shown.panels:
        assert _panel(shown, name), name
    refused = _panel(shown, "Two studies")[1]
    assert "cannot be compared" in refused.value or "no runs of" in refused.value


def test_a_clicked_row_shows_its_checks_and_its_intervals(shown):
    _, table, below = _panel(shown, "Runs, checks")
    assert below.children == ()
    table.selected_rows = [4]
    facts, _, checks, _ = below.children
    assert shown.run_id.endswith(table.df["run"].iloc[4])
    assert facts.df.set_index("fact").loc["run", "value"] == shown.run_id
    assert len(checks.df) == len(moelib.load("demo").record(shown.run_id).audit)
    assert shown.run_id in _panel(shown, "Token intervals")[1].value


def test_a_study_without_a_whole_round_is_refused(h100, monkeypatch):
    contents = replace(h100.contents, evidence=replace(h100.evidence, records=[]))
    monkeypatch.setattr(view.studies, "load", lambda name: Study(H100, h100.plan, contents))
    with pytest.raises(StudyError, match="no whole round that is usable; `moelib study status h100-twins`"):
        view.at("h100-twins")


def test_what_is_not_told_is_a_figure_that_says_so(h100):
    untold = view.at(h100, vram_gb=12, context=4096)
    assert [t.get_text() for t in draw.memory(untold).axes[0].texts] == ["not told for this context"]
    for make in (draw.curves, draw.front):
        assert len(draw.png(make(untold))) > 5000


def test_a_study_that_cannot_be_read_is_told_on_the_board(shown, tmp_path, monkeypatch):
    shown.study.options = [*shown.study.options, "lost"]
    shown.study.value = "lost"
    assert "no study &#x27;lost&#x27; was measured here" in shown.tab.children[0].children[0].value
    shown.study.value = "demo"
    assert "the fastest in" in shown.tab.children[0].children[0].value
    monkeypatch.setattr(plans, "folders", lambda: {"demo": tmp_path})
    shown._loaded.clear()
    shown.quant.value = "Q2_K"
    assert "holds no plan" in shown.tab.children[0].children[0].value
    assert "holds no plan" in board.show("demo").tab.children[0].children[0].value


@pytest.mark.slow
def test_the_notebook_in_a_browser(tmp_path):
    """Run All, a control changed, another figure seen, a row clicked, no page error, and nothing asked of a network.

    $MOELIB_SCREENSHOTS: a folder that keeps what was seen."""
    browser.chromium()
    kept = Path(os.environ.get("MOELIB_SCREENSHOTS") or tmp_path)
    with browser.jupyterlab(REPO / "notebooks/explore.ipynb", tmp_path) as url, browser.opened(url) as seen:
        page = seen.page
        for cell in seen.run_all():
            assert cell["count"], cell["source"]
            assert "error" not in cell["kinds"], cell["source"]
        page.screenshot(path=kept / "all.png")
        page.locator(".widget-tab").scroll_into_view_if_needed()
        page.get_by_text("the fastest in 12.0 GB of VRAM: Q2_K baseline").wait_for()
        page.screenshot(path=kept / "fits.png")
        tabs = page.locator(".widget-tab .lm-TabBar-tab")
        tabs.filter(has_text="Curves over N").click()
        before = seen.image()
        page.screenshot(path=kept / "curves.png")
        page.locator(".widget-dropdown select").nth(2).select_option("Q2_K")
        of_one = seen.image(before)
        assert of_one != before
        page.locator(".widget-slider .noUi-handle").nth(2).press("ArrowRight")
        page.get_by_text("estimated for RAM of 20 GB/s from a law").first.wait_for()
        assert seen.image(of_one) not in (before, of_one)
        page.screenshot(path=kept / "estimated.png")
        last = of_one
        for name in ("Pareto front", "Memory", "Token intervals"):
            tabs.filter(has_text=name).click()
            assert (last := seen.image(last)) not in (before, of_one), name
            page.screenshot(path=kept / f"{name.split()[0]}.png")
        tabs.filter(has_text="Quality").click()
        page.get_by_text("what quantising costs is not measured on geometry twins").wait_for()
        tabs.filter(has_text="Two studies").click()
        page.get_by_text("demo has no runs of").wait_for()
        page.locator(".widget-tab .widget-dropdown select").nth(0).select_option("h100")
        page.locator(".widget-dropdown select").nth(2).select_option("Q8_0")
        page.locator(".widget-tab .widget-dropdown select").nth(1).select_option("tokens/s")
        page.get_by_text("The ratios are of all that differs: gpu (NVIDIA H200; NVIDIA H100").first.wait_for()
        page.get_by_text("two.compare(seen, 'h100', 'tokens_per_s/mixed-512')").wait_for()
        page.screenshot(path=kept / "two.png")
        tabs.filter(has_text="Runs, checks").click()
        page.locator(".widget-tab table tbody tr:visible").nth(2).click()
        page.screenshot(path=kept / "row.png")
        page.locator(".widget-tab").get_by_text("requests-complete").scroll_into_view_if_needed()
        page.screenshot(path=kept / "runs.png")
        page.locator(".widget-dropdown select").nth(0).select_option("demo")
        tabs.filter(has_text="Quality").click()
        page.locator(".widget-tab").get_by_text("It was late in the evening").first.wait_for()
        page.locator(".widget-tab").scroll_into_view_if_needed()
        page.screenshot(path=kept / "quality.png")
        assert seen.errors == []
        assert seen.elsewhere == []
