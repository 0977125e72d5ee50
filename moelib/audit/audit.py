"""The audit: every invariant of runs, logs, blocks, cells and studies, and the verdicts that follow.

A block's or a cell's invariant that fails makes all of its runs invalid; a study's is listed with its problems.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime
from statistics import median
from typing import Any, NamedTuple

from moelib.audit import bounds, cells, energy, invariants, witness
from moelib.audit.cells import Cell
from moelib.audit.invariants import INVARIANTS, Faults, Finding, Invariant, Measured, agrees, holds, silence, strained
from moelib.audit.record import Check, Record
from moelib.audit.witness import Witnessed
from moelib.catalogue.placement import REFERENCE
from moelib.measure.run import Observation

FAMILIES = (invariants, bounds, witness, cells, energy)
"""Modules whose invariants count beside those of this one; importing them registers theirs."""
RAM_TIMES = 1.4  # between cells of one host: 1.26 seen
IDLE_TIMES, ASLEEP = 1.3, 0.5  # between cells of one board: 1.26 seen; of its highest clock, 0.17 to 0.36 seen
COUNTER_WATT = 2000.0  # more than any board of today draws
LIBRARY_BYTES = {"cuda": 512 << 20}  # of what a server's memory holds beside weights, between runs: 265 MiB apart seen
LIBRARY_SMALL_BYTES = 32 << 20  # with no GPU's libraries in it: 22 MiB seen
PAGE_BYTES, PAGE_SHARE, SMALL_PAGES = 4096, 0.05, 0.5  # faults for each page of resident memory: 0.977 to 0.997 seen
WATCH_LOOK_S = 0.06  # of the look that waits for the driver, in the median
WATCH_TIMES, WATCH_MORE, WATCHED = 1.5, 5e-4, 3  # share of a CPU, medians of so many runs alike: 1.3 times seen
SHARE_TIMES, SHARE_LEAST = 1.1, 0.2  # 1.014 seen; a short prompt's experts are computed where they are
SHARE_BYTES = 1 << 30  # of experts moved: beside less, what else crosses the bus counts
CLOCK_SHARE = 0.08  # boost moves by steps of 15 MHz, and not at all on the cards seen
SAME_SHARE = 1e-4  # measured shares of one block's requests differ by percents


def reference(runs: Sequence[Record]) -> Record:
    """The run that the others of its block are compared with."""
    bases = [r for r in runs if r.spec.placement == REFERENCE]
    return bases[0] if bases else min(runs, key=lambda r: r.spec.placed.rank)


@holds("block", "a baseline, or what has most on the GPU, and at least one more, each placement and load mode once")
def block_complete(runs: Sequence[Record]) -> Finding:
    """There is something to compare, and nothing twice."""
    labels = [r.spec.label for r in runs]
    bases = [r for r in runs if r.spec.placement == REFERENCE]
    whole = len(bases) <= 1 < len(runs) and len(set(labels)) == len(labels) and all(r.observed for r in runs)
    return whole, ", ".join(labels) or "no runs"


@holds("block", "equal")
def block_alike(runs: Sequence[Record]) -> Finding:
    """Nothing but the placement differs: one host, GPU, driver, kernel, engine and file, the same requests."""

    def common(r: Record) -> dict[str, Any]:
        requests = [(q.workload, q.index, q.prompt_tokens, q.generate_tokens) for q in r.observation.requests]
        host, device = r.host, r.device
        return {
            "file": r.sheet.sha256,
            "engine": (r.engine.runner, r.engine.server_sha256, r.observation.engine_files, r.observation.device_files),
            "device": (device.kind, device.name, device.uuid, device.total_bytes, device.context_bytes),
            "driver": device.driver,
            "link and limits": [
                getattr(device, k) for k in ("pcie_bytes_per_s", "bandwidth_bytes_per_s", "power_limit_watt")
            ],
            "host": (host.host_id, host.cpu, host.cpus, host.ram_bytes),
            "kernel": host.system,
            "context": r.spec.context,
            "prompts": requests,
        } | ({} if r.spec.placed.threads else {"threads": r.observation.threads})

    first = common(reference(runs))
    differs = {k for r in runs for k, v in common(r).items() if v != first[k]}
    # a driver maps some of its libraries late, so only those that both have are compared
    system = runs[0].observation.system_files or {}
    for r in runs[1:]:
        if any(system.get(name, sha256) != sha256 for name, sha256 in (r.observation.system_files or {}).items()):
            differs.add("the system's libraries")
    return not differs, f"differ in {', '.join(sorted(differs))}" if differs else f"{len(runs)} runs alike"


@holds("block", "0.1 % + 1 MiB, and more graph splits", needs="buffers")
def block_placement(runs: Sequence[Record]) -> Faults:
    """What left the device between the reference and another placement is what the header says that it moves more, and
    the graph was cut where the experts went: a flag that was accepted and ignored is caught here."""
    compared = reference(runs)
    base = compared.observation
    for r in (r for r in runs if r is not compared and r.observation.device_kind != "none"):
        observation = r.observation
        moved = observation.placement.moved_bytes - base.placement.moved_bytes
        on, off = base.report.device_bytes("model"), observation.report.device_bytes("model")
        if on is None or off is None or not agrees(on - off, moved):
            yield f"{r.spec.label}: device weights {on} -> {off}, header moves {moved}"
        more_splits = max(observation.report.graph_splits, default=0) > max(base.report.graph_splits, default=0)
        if not more_splits and moved:
            yield f"{r.spec.label}: graph splits {base.report.graph_splits} -> {observation.report.graph_splits}"
    return "header and engine agree"


@holds("block", f"relative spread above {SAME_SHARE:g}")
def block_ttft_measured(runs: Sequence[Record]) -> Finding:
    """Time to first token is not a constant share of the total: then it was computed, not measured."""
    requests = [(q, q.total_s) for r in runs for q in r.observation.requests if q.total_s]
    # an answer in one piece, of which nobody says how many tokens it has, shows no first token
    shares = [q.token_s[0] / total_s for q, total_s in requests if q.token_n or len(q.token_s) > 1]
    if not shares and (unknown := silence(_runs(runs), ["tokens"])):
        return None, unknown
    spread = (max(shares) - min(shares)) / max(shares) if shares else 0.0
    return spread > SAME_SHARE, f"spread {spread:.2g} over {len(shares)} requests"


class Matrix(NamedTuple):
    """What a study's invariants look at."""

    planned: Sequence[str]
    """Keys of the planned runs."""
    runs: Sequence[Record]
    """The record that stands for each run that has one in a whole, valid block."""
    records: Sequence[Record] = ()
    """Every record that can be read."""
    set_aside: Sequence[str] = ()
    """Run ids of damaged records, which were moved away."""


