"""What the runs of one cell have in common: each invariant has a cell that breaks it, and it alone."""

import random
from dataclasses import replace

import pytest
from factory import EXPERTS, MIB, WORKLOADS, evidence, made, observation, request, spec

from moelib.audit import audit, cells
from moelib.audit.invariants import INVARIANTS
from moelib.catalogue import params
from moelib.measure.nvml import Counters
from moelib.measure.run import PromptTraffic
from moelib.study import study

LONG = {"plan-short": params.Workload(name="plan-short", title="t", text="x", generate_tokens=40)}


def jitter(k, i):
    """Differences in length between steps, of no two runs the same: 0 to 1.2 ms."""
    return random.Random(1000 * k + i).random() * 1.2e-3


def timed(k, shift=0.0, scale=1.0):
    """Two requests of 40 tokens, as run number `k` had them."""
    made_ = []
    for index in (0, 1):
        t, times = 0.02, []
        for i in range(40):
            times.append(round((t + shift) * scale, 6))
            t += 0.002 + jitter(2 * k + index, i)
        lasted = times[-1] - times[0]
        prompt = times[0] - 0.002
        made_.append(
            request(
                index, n=40, token_s=tuple(times), engine_predicted_s=round(lasted, 6), engine_prompt_s=round(prompt, 6)
            )
        )
    return tuple(made_)


def cell_of(blocks=3):
    """A valid cell: so many blocks of baseline and cpu-moe."""
    runs = []
    for b in range(blocks):
        for order, placement in enumerate(("baseline", "cpu-moe")):
            observed = replace(observation(placement), requests=timed(2 * b + order))
            runs.append(made(observed, placement=placement, block=b, order=order))
    return runs


def flagged(runs, workloads=LONG, starts=None):
    return {c.id for c in audit.cell(audit.Cell(runs, workloads, starts or {})) if not c.passed}


def with_seen(r, **change):
    return r.model_copy(update={"observed": replace(r.observed, **change)})


def changed(runs, n, **change):
    """The cell with run `n` changed."""
    return [with_seen(r, **change) if i == n else r for i, r in enumerate(runs)]


def arm(runs, placement, change):
    """The cell with every run of one placement changed, by what `change` makes of its observation."""
    return [with_seen(r, **change(r.observed)) if r.spec.placement == placement else r for r in runs]


def test_a_whole_cell_passes_every_check():
    checks = audit.cell(audit.Cell(cell_of(), LONG, {r.run_id: 0.02 for r in cell_of()}))
    assert {c.id for c in checks} == {i.id for i in INVARIANTS.values() if i.scope == "cell"}
    assert [c for c in checks if not c.passed] == []


def test_one_file_engine_and_kind_of_device():
    runs = cell_of()
    for part, change in [
        ("sheet", {"expert_types": {"Q5_K": 9}}),
        ("engine", {"server_sha256": "c" * 64}),
        ("device", {"name": "another"}),
        ("device", {"bandwidth_bytes_per_s": 1e12}),
    ]:
        other = runs[3].model_copy(update={part: getattr(runs[3], part).model_copy(update=change)})
        assert flagged([*runs[:3], other, *runs[4:]]) - {"one-session-at-a-time"} == {"one-file-and-engine"}
    exchanged = with_seen(runs[3], engine_files={"libggml.so": "c" * 64})
    assert flagged([*runs[:3], exchanged, *runs[4:]]) == {"one-file-and-engine"}
    # one that was made again took other seconds, and later code tells its origin
    again = runs[3].sheet.model_copy(update={"quantize_s": 9.0, "origin": None})
    assert flagged([*runs[:3], runs[3].model_copy(update={"sheet": again}), *runs[4:]]) == set()


