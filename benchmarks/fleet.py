"""A thousand cells over many hosts, simulated with measured times: what breaks first.

    python benchmarks/fleet.py measure            # how fast this machine verifies records: outputs/fleet/times.json
    python benchmarks/fleet.py > docs/FLEET.md    # from that and from committed records alone

A cell is simulated as it is measured: a host takes it, fetches the model's source from a store that all hosts share,
quantises it, and measures round by round. Times, sizes and the share of runs that are repeated are those of a committed
study; what no record tells is an assumption, printed with the page and halved and doubled there.
"""

import heapq
import itertools
import json
import random
import statistics
import sys
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path

from moelib.audit import record
from moelib.base import files
from moelib.machine import host
from moelib.study import gather

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "outputs/h100-twins"
STUDIES = ("h100", "h100-prompts", "h100-threads", "h100-twins", "h200-twins")
"""Of which runs were made again."""
TIMES = ROOT / "outputs/fleet/times.json"
CELLS, HOSTS, SEEDS = 1000, 50, (1, 2, 3)
LADDER = (1, 5, 10, 25, 50, 100, 200)
FAR = f"not up to {LADDER[-1]} hosts"
HOUR, GB = 3600.0, 1e9


@dataclass(frozen=True)
class Kind:
    """A cell as it was measured."""

    model: str
    source_bytes: float
    """Of the F16 file, two bytes a parameter."""
    file_bytes: float
    quantise_s: float
    rounds_s: tuple[float, ...]
    """Of each round, from the start of its first run to the end of its last."""


@dataclass(frozen=True)
class Assumed:
    """What no record tells."""

    store_gb_per_s: float = 5.0
    """The store's, shared by all hosts."""
    link_gb_per_s: float = 1.25
    """Of a host, to the store: 10 Gbit/s."""
    disk_gb: float = 1000.0
    """Of a host, for sources and quants."""
    lost_after_h: float = 100.0
    """Mean hours until a host is lost: a spot machine, or a crash."""
    back_after_h: float = 0.5
    start_s: float = 15.0
    """Of a job: the scheduler, Python, papermill, a GPU's driver."""
    price_per_h: float = 3.0
    """Of a host with one GPU, in any currency."""


@dataclass(frozen=True)
class Outcome:
    hours: float
    """Until the last cell is done."""
    worked_h: float
    """Of hosts, on what counted in the end."""
    waited_h: float
    """Of hosts, for the store."""
    lost_h: float
    """Of hosts, on what was begun again."""
    moved_bytes: float
    host_h: float
    """Of all hosts, until the last cell is done: what is paid for."""


def kinds(study: Path = STUDY) -> list[Kind]:
    """The cells of a committed study."""
    of: dict[str, list[record.Record]] = defaultdict(list)
    for r in record.read_all(study)[0]:
        of[r.cell].append(r)
    found = []
    for _, runs in sorted(of.items()):
        sheet, rounds = runs[0].sheet, []
        for block in sorted({r.spec.block for r in runs}):
            times = [(datetime.fromisoformat(r.started_utc).timestamp(), r) for r in runs if r.spec.block == block]
            rounds.append(max(t + r.observation.wall_s for t, r in times) - min(t for t, _ in times))
        usual = statistics.median(rounds)  # one may span two sessions
        whole = tuple(min(s, 2 * usual) for s in rounds)
        found.append(Kind(sheet.model, 2.0 * sheet.parameters, sheet.file_bytes, sheet.quantize_s or 0.0, whole))
    return found


def repeated(studies: Sequence[Path]) -> tuple[int, int]:
    """(runs that were made again, all runs) of committed studies."""
    every = [r for s in studies for r in record.read_all(s)[0]]
    return sum(r.attempt > 1 for r in every), len(every)


def matrix(of: Sequence[Kind], cells: int) -> list[tuple[str, Kind]]:
    """(model, kind) of so many cells: models of the measured kinds in turn, each at all its quants."""
    by_model: dict[str, list[Kind]] = defaultdict(list)
    for kind in of:
        by_model[kind.model].append(kind)
    models = ((f"{name}-{i}", kind) for i in itertools.count() for name, quants in by_model.items() for kind in quants)
    return list(itertools.islice(models, cells))


