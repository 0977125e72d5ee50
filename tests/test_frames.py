"""Quantities of a run, by hand."""

import math
from collections import Counter
from dataclasses import replace

import pytest
from factory import block, observation, record_of, request, study_of, with_facts, with_observed

from moelib.base import stats
from moelib.catalogue import params
from moelib.catalogue.params import PlacementMode
from moelib.catalogue.placement import Placement
from moelib.engine.buffers import Buffer
from moelib.measure.nvml import Counters
from moelib.measure.run import PromptTraffic
from moelib.study import columns, frames, plan
from moelib.study.status import Status


def run_of(*requests, **change):
    return record_of(observation(requests=requests, **change))


def test_energy_is_of_all_requests_of_the_workload_together():
    r = run_of(request(0, n=5, energy_joule=10.0), request(1, n=5, energy_joule=0.0))  # its counter had not moved yet
    assert columns.energy_per_token("plan-short")(r) == 1.0
    assert columns.energy_per_token("long-512")(r) is None
    assert columns.energy_per_token("plan-short")(run_of(request(0, energy_joule=10.0), request(1))) is None
    assert columns.energy_per_token("plan-short")(run_of(request(0, energy_joule=0.0))) is None


def test_power_is_energy_over_the_time_of_the_requests():
    first, second = request(0, energy_joule=12.0), request(1, energy_joule=0.0)
    assert columns.power(run_of(first, second)) == pytest.approx(12 / (first.total_s + second.total_s))
    assert columns.power(run_of(first, request(1))) is None
    assert columns.power(run_of()) is None


def test_the_clock_is_the_mean_of_what_was_read():
    counters = (Counters(0.1, sm_clock_mhz=1000), Counters(0.2), Counters(0.3, sm_clock_mhz=2000))
    frame = frames.runs([run_of(request(), counters=counters), run_of(request())])
    assert frame.gpu_clock_mhz.tolist()[0] == 1500
    assert frame.gpu_clock_mhz.isna().tolist() == [False, True]


def test_the_bound_is_the_time_to_read_each_tokens_weights_once():
    """10 bytes at 10 bytes a second, and 30 at 20: 2.5 s a token at the very best."""
    slow = request(n=5, step=5.0)  # 0.2 tokens a second
    place = replace(observation().placement, device_read_bytes=10, host_read_bytes=30)
    r = record_of(replace(observation(requests=(slow,)), placement=place))
    assert columns.bandwidth_share("plan-short")(r) is None  # the memories' speeds are not known
    known = with_facts(with_facts(r, "device", bandwidth_bytes_per_s=10.0), "host", ram_read_bytes_per_s=20.0)
    assert columns.bandwidth_share("plan-short")(known) == pytest.approx(0.5)
    assert columns.bandwidth_share("long-512")(known) is None


def test_monitoring_is_a_share_of_one_cpu():
    r = run_of(request(), watch_cpu_s=0.005)
    assert columns.monitoring(r) == pytest.approx(0.005 / r.observed.host.elapsed_s)
    assert columns.monitoring(run_of(request(), watch_cpu_s=None)) is None


def test_a_prompts_traffic_is_its_own_workloads():
    traffic = (PromptTraffic("plan-short", 8, 100, 1), PromptTraffic("long-512", 512, 900, 1))
    assert columns.bus_received("long-512")(run_of(request(), prompt_traffic=traffic)) == 900
    assert columns.bus_received("plan-short")(run_of(request())) is None


def test_a_machine_is_told_by_its_host_or_in_older_records_by_its_gpu():
    r = run_of(request())
    old = with_facts(r, "host", host_id=None)
    told = [columns.machine(one) for one in (r, with_facts(old, "device", uuid="GPU-12345678-9abc"), old)]
    assert told == ["d" * 12, "GPU-12345678", "unknown"]
    assert frames.runs([r]).machine.tolist() == told[:1]


def test_buffers_on_the_device_are_summed_by_kind_and_unknown_where_none_was_reported():
    buffers = [
        Buffer(*of) for of in (("CUDA0", "KV", 3), ("CUDA0", "RS", 4), ("CPU", "KV", 50), ("CUDA0", "compute", 9))
    ]
    report = replace(observation().report, buffers=tuple(buffers))
    frame = frames.runs([run_of(request(), report=report), run_of(report=replace(report, buffers=()))])
    assert frame.vram_cache_bytes.tolist()[:1] == [7]
    assert frame.vram_compute_bytes.tolist()[:1] == [9]
    assert frame[["vram_cache_bytes", "vram_compute_bytes"]].isna().all(axis=1).tolist() == [False, True]


