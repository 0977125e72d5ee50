"""What the runs of one cell have in common: each invariant has a cell that breaks it, and it alone."""

import random
from dataclasses import replace

import pytest
from factory import EXPERTS, MIB, WORKLOADS, evidence, observation, record_of, request, with_facts, with_observed

from moelib.audit import audit, cells
from moelib.audit.bounds import PACKETS
from moelib.audit.invariants import INVARIANTS
from moelib.catalogue import params
from moelib.measure.nvml import Counters
from moelib.measure.run import PromptTraffic
from moelib.study import study

LONG = {"plan-short": params.Workload(name="plan-short", title="t", text="x", generate_tokens=40)}


def jitter(run, step):
    """Differences in length between steps, of no two runs the same: 0 to 1.2 ms."""
    return random.Random(1000 * run + step).random() * 1.2e-3


def timed(run, shift=0.0, scale=1.0):
    """Two requests of 40 tokens, as run number `run` had them."""
    requests = []
    for index in (0, 1):
        t, times = 0.02, []
        for step in range(40):
            times.append(round((t + shift) * scale, 6))
            t += 0.002 + jitter(2 * run + index, step)
        engine = {
            "engine_predicted_s": round(times[-1] - times[0], 6),
            "engine_prompt_s": round(times[0] - 0.002, 6),
        }
        requests.append(request(index, n=40, token_s=tuple(times), **engine))
    return tuple(requests)


def cell_of(rounds=3):
    """A valid cell: so many rounds of baseline and cpu-moe."""
    runs = []
    for b in range(rounds):
        for order, placement in enumerate(("baseline", "cpu-moe")):
            observed = replace(observation(placement), requests=timed(2 * b + order))
            runs.append(record_of(observed, placement=placement, block=b, order=order))
    return runs


def flagged(runs, workloads=LONG, starts=None):
    return {c.id for c in audit.cell(audit.Cell(runs, workloads, starts or {})) if not c.passed}


RUNS = cell_of()


def with_run(n, r, runs=RUNS):
    """The cell with its run `n` exchanged for `r`."""
    return [*runs[:n], r, *runs[n + 1 :]]


def changed(n, runs=RUNS, **change):
    """The cell with the observation of its run `n` changed."""
    return with_run(n, with_observed(runs[n], **change), runs)


def every(runs=RUNS, **change):
    return [with_observed(r, **change) for r in runs]


def placed(placement, change, runs=RUNS):
    """The cell with every run of one placement changed, by what `change` makes of its observation."""
    return [with_observed(r, **change(r.observed)) if r.spec.placement == placement else r for r in runs]


def host(**change):
    return replace(RUNS[0].observed.host, **change)


def header(n, **change):
    return changed(n, placement=replace(RUNS[n].observed.placement, **change))


def offloads(**change):
    """The cell whose offload runs have another header."""
    return placed("cpu-moe", lambda o: {"placement": replace(o.placement, **change)})


BUSY = {"busy_s": 0.8}  # others work on the host
TIMES = "placements-keep-the-engines-time"


def late(by, room=0.012):
    """Change of a run whose first tokens are `by` seconds late, and whose second ones leave `room` for that."""

    def change(observed):
        requests = []
        for q in observed.requests:
            first, *later = q.token_s
            token_s = (first + by, *(t + room for t in later))
            requests.append(replace(q, token_s=token_s, engine_predicted_s=q.engine_predicted_s + room))
        return {"requests": tuple(requests)}

    return change


def decoding(more_s):
    """Change of a run whose engine says that decoding took so much longer."""
    return lambda o: {
        "requests": tuple(replace(q, engine_predicted_s=q.engine_predicted_s + more_s) for q in o.requests)
    }


def shifted(n, by, **change):
    """The cell whose run `n` had all tokens so much later: the last comes 2 ms after the engine's own times here."""
    requests = tuple(replace(q, token_s=tuple(t + by for t in q.token_s)) for q in RUNS[n].observed.requests)
    return changed(n, requests=requests, **change)


def touched(*faults, **of_host):
    """The cell whose baselines touched so many pages, and its other runs 5000."""
    counts = {2 * i: n for i, n in enumerate(faults)}
    return [
        with_observed(r, host=replace(r.observed.host, minor_faults=counts.get(i, 5000), **of_host))
        for i, r in enumerate(RUNS)
    ]


def memory(o, more):
    return {"memory": replace(o.memory, value_bytes=o.memory.value_bytes + more)}


