"""What a law is: a formula with its numbers, what it is of, and how far it is from runs that it did not see."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Literal, TypeVar

from moelib.base.stats import Estimate, span

if TYPE_CHECKING:
    import pandas as pd

HeldOut = Literal["nothing", "placement", "ends", "cell", "machine"]
"""What the fit that predicts a residual had not seen. nothing: it saw all. placement: the runs of that placement of the
model and quant. ends: all placements but those with least and most on the CPU. cell: all placements of the model and
quant with experts on the CPU. machine: that machine; the law of another one is scaled by the speed of their RAM."""


HELD_OUT: dict[HeldOut, str] = {
    "nothing": "nothing: fitted to it",
    "placement": "that placement",
    "ends": "all placements but the ends",
    "cell": "that model and quant on the CPU",
    "machine": "that machine",
}
"""Without what a residual was predicted, in words."""
ANY_FITS = "nothing: any runs fit it"
"""Instead, of a law with as many terms as placements, which no run can contradict."""
BEST: tuple[HeldOut, ...] = ("placement", "cell", "machine")
"""What says most of how a law predicts comes first."""


@dataclass(frozen=True)
class Parameter:
    """A number of a law, with its 95 % interval; None with the reason where the runs do not tell it."""

    name: str
    unit: str
    value: Estimate | None
    source: str
    reason: str | None = None


@dataclass(frozen=True)
class Residual:
    """One placement as it is predicted, and as its runs were."""

    held_out: HeldOut
    machine: str
    model: str
    quant: str
    placement: str
    load_mode: str
    measured: float
    """Mean over its runs, in the law's unit."""
    n: int
    """Runs."""
    predicted: float | None
    reason: str | None = None
    """Why nothing is predicted."""

    @classmethod
    def of(
        cls, held_out: HeldOut, runs: pd.DataFrame, column: str, predicted: float | None, reason: str | None
    ) -> Residual:
        """Of the runs of one placement. column: what was measured. reason: why nothing is predicted, if so."""
        return cls(
            held_out=held_out,
            machine=", ".join(dict.fromkeys(runs["machine"])),
            model=runs["model"].iloc[0],
            quant=runs["quant"].iloc[0],
            placement=runs["placement"].iloc[0],
            load_mode=runs["load_mode"].iloc[0],
            measured=float(runs[column].mean()),
            n=len(runs),
            predicted=predicted,
            reason=reason if predicted is None else None,
        )

    @property
    def off(self) -> float | None:
        """How far the prediction is from what was measured, as a share of that."""
        return None if self.predicted is None else self.predicted / self.measured - 1


@dataclass(frozen=True)
class Errors:
    """How far predictions are off, above or below, as shares of what was measured."""

    median: float
    largest: float
    n: int
    """Placements."""


def errors(residuals: Iterable[Residual], held_out: HeldOut) -> Errors | None:
    """Of the residuals of this kind; None where there is none."""
    off = [abs(r.off) for r in residuals if r.held_out == held_out and r.off is not None]
    return Errors(median(off), max(off), len(off)) if off else None


def held_out(residuals: Iterable[Residual]) -> HeldOut:
    """The best kind of residual that there is; `nothing` where the fit saw all that it predicts."""
    kinds = {r.held_out for r in residuals if r.off is not None}
    return next((kind for kind in BEST if kind in kinds), "nothing")


@dataclass(frozen=True)
class Domain:
    """What a law is of; of anything else it says nothing."""

    gpu: str
    machines: tuple[str, ...]
    models: tuple[str, ...]
    quants: tuple[str, ...]
    load_mode: str
    workload: str
    scale: str
    context: int
    threads: tuple[int, ...]
    """Of the CPU."""
    ram_bytes_per_s: float | None
    """What all CPUs together read: the median of what was measured before the runs."""

    @property
    def question(self) -> tuple[object, ...]:
        """What is asked, wherever it was answered."""
        return self.models, self.quants, self.load_mode, self.workload, self.scale, self.context

    def covers(self, other: Domain) -> bool:
        """Whether all of another domain is in this one."""
        same = ("gpu", "load_mode", "workload", "scale", "context")
        return all(getattr(self, k) == getattr(other, k) for k in same) and all(
            set(getattr(other, k)) <= set(getattr(self, k)) for k in ("machines", "models", "quants")
        )

    def __str__(self) -> str:
        machines = f"machine{'s' * (len(self.machines) > 1)} {', '.join(self.machines)}"
        ram = "of unknown speed" if self.ram_bytes_per_s is None else f"of {self.ram_bytes_per_s / 1e9:.3g} GB/s"
        asked = f"load mode {self.load_mode}, {self.workload}"
        return f"{self.gpu} ({machines}; {span(self.threads, str)} CPU threads, RAM {ram}; {asked})"


@dataclass(frozen=True)
class Labelled:
    """A number that was not measured; what it is belongs to it."""

    value: float
    unit: str
    label: str

    def __str__(self) -> str:
        return f"{self.value:.3g} {self.unit}, {self.label}"


@dataclass(frozen=True, kw_only=True)
class Law:
    """A law, or why there is none."""

    name: str
    unit: str
    formula: str
    domain: Domain
    n: int
    """Runs that it was fitted to."""
    parameters: tuple[Parameter, ...] = ()
    spread: float | None = None
    """Standard deviation of a run from it, as a share of what was measured."""
    residuals: tuple[Residual, ...] = ()
    sources: dict[str, str] = field(repr=False)
    """Run id -> digest of the records behind it."""
    reason: str | None = None
    """Why the runs give no law."""

    def errors(self, held_out: HeldOut) -> Errors | None:
        return errors(self.residuals, held_out)


AnyLaw = TypeVar("AnyLaw", bound=Law)


def standing(laws: Iterable[AnyLaw]) -> list[AnyLaw]:
    """Of laws with the shared ones first: those that the runs tell, without those of a part of what one before has."""
    found: list[AnyLaw] = []
    for law in laws:
        if law.reason is None and not any(before.domain.covers(law.domain) for before in found):
            found.append(law)
    return found
