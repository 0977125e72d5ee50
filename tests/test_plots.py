"""Figures: a placement keeps its colour, and a bar is the mean of its runs."""

import dataclasses
import re
from statistics import fmean

import pytest
from conftest import REPO
from factory import record_of, with_spec
from matplotlib.colors import to_hex

from moelib.catalogue.params import PlacementMode
from moelib.figures import axes, layout, plots
from moelib.study import frames, study

PLACEMENTS = {
    "outputs/h100-twins": ["baseline, mmap", "cpu-moe, mmap", "cpu-moe, none"],
    "tests/fixtures/twins": ["baseline", "n-cpu-moe=2", "n-cpu-moe=3", "cpu-moe"],
}
FIGURES = {
    "vram": plots.vram,
    "speed": lambda results: plots.speed(results, "plan-short"),
    "ttft": lambda results: plots.ttft(results, results.parameters.workloads[-1]),
    "trade": lambda results: plots.trade(results, "plan-short"),
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("folder", PLACEMENTS)
def test_the_legend_names_the_placements_in_the_studys_order(folder, name):
    (legend,) = FIGURES[name](study.Study.read(REPO / folder)).legends
    assert [text.get_text() for text in legend.texts] == PLACEMENTS[folder]
    n, handles = len(PLACEMENTS[folder]), legend.legend_handles
    colours = [h.get_color() if name == "trade" else to_hex(h.get_facecolor()).upper() for h in handles]
    assert colours == list(axes.COLOURS[:n])
    forms, expected = (
        ([h.get_marker() for h in handles], axes.MARKERS[:n])
        if name == "trade"
        else ([h.get_hatch() or "" for h in handles], axes.HATCHES[:n])
    )
    assert forms == list(expected)  # that tell them apart in grey as well


def changed(results, **contents):
    return study.Study(results.path, results.plan, dataclasses.replace(results.contents, **contents))


def test_quants_come_by_their_bits_in_figures():
    results = study.Study.read(REPO / "tests/fixtures/twins")
    axis = plots.vram(results).axes[0]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["Q2_K", "Q4_K_M", "Q8_0"]
    assert list(results.parameters.quants) == ["Q4_K_M", "Q2_K", "Q8_0"]
    nameless = changed(results, manifests=())
    assert [t.get_text() for t in plots.vram(nameless).axes[0].get_xticklabels()] == ["Q4_K_M", "Q2_K", "Q8_0"]


def test_a_bar_in_a_placements_colour_is_the_mean_of_its_requests():
    results = study.Study.read(REPO / "outputs/h100-twins")
    axis = plots.ttft(results, results.parameters.workloads[-1]).axes[
        1
    ]  # deepseek-moe-16b, whose placements came in another order
    for colour, label in zip(axes.COLOURS, layout.placements(results), strict=False):
        bars = [p for p in axis.patches if to_hex(p.get_facecolor()).upper() == colour and p.get_height()]
        for quant, bar in zip(("Q2_K", "Q4_K_M", "Q8_0"), sorted(bars, key=lambda p: p.get_x()), strict=True):
            runs = [r for b in results.measured[f"deepseek-moe-16b/{quant}"].rounds for r in b if r.spec.label == label]
            requests = [q for r in runs for q in r.observed.requests if q.index and q.workload == "long-512"]
            assert bar.get_height() == pytest.approx(1000 * fmean(q.ttft_s for q in requests))


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


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_without_data_says_why(name):
    results = study.Study.read(REPO / "tests/fixtures/twins")
    empty = changed(results)
    empty.__dict__["statuses"] = {k: dataclasses.replace(s, rounds=()) for k, s in results.statuses.items()}
    figure = FIGURES[name](empty)
    (axis,) = figure.axes
    assert axis.texts[0].get_text().startswith("no data: no complete round")
    figure.draw_without_rendering()


def test_a_run_without_records_has_figures_that_say_so():
    failed = [record_of(status="failed")]
    for figure in (plots.vram_over_time([]), plots.tokens_over_time([], "x"), plots.vram_over_time(failed)):
        assert figure.axes[0].texts[0].get_text().startswith("no data: ")
    assert [axis.get_title() for axis in plots.tokens_over_time(failed, "x").axes] == ["baseline, mmap"]


def test_more_placements_than_colours_are_all_in_the_legend():
    results = study.Study.read(REPO / "tests/fixtures/twins")
    modes = [PlacementMode(placement="baseline")] + [PlacementMode(placement=f"n-cpu-moe={n}") for n in range(1, 10)]
    parameters = results.parameters.model_copy(update={"arms": tuple(modes)})
    many = changed(results)
    many.plan = results.plan.model_copy(update={"study": parameters})
    block = results.rounds[0]
    runs = [with_spec(block[0], placement=a.placement) for a in modes]
    cell = next(iter(results.statuses))
    many.__dict__["statuses"] = {cell: dataclasses.replace(results.statuses[cell], rounds=(tuple(runs),))}
    for draw in FIGURES.values():
        figure = draw(many)
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
        ("ttft-long-512", True),
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
    runs, records = results.runs, results.used[:2]
    sides = [mode.label for mode in results.parameters.arms]
    memory, rate = (frames.comparisons(runs, c) for c in ("vram_bytes", "tokens_per_s/plan-short"))
    draw = [
        lambda ax: axes.bars(runs, x="quant", y="load_s", hue="placement", hue_order=["baseline", "cpu-moe"], ax=ax),
        lambda ax: axes.arrows(memory, rate, names=sides, ax=ax),
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
