"""Figures of memory and speed: what is drawn are the study's numbers, and each says of what machine, n and unit."""

import dataclasses
import io
import itertools
import re
from statistics import geometric_mean

import pytest
from conftest import REPO
from factory import GIB, MIB, swept
from matplotlib.container import ErrorbarContainer
from matplotlib.text import Text

from moelib.figures import axes, curves, layout
from moelib.laws import law, speed
from moelib.study import study

FIGURES = {
    "memory": curves.memory_stack,
    "rate": lambda results: curves.rate_over_vram(results, results.parameters.workloads[-1]),
    "ttft": curves.ttft_over_prompt,
    "predicted": lambda results: curves.predicted_against_measured(results, results.parameters.workloads[-1]),
}


@pytest.fixture(scope="module")
def h100():
    return study.Study.read(REPO / "outputs/h100-twins")


@pytest.fixture(scope="module")
def demo():
    return study.Study.read(REPO / "tests/fixtures/twins")


@pytest.fixture(scope="module")
def points():
    """Three quants in five placements, in no order of theirs."""
    return swept(layers=(0, 21, 7, 28, 14))


@pytest.fixture(scope="module")
def prompts():
    return swept(quants=("Q4_K_M",), layers=(0, 28), prompts=(1, 31, 32, 64, 1024))


def texts(ax):
    return [t.get_text() for t in ax.texts if t.get_text()]


def lines(ax):
    """The points of each curve with intervals."""
    every = [c.lines[0] for c in ax.containers if isinstance(c, ErrorbarContainer)]
    return [line.get_xydata().tolist() for line in every]


def titled(figure):
    return figure.get_suptitle().replace("\n", " ").replace(layout.HARD, " ")


# what they say of themselves


@pytest.mark.parametrize("name", FIGURES)
def test_a_title_has_the_gpu_the_machines_and_n(h100, demo, name):
    for results, of in (
        (h100, "; NVIDIA H100 80GB HBM3 (2 machines); "),
        (demo, "; no GPU: ggml-rpc-server, 1 threads on"),
    ):
        title = titled(FIGURES[name](results))
        assert of in title
        n = {"h100-twins": ("90 runs", "n = 5 rounds"), "twins": ("60 runs", "n = 3 rounds")}[results.name]
        assert n[0 if name == "predicted" else 1] in title
        assert results.parameters.workloads[-1] in title or name in ("memory", "ttft")


@pytest.mark.parametrize("name", FIGURES)
def test_all_of_a_figure_is_on_its_page_with_units(h100, name):
    figure = FIGURES[name](h100)
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    assert width / figure.dpi == layout.WIDTH
    for part in (*figure.legends, *figure.texts, *(ax.title for ax in figure.axes if ax.get_title())):
        box = part.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= width, part
        assert 0 <= box.y0 < box.y1 <= height, part
    names = " ".join(ax.get_xlabel() + ax.get_ylabel() for ax in figure.axes)
    units = {
        "memory": ["GiB"],
        "rate": ["GiB", "tokens/s"],
        "ttft": ["ms", "tokens"],
        "predicted": ["ms per token", "ms"],
    }
    assert all(unit in names for unit in units[name])


@pytest.mark.parametrize("name", FIGURES)
def test_without_data_it_says_why(demo, name):
    empty = study.Study(demo.path, demo.plan, demo.contents)
    empty.__dict__["statuses"] = {k: dataclasses.replace(s, rounds=()) for k, s in demo.statuses.items()}
    figure = FIGURES[name](empty)
    (ax,) = figure.axes
    assert re.match("no data: .*no(ne in a)? complete round", texts(ax)[0])
    figure.draw_without_rendering()


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_study_gives_the_same_bytes_whatever_the_sessions_settings(prompts, name):
    import matplotlib as mpl

    def drawn():
        out = io.BytesIO()
        FIGURES[name](prompts).savefig(out, format="png", dpi=50, metadata={"Software": None})
        return out.getvalue()

    first = drawn()
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "lines.linewidth": 9}):
        before = dict(mpl.rcParams)
        assert drawn() == first
        assert dict(mpl.rcParams) == before


