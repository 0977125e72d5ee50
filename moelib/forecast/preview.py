"""What a model's placements will give on this machine, before it is downloaded: two slices of its twin are measured.

The slices are the model's first layers in its own types, with random weights; the real engine runs them here in
audited runs, and `predict` extends their times to the whole. Whatever is predicted is said to be.
"""

from __future__ import annotations

import html
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moelib.audit.record import Record
from moelib.base import stats
from moelib.base.stats import Estimate
from moelib.engine import engine
from moelib.engine.client import WARM_UP
from moelib.forecast import predict, slices
from moelib.forecast.slices import LOAD_MODE, WORKLOAD, Model, PreviewError, instead, length, measured
from moelib.machine import host
from moelib.measure import device
from moelib.planner import budget, named
from moelib.planner.budget import Plan
from moelib.planner.memory import Need

if TYPE_CHECKING:
    import pandas as pd

ROUNDS, LEAST_ROUNDS = 3, 2


@dataclass(frozen=True)
class Row:
    """One placement of the whole model: what it needs by its header, and what it will give; both are predictions."""

    need: Need
    tokens_per_s: Estimate | None
    ttft_s: Estimate | None
    """Of 512 prompt tokens, on a warm server, load mode none."""


@dataclass(frozen=True)
class Preview:
    """Predicted speeds of every placement, with the runs of the slices that they come from."""

    plan: Plan
    rows: tuple[Row, ...]
    records: tuple[Record, ...]
    """Of all runs of the slices, audited; those that are not valid or degraded were not used."""
    notes: tuple[str, ...]
    """What is not predicted, and why."""
    command: str

    @property
    def chosen(self) -> Row:
        """The placement that fits with the fewest experts on the CPU."""
        return next(r for r in self.rows if r.need is self.plan.chosen)

    @property
    def frame(self) -> pd.DataFrame:
        """One row for each placement; all of it is predicted."""
        import pandas as pd

        rows = []
        for r in self.rows:
            row: dict[str, object] = {"placement": str(r.need.placement), "vram_bytes": r.need.vram_bytes}
            row |= {"ram_bytes": r.need.ram_bytes, "fits": self.plan.budget.fits(r.need)}
            for name, e in (("tokens_per_s", r.tokens_per_s), ("ttft_s", r.ttft_s)):
                row |= {name: e and e.value, f"{name}_low": e and e.low, f"{name}_high": e and e.high}
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def evidence(self) -> pd.DataFrame:
        """One row for each run of a slice: its id, layers, placement, status and what it showed."""
        import pandas as pd

        rows = []
        for r in self.records:
            shown = measured(r) if r.observed is not None else (None, None)
            row = {"run_id": r.run_id, "layers": length(r), "placement": r.spec.placement, "status": r.status}
            rows.append(row | {"reasons": ", ".join(r.reasons), "s_per_token": shown[0], "ttft_s": shown[1]})
        return pd.DataFrame(rows)

    def lines(self) -> Iterator[str]:
        """The preview as text, its answer first."""
        one, plan = self.chosen, self.plan
        speed, first = stats.estimate(one.tokens_per_s), stats.estimate(one.ttft_s)
        vram = budget.gib(plan.budget.vram_bytes)
        where = f"{plan.header.path.name} on {vram} of VRAM: {one.need.placement}"
        yield f"{where}, predicted {speed} tokens/s, TTFT {first} s"
        yield self.command
        yield ""
        speeds = f"{'tokens/s [low, high]':>26}{'TTFT, s [low, high]':>28}"
        yield f"{'placement':<28}{'VRAM, GiB':>10}{speeds}  all predicted"
        for r in self.rows:
            mark = "  <-" if r is one else "" if plan.budget.fits(r.need) else "  too much"
            cells = f"{stats.estimate(r.tokens_per_s):>26}{stats.estimate(r.ttft_s):>28}"
            yield f"{r.need.placement!s:<28}{r.need.vram_bytes / budget.GIB:>10.2f}{cells}{mark}"
        yield ""
        yield from self.notes
        used = [r for r in self.records if r.done]
        lengths = " and ".join(map(str, sorted({length(r) for r in used})))
        yield (
            f"From {len(used)} of {len(self.records)} audited runs of twins of the first {lengths} layers on "
            f"{used[0].device.name}{self._flagged()}. Brackets: 95 % for one run, by what the slices show; what bends "
            "beyond them is not in it."
        )
        yield (
            f"TTFT is of the 512 different prompt tokens of {WORKLOAD} on a warm server at load mode {LOAD_MODE}; "
            f"tokens/s is with them in the cache, after the first {WARM_UP} tokens."
        )

    def _flagged(self) -> str:
        """How many runs are not valid, with their reasons."""
        flagged = [r for r in self.records if r.status != "valid"]
        reasons = sorted({reason for r in flagged for reason in r.reasons})
        return f"; {len(flagged)} of them are flagged: {', '.join(reasons)}" if flagged else ""

    def __repr__(self) -> str:
        one = self.chosen
        speed = stats.estimate(one.tokens_per_s)
        return f"<Preview {self.plan.header.path.name}: {one.need.placement}, {speed} tokens/s predicted>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(chr(10).join(self.lines()))}</pre>"


