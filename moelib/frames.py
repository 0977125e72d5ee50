"""Records as data frames: one row a run or a request, columns declared once with label, unit, direction and source.

Units are in the names and SI: bytes, s, tokens per s. A value that was not measured is NaN, never 0.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

import pandas as pd

from moelib import analyse, stats
from moelib.params import UserError
from moelib.placement import REFERENCE
from moelib.record import Record

Better = Literal["more", "less"] | None


class FrameError(UserError):
    """The frame cannot answer the question; the message says what is missing or what differs."""


@dataclass(frozen=True)
class Column:
    """What a column of the runs' frame holds. `get` reads it from a record, or, where `by_workload`, is given a
    workload's name first; the column is then called `name/workload`."""

    name: str
    label: str
    unit: str
    better: Better
    """Whether more or less of it is better; None where neither is."""
    source: str
    """Where the value comes from."""
    get: Callable
    by_workload: bool = False


WHERE: dict[str, Callable[[Record], object]] = {
    "study": attrgetter("spec.study"),
    "model": attrgetter("spec.model"),
    "quant": attrgetter("spec.quant"),
    "placement": attrgetter("spec.placement"),
    "load_mode": attrgetter("spec.load_mode"),
    "round": lambda r: r.spec.block + 1,
    "status": attrgetter("status"),
    "run_id": attrgetter("run_id"),
}
"""Columns that say which run it is; `round`: the runs of a round are compared with each other."""

SETUP: dict[str, Callable[[Record], object]] = {
    "weights": attrgetter("spec.weights"),
    "scale": attrgetter("spec.scale"),
    "context": attrgetter("spec.context"),
    "gpu": lambda r: r.device.name,
    "engine": attrgetter("engine.version"),
}
"""Columns that must agree for runs to be compared."""

COLUMNS = (
    Column("vram_bytes", "VRAM", "bytes", "less", "peak of the run's processes: driver, engine, header", analyse.vram),
    Column("vram_engine_bytes", "engine's buffers", "bytes", None, "llama.cpp's load report", analyse.engine_buffers),
    Column("vram_rest_bytes", "VRAM beyond them", "bytes", None, "difference of these two", analyse.residual),
    Column("vram_needed_bytes", "VRAM needed", "bytes", "less", "growth of the whole GPU's use", analyse.vram_needed),
    Column("host_rss_peak_bytes", "host RSS, peak", "bytes", "less", "VmHWM of the server", analyse.host_peak),
    Column("load_s", "load time", "s", "less", "start of the process to the first request taken", analyse.load_time),
    Column("major_faults", "major page faults", "", "less", "/proc of the server", analyse.major_faults),
    Column("gpu_clock_mhz", "GPU clock", "MHz", None, "mean of NVML's readings", analyse.sm_clock),
    Column("board_watt", "board power", "W", "less", "energy of the requests over their time", analyse.power),
    Column("monitor_cpu_share", "monitoring, of one CPU", "", "less", "CPU time of its thread", analyse.monitoring),
    Column("tokens_per_s", "tokens/s", "1/s", "more", "(n - 1) / (last - first arrival)", analyse.tokens_per_s, True),
    Column(
        "ttft_first_s",
        "TTFT, first request",
        "s",
        "less",
        "request sent to first token, of a fresh server",
        lambda workload: analyse.ttft(workload, warm=False),
        True,
    ),
    Column(
        "ttft_warm_s",
        "TTFT, warm requests",
        "s",
        "less",
        "request sent to first token, mean of the later requests",
        lambda workload: analyse.ttft(workload, warm=True),
        True,
    ),
    Column("joule_per_token", "energy per token", "J", "less", "NVML's counter", analyse.energy_per_token, True),
    Column("bus_received_bytes", "over PCIe, per prompt", "bytes", "less", "NVML's counter", analyse.received, True),
    Column("bandwidth_share", "share of the memory bound", "", "more", "tokens/s over bandwidths", analyse.bound, True),
)
"""Measured columns of the runs' frame, in order."""

REQUESTS: dict[str, str] = {
    "workload": "workload",
    "request": "index",
    "prompt_tokens": "prompt_n",
    "generated_tokens": "predicted_n",
    "ttft_s": "ttft_s",
    "tokens_per_s": "tps",
    "total_s": "total_s",
    "energy_joule": "energy_joule",
}
"""Column of the requests' frame -> the request's attribute. Request 0 is the first of a fresh server."""


