"""Speed as laws, fitted to a study's runs.

A token: seconds = GPU time + cost per layer with experts on the CPU + host bytes / their speed. A prompt whose experts
are copied to the GPU: TTFT = GPU time + bytes over the bus / its speed. GPU time is that of the whole model on the GPU;
what the GPU is spared when experts move is taken off the other terms.

A law is of placements without further settings, of one workload, context, load mode and engine; runs that are all on
the GPU count for every load mode. Frames are those of `Study.runs`, or of `frames.runs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

import numpy as np
import pandas as pd

from moelib.audit.bounds import PACKETS
from moelib.base.stats import Estimate
from moelib.catalogue.placement import Placement
from moelib.laws import fit
from moelib.laws.law import Domain, HeldOut, Labelled, Law, Parameter, Residual
from moelib.planner.graph import OFFLOADED_TOKENS
from moelib.study.columns import SETUP
from moelib.study.frames import sources

CELL = ["machine", "model", "quant"]
NOT_TOLD = (
    "the runs do not tell its terms apart: that takes two placements of each model and quant, and for a cost per layer "
    "two quants whose bytes per layer differ by some 10 % or more"
)
NO_LONGER = "more bytes do not take longer in these runs"
NO_TIME = "it would leave the GPU less than no time: the runs scatter more than the law can tell"
ONE_QUANT = "the layers of one quant do not tell a cost per layer from one per byte: it is in the speed"


@dataclass(frozen=True)
class Cell:
    """What a law knows of a model and quant on a machine."""

    machine: str
    model: str
    quant: str
    gpu_s: float
    bytes_per_layer: float
    """That a token reads from RAM, or a prompt needs over the bus, for each layer with experts on the CPU: in the mean
    over those of the placement with most of them."""


@dataclass(frozen=True, kw_only=True)
class TimeLaw(Law):
    """Seconds of a token, or of a prompt, by the layers with experts on the CPU."""

    scales_with: Literal["RAM", "bus"]
    cells: tuple[Cell, ...] = ()
    per_layer_s: float = 0.0
    per_byte_s: float = 0.0
    per_byte: float = 1.0
    """Bytes that the law counts for each byte of a tensor."""

    def at(self, model: str, quant: str, layers: float) -> float | None:
        """Seconds with the experts of so many layers on the CPU, in the mean over the law's machines; None where there
        is no law, or it does not have the model and quant."""
        return self._seconds(model, quant, layers, self.per_layer_s, self.per_byte_s)

    def estimate(
        self,
        model: str,
        quant: str,
        layers: float,
        *,
        ram_bytes_per_s: float | None = None,
        bus_bytes_per_s: float | None = None,
    ) -> Labelled | None:
        """Seconds on another machine: of a token for this speed of its RAM (what all CPUs together read), of a prompt
        for this speed of its bus (what copying tensors to the GPU reaches). None where `at` has none.

        All that the CPU does for a token scales with the RAM, the cost per layer too: so it was between machines, see
        the residuals that held one out. Raises ValueError without the speed that the law takes, or of its own machine.
        """
        if self.scales_with == "RAM":
            if not ram_bytes_per_s or not self.domain.ram_bytes_per_s:
                raise ValueError("a law of tokens takes ram_bytes_per_s, and records that have their own machine's")
            there, ratio = f"RAM of {ram_bytes_per_s / 1e9:.3g} GB/s", self.domain.ram_bytes_per_s / ram_bytes_per_s
            told = self._seconds(model, quant, layers, ratio * self.per_layer_s, ratio * self.per_byte_s)
        else:
            if not bus_bytes_per_s:
                raise ValueError("a law of prompts takes bus_bytes_per_s")
            there = f"a bus of {bus_bytes_per_s / 1e9:.3g} GB/s"
            told = self._seconds(model, quant, layers, 0.0, 1 / (self.per_byte * bus_bytes_per_s))
        label = f"estimated for {there} from a law fitted on {self.domain}, with the time of that GPU"
        return None if told is None else Labelled(told, self.unit, label)

    def _seconds(self, model: str, quant: str, layers: float, per_layer_s: float, per_byte_s: float) -> float | None:
        cells = [c for c in self.cells if (c.model, c.quant) == (model, quant)]
        if not cells:
            return None
        return fmean(c.gpu_s + layers * (per_layer_s + per_byte_s * c.bytes_per_layer) for c in cells)


def decode(frame: pd.DataFrame, workload: str) -> list[TimeLaw]:
    """Laws of a token of the workload: for each model on each machine, and each load mode, one that its quants share,
    then one for each quant, whose speed has the cost per layer in it."""
    rows = _rows(frame, workload, seconds=1 / frame[f"tokens_per_s/{workload}"], bytes=frame["ram_read_bytes"])
    shared: list[TimeLaw] = []
    own: list[tuple[pd.DataFrame, TimeLaw]] = []
    for _, group in rows.groupby([*SETUP, "machine", "cpu_threads", "model"], sort=False, dropna=False):
        for part in _by_load_mode(group):
            shared.append(_law(part, "host bytes", per_layer=True))
            own += [(one, _law(one, "host bytes")) for _, one in part.groupby("quant", sort=False)]
    return [*shared, *(replace(law, residuals=(*law.residuals, *_elsewhere(law, own))) for _, law in own)]


def ttft(frame: pd.DataFrame, workload: str, counted: bool = True) -> list[TimeLaw]:
    """Laws of a warm prompt of the workload: for each GPU and load mode one speed of the bus for all models, quants and
    machines, then one for each of them.

    counted: bytes are those that the GPU's counter saw in each placement's own runs, if all runs have them; else the
    header's bytes of the experts on the CPU, which are known of a placement that nobody ran, and are more than crosses
    the bus where a prompt does not need all experts.
    """
    names = {"seconds": "ttft_warm_s", "counts": "bus_received_bytes", "tokens": "prompt_tokens"}
    values = {name: frame[f"{column}/{workload}"] for name, column in names.items()}
    rows = _rows(frame, workload, bytes=frame["moved_bytes"], **values)
    laws = []
    for _, group in rows.groupby([*SETUP], sort=False, dropna=False):
        for part in _by_load_mode(group):
            seen = counted and bool(part["counts"].notna().all())
            part = part.assign(bytes=part["counts"]) if seen else part
            what = "bytes counted on the bus" if seen else "expert bytes by the header"
            for one in (part, *(cell for _, cell in part.groupby("cell", sort=False))):
                laws.append(
                    _law(one, what, scales_with="bus", reason=_not_copied(one), per_byte=PACKETS if seen else 1.0)
                )
    return laws


def _not_copied(rows: pd.DataFrame) -> str | None:
    """Why no experts are copied to the GPU for the prompt; None where they are."""
    if (rows["device"] != "cuda").any():
        return "without a GPU no experts are copied to one"
    if (tokens := rows["tokens"].min()) < OFFLOADED_TOKENS:
        return (
            f"llama.cpp copies experts to the GPU for prompts from {OFFLOADED_TOKENS} tokens on; this has {tokens:.0f}"
        )
    return None


def _rows(frame: pd.DataFrame, workload: str, **columns: pd.Series) -> pd.DataFrame:
    """The runs that laws are of, with columns of the frame by the names that laws have for them: those that shared
    their host took the time that others left them."""
    rows = frame.assign(workload=workload, **columns).reset_index(drop=True)
    placed = [Placement.parse(*side) for side in zip(rows["placement"], rows["load_mode"], strict=True)]
    plain = np.array([p == Placement(p.cpu_layers, p.load_mode) for p in placed], bool)
    rows["cell"] = rows.groupby(CELL, sort=False).ngroup()
    lone = ~rows["host_shared"].astype(bool)
    return rows[plain & lone & rows["seconds"].notna() & rows["bytes"].notna()]


def _by_load_mode(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The runs of each load mode that have experts on the CPU, and those of the same models and quants without."""
    moved = rows["moved_layers"] > 0
    for mode in rows.loc[moved, "load_mode"].unique():
        of_mode = moved & (rows["load_mode"] == mode)
        there = of_mode.groupby(rows["cell"]).transform("any")
        yield rows[there & (of_mode | ~moved)]