def preview(
    what: str | Path,
    vram_bytes: int | None = None,
    ram_bytes: int | None = None,
    context: int | None = None,
    ubatch: int | None = None,
    kv: str | None = None,
    quant: str | None = None,
    scale: str = "full",
    rounds: int = ROUNDS,
    device_kind: str = "auto",
) -> Preview:
    """Measure two slices of a model here and predict every placement of the whole.

    what, quant: as `named.outline` takes them. vram_bytes: of the card it is for; default: this machine's. The slices
    lie in the folder of models while they are measured. Raises PreviewError; PlanError where nothing fits, before
    anything is written; and what `named.outline`, `quantize.twin` and `bench.one` raise.
    """
    if rounds < LEAST_ROUNDS:
        raise PreviewError(f"{rounds} round of runs gives no interval: take --rounds {LEAST_ROUNDS} or more")
    model = Model(*named.outline(what, quant, scale))
    path = Path(what) if quant is None and Path(what).is_file() else Path(f"{model.name}-{model.header.label}.gguf")
    card = vram_bytes or device.card_bytes()
    plan = budget.plan(replace(model.header, path=path), card, ram_bytes, context, ubatch, kv)
    plan.chosen  # noqa: B018  # refuses what fits nowhere
    llama = engine.find()
    where = device.choose(device_kind, llama)
    if where.kind == "none":
        raise PreviewError(f"there is no device to offload from: {where.note or 'run `moelib doctor`'}")
    lengths, placements = slices.choose(model, plan.settings, where.kind)
    records = slices.measure(model, lengths, placements, rounds, where.kind)
    loads = replace(plan.chosen.placement, load_mode=LOAD_MODE).load_flags(llama.help.flags)
    command = shlex.join([*shlex.split(plan.command), *(part for flag in loads.items() for part in flag if part)])
    return predicted(model, plan, records, command)


def predicted(model: Model, plan: Plan, records: Sequence[Record], command: str = "") -> Preview:
    """The preview that records of slices give. Raises PreviewError if they do not."""
    per_token, per_prompt = slices.fits(model, records)
    kinds, machines = {r.device.kind for r in records}, {r.host.ram_bytes for r in records}
    ram, cache, notes = min(machines), host.cache_bytes(), []
    lengths = sorted({length(r) for r in records})
    all_experts = model.header.moved_bytes("cpu-moe")
    cached = bool(cache) and not model.beyond(lengths[0], cache or 0) and all_experts > (cache or 0)
    rows, unknown = [], 0
    for need in plan.needs:
        layers = model.counted(model.header, need.placement)
        hidden = (cached and layers.on_cpu) or need.ram_bytes > ram
        token, prompt = (None, None) if hidden else (per_token.at(layers), per_prompt.at(layers))
        rows.append(Row(need, predict.rate(token), prompt))
        unknown += not hidden and (token is None or prompt is None)
    if "loopback" in kinds:
        notes.append("Measured on the loopback device, two processes on this CPU: these speeds are not those of a GPU.")
    if not model.regular:
        notes.append(
            "Its layers are of several kinds in no regular order and are taken as alike: the brackets may be too "
            "narrow."
        )
    if cached:
        notes.append(
            f"n/a with experts on the CPU: much of those of {lengths[0]} layers stays in this CPU's cache "
            f"({stats.size(cache)}), of the whole model's little does; {instead(model)}."
        )
    if any(n.ram_bytes > ram for n in plan.needs):
        notes.append(
            f"n/a where a placement needs more than this machine's {stats.size(ram)} of RAM: it would read the disk "
            "for each token; take a smaller quant."
        )
    if not any(r.spec.placed.is_baseline for r in records):
        notes.append("n/a with layers all on the GPU: two slices do not fit this GPU; take a smaller quant.")
    elif unknown:
        notes.append(
            f"n/a in {unknown} placements: longer slices did not take longer, the runs' spread hides it; try again on "
            "a quiet machine, with more --rounds."
        )
    return Preview(plan, tuple(rows), tuple(records), tuple(notes), command)