# memory


def test_a_stack_is_the_vram_of_its_runs_by_part(h100):
    ax = curves.memory_stack(h100).axes[1]
    bars = [c for c in ax.containers if len(c) == 6]
    assert len(bars) == 4
    runs = h100.runs[h100.runs.model == "deepseek-moe-16b"]
    for i, (quant, placement) in enumerate((q, p) for q in ("Q2_K", "Q4_K_M", "Q8_0") for p in ("baseline", "cpu-moe")):
        own = runs[(runs.quant == quant) & (runs.placement == placement)]
        widths = [bar[i].get_width() * GIB for bar in bars]
        assert sum(widths) == pytest.approx(own.vram_bytes.mean())
        assert widths[:3] == pytest.approx(
            [own[f"vram_{part}_bytes"].mean() for part in ("weights", "cache", "compute")]
        )
        assert widths[3] == pytest.approx(own.vram_rest_bytes.mean(), rel=0.001)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["baseline", "cpu-moe"] * 3
    assert texts(ax)[:3] == [" Q2_K", " Q4_K_M", " Q8_0"]
    assert texts(ax)[3:5] == ["7.16", "1.59 (0.523 + 0.219 + 0.153 + 0.698)"]  # GiB
    tops = [bar.get_y() for bar in bars[0]]
    assert tops == sorted(tops)
    low, high = ax.get_ylim()
    assert low > high, "the first is on top"


def test_placements_come_in_order_of_n_and_parts_differ_without_colour(points):
    figure = curves.memory_stack(points)
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()][:5] == [
        "baseline",
        "n-cpu-moe=7",
        "n-cpu-moe=14",
        "n-cpu-moe=21",
        "cpu-moe",
    ]
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.texts] == list(curves.PARTS.values())
    assert len({h.get_hatch() for h in legend.legend_handles}) == 4
    assert [h.get_hatch() or "" for h in legend.legend_handles] == list(axes.HATCHES[:4])


# tokens/s against VRAM


def test_a_quants_curve_goes_through_its_placements_in_one_load_mode(points):
    figure = curves.rate_over_vram(points, "prompt-512")
    (ax,) = figure.axes
    rate = "tokens_per_s/prompt-512"
    runs = points.runs[points.runs.load_mode == "mmap"]
    through = [line for line in lines(ax) if len(line) == 5]
    for quant, line in zip(("Q2_K", "Q4_K_M", "Q8_0"), through, strict=True):
        own = runs[runs.quant == quant].groupby("moved_layers")
        assert [x for x, _ in line] == pytest.approx([v / GIB for v in own.vram_bytes.mean()])
        assert [y for _, y in line] == pytest.approx([geometric_mean(v) for _, v in own[rate]])
    assert {"0", "7", "14", "21", "all", "Q2_K", "Q4_K_M", "Q8_0"} <= set(texts(ax))
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_ylabel() == "tokens/s"
    alone = [line for line in lines(ax) if len(line) == 1]
    assert len(alone) == 3
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.texts] == ["Q2_K", "Q4_K_M", "Q8_0", "load mode none"]
    assert [h.get_marker() for h in legend.legend_handles] == ["o", "s", "^", "D"]


def test_settings_are_beside_the_curve(points):
    changed = study.Study(points.path, points.plan, points.contents)
    runs = points.runs.replace({"placement": {"n-cpu-moe=7": "cpu-moe,ubatch=64"}})
    changed.__dict__["runs"] = runs
    changed.__dict__["statuses"] = points.statuses
    figure = curves.rate_over_vram(changed, "prompt-512")
    assert sorted({len(line) for line in lines(figure.axes[0])}) == [1, 4]
    assert [t.get_text() for t in figure.legends[0].texts][3:] == [
        "cpu-moe,ubatch=64".partition(",")[2],
        "load mode none",
    ]