class Store:
    """A store whose rate its transfers share evenly, each no faster than a host's link."""

    def __init__(self, rate: float, link: float):
        self.rate, self.link = rate, link
        self.left: dict[int, float] = {}
        self.now = 0.0

    def each(self) -> float:
        return min(self.link, self.rate / len(self.left)) if self.left else self.link

    def advance(self, now: float) -> None:
        moved = self.each() * (now - self.now)
        self.left = {h: max(0.0, b - moved) for h, b in self.left.items()}
        self.now = now

    def next_end(self) -> tuple[float, int] | None:
        if not self.left:
            return None
        first = min(self.left, key=lambda h: (self.left[h], h))
        return self.now + self.left[first] / self.each(), first


def simulate(
    cells: Sequence[tuple[str, Kind]],
    hosts: int,
    a: Assumed,
    seed: int,
    again: float = 0.0,
    local: bool = True,
    resume: bool = True,
) -> Outcome:
    """Until every cell is done. again: share of rounds that are made again. local: a host takes cells of models that it
    has on its disk first. resume: rounds that are done stay done, else a cell that was interrupted begins anew."""
    chance = random.Random(seed)
    queue: OrderedDict[int, tuple[str, Kind]] = OrderedDict(enumerate(cells))
    if not local:  # as a scheduler without a notion of place takes them
        queue = OrderedDict(chance.sample(sorted(queue.items()), len(queue)))
    store = Store(a.store_gb_per_s * GB, a.link_gb_per_s * GB)
    disks: list[OrderedDict[str, float]] = [OrderedDict() for _ in range(hosts)]
    life, doing, done_rounds = [0] * hosts, dict[int, int](), defaultdict[int, int](int)
    spent: dict[int, float] = defaultdict(float)
    begun = [0.0] * hosts
    events: list[tuple[float, int, str, int, int]] = []
    order = itertools.count()
    total = {"worked": 0.0, "waited": 0.0, "lost": 0.0, "moved": 0.0}
    ended, now = 0, 0.0

    def at(when: float, what: str, h: int) -> None:
        heapq.heappush(events, (when, next(order), what, h, life[h]))

    def take(h: int) -> None:
        if not queue:
            return
        mine = next((i for i, (m, _) in queue.items() if m in disks[h]), None) if local else None
        busy = {cells[i][0] for i in doing.values()}
        fresh = next((i for i, (m, _) in queue.items() if m not in busy), None) if local and mine is None else None
        i = next(c for c in (mine, fresh, next(iter(queue))) if c is not None)
        del queue[i]
        doing[h], begun[h], spent[h] = i, now, 0.0
        model, kind = cells[i]
        if model in disks[h]:
            disks[h].move_to_end(model)
            at(now + a.start_s + kind.quantise_s, "round", h)
        else:
            store.left[h] = kind.source_bytes
            total["moved"] += kind.source_bytes

    for h in range(hosts):
        at(chance.expovariate(1 / (a.lost_after_h * HOUR)), "lose", h)
        take(h)
    while ended < len(cells):
        arrival = store.next_end()
        if arrival and (not events or arrival[0] <= events[0][0]):
            now, h = arrival
            store.advance(now)
            del store.left[h]
            model, kind = cells[doing[h]]
            total["waited"] += now - begun[h]
            disks[h][model] = kind.source_bytes
            while sum(disks[h].values()) > a.disk_gb * GB and len(disks[h]) > 1:
                disks[h].popitem(last=False)
            begun[h] = now
            at(now + a.start_s + kind.quantise_s, "round", h)
            continue
        now, _, what, h, of_life = heapq.heappop(events)
        store.advance(now)
        if what == "lose":
            if of_life != life[h]:
                continue
            life[h] += 1
            store.left.pop(h, None)
            disks[h].clear()
            if (i := doing.pop(h, None)) is not None:
                # what rounds took stays where they are kept, all else was for nothing
                kept = spent[h] if resume else 0.0
                total["lost"] += now - begun[h] - kept
                total["worked"] += kept
                if not resume:
                    done_rounds[i] = 0
                queue[i] = cells[i]
                queue.move_to_end(i, last=False)
            at(now + a.back_after_h * HOUR, "back", h)
        elif of_life != life[h]:
            continue
        elif what == "back":
            at(now + chance.expovariate(1 / (a.lost_after_h * HOUR)), "lose", h)
            take(h)
        else:
            i = doing[h]
            rounds = cells[i][1].rounds_s
            if what == "done-round":
                if chance.random() < again:
                    at(now + rounds[done_rounds[i] % len(rounds)], "done-round", h)
                    continue
                spent[h] += rounds[done_rounds[i]]
                done_rounds[i] += 1
            if done_rounds[i] < len(rounds):
                at(now + rounds[done_rounds[i]], "done-round", h)
            else:
                total["worked"] += now - begun[h]
                del doing[h]
                ended += 1
                take(h)
                for idle in range(hosts):  # whom a queue that was empty left without work
                    if idle not in doing and queue and _up(events, idle, life):
                        take(idle)
    hours = now / HOUR
    return Outcome(
        hours,
        total["worked"] / HOUR,
        total["waited"] / HOUR,
        total["lost"] / HOUR,
        total["moved"],
        hours * hosts,
    )


