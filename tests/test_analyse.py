"""Quantities of a run, by hand."""

from collections import Counter
from dataclasses import replace

import pytest
from conftest import REPO
from factory import made, observation, request

from moelib import analyse, study
from moelib.nvml import Counters
from moelib.params import Arm
from moelib.run import PromptTraffic


def run_of(*requests, **change):
    return made(observation(requests=requests, **change))


def test_energy_is_of_all_requests_of_the_workload_together():
    r = run_of(request(0, n=5, energy_joule=10.0), request(1, n=5, energy_joule=0.0))  # its counter had not moved yet
    assert analyse.energy_per_token("plan-short")(r) == 1.0
    assert analyse.energy_per_token("long-512")(r) is None
    assert analyse.energy_per_token("plan-short")(run_of(request(0, energy_joule=10.0), request(1))) is None
    assert analyse.energy_per_token("plan-short")(run_of(request(0, energy_joule=0.0))) is None


def test_power_is_energy_over_the_time_of_the_requests():
    first, second = request(0, energy_joule=12.0), request(1, energy_joule=0.0)
    assert analyse.power(run_of(first, second)) == pytest.approx(12 / (first.total_s + second.total_s))
    assert analyse.power(run_of(first, request(1))) is None
    assert analyse.power(run_of()) is None


def test_the_clock_is_the_mean_of_what_was_read():
    counters = (Counters(0.1, sm_clock_mhz=1000), Counters(0.2), Counters(0.3, sm_clock_mhz=2000))
    assert analyse.sm_clock(run_of(request(), counters=counters)) == 1500
    assert analyse.sm_clock(run_of(request())) is None


def test_the_bound_is_the_time_to_read_each_tokens_weights_once():
    """10 bytes at 10 bytes a second, and 30 at 20: 2.5 s a token at the very best."""
    slow = request(n=5, step=5.0)  # 0.2 tokens a second
    place = replace(observation().placement, device_read_bytes=10, host_read_bytes=30)
    r = made(replace(observation(requests=(slow,)), placement=place))
    assert analyse.bound("plan-short")(r) is None  # the memories' speeds are not known
    known = r.model_copy(
        update={
            "device": r.device.model_copy(update={"bandwidth_bytes_per_s": 10.0}),
            "host": r.host.model_copy(update={"ram_read_bytes_per_s": 20.0}),
        }
    )
    assert analyse.bound("plan-short")(known) == pytest.approx(0.5)
    assert analyse.bound("long-512")(known) is None


def test_monitoring_is_a_share_of_one_cpu():
    r = run_of(request(), watch_cpu_s=0.005)
    assert analyse.monitoring(r) == pytest.approx(0.005 / r.observed.host.elapsed_s)
    assert analyse.monitoring(run_of(request(), watch_cpu_s=None)) is None


def test_a_prompts_traffic_is_its_own_workloads():
    traffic = (PromptTraffic("plan-short", 8, 100, 1), PromptTraffic("long-512", 512, 900, 1))
    assert analyse.received("long-512")(run_of(request(), prompt_traffic=traffic)) == 900
    assert analyse.received("plan-short")(run_of(request())) is None


def test_what_must_be_free_is_known_only_where_the_memory_is():
    """The device's growth alone is no account of the run: without a value that stands, nothing is advised."""
    memory = observation().memory

    def of(value, growth):
        seen = replace(memory, value_bytes=value, growth_bytes=growth)
        return analyse.vram_needed(made(replace(observation(requests=(request(),)), memory=seen)))

    assert of(100, None) == of(100, 90) == 100
    assert of(100, 120) == 120
    assert of(None, 120) is None
    assert of(None, None) is None


CELL = "deepseek-moe-16b/Q4_K_M"
TWO = ("plan-short", "long-512")


def study_of(*values, arms=("baseline/mmap", "cpu-moe/mmap")):
    """Results of one cell; `values` are load times by block and arm, s; None where a run has no memory."""
    named = [Arm(placement=a.split("/")[0], load_mode=a.split("/")[1]) for a in arms]
    change = {"models": ("deepseek-moe-16b",), "quants": ("Q4_K_M",), "arms": tuple(named)}
    plan = study.results(REPO / "docs/example/demo").study.model_copy(update=change)
    blocks = []
    for b, loads in enumerate(values):
        runs = []
        for arm, load in zip(named, loads, strict=True):
            asked = [
                replace(request(i, first=0.02 + 0.001 * k, step=0.01 * (k + 1)), workload=w)
                for k, w in enumerate(TWO)
                for i in range(2)
            ]
            seen = observation(arm.placement, requests=tuple(asked), load_s=load or 1.0)
            if load is None:
                seen = replace(seen, memory=replace(seen.memory, value_bytes=None))
            runs.append(made(seen, block=b, placement=arm.placement, load_mode=arm.load_mode))
        blocks.append(tuple(runs))
    records = [r for block in blocks for r in block]
    results = study.Results.model_construct(study=plan, name="s", cells=[], records=records, manifests=[])
    results.__dict__["statuses"] = {CELL: study.Status(tuple(blocks), (), Counter())}
    return results


