"""Which placement fits a card: the fewest layers' experts on the CPU, and what each choice needs."""

from __future__ import annotations

import html
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from moelib.base.schema import UserError
from moelib.catalogue.placement import KV, KV_TYPES, UBATCH, Placement
from moelib.gguf.gguf_header import Header
from moelib.planner.memory import CONTEXT_BYTES, LOOPBACK_BYTES, Need, need

if TYPE_CHECKING:
    import pandas as pd

CONTEXT = 8192  # tokens, where the model allows it and nobody says otherwise
LEAST_CONTEXT, LEAST_UBATCH = 1024, 32
GIB = 1 << 30


CLOSE = 0.03
"""Plans are right to this share of a card's memory (docs/PLANNER.md): what is nearer to all of it may not fit."""


class PlanError(UserError):
    """Nothing fits, or the question makes no sense for the model; the message says what would."""


def gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / (1 << 20):.0f} MiB"


@dataclass(frozen=True)
class Budget:
    """What may be used, and for what."""

    vram_bytes: int
    ram_bytes: int | None = None
    context: int = CONTEXT
    """Tokens of prompt and answer together."""
    cuda: bool = True
    """Whether the device is a GPU with CUDA; else one without its peculiarities, such as the loopback one."""

    @property
    def context_bytes(self) -> int:
        """What a process holds on the device beside the engine's buffers."""
        return CONTEXT_BYTES if self.cuda else LOOPBACK_BYTES

    def fits(self, need: Need) -> bool:
        ram = self.ram_bytes is None or need.ram_bytes <= self.ram_bytes
        return ram and need.vram_bytes <= self.vram_bytes