def _up(events: Sequence[tuple[float, int, str, int, int]], h: int, life: Sequence[int]) -> bool:
    """Whether a host is there: none that is to come back."""
    return not any(what == "back" and who == h and of == life[h] for _, _, what, who, of in events)


def over_seeds(cells: Sequence[tuple[str, Kind]], hosts: int, a: Assumed, again: float, **how: bool) -> Outcome:
    """The mean over seeds."""
    every = [simulate(cells, hosts, a, seed, again, **how) for seed in SEEDS]
    return Outcome(*(statistics.fmean(getattr(o, f.name) for o in every) for f in fields(Outcome)))


def measure() -> None:
    """Write how long this machine takes to verify and audit a record with its log."""
    folders = [STUDY, ROOT / "outputs/h200-twins", ROOT / "outputs/h100"]
    started, records = time.perf_counter(), 0
    for folder in folders:
        records += len(gather.gather(folder).records)
    facts = host.facts()
    told = {"record_s": (time.perf_counter() - started) / records, "records": records}
    files.write_json(TIMES, told | {k: facts[k] for k in ("cpu", "cpus", "commit", "dirty")})


def _told(k: Kind) -> str:
    usual = statistics.median(k.rounds_s)
    return f"{k.model} {k.file_bytes / GB:.0f} GB (quantised in {k.quantise_s:.0f} s, a round {usual:.0f} s)"


def _waits(of: Outcome) -> str:
    """For the store, of all host hours."""
    return f"{of.waited_h / of.host_h:.0%}"


