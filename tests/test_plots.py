"""Figures: an arm keeps its colour, and a bar stands for its runs."""

from statistics import fmean

import pytest
from conftest import REPO
from matplotlib.colors import to_hex

from moelib import plots, study

ARMS = {
    "outputs/h100-twins": ["baseline/mmap", "cpu-moe/mmap", "cpu-moe/none"],
    "docs/example/demo": ["baseline", "cpu-moe"],
}
FIGURES = {
    "memory": plots.memory,
    "speed": lambda found: plots.speed(found, "plan-short"),
    "first token": lambda found: plots.first_token(found, "long-512"),
    "trade": lambda found: plots.trade(found, "plan-short"),
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("folder", ARMS)
def test_the_legend_names_the_arms_in_the_studys_order(folder, name):
    (legend,) = FIGURES[name](study.results(REPO / folder)).legends
    told = {
        text.get_text(): to_hex(p.get_facecolor()) for text, p in zip(legend.texts, legend.get_patches(), strict=True)
    }
    assert list(told) == ARMS[folder]
    assert list(told.values()) == plots.COLOURS[: len(told)]


def test_a_bar_in_an_arms_colour_is_the_mean_of_its_requests():
    found = study.results(REPO / "outputs/h100-twins")
    axis = plots.first_token(found, "long-512").axes[1]  # deepseek-moe-16b, whose arms came in another order
    for colour, arm in zip(plots.COLOURS, ARMS["outputs/h100-twins"], strict=False):
        bars = [p for p in axis.patches if to_hex(p.get_facecolor()) == colour and p.get_height()]
        for quant, bar in zip(found.study.quants, sorted(bars, key=lambda p: p.get_x()), strict=True):
            runs = [r for b in found.measured[f"deepseek-moe-16b/{quant}"].blocks for r in b if r.spec.arm == arm]
            asked = [q for r in runs for q in r.observed.requests if q.index and q.workload == "long-512"]
            assert bar.get_height() == pytest.approx(1000 * fmean(q.ttft_s for q in asked))