def columns(workloads: Iterable[str]) -> dict[str, Column]:
    """Name of each measured column of the runs' frame -> what it holds."""
    names = tuple(workloads)
    return {name: c for c in COLUMNS for name in ([f"{c.name}/{w}" for w in names] if c.by_workload else [c.name])}


def runs(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each record that holds an observation: WHERE, the measured columns, SETUP."""
    observed = [r for r in records if r.observed]
    workloads = dict.fromkeys(w for r in observed for w in r.spec.workloads)
    values: dict[str, list] = {name: [get(r) for r in observed] for name, get in WHERE.items()}
    for name, column in columns(workloads).items():
        get = column.get(name.partition("/")[2]) if column.by_workload else column.get
        values[name] = pd.array([get(r) for r in observed], dtype="Float64").to_numpy("float64", na_value=float("nan"))
    values |= {name: [get(r) for r in observed] for name, get in SETUP.items()}
    return pd.DataFrame(values)


def requests(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each request of each record: WHERE, then REQUESTS."""
    pairs = [(r, q) for r in records if r.observed for q in r.observed.requests]
    values = {name: [get(r) for r, _ in pairs] for name, get in WHERE.items()}
    return pd.DataFrame(values | {name: [getattr(q, k) for _, q in pairs] for name, k in REQUESTS.items()})


GROUP = ["study", "model", "quant"]


def compare(frame: pd.DataFrame, column: str, baseline: str = REFERENCE) -> pd.DataFrame:
    """`column` of every placement and load mode against `baseline`, paired within rounds.

    frame: as `runs` gives it. Returns one row for each study, model, quant, placement and load mode: geometric means of
    both sides (`baseline`, `value`), `ratio` (value / baseline) with its 95 % interval `low` to `high` (Student's t on
    logarithms; NaN where one round gives none), and `n`, the number of rounds. Raises FrameError for an unknown column,
    for runs that cannot be compared (what differs is said), and where no round has both sides.
    """
    _known(frame, column)
    rows = []
    for names, cell in frame.groupby(GROUP, sort=False):
        _comparable(names, cell)
        base = cell[cell["placement"] == baseline]
        if base["load_mode"].nunique() > 1:
            base = base[base["load_mode"] == base["load_mode"].iloc[0]]
        before = base.set_index("round")[column]
        if before.index.has_duplicates:
            raise FrameError(f"{'/'.join(names)}: a round has two runs of {baseline}: leave one of them out")
        others = cell[~cell.index.isin(base.index)]
        for (placement, load_mode), side in others.groupby(["placement", "load_mode"], sort=False):
            pairs = side.set_index("round")[column].to_frame("value").join(before.rename("before"), how="inner")
            pairs = pairs[(pairs > 0).all(axis=1)]  # NaN is not
            if len(pairs):
                ratio = stats.ratio(list(zip(pairs["before"], pairs["value"], strict=True)))
                means = (stats.geometric_mean(list(pairs[k])).value for k in ("before", "value"))
                rows.append((*names, placement, load_mode, *means, ratio.value, ratio.low, ratio.high, ratio.n))
    if not rows:
        raise FrameError(
            f"no round has {column} of both {baseline!r} and another placement; the frame has "
            f"{', '.join(sorted(frame['placement'].unique())) or 'no runs'}"
        )
    names = [*GROUP, "placement", "load_mode", "baseline", "value", "ratio", "low", "high", "n"]
    return pd.DataFrame(rows, columns=names).astype({"low": float, "high": float})


def _known(frame: pd.DataFrame, column: str) -> None:
    """Raise FrameError if the frame lacks what comparing takes."""
    if column not in frame.columns:
        numbers = [c for c in frame.select_dtypes("number").columns if c != "round"]
        raise FrameError(f"no column {column!r}{near(column, numbers)}")
    if missing := {"placement", "load_mode", "round", *GROUP} - set(frame.columns):
        raise FrameError(
            f"the frame lacks {', '.join(sorted(missing))}: take one that moelib made, with all its columns"
        )


def _comparable(names: Sequence[str], cell: pd.DataFrame) -> None:
    """Raise FrameError if the runs of a cell differ in more than placement and round."""
    for column in SETUP:
        if column in cell.columns and len(values := cell[column].map(str).unique()) > 1:
            raise FrameError(
                f"{'/'.join(names)}: these runs cannot be compared, as they differ in {column}: {', '.join(values)}; "
                f"take those of one {column}"
            )


def near(name: str, names: Sequence[str]) -> str:
    """What a message says after a name that is not known: the nearest one, or all."""
    if close := difflib.get_close_matches(name, names, 1, 0.6):
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(names)}" if names else ""
