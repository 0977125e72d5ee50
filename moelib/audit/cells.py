"""Invariants of a cell: what the runs of one file have in common, whatever their placement, and what sets them apart.

One run's numbers can be made to fit each other; here each is held against its neighbours'.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from statistics import median
from typing import Any, NamedTuple

from moelib.audit.bounds import COPIED_TOKENS, PAGING, copied_bytes
from moelib.audit.invariants import WATCH_ONCE_S, Faults, holds, lacks, strained
from moelib.audit.record import Record
from moelib.catalogue.facts import DeviceFacts, HostFacts
from moelib.catalogue.params import Workload
from moelib.engine.client import Request
from moelib.measure.memory import AGREE_BYTES, AGREE_SHARE

LATENCY_S, LATENCY_SHARE = 0.015, 0.005  # medians of a placement: 2.0 ms on an idle host, 10.7 ms where all CPUs decode
IDLE_S, IDLE_SHARE = 0.001, 0.001  # the same of a GPU's baseline, whose CPUs are idle: 0.46 ms seen
ENDED_S = {"cuda": 0.005}  # medians of a run, of the last token after the engine's own times: 0.6 to 1.9 ms seen
ENDED_SHARED_S = 0.010  # where the device takes the host's own CPUs: 0.7 to 1.1 ms seen on an idle one
DECODE_S, DECODE_SHARE = 0.012, 0.005  # medians of a placement: 0.1 to 7.5 ms seen
START_S, STARTS = 0.25, 5  # a cold start of the engine, and times the cell's usual one
PLACEMENT_START_S = 0.015  # between medians of a placement and of its cell, beside a factor of two: 10 ms seen
STEADY_SHARE, STEADY_BYTES = 0.02, 8 << 20  # host memory, bus traffic: 0.01 % seen on a GPU's host, 0.8 % on loopback
LOOPBACK_BYTES, LOOPBACK_SHARE = 4 << 20, 0.02  # RSS of a loopback device: 0.15 MiB apart seen
REST_BYTES, REST_SHARE = 8 << 20, 0.05  # what the engine's buffers do not explain, between placements: 2.3 MiB seen
MONITOR_TIMES = 1.6  # a run's CPU seconds for monitors, the same, beside the look that waits: 1.37 seen
ALL_EXPERTS, MANY_TOKENS = 0.95, 512  # 0.996 and more seen; 0.58 where a text was repeated
FAULT_SHARE, FAULTS = 0.02, 1 << 13  # page faults of a placement's runs: 0.6 % apart with a GPU, 5,200 on loopback
SESSION_S = 2.0  # between runs of one process: no driver is loaded anew meanwhile
TURN_S = 2.0  # starts are kept to whole seconds
ALIKE_S, ALIKE_SHARE = 8e-6, 0.01  # two runs' steps differ by 22 us, and by 0.7 to 3 %, at the least that was seen
ALIKE_STEPS = 20  # fewer may be alike by chance
NEIGHBOURS = 4  # a copy takes as long as what it was copied from: only the next in length are compared


class Cell(NamedTuple):
    """What a cell's invariants look at."""

    runs: Sequence[Record]
    """The records that stand, of whole blocks, in the plan's order."""
    workloads: Mapping[str, Workload]
    """As the plan has them."""
    starts: Mapping[str, float]
    """Run -> seconds from the start of its process to the log's first instant, where the log has times."""


def by_placement(runs: Iterable[Record]) -> dict[str, list[Record]]:
    """Placement and load mode -> its runs, in their order."""
    placements = defaultdict(list)
    for r in runs:
        placements[r.spec.label].append(r)
    return placements


def _differ(getters: Mapping[str, Callable[[Record], Any]], runs: Sequence[Record]) -> Iterator[str]:
    for name, get in getters.items():
        values = [get(r) for r in runs]
        odd = next((r for r, v in zip(runs, values, strict=True) if v != values[0]), None)
        if odd is not None:
            yield f"{name} of {odd.run_id}"