def value(more, kind="loopback"):
    """The cell on that kind of device whose first run took so much more memory."""
    return changed(0, every(device_kind=kind), **memory(RUNS[0].observed, more))


def traffic(nbytes):
    return {"prompt_traffic": (PromptTraffic("plan-short", 8, nbytes, 5),)}


def bus(nbytes):
    """The cell whose prompts take 1000 MiB over the bus, and in its first run so many."""
    return changed(0, every(**traffic(1000 * MIB)), **traffic(nbytes))


def watched(usual, spent):
    return changed(0, every(watch_cpu_s=usual), watch_cpu_s=spent)


# runs a second apart are of one session; the energy counter goes on between them
SESSION = [r.model_copy(update={"started_utc": f"2026-01-01T00:00:{i:02}+00:00"}) for i, r in enumerate(RUNS)]
FASTER_RAM = {"ram_read_bytes_per_s": 50e9}


def session(n, part, **change):
    return with_run(n, with_facts(SESSION[n], part, **change), SESSION)


def repeated(n):
    """A run of another session that was done again, in the second in which the last of the others began."""
    again = with_facts(SESSION[n], "host", **FASTER_RAM)
    return with_run(n, again.model_copy(update={"attempt": 2, "started_utc": SESSION[5].started_utc}), SESSION)


def counted(*joules):
    pairs = zip(SESSION, joules, strict=True)
    return [with_observed(r, counters=(Counters(0.1, j), Counters(0.4, j + 10))) for r, j in pairs]


def second_begins(second, **of_host):
    """The cell whose first run lasts 10 s, and whose second begins at this second."""
    first, other = (
        with_observed(r, wall_s=10.0).model_copy(update={"started_utc": f"2026-01-01T00:00:{s:02}+00:00"})
        for r, s in ((RUNS[0], 0), (RUNS[1], second))
    )
    return [first, with_facts(other, "host", **of_host), *RUNS[2:]]


def noisy(requests):
    return tuple(
        replace(q, token_s=tuple(round(t + 4e-6 * ((7 * i) % 3 - 1), 6) for i, t in enumerate(q.token_s)))
        for q in requests
    )


def longer_prompts(n):
    return changed(n, requests=tuple(replace(q, prompt_tokens=9, prompt_n=9) for q in RUNS[n].observed.requests))


