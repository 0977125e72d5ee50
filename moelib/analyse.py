"""Records -> tidy frames by declared columns, and the comparisons of a study. SI units, nothing rounded.

Only whole, valid blocks enter a comparison: each value is paired with the baseline of its own block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moelib import stats
from moelib.record import Record
from moelib.run import Request
from moelib.study import Results

Block = Sequence[Record]


@dataclass(frozen=True)
class Column:
    """A column of a tidy frame: its name carries the unit."""

    name: str
    get: Callable[..., Any]


_WHERE = [
    Column("model", lambda r: r.spec.model),
    Column("quant", lambda r: r.spec.quant),
    Column("placement", lambda r: r.spec.placement),
    Column("load_mode", lambda r: r.spec.load_mode),
    Column("block", lambda r: r.spec.block),
    Column("run_id", lambda r: r.run_id),
]
RUN_COLUMNS = [
    *_WHERE,
    Column("status", lambda r: r.status),
    Column("order", lambda r: r.spec.order),
    Column("device_memory_bytes", lambda r: r.observed.memory.value_bytes),
    Column("engine_device_bytes", lambda r: r.observed.memory.engine_bytes),
    Column("device_weights_bytes", lambda r: r.observed.report.device_bytes("model")),
    Column("moved_bytes", lambda r: r.observed.placement.moved_bytes),
    Column("host_rss_peak_bytes", lambda r: r.observed.host_rss_peak_bytes),
    Column("load_s", lambda r: r.observed.load_s),
    Column("wall_s", lambda r: r.observed.wall_s),
    Column("engine_s", lambda r: r.observed.engine_s),
]
REQUEST_COLUMNS = [
    Column("workload", lambda r, q: q.workload),
    Column("request", lambda r, q: q.index),
    Column("prompt_n", lambda r, q: q.prompt_n),
    Column("ttft_s", lambda r, q: q.ttft_s),
    Column("tokens_per_s", lambda r, q: q.tps),
]


def runs(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each record that holds an observation; columns RUN_COLUMNS."""
    rows = [{c.name: c.get(r) for c in RUN_COLUMNS} for r in records if r.observed]
    return pd.DataFrame(rows, columns=[c.name for c in RUN_COLUMNS])


def requests(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each request of each record; columns of where it was and REQUEST_COLUMNS."""
    rows = []
    for r in records:
        for q in r.observed.requests if r.observed else ():
            rows.append({**{c.name: c.get(r) for c in _WHERE}, **{c.name: c.get(r, q) for c in REQUEST_COLUMNS}})
    return pd.DataFrame(rows, columns=[c.name for c in [*_WHERE, *REQUEST_COLUMNS]])


@dataclass(frozen=True)
class Quantity:
    """Something that a run gives one value of."""

    name: str
    of: Callable[[Record], float | None]


def _request(r: Record, workload: str, warm: bool) -> list[Request]:
    return [q for q in r.observed.requests if q.workload == workload and (q.index > 0) == warm]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def device_memory() -> Quantity:
    return Quantity("device_memory_bytes", lambda r: r.observed.memory.value_bytes)


def load_time() -> Quantity:
    return Quantity("load_s", lambda r: r.observed.load_s)


def decode_rate(workload: str) -> Quantity:
    """Tokens per second over all requests of the workload in a run: total tokens over total time."""

    def of(r: Record) -> float | None:
        asked = [q for q in r.observed.requests if q.workload == workload]
        return _mean(q.tps for q in asked)

    return Quantity("tokens_per_s", of)


def first_token(workload: str, warm: bool) -> Quantity:
    """Seconds to the first token: of the server's first request of a workload, or the mean of its warm ones."""
    return Quantity("ttft_s", lambda r: _mean(q.ttft_s for q in _request(r, workload, warm)))


@dataclass(frozen=True)
class Comparison:
    """One offload arm against the baseline of the same blocks."""

    model: str
    quant: str
    placement: str
    load_mode: str
    baseline: stats.Estimate | None
    offload: stats.Estimate | None
    ratio: stats.Estimate | None
    """offload / baseline within blocks."""
    difference: stats.Estimate | None
    """baseline - offload within blocks."""
    records: tuple[str, ...]
    """Runs that the numbers come from."""


def compare(results: Results, quantity: Quantity) -> list[Comparison]:
    """`quantity` of every cell and offload arm of the study, in its order; None where no whole block has it."""
    rows = []
    arms = [a for a in results.study.arms if a.placement != "baseline"]
    for name, status in results.statuses.items():
        model, quant = name.split("/")
        for arm in arms:
            pairs, used = [], []
            for block in status.blocks:
                base = next(r for r in block if r.spec.placement == "baseline")
                other = next((r for r in block if r.spec.arm == arm.label), None)
                values = [quantity.of(r) for r in (base, other) if r]
                if len(values) == 2 and None not in values:
                    pairs.append((values[0], values[1]))
                    used += [base.run_id, other.run_id]
            estimates = (None,) * 4
            if pairs:
                estimates = (
                    stats.geometric_mean([a for a, _ in pairs]),
                    stats.geometric_mean([b for _, b in pairs]),
                    stats.ratio(pairs),
                    stats.mean([a - b for a, b in pairs]),
                )
            rows.append(Comparison(model, quant, arm.placement, arm.load_mode, *estimates, tuple(used)))
    return rows


@dataclass(frozen=True)
class LedgerRow:
    """What left the device in one block: the header's prediction and the engine's buffers."""

    model: str
    quant: str
    arm: str
    block: int
    moved_tensors: int
    moved_blocks: int
    header_bytes: int
    engine_bytes: int
    """Device weights of the baseline minus those of the offload run."""
    memory_bytes: int | None
    """Device memory of the baseline minus that of the offload run."""
    host_buffers: str
    """Where the engine put the weights that are not on the device."""
    splits: tuple[int, int]
    """Graph splits, baseline and offload."""


def ledger(blocks: Iterable[Block]) -> list[LedgerRow]:
    """The placement proof of every whole block, offload run by offload run."""
    rows = []
    for block in blocks:
        base = next(r for r in block if r.spec.placement == "baseline")
        for r in block:
            if r.spec.placement == "baseline":
                continue
            b, o = base.observed, r.observed
            known = b.memory.value_bytes is not None and o.memory.value_bytes is not None
            hosts = sorted({x.name for x in o.report.buffers if x.kind == "model" and not x.on_device})
            rows.append(
                LedgerRow(
                    r.spec.model,
                    r.spec.quant,
                    r.spec.arm,
                    r.spec.block,
                    o.placement.moved_tensors,
                    o.placement.moved_blocks,
                    o.placement.moved_bytes,
                    (b.report.device_bytes("model") or 0) - (o.report.device_bytes("model") or 0),
                    b.memory.value_bytes - o.memory.value_bytes if known else None,
                    ", ".join(hosts),
                    (max(b.report.graph_splits, default=0), max(o.report.graph_splits, default=0)),
                )
            )
    return rows