def page() -> Iterator[str]:
    """What the simulation says, as Markdown."""
    a, of, times = Assumed(), kinds(), json.loads(TIMES.read_bytes())
    bad, every = repeated([ROOT / "outputs" / name for name in STUDIES])
    again, cells = bad / every, matrix(of, CELLS)
    runs = len(list((STUDY / "records").glob("*.json"))) / len(of)
    size = sum(p.stat().st_size for kind in ("records", "raw") for p in (STUDY / kind).iterdir()) / len(of)
    ladder = {n: over_seeds(cells, n, a, again) for n in LADDER}
    anywhere = {n: over_seeds(cells, n, a, again, local=False) for n in LADDER}
    breaks = next((n for n in LADDER if ladder[n].waited_h > 0.1 * ladder[n].host_h), None)
    naive = next((n for n in LADDER if anywhere[n].waited_h > 0.1 * anywhere[n].host_h), None)
    here = ladder[HOSTS]
    yield "# A thousand cells over fifty hosts"
    yield ""
    yield (
        "**A simulation, not a measurement**: `benchmarks/fleet.py`. The times of quantising and of every round, "
        f"sizes, and how many runs are repeated are those of committed records (`outputs/{STUDY.name}`: {len(of)} "
        f"cells on an H100; {bad} of {every} runs of studies on GPUs were made again). Speeds of store and links, "
        "losses of hosts and prices are assumptions, listed below with what they change."
    )
    yield ""
    yield "## Answers"
    yield ""
    yield (
        f"- {CELLS:,} cells ({CELLS * runs:,.0f} runs) take **{here.hours:.1f} hours** on {HOSTS} hosts with one GPU "
        f"each, {here.host_h:,.0f} host hours, {here.host_h * a.price_per_h:,.0f} at a price of {a.price_per_h:g} an "
        f"hour; on one host {ladder[1].hours / 24:,.0f} days."
    )
    first = f"at {breaks} hosts {_waits(ladder[breaks])} of all host hours are waiting for it" if breaks else FAR
    other = f"at {naive} hosts already {_waits(anywhere[naive])}" if naive else f"{FAR} either"
    yield (
        f"- **What breaks first is the store of sources**: {first} where hosts take cells of models that they have; "
        f"where any host takes any cell, {other}: {anywhere[HOSTS].moved_bytes / 1e12:,.0f} TB are moved for {HOSTS} "
        f"hosts instead of {here.moved_bytes / 1e12:,.0f}."
    )
    rest = over_seeds(cells, HOSTS, a, again, resume=False)
    yield (
        f"- A host that is lost costs what its round had: {here.lost_h:,.1f} of {here.host_h:,.0f} host hours, where "
        f"each is lost every {a.lost_after_h:g} hours. Cells that began anew would lose {rest.lost_h:,.1f}."
    )
    merge_s = times["record_s"] * CELLS * runs
    yield (
        f"- What is kept is small: {CELLS * size / GB:.2f} GB of records and logs. Verifying and auditing all of them, "
        f"which a merge and a document do, takes {merge_s / 60:.1f} minutes of one CPU "
        f"({times['record_s'] * 1e3:.1f} ms a record on {times['cpu']})."
    )
    yield ""
    yield "## Hosts"
    yield ""
    yield "Means over three seeds. *Waits*: for the store, of all host hours. *Local*: hosts take cells of models that"
    yield "they have."
    yield ""
    yield "| hosts | local: hours | waits | moved, TB | any host: hours | waits | moved, TB |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for n in LADDER:
        x, y = ladder[n], anywhere[n]
        yield (
            f"| {n} | {x.hours:.1f} | {_waits(x)} | {x.moved_bytes / 1e12:.1f} | {y.hours:.1f} | {_waits(y)} | "
            f"{y.moved_bytes / 1e12:.1f} |"
        )
    yield ""
    yield f"## What is assumed, and what it changes at {HOSTS} hosts"
    yield ""
    yield "| assumed | value | hours: halved | as it is | doubled | lost host hours: halved | doubled |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for f in fields(Assumed):
        if f.name == "price_per_h":
            continue
        value = getattr(a, f.name)
        less, more = (over_seeds(cells, HOSTS, replace(a, **{f.name: value * k}), again) for k in (0.5, 2.0))
        yield (
            f"| `{f.name}` | {value:g} | {less.hours:.1f} | {here.hours:.1f} | {more.hours:.1f} | {less.lost_h:.1f} | "
            f"{more.lost_h:.1f} |"
        )
    yield ""
    yield f"## Hosts that are lost, {HOSTS} of them"
    yield ""
    yield "| each lost every | rounds stay: hours | lost host hours | cells begin anew: hours | lost host hours |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    for after in (1.0, 3.0, 10.0, 30.0, 100.0):
        x, y = (over_seeds(cells, HOSTS, replace(a, lost_after_h=after), again, resume=r) for r in (True, False))
        yield f"| {after:g} h | {x.hours:.1f} | {x.lost_h:.1f} | {y.hours:.1f} | {y.lost_h:.1f} |"
    yield ""
    told = ", ".join(map(_told, of))
    sources = " and ".join(sorted({f"{k.source_bytes / GB:.0f} GB" for k in of}))
    yield (
        f"Measured: {told}; the models' F16 files are {sources}. A thousand cells are so many models of these two "
        "shapes, each at three quants."
    )
    yield ""
    yield "## So"
    yield ""
    yield "- **Layout.** Sources in one store; `MOELIB_MODELS` on each host's own disk, where its quants are made and"
    yield "  stay; outputs per cell, merged in the end. Records are too small to matter: any shared folder does."
    yield "- **Bandwidth.** Let one host measure all quants of a model. A study with `interleaved: true` does so by"
    yield "  itself: its cell is a model. Of another one, a scheduler sends cells anywhere."
    yield "- **Failures.** Rounds that are done stay; exit code 75 and a lost host are tried again. Nothing else is"
    yield "  needed while hosts live longer than a round."
    yield "- **More hosts** than the store can feed cost more and end no sooner: copy sources to a second store first."


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        measure()
    else:
        print("\n".join(page()))