def test_a_prompts_tokens_are_those_that_the_engine_counted():
    r = run_of(request(0, prompt_n=8), request(1, prompt_n=8), request(0, workload="long-512", prompt_n=512))
    assert columns.prompt_tokens("long-512")(r) == 512
    assert columns.prompt_tokens("plan-short")(r) == 8
    assert columns.prompt_tokens("smoke")(r) is None


def test_what_must_be_free_is_known_only_where_the_memory_is():
    """The device's growth alone is no account of the run: without a value that stands, nothing is advised."""
    memory = observation().memory

    def of(value, growth):
        account = replace(memory, value_bytes=value, growth_bytes=growth)
        return columns.vram_needed(record_of(replace(observation(requests=(request(),)), memory=account)))

    assert of(100, None) == of(100, 90) == 100
    assert of(100, 120) == 120
    assert of(None, 120) is None
    assert of(None, None) is None


CELL = "deepseek-moe-16b/Q4_K_M"
TWO = ("plan-short", "long-512")


def measured(*values, modes=("baseline/mmap", "cpu-moe/mmap")):
    """A study of one cell; `values` are load times by round and placement, s; None where a run has no known VRAM."""
    named = [PlacementMode(placement=a.split("/")[0], load_mode=a.split("/")[1]) for a in modes]
    change = {"models": ("deepseek-moe-16b",), "quants": ("Q4_K_M",), "arms": tuple(named), "workloads": TWO}
    parameters = params.study("demo-twins").model_copy(update=change)
    rounds = []
    for b, loads in enumerate(values):
        runs = []
        for mode, load in zip(named, loads, strict=True):
            requests = [
                replace(request(i, first=0.02 + 0.001 * k, step=0.01 * (k + 1)), workload=w)
                for k, w in enumerate(TWO)
                for i in range(2)
            ]
            observed = observation(mode.placement, requests=tuple(requests), load_s=load or 1.0)
            if load is None:
                observed = replace(observed, memory=replace(observed.memory, value_bytes=None))
            where = {"placement": mode.placement, "load_mode": mode.load_mode, "workloads": TWO}
            runs.append(record_of(observed, block=b, **where))
        rounds.append(tuple(runs))
    of_one = study_of(parameters, plan.of(parameters).cells, [r for runs in rounds for r in runs])
    of_one.__dict__["statuses"] = {CELL: Status(tuple(rounds), (), Counter())}
    return of_one


def test_runs_and_requests_are_tidy_frames():
    study = measured((1.0, 2.0))
    runs = frames.runs([*study.records, record_of(status="failed")])
    assert runs.placement.tolist() == ["baseline", "cpu-moe"]
    assert runs.load_s.tolist() == [1.0, 2.0]
    assert runs.vram_bytes.tolist() == [r.observed.memory.value_bytes for r in study.records]
    assert frames.sources(runs) == {r.run_id: r.digest for r in study.records}
    requests = frames.requests([*study.records, record_of(status="failed")])
    assert len(requests) == 8
    assert requests.workload.tolist() == ["plan-short", "plan-short", "long-512", "long-512"] * 2
    assert requests.request.tolist() == [0, 1] * 4
    assert requests.ttft_s.tolist() == [q.ttft_s for r in study.records for q in r.observed.requests]
    assert len(frames.runs([])) == len(frames.requests([])) == 0
    assert list(frames.requests([])) == [*columns.WHERE, *columns.REQUESTS]


def test_the_cached_share_of_a_file_is_a_column_and_is_compared():
    study = measured((1.0, 4.0), modes=("baseline/mmap", "cpu-moe,cache=cold/mmap"))
    assert study.runs.cached_share.isna().all()  # of earlier code
    size = study.records[0].sheet.file_bytes
    known = [with_observed(r, cached_bytes=n) for r, n in zip(study.records, (size, 0), strict=True)]
    runs = frames.runs(known)
    assert runs.cached_share.tolist() == [1.0, 0.0]
    (row,) = frames.compare(runs, "cached_share").itertuples()
    assert (row.placement, row.baseline, row.value, row.n) == ("cpu-moe,cache=cold", 1.0, 0.0, 1)
    (row,) = frames.compare(runs, "load_s").itertuples()
    assert row.ratio == pytest.approx(4.0)


def test_a_quantity_is_of_its_own_workload():
    (r, _) = measured((1.0, 2.0)).records
    assert columns.tokens_per_s("plan-short")(r) == pytest.approx(100)
    assert columns.tokens_per_s("long-512")(r) == pytest.approx(50)
    assert columns.tokens_per_s("smoke")(r) is None
    assert columns.ttft_first("plan-short")(r) == pytest.approx(0.020)
    assert columns.ttft_warm("plan-short")(r) == pytest.approx(0.021)
    assert columns.ttft_first("long-512")(r) == pytest.approx(0.021)
    assert columns.ttft_warm("long-512")(r) == pytest.approx(0.022)


