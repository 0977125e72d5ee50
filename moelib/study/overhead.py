"""How far the harness's own numbers are from the engine's: rates of a benchmark, kept, and the ratios they give.

`benchmarks/overhead.py` measures them and writes a file; a study's document shows what is in its folder.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from moelib.base import files, neutral, stats
from moelib.base.schema import Name, Sha256
from moelib.catalogue.facts import DeviceFacts, HostFacts
from moelib.catalogue.params import Strict

FOLDER = "harness"  # in a study's: one file for each model, quant and state of the harness that was looked at


Rate = Annotated[float, Field(gt=0, le=1e9)]
"""Tokens per second."""


class Rates(Strict):
    """Decode tokens per second of each request to one server."""

    client: list[Rate]
    """By arrival times here."""
    server: list[Rate]
    """By the server's own timings."""


class Round(Strict):
    """Each way of measuring once, in random order, each with a fresh process."""

    placement: Name
    order: list[Name]
    watched: Rates
    """With every monitor that a study's run has."""
    unwatched: Rates | None = None
    """Without them, in a process of its own; in files of earlier code."""
    toggled: list[tuple[Rate, Rate]] | None = None
    """(watched, unwatched) within one generation: its neighbouring slots of time, the monitors on in one of them."""
    bench: list[Rate] | None = None
    """Tokens per second by llama-bench, which streams and samples nothing."""
    on_device: Rates | None = None
    """With the next token chosen on the device where the build can: the logits stay there."""
    bare: list[Rate] | None = None
    """The server's rates so, with the answer in one piece: no event for each token."""


class About(Strict):
    """What the rates were measured with."""

    model: Name
    quant: Name
    scale: Name
    weights: Literal["twin", "real"]
    file_sha256: Sha256
    workload: Name
    engine: Name
    device: DeviceFacts
    host: HostFacts


class Overhead(Strict):
    """What the file holds."""

    model_config = ConfigDict(allow_inf_nan=False)

    about: About
    rounds: list[Round]
    digest: str


@dataclass(frozen=True)
class Ratio:
    """One of the ratios, above 1 where the first is faster."""

    name: str
    aim: str
    lowest: float
    highest: float
    of: Callable[[Round], Sequence[tuple[float, float]]]
    """The rates below and above the line, in pairs: one of a round, or as many as were drawn by lot within it."""

    def estimate(self, measurement: Overhead, placement: str) -> stats.Estimate | None:
        """Geometric mean over pairs with its interval; None where there are none."""
        pairs = [pair for r in measurement.rounds if r.placement == placement for pair in self.of(r)]
        return stats.ratio(pairs) if pairs else None

    def met(self, e: stats.Estimate) -> str:
        """yes or no where the whole interval says so, else undecided."""
        low, high = (e.value if x is None else x for x in (e.low, e.high))
        if self.lowest <= low and high <= self.highest:
            return "yes"
        return "no" if high < self.lowest or self.highest < low else "undecided"


def _pair(below: list[float] | None, above: list[float] | None) -> Sequence[tuple[float, float]]:
    return [(fmean(below), fmean(above))] if below and above else []


def _watched(r: Round) -> Sequence[tuple[float, float]]:
    """Slots of one generation where there are some: a process differs from the next by more than watching costs."""
    if r.toggled:
        return [(unwatched, watched) for watched, unwatched in r.toggled]
    return _pair(r.unwatched.client if r.unwatched else None, r.watched.client)


CLIENT = Ratio("client / server", "within 0.5 %", 0.995, 1.005, lambda r: _pair(r.watched.server, r.watched.client))
BENCH = Ratio("server / llama-bench", "within 3 %", 0.97, 1.03, lambda r: _pair(r.bench, r.watched.server))
ON_DEVICE = Ratio(
    "server, sampling on the device / llama-bench",
    "within 3 %",
    0.97,
    1.03,
    lambda r: _pair(r.bench, r.on_device.server if r.on_device else None),
)
BARE = Ratio(
    "server, sampling on the device, not streaming / llama-bench",
    "within 3 %",
    0.97,
    1.03,
    lambda r: _pair(r.bench, r.bare),
)
WATCHED = Ratio("monitored / unmonitored", "0.995 or better", 0.995, math.inf, _watched)
RATIOS = (CLIENT, BENCH, ON_DEVICE, BARE, WATCHED)


def ratios(measurement: Overhead) -> Iterator[tuple[str, Ratio, stats.Estimate]]:
    """(placement, ratio, estimate) of all that was measured."""
    for placement in dict.fromkeys(r.placement for r in measurement.rounds):
        for ratio in RATIOS:
            if (e := ratio.estimate(measurement, placement)) is not None:
                yield placement, ratio, e


def bias(accuracy: Iterable[Overhead]) -> str | None:
    """A sentence for each placement that watching surely slowed by more than the aim allows, None where it did not."""
    sentences, escaped = [], neutral.markdown
    for about, placement, ratio, e in (
        (measurement.about, *row) for measurement in accuracy for row in ratios(measurement)
    ):
        if ratio is WATCHED and e.high is not None and e.high < ratio.lowest:
            placement_text, model_text = escaped(placement), escaped(f"{about.model} at {about.quant}")
            sentences.append(
                f"**Monitoring slowed the runs**: {model_text}, {placement_text}, decoded at {stats.estimate(e)} times "
                f"its rate without monitoring. Rates of {placement_text} here are too low by about as much, and so are "
                "their ratios."
            )
    return " ".join(sentences) or None


def write(path: Path, about: dict[str, Any], rounds: list[dict[str, Any]]) -> Overhead:
    """Keep what was measured so far."""
    data = {"about": about, "rounds": rounds}
    whole = {**data, "digest": files.digest(data)}
    files.write_json(path, whole)
    return Overhead.model_validate(whole)


def read(path: Path) -> Overhead:
    """What was kept. Raises files.FileError if it is not what was written."""
    try:
        raw = path.read_bytes()
        stored = Overhead.model_validate_json(raw, strict=True)
        data = json.loads(raw)
        del data["digest"]
    except (OSError, ValueError, RecursionError):
        stored = None
    if stored is None or stored.digest != files.digest(data):
        raise files.FileError(f"{path.name} was changed or damaged; measure it again: benchmarks/overhead.py")
    return stored