@holds("cell", "equal")
def one_file_and_engine(cell: Cell) -> Faults:
    """Every run of a cell is of one file, one engine and one kind of device."""
    manifests = {id(r.sheet): r.sheet for r in cell.runs}  # runs share them
    files = {k: s.model_copy(update={"quantize_s": 0.0, "origin": None}) for k, s in manifests.items()}
    same = {
        "file": lambda r: files[id(r.sheet)],
        "engine": lambda r: (r.engine.runner, r.engine.server_sha256, r.engine.build, r.observation.report.built),
        "engine's libraries": lambda r: r.observation.engine_digest,
        "device": lambda r: (r.device.kind, r.device.name),
        "device memory's speed": lambda r: r.device.bandwidth_bytes_per_s,
        "device's size": lambda r: r.device.total_bytes,
    }
    yield from _differ(same, cell.runs)
    return f"{len(cell.runs)} runs alike"


@holds("cell", "equal, and adding up to one file")
def header_numbers_agree(cell: Cell) -> Faults:
    """What the file's header says of a placement is the same in every run, and no placement changes the file's sum."""
    for label, runs in by_placement(cell.runs).items():
        yield from (f"{label}: {text}" for text in _differ({"header": lambda r: r.observation.placement}, runs))
    sums = {
        "weights": lambda r: r.observation.placement.device_bytes + r.observation.placement.moved_bytes,
        "experts": lambda r: r.sheet.expert_bytes,
    }
    yield from _differ(sums, cell.runs)
    read = [(p.device_read_bytes + p.host_read_bytes) for p in (r.observation.placement for r in cell.runs)]
    if max(read) - min(read) > 1:  # the share of a part is rounded down
        yield f"a token reads {min(read)} to {max(read)} bytes"
    for r in cell.runs:
        p, experts = r.observation.placement, r.sheet.expert_bytes
        whole = r.spec.placed.is_whole
        if p.moved_bytes > experts or (whole and p.moved_bytes != experts):
            yield f"{r.run_id} moves {p.moved_bytes} of {experts} bytes"
    return "one file"


@holds("cell", "the plan's", partly="tokens")
def workloads_as_planned(cell: Cell) -> Faults:
    """Prompts and answers are as long as the plan has them, and a prompt has one length in all runs."""
    lengths: dict[str, set[int | None]] = defaultdict(set)
    for r in cell.runs:
        for q in r.observation.requests:
            planned = cell.workloads.get(q.workload)
            lengths[q.workload].add(q.prompt_tokens)
            if planned is None or q.generate_tokens != planned.generate_tokens:
                yield f"{r.run_id}: {q.workload} generates {q.generate_tokens}"
            elif planned.prompt_tokens and q.prompt_tokens not in (None, planned.prompt_tokens):
                yield f"{r.run_id}: {q.workload} has {q.prompt_tokens} prompt tokens"
    yield from (
        f"{name}: prompts of {sorted(n, key=lambda k: k or 0)} tokens" for name, n in lengths.items() if len(n) > 1
    )
    return f"{len(cell.workloads)} workloads"


def _requests(runs: Iterable[Record]) -> list[Request]:
    return [q for r in runs for q in r.observation.requests]


@holds(
    "cell",
    f"medians: TTFT {LATENCY_S * 1e3:g} ms + {LATENCY_SHARE:.1%}, decode {DECODE_S * 1e3:g} ms + "
    f"{DECODE_SHARE:.1%} (a GPU's baseline {IDLE_S * 1e3:g} ms + {IDLE_SHARE:.1%}), last token "
    f"{ENDED_S['cuda'] * 1e3:g} ms ({ENDED_SHARED_S * 1e3:g} on loopback)",
    needs="timings",
)
def placements_keep_the_engines_time(cell: Cell) -> Faults:
    """On a quiet host, what this side adds to the engine's own times is small over a placement's requests: one run may
    be delayed, not all by as much. The first token may wait where all CPUs decode; the last one does not."""
    quiet = [r for r in cell.runs if not strained(r.observation)]
    idle = {r.spec.label for r in quiet if r.observation.device_kind == "cuda" and r.spec.placed.is_baseline}
    for r in quiet:
        after = [
            q.token_s[-1] - q.engine_prompt_s - q.engine_predicted_s
            for q in r.observation.requests
            if q.engine_prompt_s and q.engine_predicted_s is not None and q.whole
        ]
        if after and not 0 <= median(after) <= ENDED_S.get(r.observation.device_kind, ENDED_SHARED_S):
            yield f"{r.run_id}: last tokens {median(after) * 1e3:.1f} ms after the engine's"
    for (label, workload, _), requests in _by_workload(quiet).items():
        late = [t.ttft_s - t.prompt_s - LATENCY_SHARE * t.prompt_s for t in requests]
        if median(late) > LATENCY_S:
            yield f"{label}: first tokens of {workload} {median(late) * 1e3:.1f} ms late"
        # an incomplete character at the end has no event: then the last token's time is not known
        ours = [(t.request.token_s[-1] - t.request.token_s[0], t.decode_s) for t in requests if t.request.whole]
        least, share = (IDLE_S, IDLE_SHARE) if label in idle else (DECODE_S, DECODE_SHARE)
        if len(ours) > 1 and (apart := median([abs(a - b) - share * b for a, b in ours])) > least:
            yield f"{label}: decoding {workload} {apart * 1e3:.1f} ms from the engine's time"
    return f"{len(_requests(cell.runs))} requests"