def test_runs_and_requests_are_tidy_frames():
    found = study_of((1.0, 2.0))
    runs = analyse.runs([*found.records, made(status="failed")])
    assert list(runs) == list(analyse.RUN_COLUMNS)
    assert runs.placement.tolist() == ["baseline", "cpu-moe"]
    assert runs.load_s.tolist() == [1.0, 2.0]
    assert runs.vram_bytes.tolist() == [r.observed.memory.value_bytes for r in found.records]
    asked = analyse.requests([*found.records, made(status="failed")])
    assert len(asked) == 8
    assert asked.workload.tolist() == ["plan-short", "plan-short", "long-512", "long-512"] * 2
    assert asked.request.tolist() == [0, 1] * 4
    assert asked.ttft_s.tolist() == [q.ttft_s for r in found.records for q in r.observed.requests]
    assert len(analyse.runs([])) == len(analyse.requests([])) == 0
    assert list(analyse.requests([])) == [*analyse._WHERE, *analyse.REQUEST_COLUMNS]


def test_a_quantity_is_of_its_own_workload():
    (r, _) = study_of((1.0, 2.0)).records
    assert analyse.tokens_per_s("plan-short")(r) == pytest.approx(100)
    assert analyse.tokens_per_s("long-512")(r) == pytest.approx(50)
    assert analyse.tokens_per_s("smoke")(r) is None
    assert analyse.ttft("plan-short", warm=False)(r) == pytest.approx(0.020)
    assert analyse.ttft("plan-short", warm=True)(r) == pytest.approx(0.021)
    assert analyse.ttft("long-512", warm=False)(r) == pytest.approx(0.021)
    assert analyse.ttft("long-512", warm=True)(r) == pytest.approx(0.022)


def test_a_comparison_is_paired_within_blocks():
    found = study_of((1.0, 2.0), (2.0, 8.0))
    (c,) = analyse.compare(found, analyse.load_time)
    assert (c.model, c.quant, c.arm.placement, c.against.placement) == (*CELL.split("/"), "cpu-moe", "baseline")
    assert c.records == tuple(found.records)
    assert c.ratio.value == pytest.approx(8**0.5)  # of 2 and 4
    assert (c.baseline.value, c.offload.value) == (pytest.approx(2**0.5), pytest.approx(4))
    assert (c.difference.value, c.difference.n) == (pytest.approx(-3.5), 2)


def test_a_block_without_the_quantity_is_left_out_of_a_comparison():
    found = study_of((1.0, 2.0), (None, 2.0), (1.0, None))
    (c,) = analyse.compare(found, analyse.vram)
    assert c.difference.n == 1
    assert {r.spec.block for r in c.records} == {0}
    (nothing,) = analyse.compare(study_of((None, None)), analyse.vram)
    assert (nothing.ratio, nothing.difference, nothing.baseline, nothing.records) == (None, None, None, ())


def test_a_zero_has_a_difference_and_no_ratio():
    (c,) = analyse.compare(study_of((1.0, 2.0)), lambda r: 0.0 if r.spec.placement == "baseline" else 3.0)
    assert (c.ratio, c.baseline.value, c.offload.value, c.difference.value) == (None, 0.0, 3.0, -3.0)


def test_a_summary_is_of_its_own_arm():
    found = study_of((1.0, 2.0), (3.0, 6.0))
    base, moe = analyse.summarise(found, analyse.load_time)
    assert (base.value.value, moe.value.value) == (2.0, 4.0)
    assert {r.spec.placement for r in base.records} == {"baseline"}
    assert {r.spec.placement for r in moe.records} == {"cpu-moe"}
    part = analyse.summarise(study_of((1.0, None), (3.0, 6.0)), analyse.vram)
    assert [s.value.n for s in part] == [2, 1]
    none = analyse.summarise(study_of((None, 1.0)), analyse.vram)
    assert (none[0].value, none[0].records) == (None, ())


def test_the_arms_that_are_compared():
    study_ = study_of((1.0, 2.0, 3.0), arms=("baseline/mmap", "cpu-moe/mmap", "cpu-moe/none")).study
    assert [(a.label, b.label) for a, b in analyse.offloads(study_)] == [
        ("baseline/mmap", "cpu-moe/mmap"),
        ("baseline/mmap", "cpu-moe/none"),
    ]
    assert [(a.label, b.label) for a, b in analyse.load_modes(study_)] == [("cpu-moe/mmap", "cpu-moe/none")]
    assert analyse.load_modes(study_of((1.0, 2.0)).study) == []


def test_what_a_run_read_is_read_again():
    r = run_of(request())
    seen = r.observed
    assert analyse.residual(r) == seen.memory.residual_bytes
    assert analyse.growth(r) == seen.memory.growth_bytes
    assert analyse.engine_buffers(r) == seen.memory.engine_bytes
    assert analyse.host_peak(r) == seen.host_rss_peak_bytes
    assert analyse.major_faults(r) == seen.host.major_faults
    assert analyse.load_time(r) == seen.load_s
