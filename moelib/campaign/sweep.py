"""One file on one card, without a study's YAML: planned from its header, run in paired rounds, audited, answered.

The smallest N that fits is proven by runs: the planned one stays within the budget, and one layer fewer takes more, or
does not load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from moelib.audit import record
from moelib.audit.record import Record
from moelib.base import files, stats
from moelib.base.neutral import markdown
from moelib.campaign import bench, campaign, given
from moelib.catalogue import params
from moelib.catalogue.params import PlacementMode
from moelib.engine import engine
from moelib.gguf import gguf_file
from moelib.measure import device
from moelib.measure.device import Device
from moelib.planner import budget
from moelib.planner.budget import Plan, gib
from moelib.planner.memory import Need
from moelib.study import frames
from moelib.study import plan as plans
from moelib.study.study import Study

SHORT, LONG = "plan-short", "long-512"
ROUNDS = 3
DOCUMENT = "ANSWER.md"


@dataclass(frozen=True)
class Measured:
    """What was planned for a file and a card, and what its runs say."""

    plan: Plan
    study: Study
    proof: Record | None
    """The run with one layer fewer on the CPU, where it is not part of the rounds; None if there is none to do."""

    @property
    def path(self) -> Path:
        return self.study.path / DOCUMENT


def measure(
    file: Path,
    vram_bytes: int,
    ram_bytes: int | None = None,
    context: int | None = None,
    ubatch: int | None = None,
    kv: str | None = None,
    rounds: int = ROUNDS,
    device_kind: str = "auto",
    say: Callable[[str], object] = print,
) -> Measured:
    """Plan the file for a card of `vram_bytes`, do the runs that are not done, and write the answer beside them.

    The rounds have the baseline where the card here holds it, the planned placement, its neighbours and all experts on
    the CPU; a larger card is kept to the budget by choosing. Raises PlanError, GGUFError, QuantizeError, EngineError,
    DeviceError, StudyError.
    """
    llama = engine.find()
    where = device.choose(device_kind, llama)
    cuda = where.kind == "cuda"
    plan = budget.plan(gguf_file.read_header(file), vram_bytes, ram_bytes, context, ubatch, kv, cuda)
    say(next(plan.lines()))
    quantised = given.measurable(file, llama)
    compared, before = _placements(plan, where)
    parameters = params.Study(
        name=_name(plan, quantised.manifest["sha256"], rounds, where),
        title=f"{quantised.manifest['model']} {quantised.manifest['quant']} on {gib(vram_bytes)} of VRAM",
        models=(quantised.manifest["model"],),
        weights=quantised.manifest["weights"],
        scale=quantised.manifest["scale"],
        quants=(quantised.manifest["quant"],),
        arms=tuple(PlacementMode(placement=str(n.placement)) for n in compared),
        workloads=_workloads(plan.budget.context),
        requests=2,
        blocks=rounds,
        context=plan.budget.context,
        device=where.kind,  # type: ignore[arg-type]
        seed=1,
    )
    study = Study(plans.outputs() / parameters.name, plans.of(parameters))
    (cell,) = study.cells
    total = len(cell.specs)
    for i, r in enumerate(campaign.measure(study, cell, lambda *_: quantised), 1):
        say(f"{i} of {total}: {r.spec.placement}, {r.status}{' ' if r.reasons else ''}{', '.join(r.reasons)}")
    proof = None
    if before is not None:
        folder = study.path / "proof"
        if not record.read_all(folder)[0]:
            say(f"proof: {before.placement}, which should not fit")
            asked = parameters.workloads, parameters.requests, parameters.context, where.kind
            bench.one(file, str(before.placement), "mmap", *asked, folder)
        (proof,) = record.read_all(folder)[0]
    measured = Measured(plan, study.again(), proof)
    files.write_bytes(measured.path, document(measured).encode())
    return measured


def _placements(plan: Plan, where: Device) -> tuple[list[Need], Need | None]:
    """(what the rounds compare, from the one with most on the GPU; one layer fewer than planned, if it is not of them).

    What the card here cannot hold by its own size is no part of a round: it would leave none whole.
    """
    total = where.identity().get("total_bytes")
    needs, at = plan.needs, plan.needs.index(plan.chosen)
    fits = [total is None or n.vram_bytes <= total for n in needs]
    wanted = {0, at - 1, at, at + 1, len(needs) - 1} & set(range(len(needs)))
    compared = [needs[i] for i in sorted(wanted) if fits[i]]
    return compared, needs[at - 1] if at and not fits[at - 1] else None


def _workloads(context: int) -> tuple[str, ...]:
    long = params.workload(LONG)
    room = (long.prompt_tokens or 0) + long.generate_tokens
    return (SHORT, LONG) if context >= room else (SHORT,)


def _name(plan: Plan, sha256: str, rounds: int, where: Device) -> str:
    """The same question about the same file has the same folder, so that it is answered once."""
    stem = re.sub(r"[^a-z0-9]+", "-", plan.header.path.stem.lower()).strip("-")[:60]
    about = [sha256, plan.budget.vram_bytes, plan.budget.ram_bytes, plan.budget.context, str(plan.settings)]
    return f"measure-{stem}-{files.digest([*about, rounds, where.kind])[:8]}"


def document(measured: Measured) -> str:
    """The answer as a page: the file, N and the whole command; what it gives; predicted beside measured."""
    return "\n".join(_lines(measured)) + "\n"


def _lines(measured: Measured) -> Iterator[str]:
    plan, study = measured.plan, measured.study
    one, runs = plan.chosen, study.runs
    ours = runs[runs["placement"] == str(one.placement)]
    name = markdown(plan.header.path.name)
    yield f"# {name} on {gib(plan.budget.vram_bytes)} of VRAM"
    yield ""
    if ours.empty:
        yield f"No run of {one.placement} is usable, so nothing is answered: {'; '.join(study.problems[:3])}"
        return
    vram = ours["vram_bytes"].max()
    kept = pd.notna(vram) and vram <= plan.budget.vram_bytes
    took = gib(int(vram)) if pd.notna(vram) else "an unknown amount"
    yield (
        f"**{'It fits' if kept else 'It does not fit'}** with `{one.placement}`: {took} of VRAM were taken, "
        f"{gib(one.vram_bytes)} were predicted."
    )
    yield ""
    yield f"```\n{plan.command}\n```"
    yield ""
    for workload in study.parameters.workloads:
        rate, ttft = (_typical(ours, f"{column}/{workload}") for column in ("tokens_per_s", "ttft_warm_s"))
        what = markdown(study.workloads[workload].title)
        yield (
            f"- {what}: **{stats.estimate(rate)} tokens/s**, TTFT {stats.estimate(ttft, 1000)} ms "
            f"(geometric mean [95 % interval] of {len(ours)} runs)"
        )
    yield f"- RAM of the server: {stats.sizes(_mean(ours, 'host_rss_peak_bytes'))}; {gib(one.ram_bytes)} predicted"
    yield f"- {_smallest(measured)}"
    yield f"- {study.summary()}"
    if any(r.device.kind == "loopback" for r in study.used):
        yield "- Measured on the *loopback* device: no GPU took part, and no speed here is one of a GPU."
    yield ""
    yield from _table(measured)


def _mean(runs: pd.DataFrame, column: str) -> stats.Estimate | None:
    known = list(runs[column].dropna()) if column in runs else []
    return stats.mean(known) if known else None


def _typical(runs: pd.DataFrame, column: str) -> stats.Estimate | None:
    """The geometric mean, for rates and times, whose interval stays above zero."""
    known = list(runs[column].dropna()) if column in runs else []
    return stats.geometric_mean(known) if known and min(known) > 0 else None


def _smallest(measured: Measured) -> str:
    """Whether one layer fewer on the CPU would fit too, by its runs."""
    plan, runs = measured.plan, measured.study.runs
    at = plan.needs.index(plan.chosen)
    if not at:
        return "All of it is on the GPU: there is no layer less to keep on the CPU."
    fewer = plan.needs[at - 1].placement
    took = runs[runs["placement"] == str(fewer)]["vram_bytes"].max()
    if measured.proof is not None:
        r = measured.proof
        if r.observed is None:
            return f"`{fewer}` does not run on this card: {', '.join(r.reasons)} (record `{r.run_id}`)."
        took = r.observed.memory.value_bytes
    if pd.isna(took):
        return f"`{fewer}` was not measured, so that this is the smallest N is not proven."
    over = took > plan.budget.vram_bytes
    return f"`{fewer}` took {gib(int(took))}, {'more than the budget' if over else 'and would fit too'}."


def _table(measured: Measured) -> Iterator[str]:
    """Every placement that was run: predicted beside measured, and against the first."""
    plan, study = measured.plan, measured.study
    rows = []
    workload = study.parameters.workloads[0]
    sides = [(m.placement, m.load_mode) for m in study.parameters.arms]
    reference = frames.reference(sides)
    ratios = {c.side: c.ratio for c in frames.comparisons(study.runs, f"tokens_per_s/{workload}")}
    for side in sides:
        runs = study.runs[study.runs["placement"] == side[0]]
        need = next(n for n in plan.needs if str(n.placement) == side[0])
        rows.append(
            {
                "placement": side[0],
                "VRAM predicted": gib(need.vram_bytes),
                "VRAM measured": stats.sizes(_mean(runs, "vram_bytes")),
                "RAM predicted": gib(need.ram_bytes),
                "tokens/s": stats.estimate(_typical(runs, f"tokens_per_s/{workload}")),
                f"tokens/s / {reference}": stats.estimate(ratios.get(side)),
                "TTFT, ms": stats.estimate(_typical(runs, f"ttft_warm_s/{workload}"), 1000),
                "runs": len(runs),
            }
        )
    yield pd.DataFrame(rows).to_markdown(index=False)
    yield ""
    yield (
        "Means [95 % intervals], geometric of rates and times; ratios paired within rounds. Every run is audited; the "
        "records behind this page:"
    )
    yield ""
    for r in study.used:
        yield f"- `{r.run_id}` {r.status} `{r.digest[:12]}`"
