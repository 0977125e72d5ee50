"""VRAM as a law: weights by the file's header, KV cache and compute buffer by the engine's report, and the GPU's rest.

The first three are exact for every placement and context that they are told for. The rest is what a process holds on a
GPU beside them (CUDA's context, kernels, cuBLAS): one number for all placements, which grows by some MiB with the
layers on the CPU. Settings other than the context change the buffers; placements with them are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from moelib.base import stats
from moelib.base.stats import Estimate
from moelib.catalogue.placement import Placement
from moelib.laws.law import Domain, HeldOut, Labelled, Law, Parameter, Residual
from moelib.study.columns import SETUP
from moelib.study.frames import sources

STEP = 1024  # tokens of context
ONE_CONTEXT = "one context does not tell what another takes"
UNSEEN = "no other placement shows the compute buffer at such a context, with experts on the CPU or without as here"


@dataclass(frozen=True)
class Line:
    """Bytes of a buffer by the context, in tokens."""

    context: int
    nbytes: float
    n: int
    """Runs."""
    per_token: float | None
    """None where all runs have one context."""

    @classmethod
    def through(cls, rows: pd.DataFrame, column: str) -> Line | None:
        """Of the runs; None where there is none."""
        by_context = rows.groupby("context_tokens")[column].mean()
        if by_context.empty:
            return None
        context = int(by_context.index[0])
        if len(by_context) == 1:
            return cls(context, float(by_context.iloc[0]), len(rows), None)
        per_token, fixed = np.polyfit(by_context.index, by_context, 1)
        return cls(context, float(fixed + per_token * context), len(rows), float(per_token))

    def at(self, context: float) -> float | None:
        if context == self.context:
            return self.nbytes
        return None if self.per_token is None else self.nbytes + (context - self.context) * self.per_token


@dataclass(frozen=True)
class Parts:
    """VRAM by what takes it, in bytes."""

    weights: float
    cache: float
    compute: float
    rest: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.compute + self.rest


@dataclass(frozen=True)
class _Told:
    """What runs tell of the terms beside the weights."""

    cache: Line
    compute: dict[bool, Line]
    """By whether experts are on the CPU: of each such batch the largest expert tensor is copied into the buffer."""
    rest: Estimate

    @classmethod
    def by(cls, rows: pd.DataFrame) -> _Told | None:
        cache, moved = Line.through(rows, "vram_cache_bytes"), rows["moved_layers"] > 0
        if cache is None:
            return None
        compute = {on_cpu: Line.through(rows[moved == on_cpu], "vram_compute_bytes") for on_cpu in (False, True)}
        return cls(cache, {k: line for k, line in compute.items() if line}, stats.mean(list(rows["rest"])))

    def parts(self, weights_bytes: float, experts_on_cpu: bool, context: float) -> Parts | None:
        cache, line = self.cache.at(context), self.compute.get(experts_on_cpu)
        compute = None if line is None else line.at(context)
        if cache is None or compute is None:
            return None
        return Parts(weights_bytes, cache, compute, self.rest.value)


@dataclass(frozen=True, kw_only=True)
class VramLaw(Law):
    """Peak VRAM in bytes by the weights that a placement has on the GPU, and by the context."""

    told: _Told

    def parts(self, weights_bytes: float, experts_on_cpu: bool, context: float) -> Parts | None:
        """Of a placement with so many bytes of weights on the GPU, by the header (`Header.device_bytes`). None for what
        no run shows: a context where all runs had another one, experts on the CPU where none had."""
        return self.told.parts(weights_bytes, experts_on_cpu, context)

    def estimate(
        self, weights_bytes: float, experts_on_cpu: bool, context: float, *, rest_bytes: float
    ) -> Labelled | None:
        """Bytes on another GPU, on which a process holds `rest_bytes` beside the engine's buffers."""
        parts = self.parts(weights_bytes, experts_on_cpu, context)
        where = f"a GPU that holds {stats.size(rest_bytes)} beside the engine's buffers"
        label = f"estimated for {where} from a law of runs on {self.domain}"
        return None if parts is None else Labelled(replace(parts, rest=rest_bytes).total, self.unit, label)


