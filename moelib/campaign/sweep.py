"""One file on one card, without a study's YAML: planned from its header, run in paired rounds, audited, answered.

The smallest N that really fits is proven by runs: it stays within the budget, and one layer fewer on the CPU takes more
or does not run. Where a plan is so close to the budget, or to what the card holds, that it may be wrong, a run of its
own tells before the rounds.
"""

from __future__ import annotations

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
from moelib.planner.budget import CLOSE, Plan, gib
from moelib.planner.memory import Need
from moelib.study import frames
from moelib.study import plan as plans
from moelib.study.study import Study

SHORT, LONG = "plan-short", "mixed-512"
ROUNDS = 3
REQUESTS = 2
NO_ROOM = "out-of-memory"


@dataclass(frozen=True)
class Measured:
    """What was planned for a file and a card, and what its runs say."""

    plan: Plan
    study: Study
    trials: dict[str, Record]
    """Placement -> the run that told whether the card holds it, where its plan was too close to tell."""

    @property
    def path(self) -> Path:
        return self.study.path / bench.ANSWER

    @property
    def answer(self) -> Need | None:
        """The placement with the fewest experts on the CPU whose runs all stayed within the budget, if any did; of a
        budget of RAM what was planned is believed."""
        plan = self.plan
        for need in plan.needs:
            took = self.took(need)
            if took is not None and len(self.runs(need)) and within(plan, need, took):
                return need
        return None

    def runs(self, need: Need) -> pd.DataFrame:
        """The usable runs of a placement, in llama.cpp's own load mode."""
        every = self.study.runs
        return every[(every["placement"] == str(need.placement)) & (every["load_mode"] == "mmap")]

    def took(self, need: Need) -> int | None:
        """The most VRAM that a run of a placement took; None where that is not known."""
        known = list(self.runs(need)["vram_bytes"])
        trial = self.trials.get(str(need.placement))
        if trial is not None and trial.done:
            known.append(trial.observation.memory.value_bytes)
        return int(max(known)) if known and not any(map(pd.isna, known)) else None


