"""What is looked at: a study and the choices made on it. Tables and figures of this package are made of a `View`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd

from moelib.answers import points
from moelib.answers.points import Point
from moelib.base.schema import near
from moelib.catalogue.placement import Placement
from moelib.laws import speed
from moelib.laws.law import Labelled
from moelib.laws.speed import TimeLaw
from moelib.laws.vram import Parts, VramLaw, vram
from moelib.study import study as studies
from moelib.study.plan import StudyError
from moelib.study.study import Study, UnknownName

GB = 10**9
"""Bytes of a GB of the budget; most cards' GB have 2^30."""
CARD_GB = 12.0
NO_LAW = "no runs of this load mode with experts on the CPU, and none without"
NO_RAM = "its records do not have the speed of their machine's RAM"
COPIED = "none"
"""The load mode whose experts go to the GPU at the speed of the bus."""
NOT_COPIED = f"only of load mode {COPIED} is it known that what is copied to the GPU goes at the speed of the bus"


@dataclass(frozen=True)
class Placed:
    """A point with its speed, and how that is known."""

    point: Point
    rate: float
    """tokens/s."""
    ttft_s: float | None
    """Of warm requests; None where nothing tells it."""
    known: str
    """measured, predicted, or estimated for other RAM."""


@dataclass(frozen=True, eq=False)
class View:
    """A model of a study at some quants, a budget of VRAM, and what a machine that was not measured would have."""

    study: Study
    model: str
    quants: tuple[str, ...]
    vram_bytes: float
    """The budget."""
    context: int | None = None
    """Tokens; None: as measured."""
    ram_bytes_per_s: float | None = None
    """What all CPUs together read; None: as measured."""

    @property
    def workload(self) -> str:
        """The study's last, whose tokens/s and TTFT its document has first."""
        return self.study.parameters.workloads[-1]

    @cached_property
    def runs(self) -> pd.DataFrame:
        """The usable runs of the model and quants."""
        runs = self.study.runs
        return runs[(runs["model"] == self.model) & runs["quant"].isin(self.quants)]

    @cached_property
    def measured(self) -> list[Point]:
        """Every placement, as it was measured."""
        every = points.measured(self.study, self.workload)
        return [p for p in every if p.model == self.model and p.quant in self.quants]

    @cached_property
    def points(self) -> list[Point]:
        """Every placement with its VRAM at the chosen context; without those of which that is not told."""
        if self.context is None:
            return self.measured
        at = [(p, self.parts(p)) for p in self.measured]
        return [replace(p, vram_bytes=parts.total) for p, parts in at if parts]

    def runs_of(self, point: Point) -> pd.DataFrame:
        placed = (self.runs["placement"] == str(point.placement)) & (
            self.runs["load_mode"] == point.placement.load_mode
        )
        return self.runs[placed & (self.runs["quant"] == point.quant)]

    def parts(self, point: Point) -> Parts | None:
        """VRAM of a measured placement by what takes it: of its runs or, at a chosen context, by the law of VRAM; None
        where that does not tell it."""
        own = self.runs_of(point)
        if self.context is None:
            weights, cache, compute = (float(own[f"vram_{of}_bytes"].mean()) for of in ("weights", "cache", "compute"))
            rest = float(own["vram_bytes"].mean()) - weights - cache - compute
            return None if pd.isna(rest) else Parts(weights, cache, compute, rest)
        law = self.vram_laws.get(point.quant)
        if law is None or point.placement.context is not None:
            return None
        return law.parts(float(own["vram_weights_bytes"].iloc[0]), point.moved_layers > 0, self.context)

    @cached_property
    def vram_laws(self) -> dict[str, VramLaw]:
        """Quant -> the law of its VRAM."""
        return {law.domain.quants[0]: law for law in vram(self.runs)}

    @cached_property
    def laws(self) -> dict[tuple[str, str], TimeLaw]:
        """Quant and load mode -> the law of a token's time, told or not; of several machines that with most runs."""
        found: dict[tuple[str, str], TimeLaw] = {}
        for quant in self.quants:
            for law in speed.decode(self.runs[self.runs["quant"] == quant], self.workload):
                if "cost x" in law.formula:  # of one quant: the cost per layer is in the speed
                    continue
                key = quant, law.domain.load_mode
                if key not in found or law.n > found[key].n:
                    found[key] = law
        return found

    def estimate(self, quant: str, load_mode: str, layers: float) -> Labelled | None:
        """tokens/s with the experts of so many layers on the CPU, for the chosen RAM; None where it is not told."""
        law = self.laws.get((quant, load_mode))
        if not self.ram_bytes_per_s or law is None or not law.domain.ram_bytes_per_s:
            return None
        told = law.estimate(self.model, quant, layers, ram_bytes_per_s=self.ram_bytes_per_s)
        return None if told is None else Labelled(1 / told.value, "tokens/s", told.label)

    @cached_property
    def prompt_laws(self) -> dict[tuple[str, str], TimeLaw]:
        """Quant and load mode -> the law of a warm prompt's TTFT, told or not; of all machines together."""
        every = (speed.ttft(self.runs[self.runs["quant"] == quant], self.workload) for quant in self.quants)
        return {(law.domain.quants[0], law.domain.load_mode): law for of in every for law in reversed(of)}

    def estimate_ttft(self, quant: str, load_mode: str, layers: float) -> Labelled | None:
        """TTFT in s with the experts of so many layers on the CPU, for the chosen RAM and the bus as it was measured:
        copying goes at the slower of both. None where it is not told."""
        law = self.prompt_laws.get((quant, load_mode))
        if not self.ram_bytes_per_s or law is None or law.reason or load_mode != COPIED:
            return None
        bus = 1 / (law.per_byte * law.per_byte_s)
        told = law.estimate(self.model, quant, layers, bus_bytes_per_s=min(bus, self.ram_bytes_per_s))
        if told is None or self.ram_bytes_per_s >= bus:
            return told
        return replace(told, label=told.label.replace("a bus of", "a bus that waits for RAM of", 1))

    @cached_property
    def placed(self) -> list[Placed]:
        """What was measured and what lies between two of it at the budget, with tokens/s here or for the chosen RAM."""
        return [one for p in [*self.points, *points.between(self.points, self.vram_bytes)] if (one := self._placed(p))]

    def _placed(self, p: Point) -> Placed | None:
        between = None if p.between is None else f"predicted between {' and '.join(p.between)}"
        if self.ram_bytes_per_s is None or not p.moved_layers:
            ttft_s = p.ttft.value if p.ttft else None
            return Placed(p, p.rate.value, ttft_s, between or f"measured, n = {p.rate.n}")
        where = p.quant, p.placement.load_mode, p.moved_layers
        told, ttft = self.estimate(*where), self.estimate_ttft(*where) if is_plain(p.placement) else None
        known = f"estimated, RAM of {self.ram_bytes_per_s / GB:g} GB/s"
        return None if told is None else Placed(p, told.value, ttft.value if ttft else None, known)

    @property
    def notes(self) -> list[str]:
        """What is predicted or estimated, from which law, of what; and what is not, with the reason."""
        return list(dict.fromkeys([*self._on_speed(), *self._on_context()]))

    def _on_speed(self) -> Iterator[str]:
        if self.ram_bytes_per_s is None:
            return
        for quant in self.quants:
            moved = self.runs[(self.runs["quant"] == quant) & (self.runs["moved_layers"] > 0)]
            for mode in moved["load_mode"].unique():
                told = self.estimate(quant, mode, 1)
                law = self.laws.get((quant, mode))
                why = NO_LAW if law is None else law.reason or NO_RAM
                yield f"tokens/s of {quant}, {mode}: {told.label if told else 'not told: ' + why}."
                ttft = self.estimate_ttft(quant, mode, 1)
                prompt = self.prompt_laws.get((quant, mode))
                why = NO_LAW if prompt is None else prompt.reason or NOT_COPIED
                yield f"TTFT of {quant}, {mode}: {ttft.label if ttft else 'not told: ' + why}."

    def _on_context(self) -> Iterator[str]:
        if self.context is None:
            return
        for quant in self.quants:
            law = self.vram_laws.get(quant)
            if law is None:
                yield f"VRAM of {quant} at {self.context:,} tokens: not told: its records lack parts of VRAM."
            elif any(p.quant == quant for p in self.points):
                yield f"VRAM of {quant} at {self.context:,} tokens: estimated by a law of runs on {law.domain}."
            else:
                why = next((p.reason for p in law.parameters if p.reason), "no run shows it")
                yield f"VRAM of {quant} at {self.context:,} tokens: not told: {why}."