def vram(frame: pd.DataFrame) -> list[VramLaw]:
    """A law of each model and quant on each kind of GPU, of all load modes and machines together."""
    placed = [Placement.parse(*side) for side in zip(frame["placement"], frame["load_mode"], strict=True)]
    plain = np.array([p == Placement(p.cpu_layers, p.load_mode, context=p.context) for p in placed], bool)
    buffers = frame["vram_weights_bytes"] + frame["vram_cache_bytes"] + frame["vram_compute_bytes"]
    rows = frame.assign(rest=frame["vram_bytes"] - buffers)[plain].dropna(subset=["rest"])
    groups = rows.groupby([k for k in SETUP if k != "context"] + ["model", "quant"], sort=False, dropna=False)
    return [law for _, group in groups if (law := _law(group))]


def _law(rows: pd.DataFrame) -> VramLaw | None:
    if (told := _Told.by(rows)) is None:
        return None
    residuals = tuple(_residuals(rows))
    return VramLaw(
        name="VRAM",
        unit="bytes",
        formula="weights on the GPU + KV cache + compute buffer + rest",
        domain=_domain(rows),
        n=len(rows),
        parameters=tuple(_parameters(rows, told)),
        residuals=residuals,
        sources=sources(rows),
        told=told,
    )


def _domain(rows: pd.DataFrame) -> Domain:
    of = {k: tuple(dict.fromkeys(rows[k])) for k in ("machine", "model", "quant", "cpu_threads", "load_mode")}
    ram = rows["ram_bytes_per_s"].median()
    return Domain(
        gpu=rows["gpu"].iloc[0],
        machines=of["machine"],
        models=of["model"],
        quants=of["quant"],
        load_mode=", ".join(of["load_mode"]),
        workload=", ".join(
            c.partition("/")[2] for c in rows if c.startswith("tokens_per_s/") and rows[c].notna().any()
        ),
        scale=rows["scale"].iloc[0],
        context=int(rows["context_tokens"].iloc[0]),
        threads=tuple(int(n) for n in of["cpu_threads"]),
        ram_bytes_per_s=None if np.isnan(ram) else float(ram),
    )


def _parameters(rows: pd.DataFrame, told: _Told) -> Iterator[Parameter]:
    for placement, own in rows.groupby("placement", sort=False):
        weights = Estimate(float(own["vram_weights_bytes"].iloc[0]), None, None, len(own))
        yield Parameter(f"weights on the GPU, {placement}", "bytes", weights, "header")
    names = {False: "all on the GPU", True: "experts on the CPU"}
    lines = {"KV cache": told.cache} | {f"compute buffer, {names[k]}": line for k, line in told.compute.items()}
    for name, line in lines.items():
        at = Estimate(line.nbytes, None, None, line.n)
        yield Parameter(f"{name}, {line.context:,} tokens", "bytes", at, "engine's report")
        more = None if line.per_token is None else Estimate(STEP * line.per_token, None, None, line.n)
        name = f"{name}, per {STEP:,} tokens more"
        yield Parameter(name, "bytes", more, "engine's report", None if more else ONE_CONTEXT)
    rest = told.rest
    if rest.interval is None:
        rest = replace(rest, low=None, high=None)
    yield Parameter("rest", "bytes", rest, "peak of the processes less these")


def _residuals(rows: pd.DataFrame) -> Iterator[Residual]:
    for (placement, _), test in rows.groupby(["placement", "load_mode"], sort=False):
        yield _residual("nothing", test, rows)
        if len(others := rows[rows["placement"] != placement]):
            yield _residual("placement", test, others)


def _residual(held_out: HeldOut, test: pd.DataFrame, seen: pd.DataFrame) -> Residual:
    one, told = test.iloc[0], _Told.by(seen)
    here = float(one["vram_weights_bytes"]), bool(one["moved_layers"] > 0), float(one["context_tokens"])
    parts = None if told is None else told.parts(*here)
    return Residual.of(held_out, test, "vram_bytes", None if parts is None else parts.total, UNSEEN)