def test_a_comparison_is_paired_within_rounds():
    study = measured((1.0, 2.0), (2.0, 8.0))
    (c,) = frames.comparisons(study.runs, "load_s")
    assert (c.model, c.quant, c.side, c.against) == (*CELL.split("/"), ("cpu-moe", "mmap"), ("baseline", "mmap"))
    assert c.placement == Placement.parse("cpu-moe")
    assert c.sources == {r.run_id: r.digest for r in study.records}
    assert c.ratio.value == pytest.approx(8**0.5)  # of 2 and 4
    assert (c.baseline.value, c.value.value) == (pytest.approx(2**0.5), pytest.approx(4))
    assert (c.difference.value, c.difference.n) == (pytest.approx(-3.5), 2)


def test_the_machine_of_each_round_is_a_factor():
    loads = [(1.0, 2.0), (1.1, 2.3), (1.0, 2.1), (1.5, 4.6), (1.6, 4.5)]
    runs, where = measured(*loads).runs, ["a", "a", "a", "b", "b"]
    two = runs.assign(machine=[m for m in where for _ in range(2)])
    (c,), (base, moved) = frames.comparisons(two, "load_s"), frames.summaries(two, "load_s")
    first, second = ([pair[i] for pair in loads] for i in (0, 1))
    assert c.ratio == stats.ratio(loads, where)
    assert c.difference == stats.mean([a - b for a, b in loads], where)
    assert (c.baseline, c.value) == (stats.geometric_mean(first, where), stats.geometric_mean(second, where))
    assert (base.value, moved.value) == (stats.mean(first, where), stats.mean(second, where))
    (plain,) = frames.comparisons(runs, "load_s")
    assert c.ratio.value == plain.ratio.value
    assert c.ratio.high / c.ratio.low > plain.ratio.high / plain.ratio.low
    (row,), (old,) = (list(frames.compare(f, "load_s").itertuples()) for f in (two, runs))
    assert (row.low, row.high, row.n, row.machines) == (c.ratio.low, c.ratio.high, 5, 2)
    assert (old.low, old.high, old.machines) == (plain.ratio.low, plain.ratio.high, 1)


def test_machines_that_are_not_known_count_as_one():
    runs = measured((1.0, 2.0), (1.1, 2.3), (2.0, 2.1)).runs
    (plain,) = frames.comparisons(runs, "load_s")
    for other in (runs.assign(machine="unknown"), runs.assign(machine=None), runs.drop(columns="machine")):
        (c,) = frames.comparisons(other, "load_s")
        assert c.ratio == plain.ratio
        assert frames.compare(other, "load_s")["machines"].tolist() == [1]


def test_a_round_without_the_value_is_left_out_of_a_comparison():
    (c,) = frames.comparisons(measured((1.0, 2.0), (None, 2.0), (1.0, None)).runs, "vram_bytes")
    assert c.difference.n == 1
    assert [*c.before["round"], *c.after["round"]] == [1, 1]
    (nothing,) = frames.comparisons(measured((None, None)).runs, "vram_bytes")
    assert (nothing.ratio, nothing.difference, nothing.baseline, nothing.sources) == (None, None, None, {})


def test_a_zero_has_a_difference_and_no_ratio():
    runs = measured((1.0, 2.0)).runs.assign(load_s=[0.0, 3.0])
    (c,) = frames.comparisons(runs, "load_s")
    assert (c.ratio, c.baseline.value, c.value.value, c.difference.value) == (None, 0.0, 3.0, -3.0)
    assert frames.compare(runs, "load_s")["ratio"].isna().all()


def test_there_is_no_interval_where_nothing_varies():
    runs = measured((1.0, 2.0), (1.1, 2.2), (3.0, 6.0)).runs
    (same,) = frames.compare(runs, "load_s").itertuples()
    assert (same.ratio, same.n) == (pytest.approx(2.0), 3)
    assert math.isnan(same.low)
    assert math.isnan(same.high)
    (other,) = frames.compare(measured((1.0, 2.0), (1.0, 2.1)).runs, "load_s").itertuples()
    assert other.low < other.ratio < other.high


def test_a_summary_is_of_its_own_placement():
    base, moe = frames.summaries(measured((1.0, 2.0), (3.0, 6.0)).runs, "load_s")
    assert (base.value.value, moe.value.value) == (2.0, 4.0)
    assert set(base.runs["placement"]) == {"baseline"}
    assert set(moe.runs["placement"]) == {"cpu-moe"}
    part = frames.summaries(measured((1.0, None), (3.0, 6.0)).runs, "vram_bytes")
    assert [s.value.n for s in part] == [2, 1]
    none, _ = frames.summaries(measured((None, 1.0)).runs, "vram_bytes")
    assert (none.value, none.sources) == (None, {})


