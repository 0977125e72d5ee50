"""Two studies against each other, or the sentence why not."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from moelib.base import stats
from moelib.explore.view import GB, View, load
from moelib.study.frames import FrameError
from moelib.study.study import Study

SAME = ("weights", "scale", "context", "device")
"""What two studies must have in common, and of times whether a host was shared (`exclusive`); what else of their setup
differs, the ratios are of all of it together."""
SIDE = ["quant", "placement", "load_mode"]
UNWATCHED = "not known how much monitoring slowed the CPU in {}"


def columns(view: View) -> dict[str, str]:
    """What can be compared: label -> column."""
    of = {"tokens/s": f"tokens_per_s/{view.workload}", "TTFT, s": f"ttft_warm_s/{view.workload}"}
    return {"VRAM, GB": "vram_bytes", **of, "load time, s": "load_s"}


def compare(view: View, other: Study | str, column: str = "vram_bytes") -> pd.DataFrame:
    """`column` of the model in another study against that of the view's, placement by placement.

    Returns a row for each quant, placement and load mode of both: geometric means, `ratio` (other / this) with its 95 %
    interval (Welch's t on logarithms; what another day or machine changes is not in it), runs of each, and `why` there
    is no ratio. Raises FrameError where the studies cannot be compared, with what differs.
    """
    second = load(other) if isinstance(other, str) else other
    ours, theirs = view.runs, second.runs
    theirs = theirs[(theirs["model"] == view.model) & theirs["quant"].isin(view.quants)]
    names = view.study.name, second.name
    _comparable(names, ours, theirs, column, view.model)
    sides = [dict(iter(runs.groupby(SIDE, sort=False))) for runs in (ours, theirs)]
    rows = []
    for side in (s for s in sides[0] if s in sides[1]):
        a, b = (of[side] for of in sides)
        rows.append(dict(zip(SIDE, side, strict=True)) | _ratio(names, a, b, column))
    if not rows:
        raise FrameError(f"{names[0]} and {names[1]} have no placement of {view.model} in common")
    return pd.DataFrame(rows)


def short(compared: pd.DataFrame, column: str) -> pd.DataFrame:
    """What `compare` gives, for people: bytes in GB, and four significant figures."""
    means = compared.columns[len(SIDE) : len(SIDE) + 2]
    shown = compared.assign(**{name: compared[name] / (GB if column.endswith("_bytes") else 1) for name in means})
    return shown.map(lambda x: float(f"{x:.4g}") if isinstance(x, float) else x)


def differ(view: View, other: Study | str) -> str:
    """What else differs between the studies, in a sentence; empty where nothing does."""
    second = load(other) if isinstance(other, str) else other
    theirs = second.runs[second.runs["model"] == view.model]
    told = []
    for name in ("gpu", "engine", "machine"):
        a, b = (sorted(map(str, runs[name].unique())) for runs in (view.runs, theirs))
        if a != b:
            told.append(f"{name} ({', '.join(a)}; {', '.join(b)})")
    return f"The ratios are of all that differs: {', '.join(told)}." if told else ""


def _comparable(names: tuple[str, str], ours: pd.DataFrame, theirs: pd.DataFrame, column: str, model: str) -> None:
    both = " and ".join(names)
    if names[0] == names[1]:
        raise FrameError(f"{names[0]} is compared with itself; choose another study")
    if theirs.empty:
        raise FrameError(f"{names[1]} has no runs of {model} at these quants; choose what both studies have")
    for name in SAME if column == "vram_bytes" else (*SAME, "host_shared"):
        a, b = (sorted(map(str, runs[name].unique())) for runs in (ours, theirs))
        if a != b:
            raise FrameError(
                f"{both} cannot be compared, as they differ in {name}: {', '.join(a)} and {', '.join(b)}; "
                "choose studies that share it"
            )
    for study, runs in zip(names, (ours, theirs), strict=True):
        if column not in runs.columns or runs[column].isna().all():
            raise FrameError(f"{study} has no {column}; choose what both studies measured")


def _ratio(names: tuple[str, str], a: pd.DataFrame, b: pd.DataFrame, column: str) -> dict[str, object]:
    x, y = (runs[column].dropna() for runs in (a, b))
    row: dict[str, object] = {
        n: math.exp(np.log(v).mean()) if len(v) else None for n, v in zip(names, (x, y), strict=True)
    }
    row |= {"ratio": None, "low": None, "high": None, "n": f"{len(x)}, {len(y)}", "why": None}
    if not (len(x) and len(y)):
        return row | {"why": "not measured in both"}
    unwatched = [n for n, runs in zip(names, (a, b), strict=True) if runs["monitor_cpu_share"].isna().any()]
    if unwatched and column != "vram_bytes" and (a["moved_layers"] > 0).any():
        return row | {"why": UNWATCHED.format(" and ".join(unwatched))}
    e = stats.apart(x, y)
    return row | {"ratio": e.value, "low": e.low, "high": e.high}