@dataclass(frozen=True)
class Plan:
    """What each number of layers needs, and the placement that fits with the fewest experts on the CPU."""

    header: Header
    budget: Budget
    settings: Placement
    """Settings that all placements have: ubatch, KV type, op-offload; its layers do not count."""

    @cached_property
    def needs(self) -> tuple[Need, ...]:
        """Of every placement that differs, from the one with most on the GPU to the one with least."""
        placements = [0.0, *(layer + 1 for layer in self.header.expert_layers[:-1]), float("inf")]
        budget = self.budget
        return tuple(
            need(self.header, replace(self.settings, cpu_layers=n), budget.context, budget.context_bytes, budget.cuda)
            for n in placements
        )

    @cached_property
    def chosen(self) -> Need:
        """The first that fits. Raises PlanError with what would fit if none does."""
        for one in self.needs:
            if self.budget.fits(one):
                return one
        raise PlanError(self._nothing())

    @property
    def command(self) -> str:
        """The whole command of llama.cpp's server for the chosen placement."""
        return self.command_for(self.chosen.placement)

    def command_for(self, placement: Placement) -> str:
        argv = ["llama-server", "-m", str(self.header.path), "-ngl", "999", "-c", str(self.budget.context)]
        argv += ["-np", "1", "-fa", "on", "--fit", "off"]
        for flag, value in placement.flags().items():
            argv += [flag] if value is None else [flag, value]
        return shlex.join(argv)

    @property
    def frame(self) -> pd.DataFrame:
        """One row for each placement: bytes by term, and whether it fits."""
        import pandas as pd

        rows = [
            {
                "placement": str(n.placement),
                "weights_bytes": n.weights_bytes,
                "cache_bytes": n.cache_bytes,
                "compute_bytes": n.compute_bytes,
                "context_bytes": n.context_bytes,
                "vram_bytes": n.vram_bytes,
                "ram_bytes": n.ram_bytes,
                "fits": self.budget.fits(n),
            }
            for n in self.needs
        ]
        return pd.DataFrame(rows)

    def lines(self) -> Iterator[str]:
        """The plan as text, its answer first. Raises PlanError."""
        one, budget = self.chosen, self.budget
        what = "all of it on the GPU" if one.placement.is_baseline else f"{_words(one.placement)} on the CPU"
        name, vram = self.header.path.name, gib(budget.vram_bytes)
        yield f"{name} fits {vram} of VRAM with {what}: predicted {gib(one.vram_bytes)}"
        yield self.command
        yield ""
        titles = "weights", "KV", "compute", "context", "VRAM", "RAM"
        yield f"{'placement':<28}" + "".join(f"{title:>9}" for title in titles) + "  GiB, predicted"
        for n in self._shown():
            terms = n.weights_bytes, n.cache_bytes, n.compute_bytes, n.context_bytes, n.vram_bytes, n.ram_bytes
            mark = "  <-" if n is one else "" if budget.fits(n) else "  too much"
            yield f"{n.placement!s:<28}" + "".join(f"{value / GIB:9.2f}" for value in terms) + mark
        yield ""
        said = f"For {budget.context} tokens; {gib(budget.vram_bytes - one.vram_bytes)} of the budget are left."
        if budget.cuda:
            said += f" The GPU's own context is taken as {one.context_bytes >> 20} MiB, as on an H100 and an H200."
        yield said

    def _shown(self) -> list[Need]:
        """Both ends, the chosen one with its neighbours, and some between."""
        needs, at = self.needs, self.needs.index(self.chosen)
        step = max(1, len(needs) // 6)
        keep = {0, len(needs) - 1, *range(max(0, at - 1), min(len(needs), at + 2)), *range(0, len(needs), step)}
        return [n for i, n in enumerate(needs) if i in keep]

    def __repr__(self) -> str:
        return (
            f"<Plan {self.header.path.name}: {self.chosen.placement}, {gib(self.chosen.vram_bytes)} of VRAM predicted>"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(chr(10).join(self.lines()))}</pre>"

    def _nothing(self) -> str:
        """Why nothing fits, and the nearest change with which something would."""
        least, budget = min(self.needs, key=lambda n: n.vram_bytes), self.budget
        why = f"{self.header.path.name} does not fit {gib(budget.vram_bytes)} of VRAM: "
        if budget.ram_bytes is not None and any(n.vram_bytes <= budget.vram_bytes for n in self.needs):
            least = min((n for n in self.needs if n.vram_bytes <= budget.vram_bytes), key=lambda n: n.ram_bytes)
            why = f"{self.header.path.name} does not fit {gib(budget.ram_bytes)} of RAM beside the card: "
            return why + f"{least.placement} needs {gib(least.ram_bytes)}; take a smaller quant"
        why += f"even {least.placement} needs {gib(least.vram_bytes)}"
        for change, budget, settings in self._changes():
            other = Plan(self.header, budget, settings)
            if any(budget.fits(n) for n in other.needs):
                return f"{why}; it fits with {change}"
        return f"{why}; take a smaller quant or model"

    def _changes(self) -> Iterator[tuple[str, Budget, Placement]]:
        """Ways to need less, the least harmful first."""
        budget, settings, said = self.budget, self.settings, ""
        if settings.kv is None:
            settings, said = replace(settings, kv="q8_0"), "--kv q8_0"
            yield said, budget, settings
        while budget.context > LEAST_CONTEXT:
            budget = replace(budget, context=max(LEAST_CONTEXT, budget.context // 2))
            yield f"{said} --context {budget.context}".strip(), budget, settings
        said = f"{said} --context {budget.context}".strip() if budget is not self.budget else said
        small = replace(settings, ubatch=LEAST_UBATCH - 1)
        yield f"{said} --ubatch {small.ubatch}, at which prompts are computed where the weights are", budget, small


def plan(
    header: Header,
    vram_bytes: int,
    ram_bytes: int | None = None,
    context: int | None = None,
    ubatch: int | None = None,
    kv: str | None = None,
    cuda: bool = True,
) -> Plan:
    """The plan for a file on a card of `vram_bytes`, of which all may be used.

    context: tokens, 8,192 or the model's by default. ubatch, kv: as in a placement, llama.cpp's defaults if None. cuda:
    whether the device is a GPU, with a context of its own.
    Raises PlanError for a dense model, a context beyond the model's, an unknown KV type; UnknownCache.
    """
    name, most = header.path.name, header.number("context_length")
    if not header.expert_layers:
        raise PlanError(
            f"{name} is a dense model: it has no experts to keep on the CPU; "
            "`llama-server -ngl N` keeps whole layers there"
        )
    if most is not None and context is not None and context > most:
        raise PlanError(f"{name} was trained for {most} tokens, fewer than {context}: take --context {most} or less")
    if kv is not None and kv not in KV_TYPES:
        raise PlanError(f"{kv!r} is no type of the KV cache: take one of {', '.join(KV_TYPES)}")
    if ubatch is not None and ubatch < 1:
        raise PlanError(
            f"a ubatch of {ubatch} computes nothing: take {LEAST_UBATCH} or more, or leave it out ({UBATCH})"
        )
    if fault := header.fault():
        raise PlanError(f"{name}: {fault}")
    tokens = min(CONTEXT, most or CONTEXT) if context is None else context
    settings = Placement(0, ubatch=None if ubatch == UBATCH else ubatch, kv=None if kv == KV else kv)
    return Plan(header, Budget(vram_bytes, ram_bytes, tokens, cuda), settings)


def compared(plans: Sequence[Plan]) -> Iterator[str]:
    """What plans of several files of one model come to, a line each."""
    vram = gib(plans[0].budget.vram_bytes)
    yield f"{'on ' + vram + ' of VRAM':<34}{'file':>9}{'VRAM':>9}{'RAM':>9}  GiB, predicted; placement"
    for p in plans:
        try:
            n = p.chosen
        except PlanError as err:
            yield str(err)
            continue
        sizes = p.header.file_bytes, n.vram_bytes, n.ram_bytes
        yield f"{p.header.path.name:<34}" + "".join(f"{size / GIB:9.2f}" for size in sizes) + f"  {n.placement}"


def _words(placement: Placement) -> str:
    if placement.is_whole:
        return "all experts"
    n = int(placement.cpu_layers)
    return "the first layer's experts" if n == 1 else f"the experts of the first {n} layers"