BOTH = "one-file-and-engine one-session-at-a-time"
CELLS = [
    ("", RUNS),
    ("one-file-and-engine", with_run(3, with_facts(RUNS[3], "sheet", expert_types={"Q5_K": 9}))),
    ("one-file-and-engine", with_run(3, with_facts(RUNS[3], "engine", server_sha256="c" * 64))),
    ("one-file-and-engine", changed(3, engine_files={"libggml.so": "c" * 64})),
    (BOTH, with_run(3, with_facts(RUNS[3], "device", name="another"))),
    (BOTH, with_run(3, with_facts(RUNS[3], "device", bandwidth_bytes_per_s=1e12))),
    # one that was made again took other seconds, and later code writes its origin
    ("", with_run(3, with_facts(RUNS[3], "sheet", quantize_s=9.0, origin=None))),
    ("header-numbers-agree", header(0, device_read_bytes=2 * RUNS[0].observed.placement.device_read_bytes)),
    ("header-numbers-agree", offloads(host_read_bytes=2 * RUNS[1].observed.placement.host_read_bytes)),
    ("header-numbers-agree", offloads(moved_bytes=EXPERTS // 2)),
    ("workloads-as-planned", longer_prompts(0)),
    ("", placed("baseline", late(0.0))),
    ("", placed("baseline", late(0.012))),
    (TIMES, placed("baseline", late(0.014))),
    ("", changed(0, **late(0.014)(RUNS[0].observed))),  # one run may be
    ("", placed("baseline", late(0.014), placed("baseline", lambda o: {"host": host(**BUSY)}))),  # all, if others work
    (TIMES, placed("cpu-moe", decoding(-0.014))),
    ("", shifted(2, 0.0079)),
    (TIMES, shifted(2, 0.0081)),
    ("", shifted(2, -0.0019)),
    (TIMES, shifted(2, -0.0021)),
    ("", shifted(2, 0.1, host=host(**BUSY))),
    ("", touched(1000, 9192)),
    ("pages-steady", touched(1000, 9193, 1000)),
    ("", touched(1_000_000, 1_019_000, 1_000_000)),
    ("pages-steady", touched(1_000_000, 1_021_000, 1_000_000)),
    ("", touched(1_000_000, 1_021_000, major_faults=100)),  # pages came and went
    ("", value(4 * MIB)),
    ("memory-steady", value(4 * MIB + 1)),
    ("memory-steady", value(-4 * MIB - 1)),
    ("", value(64 * MIB, "cuda")),
    ("memory-steady", value(65 * MIB, "cuda")),
    # what the engine's buffers leave unexplained is about the same in every placement
    ("memory-steady", placed("baseline", lambda o: memory(o, -9 * MIB))),
    ("", placed("baseline", lambda o: memory(o, -7 * MIB))),
    ("", changed(0, host_rss_peak_bytes=58 * MIB)),
    ("memory-steady", changed(0, host_rss_peak_bytes=59 * MIB)),
    ("", changed(0, host_rss_peak_bytes=20 * MIB, host=host(major_faults=100))),
    ("", bus(1020 * MIB)),
    ("memory-steady", bus(1030 * MIB)),
    ("", bus(None)),
    ("", watched(0.2, 0.41)),
    ("monitors-alike", watched(0.2, 0.43)),
    ("", watched(2.0, 1.16)),
    ("monitors-alike", watched(2.0, 1.14)),
    ("", SESSION),
    ("one-session-at-a-time", session(2, "host", **FASTER_RAM)),
    ("one-session-at-a-time", session(2, "device", context_bytes=5)),
    ("", session(5, "host", **FASTER_RAM)),  # a second process did the last run
    ("", repeated(2)),
    ("", counted(0, 20, 40, 60, 80, 100)),
    ("one-session-at-a-time", counted(0, 20, 28, 60, 80, 100)),
    # kept to whole seconds, and half a second long
    ("", with_run(1, RUNS[1].model_copy(update={"started_utc": RUNS[0].started_utc}))),
    ("", second_begins(10)),
    ("", second_begins(8)),
    ("runs-in-turn", second_begins(7)),
    ("", second_begins(7, host_id="f" * 32)),
    # a copy is seen however it was shifted, and noise of microseconds hides none
    ("no-two-alike", changed(2, requests=timed(0))),
    ("no-two-alike", changed(2, requests=timed(0, shift=5e-6))),
    ("no-two-alike", changed(2, requests=noisy(timed(0)))),
]


@pytest.mark.parametrize(("check", "runs"), CELLS)
def test_a_cells_invariants_flag_what_only_its_runs_together_show(check, runs):
    assert flagged(runs) == set(check.split())


STARTS = [
    ("", 0.02, 0.25),
    ("starts-alike", 0.02, 0.26),
    ("", 0.4, 1.9),
    ("starts-alike", 0.4, 2.1),
]


@pytest.mark.parametrize(("check", "usual", "first"), STARTS)
def test_one_start_cannot_take_many_times_as_long_as_the_others(check, usual, first):
    starts = {r.run_id: usual for r in RUNS} | {RUNS[0].run_id: first}
    assert flagged(RUNS, starts=starts) == ({check} if check else set())


def test_every_invariant_is_broken_in_some_row():
    elsewhere = {"experts-copied", "energy-steady", "energy-as-metered", "energy-between-requests"}
    rows = {row[0] for row in (*CELLS, *STARTS)} - {"", BOTH}
    assert rows | elsewhere == {i.id for i in INVARIANTS.values() if i.scope == "cell"}


@pytest.mark.parametrize("scale", [1.03, 0.5])
def test_a_copy_is_seen_however_it_was_scaled(scale):
    assert flagged(changed(2, requests=timed(0, scale=scale))) - {TIMES} == {"no-two-alike"}


def test_requests_are_as_long_as_the_plan_has_them():
    exact = {"plan-short": LONG["plan-short"].model_copy(update={"prompt_tokens": 9})}
    for plan in (WORKLOADS, {}, exact):  # of 5 tokens, of none
        assert flagged(RUNS, plan) == {"workloads-as-planned"}
    uncounted = tuple(replace(q, prompt_tokens=None) for q in RUNS[0].observed.requests)
    _, finding = cells.workloads_as_planned(cells.Cell(changed(0, requests=uncounted), LONG, {}))
    assert finding == "plan-short: prompts of [None, 8] tokens"


def test_pages_of_another_session_are_another_matter():
    runs = touched(1_000_000, 1_021_000, 1_000_000)
    assert "pages-steady" not in flagged(with_run(2, with_facts(runs[2], "host", ram_read_bytes_per_s=1e9), runs))


def test_pages_of_a_file_that_a_cold_load_read_are_another_matter():
    """Of SESSION the baselines are runs 0, 2 and 4, the last of them with other faults."""
    runs = [
        r.model_copy(update={"started_utc": s.started_utc})
        for r, s in zip(touched(1_000_000, 1_000_000, 1_021_000), SESSION, strict=True)
    ]

    def cold(*numbers):
        of = dict.fromkeys(numbers, "cpu-moe,cache=cold")
        return [
            r if i not in of else r.model_copy(update={"spec": replace(r.spec, placement=of[i])})
            for i, r in enumerate(runs)
        ]

    def as_none(of):
        return [
            r.model_copy(update={"spec": replace(r.spec, load_mode="none")}) if r.spec.placement == "baseline" else r
            for r in of
        ]

    assert "pages-steady" in flagged(runs)
    assert "pages-steady" not in flagged(cold(3))  # between the second and the third
    assert "pages-steady" in flagged(cold(1, 5))  # those that were read by the same load are still compared
    assert "pages-steady" in flagged(as_none(cold(3)))  # what is not mapped takes faults of its own


def test_a_gpus_idle_baseline_decodes_as_long_as_the_engine_says():
    """Where no CPU decodes, nothing holds a first token up; where they do, it may wait."""

    def on_gpu(by):
        return lambda o: {"device_kind": "cuda", **late(by, room=0.0)(o)}

    for by, right in ((0.0010, True), (0.0013, False)):
        assert (TIMES not in flagged(placed("baseline", on_gpu(by)))) == right
    assert TIMES not in flagged(placed("cpu-moe", on_gpu(0.0013)))


def test_no_run_on_a_gpu_ends_its_requests_long_after_the_engine():
    for by, right in ((0.0029, True), (0.0031, False)):
        assert (TIMES not in flagged(shifted(3, by, device_kind="cuda"))) == right


def test_a_copy_is_found_among_many():
    runs = cell_of(20)
    assert flagged(runs) == set()
    assert flagged(changed(31, runs, requests=timed(4, scale=1.01))) == {"no-two-alike"}


def test_a_cell_that_does_not_hold_together_has_no_usable_run():
    plan = tuple(tuple(r.spec for r in RUNS[i : i + 2]) for i in range(0, 6, 2))
    cell = study.Cell("deepseek-moe-16b", "Q4_K_M", plan)
    whole = study.Status.of(cell, evidence(RUNS), LONG)
    assert (whole.usable, len(whole.rounds), whole.problems) == (6, 3, ())
    copied = changed(2, requests=RUNS[0].observed.requests)
    broken = study.Status.of(cell, evidence(copied), LONG)
    assert (broken.usable, broken.tally["invalid"], broken.planned, broken.rounds) == (0, 6, 6, ())
    assert broken.problems[0].startswith("deepseek-moe-16b/Q4_K_M: no-two-alike: ")


DRAWN = params.Workload(name="mixed", title="t", drawn=7, prompt_tokens=512, generate_tokens=40)
ALL = 3 * 30 * MIB // 4  # of 4 layers' experts all but the last one's


@pytest.mark.parametrize(
    ("share", "change", "workload", "flag"),
    [
        (1.0, {}, DRAWN, False),
        (0.96, {}, DRAWN, False),
        (0.94, {}, DRAWN, True),
        (0.6, {}, DRAWN.model_copy(update={"drawn": None, "text": "x"}), False),  # nobody says that it needs all
        (0.6, {"placement": "cpu-moe,op-offload=off"}, DRAWN, False),  # nothing is copied
        (0.6, {"placement": "cpu-moe,ubatch=31"}, DRAWN, False),
        (1.88, {"placement": "cpu-moe,ubatch=256"}, DRAWN, True),
        (2.0, {"placement": "cpu-moe,ubatch=256"}, DRAWN, False),
    ],
)
def test_a_prompt_of_many_different_tokens_copies_all_experts(share, change, workload, flag):
    observed = observation("cpu-moe")
    place = replace(observed.placement, moved_blocks=4, moved_bytes=30 * MIB)
    traffic = (PromptTraffic("mixed", 512, int(share * PACKETS * ALL) + 1, 5),)
    r = record_of(observed, **{"placement": "cpu-moe"} | change)
    r = r.model_copy(
        update={"observed": replace(r.observed, device_kind="cuda", placement=place, prompt_traffic=traffic)}
    )
    passed, _ = cells.experts_copied(cells.Cell([r], {"mixed": workload}, {}))
    assert passed != flag