def _domain(rows: pd.DataFrame) -> Domain:
    moved = rows[rows["moved_layers"] > 0]
    of = {name: tuple(dict.fromkeys(rows[name])) for name in (*CELL, "cpu_threads")}
    ram = moved["ram_bytes_per_s"].median()
    return Domain(
        gpu=rows["gpu"].iloc[0],
        machines=of["machine"],
        models=of["model"],
        quants=of["quant"],
        load_mode=moved["load_mode"].iloc[0],
        workload=rows["workload"].iloc[0],
        scale=rows["scale"].iloc[0],
        context=int(rows["context"].iloc[0]),
        threads=tuple(int(n) for n in of["cpu_threads"]),
        ram_bytes_per_s=None if np.isnan(ram) else float(ram),
    )


@dataclass(frozen=True)
class _Design:
    """A law's terms: a GPU time of each cell, a cost per layer where it has one, a time per byte."""

    cells: tuple[int, ...]
    per_layer: bool

    def own(self, rows: pd.DataFrame) -> fit.Mask:
        """(runs, cells): which cell a run is of."""
        return np.equal.outer(rows["cell"].to_numpy(), self.cells)

    def terms(self, rows: pd.DataFrame) -> fit.Array:
        """(runs, terms)."""
        layers = [rows["moved_layers"].to_numpy()] if self.per_layer else []
        return np.column_stack([self.own(rows).astype(float), *layers, rows["bytes"].to_numpy()])

    def estimates(self, rows: pd.DataFrame) -> list[Estimate]:
        """Each term's seconds. Raises fit.Untold."""
        rounds = list(zip(rows["machine"], rows["round"], strict=True))
        moved = self.own(rows) & (rows["moved_layers"] > 0).to_numpy()[:, None]
        cells = list(moved.T) if len(self.cells) > 1 else []
        return fit.estimates(self.terms(rows), rows["seconds"].to_numpy(), rounds, cells)

    def predicted(self, train: pd.DataFrame, test: pd.DataFrame) -> tuple[float | None, str | None]:
        """(mean seconds of `test` by a fit to `train`, why there might be none)."""
        try:
            told = fit.predict(self.terms(test), fit.solve(self.terms(train), train["seconds"].to_numpy()))
        except fit.Untold:
            told = None
        return told, NOT_TOLD


