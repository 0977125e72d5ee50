"""What fits a budget of VRAM, and what is dominated, as tables."""

from __future__ import annotations

import math

import pandas as pd

from moelib.answers import points
from moelib.answers.points import Point
from moelib.base.stats import NONE, estimate, number
from moelib.explore.view import GB, View

SIDE = ("quant", "placement", "load mode")


def what_fits(view: View) -> pd.DataFrame:
    """Placements whose VRAM is within the budget, the fastest first; empty where none is.

    TTFT is of warm requests; beside tokens/s that are estimated it is too, and None where no law tells it: the view's
    notes say why.
    """
    fit = [one for one in view.placed if one.point.vram_bytes <= view.vram_bytes]
    rows = []
    for one in sorted(fit, key=lambda one: -one.rate):
        p, here = one.point, one.known.startswith(("measured", "predicted"))
        rows.append(
            {
                "quant": p.quant,
                "placement": str(p.placement),
                "load mode": p.placement.load_mode,
                "tokens/s": _short(one.rate),
                "95 %": _interval(p) if here else NONE,
                "VRAM, GB": _short(p.vram_bytes / GB),
                "RAM, GB": _short(p.ram_bytes / GB),
                "TTFT, ms": None if one.ttft_s is None else _short(one.ttft_s * 1000),
                "known by": one.known if view.context is None else f"{one.known}; VRAM estimated",
            }
        )
    heads = [*SIDE, "tokens/s", "95 %", "VRAM, GB", "RAM, GB", "TTFT, ms", "known by"]
    return pd.DataFrame(rows, columns=heads)


def in_words(view: View) -> str:
    """The table's first row, or why it has none, in a sentence."""
    fit, budget = what_fits(view), f"{number(view.vram_bytes / GB)} GB of VRAM"
    if len(fit):
        best = fit.iloc[0]
        return (
            f"Of {view.model} the fastest in {budget}: {best['quant']} {best['placement']}, {best['load mode']}, with "
            f"{number(best['tokens/s'])} tokens/s ({best['known by']}), of workload {view.workload}."
        )
    if not view.points:
        return f"Nothing tells what {view.model} takes with these choices."
    least = min(view.points, key=lambda p: p.vram_bytes)
    if least.vram_bytes > view.vram_bytes:
        return (
            f"Nothing of {view.model} fits {budget}; {least.quant} {least.placement}, {least.placement.load_mode}, "
            f"takes least, {number(least.vram_bytes / GB)} GB."
        )
    return f"What fits {budget} of {view.model} has no tokens/s for this RAM, as its law is not told."


def pareto(view: View) -> pd.DataFrame:
    """Every measured placement with what dominates it: less VRAM, more tokens/s or less TTFT beyond doubt, and nothing
    worse. `dominated by` is None of those on the front."""
    rows = []
    for p, by in points.front(view.points).items():
        rows.append(
            {
                "quant": p.quant,
                "placement": str(p.placement),
                "load mode": p.placement.load_mode,
                "VRAM, GB": _short(p.vram_bytes / GB),
                "tokens/s": _short(p.rate.value),
                "TTFT, ms": _short(p.ttft.value * 1000) if p.ttft else None,
                "dominated by": None if by is None else name(by),
            }
        )
    return pd.DataFrame(rows, columns=[*SIDE, "VRAM, GB", "tokens/s", "TTFT, ms", "dominated by"])


def name(p: Point) -> str:
    return f"{p.quant} {p.placement}, {p.placement.load_mode}"


def _interval(p: Point) -> str:
    if p.rate.low is None or p.rate.high is None:
        return NONE
    return estimate(p.rate).partition(" ")[2]


def _short(x: float) -> float:
    """With three significant figures, as a number, so that a table sorts it."""
    return round(float(x), 2 - math.floor(math.log10(abs(x)))) if x else 0.0