@holds("study", "every planned run")
def matrix_complete(study: Matrix) -> Finding:
    """A missing run is not seen in a mean."""
    missing = set(study.planned) - {r.key for r in study.runs}
    return bool(study.planned) and not missing, f"{len(missing)} of {len(study.planned)} missing"


@holds("study", "1 to the last")
def attempts_kept(study: Matrix) -> Faults:
    """Every attempt at a run has its record: attempts that went away may have said something else."""
    attempts = defaultdict(set)
    for r in study.records:
        attempts[r.key].add(r.attempt)
    for name in study.set_aside:
        key, _, attempt = name.rpartition("_a")
        if attempt.isdigit():
            attempts[key.rpartition("_")[2]].add(int(attempt))
    for key, n in attempts.items():
        if n != set(range(1, max(n) + 1)):
            yield f"attempts {key}: {sorted(n)}"
    return f"{len(attempts)} runs with all attempts"


@holds("study", "a record with that digest and those readings")
def audited_again_from_a_record(study: Matrix) -> Faults:
    """A later judgement names the record that it judged, and that one is there, with the same readings."""
    by_id = {r.run_id: r for r in study.records}
    for r in study.records:
        if r.judged is None:
            continue
        first = by_id.get(r.judged.record)
        if (
            first is None
            or (first.digest, first.key, first.raw) != (r.judged.digest, r.key, r.raw)
            or _readings(first) != _readings(r)
            or first.attempt >= r.attempt
        ):
            yield f"no first record with that digest and those readings: {r.run_id}"
    return "each names its first record"


