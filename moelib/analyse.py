"""Records -> tidy frames by declared columns, and the comparisons of a study. SI units, nothing rounded.

Only whole, valid blocks enter a comparison: each value is paired with the baseline of its own block.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter

import pandas as pd

from moelib import audit, stats
from moelib.record import Record
from moelib.study import Results

Quantity = Callable[[Record], float | None]
"""Something that a run gives one value of."""

# Column -> what to read of a record; a column's name carries the unit.
_WHERE = {k: attrgetter(f"spec.{k}") for k in ("model", "quant", "placement", "load_mode", "block")}
_WHERE["run_id"] = attrgetter("run_id")
RUN_COLUMNS: dict[str, Callable] = {
    **_WHERE,
    "status": attrgetter("status"),
    "order": attrgetter("spec.order"),
    "device_memory_bytes": attrgetter("observed.memory.value_bytes"),
    "engine_device_bytes": attrgetter("observed.memory.engine_bytes"),
    "device_weights_bytes": lambda r: r.observed.report.device_bytes("model"),
    "moved_bytes": attrgetter("observed.placement.moved_bytes"),
    **{k: attrgetter(f"observed.{k}") for k in ("host_rss_peak_bytes", "load_s", "wall_s", "engine_s")},
}
REQUEST_COLUMNS = {"workload": "workload", "request": "index", "prompt_n": "prompt_n", "ttft_s": "ttft_s"}
REQUEST_COLUMNS["tokens_per_s"] = "tps"


def runs(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each record that holds an observation; columns RUN_COLUMNS."""
    seen = [r for r in records if r.observed]
    return pd.DataFrame({column: [get(r) for r in seen] for column, get in RUN_COLUMNS.items()})


def requests(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each request of each record; columns of where it was and REQUEST_COLUMNS."""
    asked = [(r, q) for r in records if r.observed for q in r.observed.requests]
    where = {column: [get(r) for r, _ in asked] for column, get in _WHERE.items()}
    return pd.DataFrame(where | {column: [getattr(q, k) for _, q in asked] for column, k in REQUEST_COLUMNS.items()})


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


device_memory: Quantity = RUN_COLUMNS["device_memory_bytes"]
load_time: Quantity = RUN_COLUMNS["load_s"]


def decode_rate(workload: str) -> Quantity:
    """Tokens per second: the mean over all requests of the workload in a run."""
    return lambda r: _mean(q.tps for q in r.observed.requests if q.workload == workload)


def first_token(workload: str, warm: bool) -> Quantity:
    """Seconds to the first token: of the server's first request of a workload, or the mean of its warm ones."""
    return lambda r: _mean(q.ttft_s for q in r.observed.requests if q.workload == workload and (q.index > 0) == warm)


@dataclass(frozen=True)
class Comparison:
    """One offload arm against the baseline of the same blocks; None where no whole block has the quantity."""

    model: str
    quant: str
    placement: str
    load_mode: str
    records: tuple[Record, ...]
    """Runs that the numbers come from."""
    baseline: stats.Estimate | None = None
    offload: stats.Estimate | None = None
    ratio: stats.Estimate | None = None
    """offload / baseline within blocks."""
    difference: stats.Estimate | None = None
    """baseline - offload within blocks."""


def compare(results: Results, quantity: Quantity) -> list[Comparison]:
    """`quantity` of every cell and offload arm of the study, in its order."""
    rows = []
    for name, status in results.statuses.items():
        for arm in results.study.arms:
            if arm.placement == "baseline":
                continue
            pairs, used = [], []
            for block in status.blocks:
                two = [audit.baseline(block), *(r for r in block if r.spec.arm == arm.label)]
                values = [quantity(r) for r in two]
                if len(values) == 2 and None not in values:
                    pairs.append(values)
                    used += two
            estimates = []
            if pairs:
                means = map(stats.geometric_mean, zip(*pairs, strict=True))
                estimates = [*means, stats.ratio(pairs), stats.mean([a - b for a, b in pairs])]
            rows.append(Comparison(*name.split("/"), arm.placement, arm.load_mode, tuple(used), *estimates))
    return rows