class _Timed(NamedTuple):
    """A request with all of its times: to the first token here, of the prompt and of decoding by the engine."""

    request: Request
    ttft_s: float
    prompt_s: float
    decode_s: float


def _by_workload(runs: Iterable[Record]) -> dict[tuple[str, str, bool], list[_Timed]]:
    """Requests by placement, workload, and whether the server was warm."""
    groups = defaultdict(list)
    for r in runs:
        for q in r.observation.requests:
            if q.ttft_s is not None and q.engine_prompt_s and q.engine_predicted_s is not None:
                timed = _Timed(q, q.ttft_s, q.engine_prompt_s, q.engine_predicted_s)
                groups[r.spec.label, q.workload, q.index > 0].append(timed)
    return groups


@holds("cell", f"{START_S * 1e3:g} ms, or {STARTS} times the cell's usual")
def starts_alike(cell: Cell) -> Faults:
    """From the start of a process to its log's first instant passes about the same time in every run."""
    quiet = [r for r in cell.runs if r.run_id in cell.starts and not strained(r.observation)]
    if not quiet:
        return "the logs have no times, or the host was not quiet"
    usual = median(cell.starts[r.run_id] for r in quiet)
    starts = ((r.run_id, cell.starts[r.run_id]) for r in quiet)
    yield from (f"{name}: {s:.2f} s" for name, s in starts if s > max(START_S, STARTS * usual))
    for label, runs in by_placement(quiet).items():
        known = [cell.starts[r.run_id] for r in runs]
        if known and not usual / 2 - PLACEMENT_START_S <= median(known) <= 2 * usual + PLACEMENT_START_S:
            yield f"{label}: {median(known) * 1e3:.0f} ms in the median, all {usual * 1e3:.0f} ms"
    return f"{usual * 1e3:.0f} ms in the median"


def _spread(name: str, values: Mapping[str, Sequence[float]], least: float, share: float) -> Iterator[str]:
    for label, numbers in values.items():
        if numbers and max(numbers) - min(numbers) > max(least, share * max(numbers)):
            yield f"{name} of {label}: {min(numbers):.0f} to {max(numbers):.0f}"


@holds(
    "cell",
    f"device {AGREE_SHARE:.0%} or {AGREE_BYTES >> 20} MiB ({LOOPBACK_BYTES >> 20} on loopback), host and bus 2 %",
    partly="residence",
)
def memory_steady(cell: Cell) -> Faults:
    """The same file in the same place takes the same memory of device and host in every block, and what the engine's
    buffers leave unexplained is about the same in every placement; so is what a prompt moves over the bus."""
    device, host, bus, rests = (defaultdict(list) for _ in range(4))
    loopback = any(r.observation.device_kind == "loopback" for r in cell.runs)
    for r in cell.runs:
        o, label = r.observation, r.spec.label
        if o.memory.value_bytes is not None:
            device[label].append(o.memory.value_bytes)
        if o.memory.residual_bytes is not None:
            rests[label].append(o.memory.residual_bytes)
        stays = not lacks(r.engine.runner, o, "residence")
        if o.host_rss_peak_bytes is not None and (o.host.major_faults or 0) < PAGING and stays:
            host[label].append(o.host_rss_peak_bytes)
        for m in o.prompt_traffic:
            if m.received_bytes is not None:
                bus[f"{label}, {m.workload}"].append(m.received_bytes)
    least, share = (LOOPBACK_BYTES, LOOPBACK_SHARE) if loopback else (AGREE_BYTES, AGREE_SHARE)
    yield from _spread("device memory", device, least, share)
    yield from _spread("host memory", host, STEADY_BYTES, STEADY_SHARE)
    yield from _spread("bus traffic", bus, STEADY_BYTES, STEADY_SHARE)
    alike: dict[str, list[int]] = defaultdict(list)  # mapped or copied, the same experts cross the bus
    for label, moved in bus.items():
        alike[f"{label.partition('/')[0]}, {label.partition(', ')[2]} in all load modes"] += moved
    yield from _spread("bus traffic", alike, STEADY_BYTES, STEADY_SHARE)
    middles = {label: median(rest) for label, rest in rests.items()}
    largest = max((r.observation.memory.value_bytes or 0 for r in cell.runs), default=0)
    bound = max(REST_BYTES, REST_SHARE * largest) if loopback else max(AGREE_BYTES, AGREE_SHARE * largest)
    if middles and max(middles.values()) - min(middles.values()) > bound:
        yield f"beside the engine's buffers {', '.join(f'{label} {n:.0f}' for label, n in middles.items())} bytes"
    return f"{len(by_placement(cell.runs))} placements steady"