def _readings(r: Record) -> Any:
    """What was measured, without what rules make of it."""
    observation = r.observation
    return observation and (
        observation.requests,
        observation.memory.trace,
        observation.load_s,
        observation.host,
        observation.counters,
        observation.report,
        r.started_utc,
    )


@holds("study", f"{CLOCK_SHARE:.0%} between readings of one card")
def clocks_one_cards(study: Matrix) -> Faults:
    """While nothing slows a card, its clocks are its own: about the same in every run."""
    clocks: dict[str | None, list[int]] = defaultdict(list)
    for r in study.runs:
        clocks[r.device.uuid] += [c.sm_clock_mhz for c in r.observation.counters if c.events == 0 and c.sm_clock_mhz]
    for uuid, c in clocks.items():
        if c and min(c) < max(c) * (1 - CLOCK_SHARE):
            yield f"{uuid}: {min(c)} to {max(c)} MHz"
    return f"{sum(map(len, clocks.values()))} readings"


@holds("study", f"equal facts of one device; RAM within {RAM_TIMES:g} times, idle power {IDLE_TIMES:g}")
def machines_are_themselves(study: Matrix) -> Faults:
    """One device is as large and as fast in every run and idles alike in every cell; so is one host's RAM. A
    card that was at rest for seconds clocks down, in steps, and takes less: it is left out."""
    devices: dict[tuple[str | None, str | None], tuple[float | None, ...]] = {}
    idle: dict[str | None, dict[str, float]] = defaultdict(dict)
    hosts = defaultdict(list)
    for r in study.runs:
        specs = (r.device.total_bytes, r.device.bandwidth_bytes_per_s, r.device.pcie_bytes_per_s)
        if devices.setdefault((r.device.uuid, r.device.name), specs) != specs:
            yield f"{r.device.name} in {r.run_id}"
        if r.host.ram_read_bytes_per_s and r.device.kind == "cuda" and not strained(r.observation):
            hosts[r.host.host_id, r.device.uuid, r.host.cpu].append(r.host.ram_read_bytes_per_s)
        for c in r.observation.counters[:1]:
            asleep = c.sm_clock_mhz and c.sm_clock_mhz < ASLEEP * (r.device.max_sm_clock_mhz or 0)
            if c.power_watt and not asleep:
                idle[r.device.uuid][r.cell] = min(c.power_watt, idle[r.device.uuid].get(r.cell, c.power_watt))
    for watts in (of_cells.values() for of_cells in idle.values()):
        if max(watts) > IDLE_TIMES * min(watts):
            yield f"idle at {min(watts):.0f} to {max(watts):.0f} W"
    for (_, _, cpu), speeds in hosts.items():
        if max(speeds) > RAM_TIMES * min(speeds):
            yield f"RAM of {cpu}: {min(speeds) / 1e9:.1f} to {max(speeds) / 1e9:.1f} GB/s"
    return f"{len(hosts)} hosts"


@holds(
    "study",
    f"{LIBRARY_BYTES['cuda'] >> 20} MiB apart with a GPU, {LIBRARY_SMALL_BYTES >> 20} without",
    partly="buffers residence",
)
def libraries_one_size(study: Matrix) -> Faults:
    """What a server's resident memory holds beside weights is libraries and buffers of one engine on one machine:
    about as much in every run, whatever the file."""
    rests = defaultdict(list)
    for r in study.runs:
        weights, stay = bounds.weights_resident(measured(r))
        stay = stay and not any(map(measured(r).lacks, ("buffers", "residence")))
        if r.observation.host_rss_peak_bytes is not None and stay:
            machine = r.device.kind, r.device.uuid, r.host.host_id, r.host.cpu, r.engine.server_sha256
            rests[machine].append((r.observation.host_rss_peak_bytes - weights, r.run_id))
    for (kind, *_), sizes in rests.items():
        (least, in_one), (most, in_other) = min(sizes), max(sizes)
        if most - least > LIBRARY_BYTES.get(kind, LIBRARY_SMALL_BYTES):
            yield f"{least} in {in_one}, {most} in {in_other}"
    return f"{len(rests)} machines"


