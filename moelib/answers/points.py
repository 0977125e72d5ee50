"""What a study measured of a file in a placement, as one point; which points others dominate; what fits a card."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moelib.answers import quality
from moelib.base import stats
from moelib.base.stats import Estimate
from moelib.catalogue.facts import Manifest
from moelib.catalogue.placement import Placement
from moelib.study import frames
from moelib.study.study import Study

PROCESS_BYTES = 512 << 20
"""What the server takes of RAM beside weights: 247 to 512 MiB in the committed runs with a GPU."""
ALIKE = 0.01
"""What differs by less is called equal."""
NO_TIE = 0.5
"""What is half as fast is not called a tie, however wide an interval over two machines is."""


@dataclass(frozen=True, eq=False)
class Point:
    """A file in a placement: means over the rounds of a study, or between those of two measured placements."""

    model: str
    quant: str
    placement: Placement
    moved_layers: int
    """Layers whose experts the CPU keeps."""
    vram_bytes: float
    """The most that any of its runs needed; between two placements, of a line through both."""
    ram_bytes: float
    """Weights that stay in RAM, and what the server takes."""
    rate: Estimate
    """tokens/s; without an interval where it is predicted."""
    ttft: Estimate | None
    """Of warm requests, s."""
    bits_per_weight: float
    sources: dict[str, str]
    divergence: Estimate | None = None
    """From the unquantised file, in nats a token; None where it was not measured."""
    between: tuple[str, str] | None = None
    """The placements that it was predicted from; None of what was measured."""

    @property
    def is_measured(self) -> bool:
        return self.between is None

    def surely_faster(self, other: Point) -> bool:
        return _surely_less(other.rate, self.rate)

    def dominates(self, other: Point) -> bool:
        """Whether it is better than another in VRAM, tokens/s, TTFT or quality beyond doubt, and in none as much as a
        hundredth worse: what hardly can be told is not called beaten. Quality counts where both were measured."""
        better = _less(self.vram_bytes, other.vram_bytes) or self.surely_faster(other)
        worse = _less(other.vram_bytes, self.vram_bytes) or _less(self.rate.value, other.rate.value)
        for mine, its in ((self.ttft, other.ttft), (self.divergence, other.divergence)):
            better = better or _surely_less(mine, its)
            worse = worse or bool(mine and its and _less(its.value, mine.value))
        return better and not worse


def _less(a: float, b: float) -> bool:
    return a < (1 - ALIKE) * b


def _surely_less(a: Estimate | None, b: Estimate | None) -> bool:
    """Whether a 95 % interval lies wholly below another."""
    return bool(a and b and a.high is not None and b.low is not None and a.high < b.low)


def measured(study: Study, workload: str) -> list[Point]:
    """A point for each file and placement with a whole round, a manifest, and known VRAM and tokens/s; none of a file
    that was cold, which is no choice."""
    manifests = {(m.model, m.quant): m for m in study.manifests}
    names = (f"tokens_per_s/{workload}", f"ttft_warm_s/{workload}")
    lost = quality.by_file(study)
    found = []
    for rate, ttft in zip(*(frames.summaries(study.runs, name) for name in names), strict=True):
        manifest = manifests.get((rate.model, rate.quant))
        vram = rate.runs["vram_needed_bytes"]
        loss = lost.get((rate.model, rate.quant))
        placement = Placement.parse(*rate.side)
        if manifest and not placement.cold and len(rate.runs) and vram.notna().all():
            found.append(
                Point(
                    rate.model,
                    rate.quant,
                    placement,
                    int(rate.runs["moved_layers"].iloc[0]),
                    float(vram.max()),
                    _ram(rate.runs["moved_bytes"].iloc[0], rate.runs["vram_weights_bytes"].iloc[0], manifest),
                    stats.geometric_mean(list(rate.runs[names[0]]), frames.machines(rate.runs)),
                    stats.geometric_mean(list(ttft.runs[names[1]]), frames.machines(ttft.runs))
                    if len(ttft.runs)
                    else None,
                    manifest.bits_per_weight,
                    rate.sources | ttft.sources | (loss.sources if loss else {}),
                    loss.divergence if loss else None,
                )
            )
    return found


def _ram(moved_bytes: float, device_bytes: float, manifest: Manifest) -> float:
    """Weights that are not on the device, the input layer's table among them, and the server."""
    return max(moved_bytes, manifest.file_bytes - device_bytes) + PROCESS_BYTES


def front(points: Sequence[Point]) -> dict[Point, Point | None]:
    """Each point -> the fastest of those that dominate it; None of those on the Pareto front."""
    by = {p: [q for q in points if q.dominates(p)] for p in points}
    return {p: max(better, key=lambda q: q.rate.value) if better else None for p, better in by.items()}