def test_intervals_are_bars(points):
    (ax,) = curves.rate_over_vram(points, "prompt-512").axes
    bars = [c.lines[2][1].get_segments() for c in ax.containers if len(c.lines[0].get_xydata()) == 5]
    every = [end for segments in bars for segment in segments for end in [segment[1][1] / segment[0][1]]]
    assert len(every) == 15
    assert max(every) > 1.02


def test_cards_are_lines_only_where_the_axis_has_them(points, demo, h100):
    for results, shown in (
        (points, [["8 GB", "12 GB", "16 GB"]]),
        (demo, [[], []]),
        (h100, [["8 GB", "12 GB", "16 GB", "24 GB"], ["8 GB", "12 GB", "16 GB"]]),
    ):
        figure = FIGURES["rate"](results)
        assert [[t for t in texts(ax) if t.endswith(" GB")] for ax in figure.axes] == shown
    at = [line.get_xdata()[0] for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"]
    assert at == [8, 12, 16, 24]


# TTFT against prompt length


def test_a_line_of_ttft_breaks_where_experts_begin_to_be_copied(prompts):
    (ax,) = curves.ttft_over_prompt(prompts).axes
    assert sorted(len(line) for line in lines(ax)) == [2, 2, 3, 3, 5], "the baseline has no step"
    runs = prompts.runs[(prompts.runs.placement == "cpu-moe") & (prompts.runs.load_mode == "none")]
    ends = [line for line in lines(ax) if len(line) == 3]
    (none,) = [
        line for line in ends if line[-1][1] == pytest.approx(1000 * geometric_mean(runs["ttft_warm_s/prompt-1024"]))
    ]
    assert [x for x, _ in none] == [32, 64, 1024]
    assert texts(ax)[0] == curves.STEP == "from 32 tokens on\nexperts are copied\nto the GPU"
    assert sorted(texts(ax)[1:]) == ["baseline, mmap", "cpu-moe, mmap", "cpu-moe, none"], "directly, not in a legend"
    dotted = [list(line.get_xdata()) for line in ax.get_lines() if line.get_linestyle() == ":"]
    assert dotted.count([31.0, 32.0]) == 2
    assert dotted.count([32, 32]) == 1


def test_names_beside_lines_that_end_together_do_not_overlap():
    near = swept(quants=("Q4_K_M",), layers=(0, 28), prompts=(1, 31))
    figure = curves.ttft_over_prompt(near)
    figure.draw_without_rendering()
    names = [t for t in figure.axes[0].texts if t.get_text()]
    boxes = sorted((Text.get_window_extent(t) for t in names), key=lambda box: box.y0)  # without what leads to the line
    assert len(boxes) == 3
    assert all(below.y1 < above.y0 for below, above in itertools.pairwise(boxes))
    assert max(box.x1 for box in boxes) < figure.get_size_inches()[0] * figure.dpi


def test_without_a_gpu_nothing_is_said_of_copying(demo):
    figure = curves.ttft_over_prompt(demo)
    assert not any(texts(ax) for ax in figure.axes)
    assert [ax.get_title() for ax in figure.axes] == [
        f"{m}, {q}" for m in ("phi-3.5-moe", "deepseek-moe-16b") for q in ("Q2_K", "Q4_K_M", "Q8_0")
    ]
    runs = demo.runs
    own = runs[(runs.model == "phi-3.5-moe") & (runs.quant == "Q2_K") & (runs.placement == "cpu-moe")]
    known = [geometric_mean(1000 * own[f"ttft_warm_s/{w}"]) for w in ("plan-short", "mixed-512")]
    (drawn,) = [line for line in lines(figure.axes[0]) if line[0][1] == pytest.approx(known[0])]
    assert drawn[0] == pytest.approx([8, known[0]])
    assert drawn[1] == pytest.approx([512, known[1]])


def test_one_length_is_no_curve():
    figure = curves.ttft_over_prompt(swept(quants=("Q4_K_M",), layers=(0, 28), prompts=(512,), rounds=1))
    assert texts(figure.axes[0]) == [
        "no data: a curve takes prompts of two lengths, and this study has one length (512 tokens)"
    ]


# predicted against measured


def test_what_was_held_out_is_shown_and_said(points):
    rate, ttft, vram = curves.predicted_against_measured(points, "prompt-512").axes
    for ax, n in ((rate, 9), (ttft, 9), (vram, 15)):
        assert ax.get_title().replace("\n", " ") == f"{n} predicted without that placement"
        assert sum(len(line.get_xdata()) for line in ax.get_lines() if line.get_linestyle() == "None") == n
        assert texts(ax) == ["median error 0.0 %\nlargest 0.0 %"]
        assert ax.get_xlim() == ax.get_ylim()
    laws = law.standing(speed.decode(points.runs, "prompt-512"))
    shown = {
        (r.measured * 1000, r.predicted * 1000) for one in laws for r in one.residuals if r.held_out == "placement"
    }
    drawn = {tuple(p) for line in rate.get_lines() if line.get_linestyle() == "None" for p in line.get_xydata()}
    assert sorted(drawn) == [pytest.approx(p) for p in sorted(shown)]


def test_where_no_placement_is_held_out_cells_are_and_where_nothing_is_it_says_so(h100, demo):
    rate, ttft, vram = FIGURES["predicted"](h100).axes
    assert rate.get_title().replace("\n", " ") == "6 predicted without that model and quant on the CPU"
    assert ttft.get_title().replace("\n", " ").startswith("12 predicted without that model")
    assert texts(rate)[0].startswith("median error 5.9 %")
    assert texts(vram)[0].replace("\n", " ") == "VRAM, GiB: nothing was held out that the rest tells"
    assert "without a GPU no experts are copied" in texts(FIGURES["predicted"](demo).axes[1])[0].replace("\n", " ")


def test_a_law_of_a_part_gives_way_to_the_one_that_is_shared(points, h100):
    every = speed.decode(points.runs, "prompt-512")
    mmap, none = law.standing(every)
    assert [one.domain.quants for one in every].count(("Q4_K_M",)) == 2
    assert mmap.domain.quants == none.domain.quants == ("Q2_K", "Q4_K_M", "Q8_0")
    alone = [one for one in law.standing(speed.decode(h100.runs, "long-512")) if one.domain.models == ("phi-3.5-moe",)]
    assert [one.domain.quants for one in alone] == [("Q4_K_M", "Q8_0")] * 2 + [("Q2_K",)] * 2
    assert {one.reason for one in alone} == {None}
    assert law.held_out(mmap.residuals) == "placement"
    assert law.held_out(alone[0].residuals) == "nothing"


def test_each_draws_on_the_axes_it_is_given(points):
    from matplotlib.figure import Figure

    from moelib.base.stats import Estimate

    ax = Figure().subplots()
    one = [Estimate(2.0 * MIB, MIB, 3.0 * MIB, 3), Estimate(4.0 * MIB, None, None, 1)]
    assert axes.curve(one, one, ax=ax, units=(MIB, MIB)) is ax
    assert ax.get_lines()[0].get_xydata().tolist() == [[2, 2], [4, 4]]
    assert axes.stacks([[1, 2], [3, 4]], [0, 1], names=["a", "b"], ax=ax, colours=axes.COLOURS) is ax
    assert [p.get_x() + p.get_width() for p in ax.containers[-1]] == [3, 7]
    ax.set(xscale="log", yscale="log", xlim=(10, 1000), ylim=(10, 20))
    assert axes.ticks(ax) is ax
    ax.figure.draw_without_rendering()
    assert [t.get_text() for t in ax.get_xticklabels() if 10 <= t.get_position()[0] <= 1000] == ["10", "100", "1,000"]
    assert axes.diagonal(0.05, ax=ax) is ax
    assert ax.get_xlim() == ax.get_ylim() == (10, 1000)