@holds("study", f"{PAGE_SHARE:.0%} apart, faults for each page")
def pages_one_size(study: Matrix) -> Faults:
    """Where pages are small and hold copies, each is touched once: a machine's runs have as many page faults for each
    page of resident memory, whatever the file. Of large pages their number says nothing."""
    rates = defaultdict(list)
    for r in study.runs:
        faults, peak = r.observation.host.minor_faults, r.observation.host_rss_peak_bytes
        if r.spec.load_mode == "none" and r.device.kind == "cuda" and faults and peak:
            rates[r.device.uuid, r.host.host_id, r.host.cpu].append((faults / (peak / PAGE_BYTES), r.run_id))
    for values in rates.values():
        (least, in_one), (most, in_other) = min(values), max(values)
        if least > SMALL_PAGES and most > least * (1 + PAGE_SHARE):
            yield f"{least:.3f} in {in_one}, {most:.3f} in {in_other}"
    return f"{len(rates)} machines"


@holds(
    "study",
    f"{WATCH_TIMES:g} times + {WATCH_MORE:.2%} of a CPU + {WATCH_LOOK_S * 1e3:g} ms, in the median of a placement",
)
def monitors_one_price(study: Matrix) -> Faults:
    """Monitors read one machine's instruments at one pace: that takes about as much of a CPU in every cell."""
    costs: dict[tuple[str | None, ...], dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for r in study.runs:
        spent, lasted = r.observation.watch_cpu_s, r.observation.host.elapsed_s
        if spent and lasted > 0 and not strained(r.observation):
            key = r.device.kind, r.device.uuid, r.host.host_id, r.host.cpu, r.host.commit, r.spec.label
            costs[key][r.cell].append((spent / lasted, lasted))
    for (*_, label), cells_ in costs.items():
        shares = {name: median(s for s, _ in runs) for name, runs in cells_.items() if len(runs) >= WATCHED}
        limits = {
            name: WATCH_TIMES * min(shares.values()) + WATCH_MORE + WATCH_LOOK_S / median(t for _, t in cells_[name])
            for name in shares
        }
        if any(shares[name] > limits[name] for name in shares):
            yield f"{label}: {', '.join(f'{name} {share:.2%}' for name, share in shares.items())}"
    return f"{len(costs)} placements"


@holds("study", f"{COUNTER_WATT:g} W at the most since the reading before")
def counters_have_one_course(study: Matrix) -> Faults:
    """A board's energy counter only grows, by no more than a board draws, or begins anew when its driver is loaded."""
    boards: dict[str | None, list[tuple[float, float, str]]] = defaultdict(list)
    for r in study.runs:
        known = [(c.t_s, c.energy_joule) for c in r.observation.counters if c.energy_joule is not None]
        if known and r.judged is None:
            begun = datetime.fromisoformat(r.started_utc).timestamp()
            boards[r.device.uuid] += [(begun + t, joules, r.run_id) for t, joules in (known[0], known[-1])]
    for readings in boards.values():
        readings.sort()
        for (t, before, _), (u, after, name) in itertools.pairwise(readings):
            most = COUNTER_WATT * (u - t + 2)  # starts are kept to whole seconds
            if after - before > most or (after < before - COUNTER_WATT and after > most):
                yield f"{name}: {before:.0f} J, then {after:.0f} J {u - t:.0f} s later"
    return f"{len(boards)} boards"


@holds("study", f"equal parameters; experts over the bus within {SHARE_TIMES:g} times")
def quants_of_one_model(study: Matrix) -> Faults:
    """Quantising changes no number of parameters, and of a prompt's experts about the same share crosses the bus."""
    parameters: dict[tuple[str, str], int] = {}
    shares = defaultdict(list)
    for r in study.runs:
        if parameters.setdefault((r.spec.model, r.spec.scale), r.sheet.parameters) != r.sheet.parameters:
            yield f"parameters of {r.cell}"
        moved = r.observation.placement.moved_bytes
        for t in r.observation.prompt_traffic:
            if t.received_bytes is None or (moved or t.received_bytes) < SHARE_BYTES:
                continue
            if t.received_bytes > SHARE_LEAST * moved:
                shares[f"{r.spec.model} {r.spec.placement} {t.workload}"].append(t.received_bytes / (moved or 1))
    for label, s in shares.items():
        if max(s) > SHARE_TIMES * min(s):
            yield f"{label}: {min(s):.2f} to {max(s):.2f}"
    return f"{len(parameters)} models"


def _check(scope: str, subject: Any) -> Iterator[Check]:
    for i in INVARIANTS.values():
        if i.scope == scope:
            yield _judged(i, subject)


def _judged(i: Invariant, subject: Any) -> Check:
    runs = _runs(subject) if i.needs or i.partly else []
    if unknown := silence(runs, i.needs):
        return Check(i.id, None, unknown)
    try:
        passed, finding = i.find(subject)
    except (ArithmeticError, LookupError, TypeError, ValueError) as err:
        # numbers that no run has: what cannot be computed of them has not been shown to hold
        return Check(i.id, False, f"it cannot be computed: {type(err).__name__}: {err}")
    if passed and (unknown := silence(runs, i.partly)):
        return Check(i.id, None, f"{unknown}; what can be checked holds: {finding}")
    return Check(i.id, passed, finding)


def _runs(subject: Any) -> list[tuple[str, Observation]]:
    """(runner, what it showed) of the runs that an invariant looks at."""
    if isinstance(subject, Measured):
        return [(subject.runner, subject.observation)]
    return [(r.engine.runner, r.observed) for r in getattr(subject, "runs", subject) if r.observed]


def run(subject: Measured) -> tuple[Check, ...]:
    """Every invariant of a run, in order."""
    return tuple(_check("run", subject))


def measured(r: Record) -> Measured:
    """What a record that holds an observation gives its run's invariants to look at."""
    return Measured(r.spec, r.observation, r.sheet, r.device, r.host, r.engine.runner)


def verdict(checks: Sequence[Check]) -> tuple[str, tuple[str, ...]]:
    """(valid, degraded or invalid; the ids of the checks that do not hold). No checks at all is invalid, and so is one
    that is not known here. What cannot be checked degrades."""
    flags = tuple(c.id for c in checks if not c.passed)
    if not checks:
        return "invalid", ("nothing-checked",)
    hard = [
        c for c in checks if not c.passed and (c.id not in INVARIANTS or (c.failed and not INVARIANTS[c.id].degrades))
    ]
    return "invalid" if hard else "degraded" if flags else "valid", flags


def block(runs: Sequence[Record]) -> tuple[Check, ...]:
    """Every invariant of a block; the later ones only of a complete block, as they compare its runs."""
    return _until("block", runs)


def _until(scope: str, subject: Any) -> tuple[Check, ...]:
    """The invariants in order; where the first fails, the others have nothing to look at."""
    checks = []
    for check in _check(scope, subject):
        checks.append(check)
        if not checks[0].passed:
            break
    return tuple(checks)


def log(run: Witnessed) -> tuple[Check, ...]:
    """Every invariant of a run's record against its log; of a failed run only that the logs are there."""
    if run.record.observed is None:
        return tuple(itertools.islice(_check("log", run), 1))
    return _until("log", run)


def cell(subject: Cell) -> tuple[Check, ...]:
    """Every invariant of a cell, of its standing runs."""
    return tuple(_check("cell", subject))


def study(subject: Matrix) -> tuple[Check, ...]:
    """Every invariant of a study, of its standing runs."""
    return tuple(_check("study", subject))