@holds("cell", f"{ALL_EXPERTS:.0%} of those of the moved layers, at {MANY_TOKENS} tokens and more")
def experts_copied(cell: Cell) -> Faults:
    """A prompt of many different tokens needs all experts: fewer bytes than theirs on the bus, where llama.cpp copies
    them to the GPU, are those of a prompt that repeats itself, and its time is too short for others."""
    told = 0
    for r in cell.runs:
        placed, kind = r.spec.placed, r.observation.device_kind
        if kind != "cuda" or not placed.op_offload or (placed.ubatch or COPIED_TOKENS) < COPIED_TOKENS:
            continue
        for m in r.observation.prompt_traffic:
            w, most = cell.workloads.get(m.workload), copied_bytes(r, m.prompt_tokens)
            if w and w.drawn is not None and m.prompt_tokens >= MANY_TOKENS and most and m.received_bytes is not None:
                told += 1
                if m.received_bytes < ALL_EXPERTS * most:
                    yield f"{r.run_id}: {m.workload} moved {m.received_bytes / most:.0%}"
    return f"{told} prompts that need all experts"


@holds("cell", f"{FAULT_SHARE:.0%} or {FAULTS} faults apart")
def pages_steady(cell: Cell) -> Faults:
    """The same work on the same memory touches about as many pages in every block of a session: how the system cached
    the file is another matter in the next, and after each cold load, which reads it anew."""
    sessions, read_by = defaultdict(list), _read_by(cell.runs)
    for r in cell.runs:
        use = r.observation.host
        if use.minor_faults is not None and (use.major_faults or 0) < PAGING:
            sessions[r.spec.label, _session(r), read_by.get(r.run_id)].append(use.minor_faults)
    for (label, *_), faults in sessions.items():
        if max(faults) - min(faults) > max(FAULTS, FAULT_SHARE * max(faults)):
            yield f"{label}: {min(faults)} to {max(faults)} page faults"
    return f"{len(cell.runs)} runs"


@holds("cell", f"{MONITOR_TIMES:g} times the median of its placement + {WATCH_ONCE_S:g} s")
def monitors_alike(cell: Cell) -> Faults:
    """Watching the same work takes about as much of a CPU in every block."""
    for label, runs in by_placement(cell.runs).items():
        known = {r.run_id: r.observation.watch_cpu_s for r in runs if r.observation.watch_cpu_s}
        usual = median(known.values()) if known else 0.0
        for name, spent in known.items():
            if not usual / MONITOR_TIMES - WATCH_ONCE_S <= spent <= usual * MONITOR_TIMES + WATCH_ONCE_S:
                yield f"{label}: {spent:.3f} CPU seconds in {name}, {usual:.3f} in the median"
    return "alike"


def _read_by(runs: Iterable[Record]) -> dict[str, str]:
    """Run that maps the file -> the cold run that read it into its host's cache, if one did.

    A file that was read is cached in other pieces than one that was mapped: mapping it then takes other faults.
    """
    last: dict[str | None, str] = {}
    found = {}
    for r in sorted(runs, key=lambda r: (r.started_utc, r.attempt)):
        if r.spec.placed.cold:
            last[r.host.host_id] = r.run_id
        elif r.spec.load_mode != "none" and r.host.host_id in last:
            found[r.run_id] = last[r.host.host_id]
    return found