BASE, MAPPED, COPIED = ("baseline", "mmap"), ("cpu-moe", "mmap"), ("cpu-moe", "none")
SMALL = ("baseline,ubatch=64", "mmap")
COLD = [(f"{placement},cache=cold", mode) for placement, mode in (BASE, MAPPED, COPIED)]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (frames.EVERY, [(BASE, MAPPED), (BASE, COPIED), (BASE, SMALL)]),
        (frames.offloads, [(BASE, MAPPED), (BASE, COPIED)]),
        (frames.in_one_load_mode, [(BASE, MAPPED)]),
        (frames.load_modes, [(MAPPED, COPIED)]),
    ],
)
def test_the_placements_that_are_compared(pairs, expected):
    assert list(pairs([BASE, MAPPED, COPIED, SMALL])) == expected


def test_where_the_baselines_load_mode_has_no_offload_any_other_is_taken():
    assert frames.in_one_load_mode([BASE, COPIED]) == [(BASE, COPIED)]
    assert frames.load_modes([BASE, COPIED]) == []


def test_what_offload_costs_is_told_of_files_that_are_alike_in_the_cache():
    """A cold one is compared with the baseline as any other, and its own load modes with each other."""
    every = [BASE, COLD[0], MAPPED, *COLD[1:]]
    assert list(frames.EVERY(every)) == [(BASE, side) for side in every[1:]]
    assert frames.offloads(every) == frames.in_one_load_mode(every) == [(BASE, MAPPED)]
    assert frames.load_modes(every) == [(COLD[1], COLD[2])]
    assert frames.offloads(COLD) == [(COLD[0], COLD[1]), (COLD[0], COLD[2])]  # of a study without a cached one


def test_locked_weights_are_not_taken_for_copied_ones():
    locked = (COPIED[0], "mlock")
    assert frames.load_modes([BASE, locked, MAPPED]) == []
    assert frames.load_modes([BASE, COPIED, locked, MAPPED]) == [(MAPPED, COPIED)]


def test_the_runs_of_a_study_come_in_its_order_of_placements():
    """However they were shuffled within their rounds: tables and legends keep one order."""
    study = measured((1.0, 2.0, 3.0), modes=("baseline/mmap", "cpu-moe/mmap", "cpu-moe/none"))
    (status,) = study.statuses.values()
    study.__dict__["statuses"] = {CELL: replace(status, rounds=(status.rounds[0][::-1],))}
    assert list(zip(study.runs.placement, study.runs.load_mode, strict=True)) == [BASE, MAPPED, COPIED]


def test_without_a_baseline_the_others_are_compared_with_what_has_most_on_the_gpu():
    study = measured((1.0, 2.0, 3.0), (2.0, 4.0, 5.0), modes=("n-cpu-moe=1/mmap", "n-cpu-moe=3/mmap", "cpu-moe/mmap"))
    compared = frames.compare(study.runs, "load_s")
    assert compared.placement.tolist() == ["n-cpu-moe=3", "cpu-moe"]
    assert compared.ratio.tolist() == pytest.approx([2.0, (3 * 2.5) ** 0.5])
    assert frames.compare(study.runs, "load_s", "cpu-moe").placement.tolist() == ["n-cpu-moe=1", "n-cpu-moe=3"]


def test_placements_between_are_those_with_some_experts_on_the_cpu_where_others_have_all():
    names = ("baseline", "n-cpu-moe=3", "baseline,ubatch=64", "cpu-moe", "n-cpu-moe=5,ubatch=64")
    sides = [(name, "mmap") for name in names]
    base = sides[0]
    assert frames.between(sides) == [(base, sides[1]), (base, sides[4])]
    assert frames.ends(sides) == [(base, sides[2]), (base, sides[3])]
    without = [s for s in sides if s[0] != "cpu-moe"]
    assert (frames.between(without), len(frames.ends(without))) == ([], 3)


def test_runs_that_shared_their_host_are_not_compared_with_lone_ones():
    alone, beside = block(), [with_facts(r, "host", shared=True) for r in block()]
    assert len(frames.compare(frames.runs(alone), "vram_bytes")) == 1
    assert len(frames.compare(frames.runs(beside), "vram_bytes")) == 1
    with pytest.raises(frames.FrameError, match="cannot be compared, as they differ in host_shared: False, True"):
        frames.compare(frames.runs([alone[0], beside[1]]), "vram_bytes")