def within(plan: Plan, need: Need, took: int) -> bool:
    """Whether a placement stays within the budget, given the VRAM that it took."""
    most_ram = plan.budget.ram_bytes
    return took <= plan.budget.vram_bytes and (most_ram is None or need.ram_bytes <= most_ram)


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

    The rounds have the baseline where the card here holds it, the smallest N that it holds within the budget, its
    neighbours and all experts on the CPU; a larger card is kept to the budget by choosing. Raises PlanError, GGUFError,
    QuantizeError, EngineError, DeviceError, StudyError where the card holds no placement.
    """
    llama = engine.find()
    where = device.choose(device_kind, llama)
    plan = budget.plan(gguf_file.read_header(file), vram_bytes, ram_bytes, context, ubatch, kv, where.kind == "cuda")
    say(next(plan.lines()))
    quantised = given.measurable(file, llama)
    asked = _workloads(plan.budget.context), REQUESTS, plan.budget.context
    name = _name(plan, quantised.manifest["sha256"], rounds, where, asked)
    trials = Trials(plan, file, asked, where, plans.outputs() / name / "trials", say)
    compared = _compared(plan, trials)
    modes = [PlacementMode(placement=str(n.placement)) for n in compared]
    if len(modes) == 1:  # nothing else is held: the other load mode is what it is compared with
        modes.append(modes[0].model_copy(update={"load_mode": "none"}))
    parameters = params.Study(
        name=name,
        title=f"{quantised.manifest['model']} {quantised.manifest['quant']} on {gib(vram_bytes)} of VRAM",
        models=(quantised.manifest["model"],),
        weights=quantised.manifest["weights"],
        scale=quantised.manifest["scale"],
        quants=(quantised.manifest["quant"],),
        arms=tuple(modes),
        workloads=asked[0],
        requests=REQUESTS,
        blocks=rounds,
        context=plan.budget.context,
        device=where.kind,  # type: ignore[arg-type]
        seed=1,
    )
    study = Study(plans.outputs() / parameters.name, plans.of(parameters))
    kept = study.path / "plan.json"
    if kept.exists() and not plans.read(kept).asks_for_the_runs_of(study.plan):
        raise plans.StudyError(f"{kept} is the plan of other runs: move {study.path} away, and measure again")
    (cell,) = study.cells
    total = len(cell.specs)
    for i, r in enumerate(campaign.measure(study, [cell], lambda *_: quantised), 1):
        say(f"{i} of {total}: {r.spec.placement}, {r.status}{' ' if r.reasons else ''}{', '.join(r.reasons)}")
    in_order = sorted(trials.done.items(), key=lambda item: item[1].spec.placed.order)
    measured = Measured(plan, study.again(), dict(in_order))
    files.write_bytes(measured.path, document(measured).encode())
    return measured


class Trials:
    """Runs that tell whether a placement fits where its plan is too close to tell: each is done once, and kept."""

    def __init__(
        self,
        plan: Plan,
        file: Path,
        asked: tuple[tuple[str, ...], int, int],
        where: Device,
        folder: Path,
        say: Callable[[str], object],
    ):
        self.plan, self.file, self.asked, self.where, self.folder, self.say = plan, file, asked, where, folder, say
        self.every = record.read_all(folder)[0]
        # what failed for another reason than its size tells nothing, and is tried again
        self.done = {r.spec.placement: r for r in self.every if r.done or NO_ROOM in r.reasons}

    def holds(self, need: Need) -> bool:
        """Whether the card here can run it."""
        room = self.where.usable_bytes
        return room is None or self._told(need, room, lambda took: True)

    def fits(self, need: Need) -> bool:
        """Whether it stays within the budget, on the card here."""
        if not within(self.plan, need, 0) or not self.holds(need):
            return False
        most = self.plan.budget.vram_bytes
        return self._told(need, most, lambda took: (need.vram_bytes if took is None else took) <= most)

    def _told(self, need: Need, most: int, enough: Callable[[int | None], bool]) -> bool:
        """By the plan, where that is far from `most` bytes; else by a run, and whether what it took is enough."""
        if need.vram_bytes <= (1 - CLOSE) * most or need.vram_bytes > (1 + CLOSE) * most:
            return need.vram_bytes <= most
        r = self.done.get(str(need.placement)) or self._tried(need)
        return r.done and enough(r.observation.memory.value_bytes)

    def _tried(self, need: Need) -> Record:
        name = str(need.placement)
        self.say(f"trying {name}: {gib(need.vram_bytes)} are planned")
        attempt = 1 + max((r.attempt for r in self.every if r.spec.placement == name), default=0)
        r = bench.one(self.file, name, "mmap", *self.asked, self.where.kind, self.folder, attempt)
        self.every.append(r)
        self.say(f"{name}: {r.status}{' ' if r.reasons else ''}{', '.join(r.reasons)}")
        if not r.done and NO_ROOM not in r.reasons:
            raise plans.StudyError(
                f"the run that was to tell whether {name} fits is {r.status} ({', '.join(r.reasons)}): run the same "
                f"command to try again; its log is in {self.folder / 'raw'}"
            )
        self.done[name] = r
        return r


def _compared(plan: Plan, trials: Trials) -> list[Need]:
    """What the rounds compare, from the one with most on the GPU: both ends, and the fewest layers on the CPU that fit,
    with its neighbours. Raises StudyError if nothing fits."""
    needs = plan.needs
    at = next((i for i in range(needs.index(plan.chosen), len(needs)) if trials.fits(needs[i])), None)
    if at is None:
        raise plans.StudyError(
            f"{plan.header.path.name} does not fit here even with all experts on the CPU, though it was planned "
            f"to: try a smaller context, --context {plan.budget.context // 2}"
        )
    while at and trials.fits(needs[at - 1]):
        at -= 1  # the plan was too careful
    wanted = {0, at - 1, at, at + 1, len(needs) - 1} & set(range(len(needs)))
    return [needs[i] for i in sorted(wanted) if trials.holds(needs[i])]


def _workloads(context: int) -> tuple[str, ...]:
    long = params.workload(LONG)
    room = (long.prompt_tokens or 0) + long.generate_tokens
    return (SHORT, LONG) if context >= room else (SHORT,)


def _name(plan: Plan, sha256: str, rounds: int, where: Device, asked: tuple[object, ...]) -> str:
    """The same question about the same file has the same folder, so that it is answered once."""
    about = [sha256, plan.budget.vram_bytes, plan.budget.ram_bytes, plan.budget.context, str(plan.settings)]
    about += [rounds, where.kind, where.uuid or where.name, asked]
    return f"measure-{bench.stem(plan.header.path)}-{files.digest(about)[:8]}"


def document(measured: Measured) -> str:
    """The answer as a page: the file, N and the whole command; what it gives; predicted beside measured."""
    return "\n".join(_lines(measured)) + "\n"


def _lines(measured: Measured) -> Iterator[str]:
    plan, study, one = measured.plan, measured.study, measured.answer
    name, vram = markdown(plan.header.path.name), gib(plan.budget.vram_bytes)
    yield f"# {name} on {vram} of VRAM"
    yield ""
    if one is None:
        yield f"**Nothing that was run stays within {vram}**: {_least(measured)}"
        yield ""
        yield from _planned(measured)
        yield from _table(measured)
        return
    ours = measured.runs(one)
    yield (
        f"**It fits** with `{one.placement}`: {gib(measured.took(one) or 0)} of VRAM were taken, "
        f"{gib(one.vram_bytes)} were predicted."
    )
    yield ""
    yield f"```\n{plan.command_for(one.placement)}\n```"
    yield ""
    for workload in study.parameters.workloads:
        rate, ttft = (_typical(ours, f"{column}/{workload}") for column in ("tokens_per_s", "ttft_warm_s"))
        what = markdown(study.workloads[workload].title)
        yield (
            f"- {what}: **{stats.estimate(rate)} tokens/s**, TTFT {stats.estimate(ttft, 1000)} ms "
            f"(geometric mean [95 % interval] of {len(ours)} runs)"
        )
    yield (
        f"- RAM: {gib(one.ram_bytes)} predicted to be needed; {stats.sizes(_mean(ours, 'host_rss_peak_bytes'))} at the "
        "server's peak, with the pages of the mapped file that were only read to be copied to the device"
    )
    yield f"- {_smallest(measured, one)}"
    yield from _planned(measured)
    yield f"- {study.summary()}"
    if any(r.device.kind == "loopback" for r in study.used):
        yield "- Measured on the *loopback* device: no GPU took part, and no speed here is one of a GPU."
    yield ""
    yield from _table(measured)


def _least(measured: Measured) -> str:
    """What came nearest to the budget."""
    known = {n: took for n in measured.plan.needs if (took := measured.took(n)) is not None}
    if not known:
        return f"no run is usable ({'; '.join(measured.study.problems[:3])})."
    least = min(known, key=lambda n: known[n])
    return f"`{least.placement}` took {gib(known[least])}, the least."


def _planned(measured: Measured) -> Iterator[str]:
    """What became of the planned placement, where it is not the answer."""
    chosen = measured.plan.chosen
    if chosen is not measured.answer:
        yield f"- Planned was `{chosen.placement}`, {gib(chosen.vram_bytes)}: {_outcome(measured, chosen)}."


def _outcome(measured: Measured, need: Need) -> str:
    """What the runs of a placement say of its VRAM."""
    trial, took = measured.trials.get(str(need.placement)), measured.took(need)
    if trial is not None and not trial.done:
        return f"it does not run here, {', '.join(trial.reasons)} (record `{trial.run_id}`)"
    if took is None:
        return f"{gib(need.vram_bytes)} are planned, which is far from the budget; it was not run"
    over = took > measured.plan.budget.vram_bytes
    return f"it took {gib(took)}, {'more than the budget' if over else 'and fits too'}"


def _mean(runs: pd.DataFrame, column: str) -> stats.Estimate | None:
    known = runs.dropna(subset=[column]) if column in runs else runs[:0]
    return stats.mean(list(known[column]), frames.machines(known)) if len(known) else None


def _typical(runs: pd.DataFrame, column: str) -> stats.Estimate | None:
    """The geometric mean, for rates and times, whose interval stays above zero."""
    known = runs.dropna(subset=[column]) if column in runs else runs[:0]
    if known.empty or known[column].min() <= 0:
        return None
    return stats.geometric_mean(list(known[column]), frames.machines(known))


def _smallest(measured: Measured, answer: Need) -> str:
    """That one layer fewer on the CPU does not fit, by its runs."""
    needs = measured.plan.needs
    at = needs.index(answer)
    if not at:
        return "All of it is on the GPU: there is no layer less to keep on the CPU."
    fewer = needs[at - 1]
    return f"`{fewer.placement}`, one layer fewer on the CPU: {_outcome(measured, fewer)}."


def _table(measured: Measured) -> Iterator[str]:
    """Every placement that was run: predicted beside measured, and against the first."""
    plan, study = measured.plan, measured.study
    rows = []
    workload = study.parameters.workloads[0]
    sides = [(m.placement, m.load_mode) for m in study.parameters.arms]
    reference = frames.reference(sides)
    ratios = {c.side: c.ratio for c in frames.comparisons(study.runs, f"tokens_per_s/{workload}")}
    for side in sides:
        runs = study.runs[(study.runs["placement"] == side[0]) & (study.runs["load_mode"] == side[1])]
        need = next(n for n in plan.needs if str(n.placement) == side[0])
        rows.append(
            {
                "placement": side[0] if side[1] == "mmap" else f"{side[0]}, {side[1]}",
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
    for r in (*measured.trials.values(), *study.used):
        yield f"- `{r.run_id}` {r.status} `{r.digest[:12]}`"
