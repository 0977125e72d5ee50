"""Quantities of a run, by hand."""

from dataclasses import replace

import pytest
from factory import made, observation, request

from moelib import analyse
from moelib.nvml import Counters
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


def test_watching_is_a_share_of_one_cpu():
    r = run_of(request(), watch_cpu_s=0.005)
    assert analyse.watching(r) == pytest.approx(0.005 / r.observed.host.elapsed_s)
    assert analyse.watching(run_of(request(), watch_cpu_s=None)) is None


def test_a_prompts_traffic_is_its_own_workloads():
    traffic = (PromptTraffic("plan-short", 8, 100, 1), PromptTraffic("long-512", 512, 900, 1))
    assert analyse.received("long-512")(run_of(request(), prompt_traffic=traffic)) == 900
    assert analyse.received("plan-short")(run_of(request())) is None


def test_what_must_be_free_is_known_only_where_the_memory_is():
    """The device's growth alone is no account of the run: without a value that stands, nothing is advised."""
    memory = observation().memory

    def of(value, growth):
        seen = replace(memory, value_bytes=value, growth_bytes=growth)
        return analyse.device_need(made(replace(observation(requests=(request(),)), memory=seen)))

    assert of(100, None) == of(100, 90) == 100
    assert of(100, 120) == 120
    assert of(None, 120) is None
    assert of(None, None) is None
