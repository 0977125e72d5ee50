"""Figures: names and colours of placements, sessions left alone, files, and axes of one's own."""

import dataclasses
import re

import pandas as pd
import pytest
from conftest import REPO
from factory import record_of, with_spec

from moelib.catalogue.params import PlacementMode
from moelib.figures import axes, curves, layout, plots
from moelib.study import frames, study

FIGURES = {
    "memory": curves.memory_stack,
    "trade": lambda results: curves.rate_over_vram(results, "plan-short"),
    "ttft": curves.ttft_over_prompt,
}


def test_the_legend_names_the_ends_in_the_studys_order():
    (legend,) = curves.ttft_over_prompt(study.Study.read(REPO / "outputs/h200")).legends
    assert [t.get_text() for t in legend.texts] == ["baseline, mmap", "cpu-moe, mmap", "cpu-moe, none"]
    assert [h.get_color() for h in legend.legend_handles] == list(axes.COLOURS[:3])
    assert [h.get_marker() for h in legend.legend_handles] == list(axes.MARKERS[:3])  # apart in grey as well


def test_without_the_ends_the_points_between_are_lines_of_ttft():
    results = study.Study.read(REPO / "tests/fixtures/twins")
    planned = changed(results)
    planned.__dict__["runs"] = results.runs[results.runs["placement"] != "cpu-moe"]
    (legend,) = curves.ttft_over_prompt(planned).legends
    assert [t.get_text() for t in legend.texts] == ["baseline", "n-cpu-moe=2", "n-cpu-moe=3"]


def changed(results, **contents):
    return study.Study(results.path, results.plan, dataclasses.replace(results.contents, **contents))


def test_quants_come_by_their_bits_in_figures():
    results = study.Study.read(REPO / "tests/fixtures/twins")
    assert list(results.parameters.quants) == ["Q4_K_M", "Q2_K", "Q8_0"]
    assert layout.by_bits(results) == ["Q2_K", "Q4_K_M", "Q8_0"]
    assert layout.by_bits(changed(results, manifests=())) == ["Q4_K_M", "Q2_K", "Q8_0"]


def session():
    """What a figure could change for the rest of a session."""
    import matplotlib as mpl

    return dict(mpl.rcParams), dict(mpl.colors.colorConverter.colors)


def test_figures_leave_the_sessions_settings_alone_and_are_not_changed_by_them(monkeypatch):
    import matplotlib as mpl

    shown = []
    monkeypatch.setattr(plots, "display", lambda data, **_: shown.append(data["image/png"]))
    results = study.Study.read(REPO / "tests/fixtures/twins")
    records = results.used

    def draw():
        for name, figure in FIGURES.items():
            plots.show(figure(results), name, name, records)
        plots.show(plots.tokens_over_time(records[:2], "plan-short"), "tokens", "tokens", records)

    before = session()
    draw()
    assert session() == before
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "lines.linewidth": 9, "savefig.dpi": 20}):
        own = session()
        draw()
        assert session() == own
    half = len(shown) // 2
    assert shown[:half] == shown[half:]


def test_a_run_without_records_has_figures_that_say_so():
    failed = [record_of(status="failed")]
    for figure in (plots.vram_over_time([]), plots.tokens_over_time([], "x"), plots.vram_over_time(failed)):
        assert figure.axes[0].texts[0].get_text().startswith("no data: ")
    assert [axis.get_title() for axis in plots.tokens_over_time(failed, "x").axes] == ["baseline, mmap"]


def test_more_placements_than_colours_are_all_in_the_legend():
    results = study.Study.read(REPO / "tests/fixtures/twins")
    modes = [PlacementMode(placement="baseline")]
    modes += [PlacementMode(placement=f"cpu-moe,threads={n}") for n in range(1, 10)]
    parameters = results.parameters.model_copy(update={"arms": tuple(modes)})
    many = changed(results)
    many.plan = results.plan.model_copy(update={"study": parameters})
    block = results.rounds[0]
    runs = [with_spec(block[0], placement=a.placement) for a in modes]
    cell = next(iter(results.statuses))
    many.__dict__["statuses"] = {cell: dataclasses.replace(results.statuses[cell], rounds=(tuple(runs),))}
    alike = [frames.runs(runs).assign(model=m, round=1) for m in results.parameters.models]
    many.__dict__["runs"] = pd.concat(alike)  # of several panels, which have a legend
    figure = curves.ttft_over_prompt(many)
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.texts] == [a.placement for a in modes]
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    width, height = figure.get_size_inches() * figure.dpi
    assert 0 <= box.x0 < box.x1 <= width  # all of it is on the page
    assert 0 <= box.y0 < box.y1 < height / 2


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("speed-plan-short", True),
        ("ttft-over-prompt", True),
        ("../../x", False),
        ("a/b", False),
        ("", False),
        ("x" * 200, False),
    ],
)
def test_a_figures_file_stays_in_its_folder(name, safe):
    file = plots._file_name(name)
    assert (file == name) is safe
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", file)
    assert ".." not in file
    assert plots._file_name(f"{name}?") != plots._file_name(f"{name}!")


def test_each_draws_on_the_axes_it_is_given_and_on_no_other():
    from matplotlib.figure import Figure

    results = study.Study.read(REPO / "tests/fixtures/twins")
    records = results.used[:2]
    draw = [
        lambda ax: axes.tokens_over_time(records, "plan-short", colour="black", ax=ax),
        lambda ax: axes.vram_over_time(
            records, names=["baseline", "cpu-moe", *(r.spec.placed.label for r in records)], ax=ax
        ),
    ]
    figure = Figure()
    given, other = figure.subplots(1, 2)
    empty = len(other.get_children())
    for one in draw:
        before = len(given.get_children())
        assert one(given) is given
        assert len(given.get_children()) > before
    assert len(other.get_children()) == empty
    assert not figure.legends