def _session(r: Record) -> str:
    """What a process says of its host and device, which it looks at once, before its runs."""
    return _session_key(r.host, r.device)


@lru_cache(4096)
def _session_key(host: HostFacts, device: DeviceFacts) -> str:
    return f"{host!r} {device!r}"


def _in_turn(runs: Iterable[Record]) -> Iterator[tuple[Record, Record, float]]:
    """(run, the next one on its machine, seconds from the end of one to the start of the other)."""
    machines = defaultdict(list)
    for r in runs:
        if r.judged is None:
            machines[r.host.host_id, r.device.uuid].append((datetime.fromisoformat(r.started_utc), r))
    for begun in machines.values():
        begun.sort(key=lambda pair: (pair[0], pair[1].attempt))  # starts are kept to whole seconds
        for (a, first), (b, second) in itertools.pairwise(begun):
            yield first, second, (b - a).total_seconds() - first.observation.wall_s


@holds("cell", "each session's in one piece")
def one_session_at_a_time(cell: Cell) -> Faults:
    """A process reads the host's speed and an empty context once, before its runs: what it read does not come back
    after another's; and the board's energy counter goes on from one run to the next."""
    ended_sessions: set[str] = set()
    for first, second, gap in _in_turn(cell.runs):
        before, after = _session(first), _session(second)
        if before != after:
            ended_sessions.add(before)
        if after in ended_sessions:
            yield f"what another process read is back in {second.run_id}"
        ended, begun = first.observation.counters[-1:], second.observation.counters[:1]
        counted = [c.energy_joule for c in (*ended, *begun) if c.energy_joule is not None]
        if gap <= SESSION_S and len(counted) == 2 and counted[1] < counted[0] - 1:
            yield f"the counter of {second.run_id} begins before the end of the one before"
    return f"{len(cell.runs)} runs"


@holds("cell", "each after the end of the one before")
def runs_in_turn(cell: Cell) -> Faults:
    """Runs on one machine follow each other: two at once would slow each other, and one of them was then made up."""
    for first, second, gap in _in_turn(cell.runs):
        if gap < -TURN_S - abs(first.observation.host.clock_step_s):
            yield f"{second.run_id} began before {first.run_id} ended"
    return f"{len(cell.runs)} runs one after another"


@holds("cell", f"steps {ALIKE_S * 1e6:g} us or {ALIKE_SHARE:.0%} apart in the median")
def no_two_alike(cell: Cell) -> Faults:
    """Two runs whose steps took the same time, one after another, are one run, copied: shifted or scaled, it shows."""
    import numpy as np

    groups = defaultdict(list)
    for r in cell.runs:
        if r.judged is None:
            for q in r.observation.requests:
                if len(q.token_s) > ALIKE_STEPS and q.is_live:
                    groups[q.workload, len(q.token_s)].append((f"{r.run_id}[{q.index}]", q.token_s))
    copies = set()
    for same in groups.values():
        steps = np.diff(np.asarray([times for _, times in same]), axis=1)
        mean = steps.mean(axis=1)
        shapes = steps / np.where(mean > 0, mean, 1.0)[:, None]
        least = np.minimum(ALIKE_S, ALIKE_SHARE * mean)
        # by length, which a shift leaves; by shape, which a change of scale leaves
        for order in (np.argsort(mean), np.argsort(np.median(shapes, axis=1))):
            for near in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
                a, b = order[:-near], order[near:]
                apart = np.abs(shapes[a] - shapes[b])
                # half of the values are below a median that small: where they are not it need not be looked for
                most = 1.001 * least[a] / np.where(mean[a] > 0, mean[a], 1.0)
                below = np.count_nonzero(apart <= most[:, None], axis=1)
                near_by = np.flatnonzero((2 * below >= apart.shape[1]) | (mean[a] <= 0))
                for i in near_by[np.median(apart[near_by], axis=1) * mean[a][near_by] <= least[a][near_by]]:
                    copies.add(" and ".join(sorted((same[a[i]][0], same[b[i]][0]))))
    yield from sorted(copies)
    return f"{len(cell.runs)} runs differ"