def is_plain(placement: Placement) -> bool:
    """Whether it has no setting beside layers and load mode, as laws are of such."""
    return placement == Placement(placement.cpu_layers, placement.load_mode)


def at(
    study: Study | str,
    model: str | None = None,
    quant: str | None = None,
    vram_gb: float | None = None,
    context: int | None = None,
    ram_gb_per_s: float | None = None,
) -> View:
    """The view of a study, by its name or as it was loaded: its first model, all quants, a budget that all of it fits.

    context, ram_gb_per_s: of a machine that was not measured, for estimates. Raises UnknownName, StudyError.
    """
    loaded = load(study) if isinstance(study, str) else study
    models = list(loaded.runs["model"].unique())
    chosen = _one_of(models, model or models[0], f"model of {loaded.name}")
    of_model = loaded.runs[loaded.runs["model"] == chosen]
    quants = tuple(of_model["quant"].unique())
    if quant:
        quants = (_one_of(list(quants), quant, f"quant of {chosen} in {loaded.name}"),)
    budget = vram_gb * GB if vram_gb else most_bytes(of_model)
    ram = ram_gb_per_s * GB if ram_gb_per_s else None
    return View(loaded, chosen, quants, budget, context, ram)


def load(name: str) -> Study:
    """The study, if it has what can be looked at. Raises UnknownName, StudyError."""
    study = studies.load(name)
    if study.runs.empty:
        raise StudyError(f"{name} has no whole round that is usable; `moelib study status {name}` says why")
    return study


def most_bytes(runs: pd.DataFrame) -> float:
    """The most VRAM that any of the runs needed; of a usual card, where that is known of none."""
    known = runs["vram_needed_bytes"].dropna()
    return float(known.max()) if len(known) else CARD_GB * GB


def code(view: View, make: Callable[..., object], *args: object) -> str:
    """Three lines that make what `make(view, *args)` makes."""
    module = make.__module__.rpartition(".")[2]
    choices = [repr(view.study.name), repr(view.model), *([repr(view.quants[0])] if len(view.quants) == 1 else [])]
    choices.append(f"vram_gb={view.vram_bytes / GB:.4g}")
    choices += [f"context={view.context}"] if view.context else []
    choices += [f"ram_gb_per_s={view.ram_bytes_per_s / GB:.4g}"] if view.ram_bytes_per_s else []
    given = ", ".join(["seen", *map(repr, args)])
    return (
        f"from moelib.explore import {', '.join(sorted({module, 'view'}))}\n"
        f"seen = view.at({', '.join(choices)})\n"
        f"{module}.{make.__name__}({given})"
    )


def _one_of(names: list[str], name: str, what: str) -> str:
    if name not in names:
        raise UnknownName(f"no {what} is {name!r}{near(name, names)}")
    return name
