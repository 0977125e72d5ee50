"""Slices of a model: its first layers as a twin, chosen for this machine and run here in audited runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil

from moelib.audit.record import Record
from moelib.base import files, stats
from moelib.base.bar import tqdm
from moelib.base.schema import UserError
from moelib.campaign import bench
from moelib.catalogue.placement import Placement
from moelib.forecast import predict
from moelib.forecast.predict import Layers, Sample
from moelib.gguf.gguf_header import Header
from moelib.gguf.gguf_reader import GGUFError
from moelib.gguf.outline import Outline
from moelib.machine import host
from moelib.measure import device
from moelib.models import models, quantize
from moelib.planner import memory

NEAR, SPAN = 2, 8  # layers with experts, at least: in the first slice, and more of them in the second
REQUESTS = 3  # the first one is a fresh server's
WORKLOAD = "mixed-512"
LOAD_MODE = "none"  # mapped files' first slices are too quick: their TTFT is not linear in the layers
RUN_CONTEXT = 1024  # tokens: the workload takes 612
LONGEST_PERIOD = 8
SPARE = 1.1  # of RAM and VRAM: nothing that a slice needs may be at its limit
BEYOND_CACHE = 4  # times the CPU's cache: of more experts a token finds as many bytes there, however many there are
TEMPORARY = "preview-"


class PreviewError(UserError):
    """The model cannot be previewed here; the message says why, and the nearest thing that works."""


@dataclass(frozen=True)
class Model:
    """What is asked for: an outline, and how its layers count."""

    name: str
    outline: Outline

    @cached_property
    def header(self) -> Header:
        return self.outline.header

    @cached_property
    def _period(self) -> int | None:
        first, last = self.header.expert_layers[0], self.header.layers or 0
        kinds = [{(n, t.shape) for n, t in self.header.of_layer(i).items()} for i in range(first, last)]
        return next((p for p in range(1, LONGEST_PERIOD + 1) if kinds[p:] == kinds[:-p]), None)

    @property
    def period(self) -> int:
        """After so many layers their kinds come again: 1 where all after the dense ones are alike, or irregular."""
        return self._period or 1

    @property
    def regular(self) -> bool:
        """Whether slices hold the kinds of layers in the whole's shares."""
        return self._period is not None

    def counted(self, part: Header, placement: Placement | str) -> Layers:
        """The layers of the whole, or of a slice, at a placement."""
        moved = part.moved(placement)
        mean = self.header.moved_bytes("cpu-moe") / len(self.header.expert_layers)
        on_cpu = sum(t.nbytes for t in moved) / mean
        return Layers((part.layers or 0) - self.header.expert_layers[0] - len({t.block for t in moved}), on_cpu)

    @cached_property
    def _slices(self) -> dict[int, Header]:
        return {}

    def slice(self, layers: int) -> Header:
        """The header of the twin of the first layers."""
        if layers not in self._slices:
            self._slices[layers] = self.outline.first_layers(layers).header
        return self._slices[layers]

    def lengths(self, cache_bytes: int | None) -> tuple[int, int]:
        """(near, far): layers of the two slices that tell most, if this machine can hold them."""
        first, count = self.header.expert_layers[0], len(self.header.expert_layers)
        in_period = sum(i < first + self.period for i in self.header.expert_layers)
        most = first + self.period * ((count - 1) // in_period)  # a slice that is the whole predicts nothing
        near = first + self.period * -(-NEAR // in_period)
        span = self.period * -(-SPAN // in_period)
        if cache_bytes and self.header.moved_bytes("cpu-moe") > cache_bytes:
            longer = range(near, most - span + 1, self.period)
            near = next((n for n in longer if self.beyond(n, cache_bytes)), near)
        far = min(most, near + span)
        if far <= near:
            raise PreviewError(
                f"{self.name} has {count} layers with experts, too few to be told from two slices: `moelib twin` "
                "writes all of it, and moelib.run measures it"
            )
        return near, far

    def beyond(self, layers: int, cache_bytes: int) -> bool:
        """Whether the experts of the first layers are far larger than the CPU's cache."""
        return self.slice(layers).moved_bytes("cpu-moe") >= BEYOND_CACHE * cache_bytes


def length(r: Record) -> int:
    """Layers of the slice that a run was of."""
    return int(r.spec.scale.rpartition("-")[2])


def measured(r: Record, workload: str = WORKLOAD) -> tuple[float, float]:
    """(seconds per token after the first ones, TTFT of warm requests in seconds) of a run: medians, as a moment in
    which the machine did something else tells nothing of the model. Raises PreviewError where it has none."""
    requests = [q for q in r.observation.requests if q.workload == workload]
    steps = [step for q in requests for step in q.steps_s]
    first = [q.ttft_s for q in requests if q.index and q.ttft_s]
    if not steps or not first:
        raise PreviewError(f"{r.run_id} shows no times of tokens: look at its requests")
    return median(steps), median(first)


def choose(model: Model, settings: Placement, kind: str) -> tuple[tuple[int, int], tuple[Placement, ...]]:
    """The two slices that this machine holds, and the placements to run them in: without the baseline, if only the
    experts on the CPU leave room for two slices. Raises PreviewError with what is missing."""
    near, most = model.lengths(host.cache_bytes())
    free = files.free_bytes(models.folder())
    ram = psutil.virtual_memory().available
    vram = device.card_bytes() if kind == "cuda" else ram
    off, on = (replace(settings, cpu_layers=n, load_mode=LOAD_MODE) for n in (0.0, float("inf")))

    def lacks(far: int, placement: Placement) -> str | None:
        part = model.slice(far)
        need = memory.need(part, placement, RUN_CONTEXT, cuda=kind == "cuda")
        disk = part.file_bytes + model.slice(near).file_bytes
        host_bytes = need.ram_bytes + (0 if kind == "cuda" else need.buffers_bytes)  # the loopback device is in RAM
        for what, wanted, there in (
            ("disk", disk, free),
            ("RAM", int(SPARE * host_bytes), ram),
            ("VRAM", int(SPARE * need.vram_bytes), vram),
        ):
            if wanted > there:
                needed = f"slices of {near} and {far} layers need {stats.size(wanted)} of {what}"
                return f"{needed}, {stats.size(there)} are free"
        return None

    for placements in ((off, on), (on,)):
        for far in range(most, near, -model.period):
            if not any(lacks(far, p) for p in placements):
                return (near, far), placements
    why = lacks(near + model.period, on)
    raise PreviewError(f"{model.name} cannot be previewed here: {why}; take a smaller quant, or make room")


def measure(
    model: Model, lengths: Sequence[int], placements: Sequence[Placement], rounds: int, device_kind: str
) -> list[Record]:
    """The records of every slice in every placement, once a round, in random order.

    The slices are removed at the end, also of an interrupted run. Raises PreviewError as soon as a run fails.
    """
    cells = [(n, p) for n in lengths for p in placements]
    order = random.Random(0)
    todo = [(n, p, block, i) for block in range(rounds) for i, (n, p) in enumerate(order.sample(cells, len(cells)))]
    records = []
    models.folder().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=TEMPORARY, dir=models.folder()) as scratch:
        slices = {n: written(model, n, Path(scratch)) for n in lengths}
        context = min(RUN_CONTEXT, model.header.number("context_length") or RUN_CONTEXT)
        with bench.opened(list(slices.values()), device_kind) as ready:
            benches = dict(zip(slices, ready, strict=True))
            for n, placement, block, i in tqdm(todo, desc="runs of slices", unit="run", disable=None):
                at = str(placement), LOAD_MODE, (WORKLOAD,), REQUESTS, context, None, block, i
                records.append(_observed(model, n, benches[n].measure(*at)))
    return records


def _observed(model: Model, layers: int, r: Record) -> Record:
    if r.observed is None:
        why = f"{', '.join(r.reasons)}: {' '.join((r.message or '').split())[:300]}"
        raise PreviewError(
            f"the first {layers} layers of {model.name} do not run at {r.spec.placement} ({why}); {instead(model)}"
        )
    return r


def written(model: Model, layers: int, folder: Path) -> Path:
    """The twin of the first layers, as a file in `folder`. Raises PreviewError where the engine does not load it."""
    path = folder / f"{model.name}-first-{layers}.gguf"
    try:
        return quantize.twin(model.name, model.outline, layers=layers, out=path).path
    except (quantize.QuantizeError, GGUFError) as err:
        why = str(err).partition(";")[0]  # what it says to do is for whole models
        raise PreviewError(f"the engine does not load slices of {model.name}: {why}; {instead(model)}") from None


def instead(model: Model) -> str:
    """What works where slices do not."""
    size = stats.size(model.header.file_bytes)
    return f"`moelib twin` writes the whole of it ({size}), and moelib.run measures that"


def fits(model: Model, records: Sequence[Record], workload: str = WORKLOAD) -> tuple[predict.Fit, predict.Fit]:
    """(of a token, of a prompt): what the usable runs of slices tell. Raises PreviewError if they do not."""
    used = [r for r in records if r.done]
    parts = {n: model.slice(n) for n in {length(r) for r in used}}
    layers = [model.counted(parts[length(r)], r.spec.placed) for r in used]
    times = [measured(r, workload) for r in used]
    try:
        per_token, per_prompt = (
            predict.fit([Sample(at, t[i]) for at, t in zip(layers, times, strict=True)]) for i in (0, 1)
        )
    except ValueError as err:
        bad = sorted({f"{r.status} ({', '.join(r.reasons)})" for r in records if not r.done})
        why = f"; {len(records) - len(used)} runs are {', '.join(bad)}" if bad else ""
        raise PreviewError(f"{model.name}: {err}{why}; try again on a quiet machine, with more --rounds") from None
    return per_token, per_prompt