def between(points: Sequence[Point], vram_bytes: float) -> Iterator[Point]:
    """Of each file the placement with the fewest layers on the CPU whose VRAM fits, between two that were measured in
    the same load mode: VRAM, RAM and the time of a token lie on a line through both, as bytes and time are per layer.

    None of files without a measured `n-cpu-moe=N`: how many of the first layers are dense is told by one.
    """
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for p in points:
        if p.placement == Placement(p.placement.cpu_layers, p.placement.load_mode):  # no other setting
            groups.setdefault((p.model, p.quant, p.placement.load_mode), []).append(p)
    for group in groups.values():
        dense = {p.placement.cpu_layers - p.moved_layers for p in group if p.placement.is_between}
        ordered = sorted(group, key=lambda p: p.moved_layers)
        for before, after in itertools.pairwise(ordered):
            if not dense or not after.vram_bytes <= vram_bytes < before.vram_bytes:
                continue
            share = (before.vram_bytes - vram_bytes) / (before.vram_bytes - after.vram_bytes)
            layers = math.ceil(before.moved_layers + share * (after.moved_layers - before.moved_layers))
            if before.moved_layers < layers < after.moved_layers:
                yield _on_line(before, after, layers, layers + max(dense))


def _on_line(a: Point, b: Point, layers: int, n: float) -> Point:
    share = (layers - a.moved_layers) / (b.moved_layers - a.moved_layers)

    def mix(x: float, y: float) -> float:
        return x + share * (y - x)

    rate = 1 / mix(1 / a.rate.value, 1 / b.rate.value)
    ttft = Estimate(mix(a.ttft.value, b.ttft.value), None, None, 0) if a.ttft and b.ttft else None
    return replace(
        a,
        placement=replace(a.placement, cpu_layers=n),
        moved_layers=layers,
        vram_bytes=mix(a.vram_bytes, b.vram_bytes),
        ram_bytes=mix(a.ram_bytes, b.ram_bytes),
        rate=Estimate(rate, None, None, 0),
        ttft=ttft,
        sources=a.sources | b.sources,
        between=(str(a.placement), str(b.placement)),
    )


@dataclass(frozen=True)
class Choice:
    """What is fastest on a card of so many GB in a machine with so much RAM."""

    best: Point
    ties: tuple[Point, ...]
    """Other quants whose tokens/s cannot be told from the best's."""


def in_load_mode(points: Sequence[Point], load_mode: str) -> list[Point]:
    """Of a file in a placement that was measured in several load modes, the point in this one. A baseline's is mmap: it
    leaves nothing in RAM that could be copied."""
    known = {(p.model, p.quant, p.placement) for p in points}

    def wanted(p: Point) -> Placement:
        return replace(p.placement, load_mode="mmap" if p.placement.is_baseline else load_mode)

    return [p for p in points if p.placement == wanted(p) or (p.model, p.quant, wanted(p)) not in known]


def choose(
    points: Sequence[Point],
    card_bytes: float,
    ram_bytes: float,
    *,
    finest: bool = False,
    load_mode: str = "mmap",
    predicted: bool = True,
) -> Choice | None:
    """The fastest of the points that fit, or that lie between two of them if predicted ones may be chosen; None where
    none fits. finest: of the quant with most bits per weight of those that fit. load_mode: taken where there are
    several."""
    fit = [p for p in in_load_mode(points, load_mode) if p.vram_bytes <= card_bytes]
    told = list(between(points, card_bytes)) if predicted else []
    in_mode = {p.quant for p in told if p.placement.load_mode == load_mode}
    fit += [p for p in told if p.placement.load_mode == load_mode or p.quant not in in_mode]
    fit = [p for p in fit if p.ram_bytes <= ram_bytes]
    if not fit:
        return None
    if finest:
        most = max(p.bits_per_weight for p in fit)
        fit = [p for p in fit if p.bits_per_weight == most]
    best = max(fit, key=lambda p: p.rate.value)
    fastest: dict[str, Point] = {}
    for p in sorted(fit, key=lambda p: p.rate.value):
        fastest[p.quant] = p
    ties = [p for p in fastest.values() if p.quant != best.quant and _alike(best, p)]
    return Choice(best, tuple(sorted(ties, key=lambda p: -p.rate.value)))


def _alike(a: Point, b: Point) -> bool:
    """Whether two rates, both measured, cannot be told apart; a is the faster."""
    near = b.rate.value > NO_TIE * a.rate.value
    return near and a.is_measured and b.is_measured and not a.surely_faster(b) and None not in (a.rate.low, b.rate.low)
