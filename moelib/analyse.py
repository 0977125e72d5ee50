"""Records -> tidy frames by declared columns, and the comparisons of a study. SI units, nothing rounded.

Only whole, valid rounds enter a comparison: each value is paired with the baseline of its own round (in
records: `block`).
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter

import pandas as pd

from moelib import stats
from moelib.params import Arm, Study
from moelib.record import Record
from moelib.study import Results

Quantity = Callable[[Record], float | None]
"""A quantity with one value for each run."""

# Column -> how to read it from a record; a column's name carries the unit.
_WHERE = {k: attrgetter(f"spec.{k}") for k in ("model", "quant", "placement", "load_mode", "block")}
_WHERE["run_id"] = attrgetter("run_id")
RUN_COLUMNS: dict[str, Callable] = {
    **_WHERE,
    "status": attrgetter("status"),
    "order": attrgetter("spec.order"),
    "vram_bytes": attrgetter("observed.memory.value_bytes"),
    "engine_buffer_bytes": attrgetter("observed.memory.engine_bytes"),
    "vram_weight_bytes": lambda r: r.observed.report.device_bytes("model"),
    "moved_bytes": attrgetter("observed.placement.moved_bytes"),
    **{k: attrgetter(f"observed.{k}") for k in ("host_rss_peak_bytes", "load_s", "wall_s", "engine_s")},
}
REQUEST_COLUMNS = {"workload": "workload", "request": "index", "prompt_n": "prompt_n", "ttft_s": "ttft_s"}
REQUEST_COLUMNS["tokens_per_s"] = "tps"


def runs(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each record that holds an observation; columns RUN_COLUMNS."""
    observed = [r for r in records if r.observed]
    return pd.DataFrame({column: [get(r) for r in observed] for column, get in RUN_COLUMNS.items()})


def requests(records: Iterable[Record], workload: str | None = None) -> pd.DataFrame:
    """One row for each request of each record, of all workloads or of one: which run it belongs to, then
    REQUEST_COLUMNS."""
    pairs = [(r, q) for r in records if r.observed for q in r.observed.requests if workload in (None, q.workload)]
    where = {column: [get(r) for r, _ in pairs] for column, get in _WHERE.items()}
    return pd.DataFrame(where | {column: [getattr(q, k) for _, q in pairs] for column, k in REQUEST_COLUMNS.items()})


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


vram: Quantity = RUN_COLUMNS["vram_bytes"]
load_time: Quantity = RUN_COLUMNS["load_s"]


host_peak: Quantity = RUN_COLUMNS["host_rss_peak_bytes"]


def residual(r: Record) -> float | None:
    """VRAM beyond the engine's own buffers."""
    return r.observed.memory.residual_bytes


def growth(r: Record) -> float | None:
    """How much the memory in use on the whole GPU grew: the run's VRAM, and what the driver charges to no process."""
    return r.observed.memory.growth_bytes


def vram_needed(r: Record) -> float | None:
    """VRAM that must be free for the run: how much use of the whole GPU grew, else the VRAM of the processes."""
    known = [n for n in (vram(r), growth(r)) if n is not None]
    return max(known) if vram(r) is not None else None


def engine_buffers(r: Record) -> float | None:
    """VRAM by the engine's own buffers."""
    return r.observed.memory.engine_bytes


def energy_per_token(workload: str) -> Quantity:
    """Joules of the GPU's board for each token generated, prompt included. The counter moves every 100 ms or so, so a
    run's requests are added up; None without a counter, or if it did not move."""

    def per_token(r: Record) -> float | None:
        requests = [q for q in r.observed.requests if q.workload == workload]
        joules = [q.energy_joule for q in requests]
        total = None if None in joules else sum(joules)
        return total / sum(q.predicted_n for q in requests) if total else None

    return per_token


def bound(workload: str) -> Quantity:
    """tokens/s as a share of the upper bound: reading each active weight once per token at the full bandwidth of the
    memory it is in. The GPU's bandwidth follows from clock and bus width by its driver, the host's is measured."""
    rate = tokens_per_s(workload)

    def share(r: Record) -> float | None:
        device, host = r.device.bandwidth_bytes_per_s, r.host.ram_read_bytes_per_s
        p, tokens = r.observed.placement, rate(r)
        if not device or not host or tokens is None:
            return None
        return tokens * (p.device_read_bytes / device + p.host_read_bytes / host)

    return share


def received(workload: str) -> Quantity:
    """Bytes that the GPU receives over the bus while the warm server processes the workload's prompt."""
    return lambda r: _mean(m.received_bytes for m in r.observed.prompt_traffic if m.workload == workload)