def _law(
    rows: pd.DataFrame,
    what: str,
    scales_with: Literal["RAM", "bus"] = "RAM",
    reason: str | None = None,
    per_layer: bool = False,
    per_byte: float = 1.0,
) -> TimeLaw:
    """The law of these runs. what: the bytes that it has. reason: why there can be none."""
    design = _Design(tuple(rows["cell"].unique()), per_layer)
    law = TimeLaw(
        name="seconds per token" if scales_with == "RAM" else "TTFT",
        unit="s",
        formula=f"GPU time + {'cost x layers on the CPU + ' * per_layer}{what} / speed",
        domain=_domain(rows),
        n=len(rows),
        sources=sources(rows),
        reason=reason,
        scales_with=scales_with,
        per_byte=per_byte,
    )
    if reason:
        return law
    try:
        values = design.estimates(rows)
    except fit.Untold:
        return replace(law, reason=NOT_TOLD)
    law = replace(law, residuals=tuple(_residuals(rows, design)))
    if values[-1].value <= 0 and not per_layer:
        return replace(law, reason=NO_LONGER)
    told = np.array([v.value for v in values])
    if told[: len(design.cells)].min() <= 0:
        return replace(law, reason=NO_TIME)
    cells = tuple(_cells(rows, told))
    return replace(
        law,
        parameters=tuple(_parameters(values, cells, what, per_layer, scales_with)),
        spread=fit.spread(design.terms(rows), rows["seconds"].to_numpy(), told),
        cells=cells,
        per_layer_s=float(told[-2]) if per_layer else 0.0,
        per_byte_s=float(told[-1]),
    )