def test_the_headers_numbers_are_one_files():
    runs = cell_of()
    p = runs[0].observed.placement
    assert flagged(changed(runs, 0, placement=replace(p, device_read_bytes=2 * p.device_read_bytes))) == {
        "header-numbers-agree"
    }
    doubled = arm(
        runs, "cpu-moe", lambda o: {"placement": replace(o.placement, host_read_bytes=2 * o.placement.host_read_bytes)}
    )
    assert flagged(doubled) == {"header-numbers-agree"}
    fewer = arm(runs, "cpu-moe", lambda o: {"placement": replace(o.placement, moved_bytes=EXPERTS // 2)})
    assert flagged(fewer) == {"header-numbers-agree"}


def test_requests_are_as_long_as_the_plan_has_them():
    runs = cell_of()
    assert flagged(runs, WORKLOADS) == {"workloads-as-planned"}  # of 5 tokens
    assert flagged(runs, {}) == {"workloads-as-planned"}
    exact = {"plan-short": LONG["plan-short"].model_copy(update={"prompt_tokens": 9})}
    assert flagged(runs, exact) == {"workloads-as-planned"}
    other = tuple(replace(q, prompt_tokens=9, prompt_n=9) for q in runs[0].observed.requests)
    assert flagged(changed(runs, 0, requests=other)) == {"workloads-as-planned"}
    uncounted = changed(runs, 0, requests=tuple(replace(q, prompt_tokens=None) for q in runs[0].observed.requests))
    _, finding = cells.workloads_as_planned(cells.Cell(uncounted, LONG, {}))
    assert finding == "plan-short: prompts of [None, 8] tokens"


def test_an_arm_cannot_be_late_as_a_whole():
    runs = cell_of()

    check = {"arms-keep-the-engines-time"}

    def first(late):
        return lambda o: {
            "requests": tuple(replace(q, token_s=(q.token_s[0] + late, *q.token_s[1:])) for q in asked(o))
        }

    def asked(o):
        """Requests whose second token leaves room for a late first one."""
        return [replace(q, token_s=(q.token_s[0], *(t + 0.012 for t in q.token_s[1:]))) for q in during(o, 0.012)]

    def during(o, more):
        return [replace(q, engine_predicted_s=q.engine_predicted_s + more) for q in o.requests]

    assert flagged(arm(runs, "baseline", first(0.0))) == set()
    assert flagged(arm(runs, "baseline", first(0.012))) == set()
    assert flagged(arm(runs, "baseline", first(0.014))) == check
    assert flagged(changed(runs, 0, **first(0.014)(runs[0].observed))) == set()  # one run may be
    busy = arm(runs, "baseline", lambda o: {"host": replace(o.host, busy_s=0.8)})  # and all, where others work
    assert flagged(arm(busy, "baseline", first(0.014))) == set()
    assert flagged(arm(runs, "cpu-moe", lambda o: {"requests": tuple(during(o, -0.014))})) == check


def test_a_gpus_idle_baseline_decodes_as_long_as_the_engine_says():
    """Where no CPU decodes, nothing holds a first token up; where they do, it may wait."""

    def late(by):
        return lambda o: {
            "device_kind": "cuda",
            "requests": tuple(replace(q, token_s=(q.token_s[0] + by, *q.token_s[1:])) for q in o.requests),
        }

    check = {"arms-keep-the-engines-time"}
    for by, right in ((0.0010, True), (0.0013, False)):
        assert (check <= flagged(arm(cell_of(), "baseline", late(by)))) == (not right)
    assert not check & flagged(arm(cell_of(), "cpu-moe", late(0.0013)))


def test_no_run_ends_its_requests_long_after_the_engine():
    """All tokens of a run's requests shifted: the last one comes 2 ms after the engine's own times here."""
    runs = cell_of()

    def shifted(o, by):
        return {"requests": tuple(replace(q, token_s=tuple(t + by for t in q.token_s)) for q in o.requests)}

    check = {"arms-keep-the-engines-time"}
    for by, right in ((0.0079, True), (0.0081, False), (-0.0019, True), (-0.0021, False)):
        assert flagged(changed(runs, 2, **shifted(runs[2].observed, by))) == (set() if right else check)
    for by, right in ((0.0029, True), (0.0031, False)):
        of_gpu = changed(runs, 3, device_kind="cuda", **shifted(runs[3].observed, by))
        assert (check & flagged(of_gpu) == set()) == right
    busy = replace(runs[2].observed.host, busy_s=0.8)
    assert flagged(changed(runs, 2, **shifted(runs[2].observed, 0.1), host=busy)) == set()


def test_an_arms_runs_touch_about_as_many_pages():
    def touched(*faults, **change):
        cell = [with_seen(r, host=replace(r.observed.host, minor_faults=5000, **change)) for r in cell_of()]
        for i, n in enumerate(faults):
            cell[2 * i] = with_seen(cell[2 * i], host=replace(cell[2 * i].observed.host, minor_faults=n))
        return cell

    assert flagged(touched(1000, 9192)) == set()
    assert flagged(touched(1000, 9193, 1000)) == {"pages-steady"}
    assert flagged(touched(1_000_000, 1_019_000, 1_000_000)) == set()
    assert flagged(touched(1_000_000, 1_021_000, 1_000_000)) == {"pages-steady"}
    assert flagged(touched(1_000_000, 1_021_000, major_faults=100)) == set()  # pages came and went
    cell = touched(1_000_000, 1_021_000, 1_000_000)
    host = cell[2].host.model_copy(update={"ram_read_bytes_per_s": 1e9})
    other = [*cell[:2], cell[2].model_copy(update={"host": host}), *cell[3:]]
    assert not {"pages-steady"} & flagged(other)  # another session


def test_one_start_cannot_take_many_times_as_long_as_the_others():
    runs = cell_of()
    starts = {r.run_id: 0.02 for r in runs}
    assert flagged(runs, starts=starts | {runs[0].run_id: 0.25}) == set()
    assert flagged(runs, starts=starts | {runs[0].run_id: 0.26}) == {"starts-alike"}
    slow = {r.run_id: 0.4 for r in runs}
    assert flagged(runs, starts=slow | {runs[0].run_id: 1.9}) == set()
    assert flagged(runs, starts=slow | {runs[0].run_id: 2.1}) == {"starts-alike"}


def value(o, more):
    return {"memory": replace(o.memory, value_bytes=o.memory.value_bytes + more)}


@pytest.mark.parametrize(("more", "right"), [(4 * MIB, True), (4 * MIB + 1, False), (-4 * MIB - 1, False)])
def test_device_memory_is_steady(more, right):
    runs = cell_of()
    assert (flagged(changed(runs, 0, **value(runs[0].observed, more))) == set()) == right


@pytest.mark.parametrize(("mib", "right"), [(64, True), (65, False)])
def test_a_gpus_memory_is_steady_within_what_two_accounts_may_differ_by(mib, right):
    runs = [with_seen(r, device_kind="cuda") for r in cell_of()]
    assert (flagged(changed(runs, 0, **value(runs[0].observed, mib * MIB))) == set()) == right


def test_an_arms_memory_cannot_be_lowered_as_a_whole():
    """What the engine's buffers leave unexplained is about the same in every placement."""
    runs = cell_of()
    assert flagged(arm(runs, "baseline", lambda o: value(o, -9 * MIB))) == {"memory-steady"}
    assert flagged(arm(runs, "baseline", lambda o: value(o, -7 * MIB))) == set()


def test_host_memory_and_bus_traffic_are_steady():
    runs = cell_of()
    assert flagged(changed(runs, 0, host_rss_peak_bytes=58 * MIB)) == set()
    assert flagged(changed(runs, 0, host_rss_peak_bytes=59 * MIB)) == {"memory-steady"}
    paging = replace(runs[0].observed.host, major_faults=100)
    assert flagged(changed(runs, 0, host_rss_peak_bytes=20 * MIB, host=paging)) == set()

    def moved(n):
        return {"prompt_traffic": (PromptTraffic("plan-short", 8, n, 5),)}

    bus = [with_seen(r, **moved(1000 * MIB)) for r in runs]
    assert flagged(changed(bus, 0, **moved(1020 * MIB))) == set()
    assert flagged(changed(bus, 0, **moved(1030 * MIB))) == {"memory-steady"}
    assert flagged(changed(bus, 0, **moved(None))) == set()


def test_monitors_take_about_the_same_in_every_block():
    runs = [with_seen(r, watch_cpu_s=0.2) for r in cell_of()]
    assert flagged(runs) == set()
    for spent, right in ((0.41, True), (0.43, False)):
        assert (flagged(changed(runs, 0, watch_cpu_s=spent)) == set()) == right
    long = [with_seen(r, watch_cpu_s=2.0) for r in cell_of()]
    for spent, right in ((1.16, True), (1.14, False)):
        assert (flagged(changed(long, 0, watch_cpu_s=spent)) == set()) == right


def test_one_process_reads_its_host_once():
    """Runs a second apart are of one session; the energy counter goes on between them."""
    runs = [r.model_copy(update={"started_utc": f"2026-01-01T00:00:{i:02}+00:00"}) for i, r in enumerate(cell_of())]
    assert flagged(runs) == set()

    def at(i, part, **change):
        return [
            r.model_copy(update={part: getattr(r, part).model_copy(update=change)}) if n == i else r
            for n, r in enumerate(runs)
        ]

    check = {"one-session-at-a-time"}
    assert flagged(at(2, "host", ram_read_bytes_per_s=50e9)) == check
    assert flagged(at(2, "device", context_bytes=5)) == check
    assert flagged(at(5, "host", ram_read_bytes_per_s=50e9)) == set()  # a second process did the last run
    again = at(2, "host", ram_read_bytes_per_s=50e9)  # a run done again, in the second in which the others' last began
    again[2] = again[2].model_copy(update={"attempt": 2, "started_utc": runs[5].started_utc})
    assert flagged(again) == set()

    def counted(*joules):
        pairs = zip(runs, joules, strict=True)
        return [with_seen(r, counters=(Counters(0.1, j), Counters(0.4, j + 10))) for r, j in pairs]

    assert flagged(counted(0, 20, 40, 60, 80, 100)) == set()
    assert flagged(counted(0, 20, 28, 60, 80, 100)) == check


def test_runs_follow_each_other():
    runs = cell_of()
    at_once = runs[1].model_copy(update={"started_utc": runs[0].started_utc})
    assert flagged([runs[0], at_once, *runs[2:]]) == set()  # kept to whole seconds, and half a second long

    def at(r, second, **change):
        return with_seen(r, wall_s=10.0).model_copy(
            update={"started_utc": f"2026-01-01T00:00:{second:02}+00:00", **change}
        )

    for second, right in ((10, True), (8, True), (7, False)):
        assert (flagged([at(runs[0], 0), at(runs[1], second), *runs[2:]]) == set()) == right
    elsewhere = runs[1].host.model_copy(update={"host_id": "f" * 32})
    assert flagged([at(runs[0], 0), at(runs[1], 7, host=elsewhere), *runs[2:]]) == set()


@pytest.mark.parametrize("how", [{}, {"shift": 5e-6}, {"scale": 1.03}, {"scale": 0.5}])
def test_a_copy_is_seen_however_it_was_shifted_or_scaled(how):
    runs = cell_of()
    assert flagged(changed(runs, 2, requests=timed(0, **how))) - {"arms-keep-the-engines-time"} == {"no-two-alike"}


def test_noise_of_microseconds_hides_no_copy():
    runs = cell_of()
    noisy = tuple(
        replace(q, token_s=tuple(round(t + 4e-6 * ((7 * i) % 3 - 1), 6) for i, t in enumerate(q.token_s)))
        for q in timed(0)
    )
    assert flagged(changed(runs, 2, requests=noisy)) == {"no-two-alike"}


def test_few_steps_may_be_alike_by_chance():
    runs = [made(placement=p, block=b, order=o) for b in range(2) for o, p in enumerate(("baseline", "cpu-moe"))]
    assert flagged(runs, WORKLOADS) == set()


def test_a_copy_is_found_among_many():
    runs = cell_of(20)
    assert flagged(runs) == set()
    assert flagged(changed(runs, 31, requests=timed(4, scale=1.01))) == {"no-two-alike"}


def test_a_cell_that_does_not_hold_together_has_no_usable_run():
    runs = cell_of()
    plan = tuple(tuple(r.spec for r in runs[i : i + 2]) for i in range(0, 6, 2))
    cell = study.Cell("deepseek-moe-16b", "Q4_K_M", plan)
    whole = study.Status.of(cell, evidence(runs), LONG)
    assert (whole.usable, len(whole.rounds), whole.problems) == (6, 3, ())
    copied = changed(runs, 2, requests=runs[0].observed.requests)
    broken = study.Status.of(cell, evidence(copied), LONG)
    assert (broken.usable, broken.tally["invalid"], broken.planned, broken.rounds) == (0, 6, 6, ())
    assert broken.problems[0].startswith("deepseek-moe-16b/Q4_K_M: no-two-alike: ")
    assert spec().model == cell.model
    assert cells.NEIGHBOURS == 4