def sm_clock(r: Record) -> float | None:
    """MHz of the GPU's processors, over the run's readings."""
    return _mean(c.sm_clock_mhz for c in r.observed.counters)


def power(r: Record) -> float | None:
    """Watts of the GPU's board during requests: their energy over their time."""
    pairs = [(q.energy_joule, q.total_s) for q in r.observed.requests]
    if not pairs or None in itertools.chain(*pairs):
        return None
    joules, seconds = map(sum, zip(*pairs, strict=True))
    return joules / seconds


def monitoring(r: Record) -> float | None:
    """Share of one CPU that monitoring the run took; None in records of earlier code."""
    spent = r.observed.watch_cpu_s
    return None if spent is None or not r.observed.host.elapsed_s else spent / r.observed.host.elapsed_s


def major_faults(r: Record) -> float | None:
    """Pages that the server had to wait for the disk for."""
    return r.observed.host.major_faults


def tokens_per_s(workload: str) -> Quantity:
    """Decode rate: the mean of tokens/s over all requests of the workload in a run."""
    return lambda r: _mean(q.tps for q in r.observed.requests if q.workload == workload)


def ttft(workload: str, warm: bool) -> Quantity:
    """Time to first token, s: of the server's first request of a workload, or the mean of its warm ones."""
    return lambda r: _mean(q.ttft_s for q in r.observed.requests if q.workload == workload and (q.index > 0) == warm)


@dataclass(frozen=True)
class Comparison:
    """One placement and load mode against another of the same rounds; None where no complete round has the quantity."""

    model: str
    quant: str
    arm: Arm
    against: Arm
    records: tuple[Record, ...]
    """Runs that the numbers come from."""
    baseline: stats.Estimate | None = None
    offload: stats.Estimate | None = None
    ratio: stats.Estimate | None = None
    """CPU offload / baseline, paired within rounds; None where a value is 0."""
    difference: stats.Estimate | None = None
    """baseline - CPU offload, paired within rounds."""


def offloads(study: Study) -> list[tuple[Arm, Arm]]:
    """(baseline, other) for every placement and load mode that is not the baseline."""
    return [(study.arms[0], arm) for arm in study.arms[1:]]


def cpu_offloads(study: Study) -> list[tuple[Arm, Arm]]:
    """Those of `offloads` that keep experts on the CPU: a baseline with other settings offloads nothing."""
    return [(base, arm) for base, arm in offloads(study) if not arm.placed.is_baseline]


def load_modes(study: Study) -> list[tuple[Arm, Arm]]:
    """(mmap, none) for every placement that the study runs in both load modes."""
    return [(a, b) for a in study.arms for b in study.arms if a.placement == b.placement and a.load_mode < b.load_mode]


def compare(
    results: Results, quantity: Quantity, pairs: Callable[[Study], list[tuple[Arm, Arm]]] = offloads
) -> list[Comparison]:
    """`quantity` of every cell that has a complete round, and of every pair, in the study's order."""
    rows = []
    for name, status in results.measured.items():
        for against, arm in pairs(results.study):
            pairs_of_values, used = [], []
            for block in status.blocks:
                by_arm = {r.spec.arm: r for r in block}
                pair = [by_arm[against.label], by_arm[arm.label]]
                values = [quantity(r) for r in pair]
                if None not in values:
                    pairs_of_values.append(values)
                    used += pair
            rows.append(Comparison(*name.rsplit("/", 1), arm, against, tuple(used), *_estimates(pairs_of_values)))
    return rows


def _estimates(pairs: list[list[float]]) -> list[stats.Estimate | None]:
    if not pairs:
        return []
    difference = stats.mean([a - b for a, b in pairs])
    if not all(v > 0 for pair in pairs for v in pair):
        return [*(stats.mean(side) for side in zip(*pairs, strict=True)), None, difference]
    return [*map(stats.geometric_mean, zip(*pairs, strict=True)), stats.ratio(pairs), difference]


@dataclass(frozen=True)
class Summary:
    """A quantity of one placement and load mode of a cell; None where no complete round has it."""

    model: str
    quant: str
    arm: Arm
    records: tuple[Record, ...]
    value: stats.Estimate | None


def summarise(results: Results, quantity: Quantity) -> list[Summary]:
    """`quantity` of every cell that has a complete round, by placement and load mode, in the study's order."""
    rows = []
    for name, status in results.measured.items():
        for arm in results.study.arms:
            runs_with = [r for b in status.blocks for r in b if r.spec.arm == arm.label and quantity(r) is not None]
            value = stats.mean([quantity(r) for r in runs_with]) if runs_with else None
            rows.append(Summary(*name.rsplit("/", 1), arm, tuple(runs_with), value))
    return rows