def _cells(rows: pd.DataFrame, told: fit.Array) -> Iterator[Cell]:
    """Each cell in the order of a design's, with what the fit told of it."""
    for (_, own), gpu_s in zip(rows.groupby("cell", sort=False), told, strict=False):
        most = own[own["moved_layers"] == own["moved_layers"].max()]
        machine, model, quant = (own[k].iloc[0] for k in CELL)
        size = most["bytes"].mean() / most["moved_layers"].iloc[0]
        yield Cell(machine, model, quant, float(gpu_s), float(size))


def _parameters(
    values: list[Estimate], cells: Sequence[Cell], what: str, per_layer: bool, scales_with: str
) -> Iterator[Parameter]:
    for cell, value in zip(cells, values, strict=False):
        yield Parameter(f"GPU time of {cell.model} {cell.quant} on machine {cell.machine}", "s", value, "fit")
    if scales_with == "RAM":
        cost, reason = (values[-2], None) if per_layer else (None, ONE_QUANT)
        yield Parameter("cost per layer on the CPU", "s", cost, "fit", reason)
    yield _speed(f"speed of {what}", values[-1])


def _speed(name: str, per_byte: Estimate) -> Parameter:
    """Bytes per second from seconds per byte; None where the latter may as well be 0."""
    value, low, high = per_byte.value, per_byte.low, per_byte.high
    if value <= 0 or (low is not None and low <= 0):
        or_more = f"{1 / high / 1e9:.3g} GB/s or any more: " if high and high > 0 else ""
        return Parameter(name, "bytes/s", None, "fit", or_more + NO_LONGER)
    least, most = (None if s is None else 1 / s for s in (high, low))
    return Parameter(name, "bytes/s", Estimate(1 / value, least, most, per_byte.n), "fit")


def _residuals(rows: pd.DataFrame, design: _Design) -> Iterator[Residual]:
    """Every placement by the law itself, if there are more of them than its terms, as else any law fits; those between
    the ends, and whole cells, by fits without them."""
    layers, by_cell = rows["moved_layers"], rows.groupby("cell")["moved_layers"]
    free = rows.groupby(["cell", "placement", "load_mode"]).ngroups > design.terms(rows).shape[1]
    between = (layers > by_cell.transform("min")) & (layers < by_cell.transform("max"))
    for _, own in rows.groupby("cell", sort=False):
        for _, test in own.groupby(["placement", "load_mode"], sort=False):
            train: dict[HeldOut, pd.DataFrame] = {"nothing": rows} if free else {}
            if between[test.index].all():
                train |= {"placement": rows.drop(test.index), "ends": rows[~between]}
            if len(design.cells) > 1 and (test["moved_layers"] > 0).all():
                train["cell"] = rows.drop(own.index[own["moved_layers"] > 0])
            for held_out, seen in train.items():
                yield Residual.of(held_out, test, "seconds", *design.predicted(seen, test))


def _elsewhere(law: TimeLaw, runs: list[tuple[pd.DataFrame, TimeLaw]]) -> Iterator[Residual]:
    """The law's model and quant on other machines: what the CPU does takes longer by the ratio of their RAM's speeds;
    the GPU time is that of their own runs without experts on the CPU."""
    for rows, other in runs:
        if other.domain.question == law.domain.question and other.domain.machines != law.domain.machines:
            for _, test in rows[rows["moved_layers"] > 0].groupby("placement", sort=False):
                yield Residual.of("machine", test, "seconds", *_scaled(law, other, rows, test))


def _scaled(law: TimeLaw, other: TimeLaw, rows: pd.DataFrame, test: pd.DataFrame) -> tuple[float | None, str | None]:
    gpu_s = rows.loc[rows["moved_layers"] == 0, "seconds"].mean()
    ram, its_ram = law.domain.ram_bytes_per_s, other.domain.ram_bytes_per_s
    if law.reason or np.isnan(gpu_s) or ram is None or its_ram is None:
        return None, law.reason or "it takes the RAM's speed of both machines, and runs without experts on the CPU"
    return float(gpu_s + ram / its_ram * law.per_byte_s * test["bytes"].mean()), None
