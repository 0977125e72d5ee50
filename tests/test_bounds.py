"""What the order of time and the hardware's own limits allow: each limit has a run that breaks it, and it alone."""

from dataclasses import replace

import pytest
from factory import BASE, DEVICE, EXPERTS, HOST, MANIFEST, MIB, measured, observation, request, spec
from test_audit import remembered

from moelib.audit import audit, bounds
from moelib.audit.invariants import INVARIANTS
from moelib.engine.buffers import Buffer
from moelib.measure.memory import Reading
from moelib.measure.nvml import Counters
from moelib.measure.run import PromptTraffic

OWN = {i.id for i in INVARIANTS.values() if i.find.__module__ == bounds.__name__}
GPU = DEVICE.model_copy(
    update={
        "kind": "cuda",
        "total_bytes": 80 << 30,
        "bandwidth_bytes_per_s": 3352e9,
        "pcie_bytes_per_s": 63e9,
        "power_limit_watt": 700.0,
    }
)


def failed(observed, placement="baseline", device=DEVICE, host=HOST):
    """Those of this module's checks that fail."""
    checks = audit.run(measured(spec(placement=placement), observed, MANIFEST, device, host))
    return {c.id for c in checks if not c.passed} & OWN


def of_gpu(**change):
    """A run whose readings are a GPU's."""
    observed = observation(**change)
    return replace(observed, device_kind="cuda")


def host(**change):
    return replace(observation(), host=replace(observation().host, **change))


def trace(**change):
    observed = observation()
    return remembered(
        replace(observed, memory=replace(observed.memory, trace=replace(observed.memory.trace, **change)))
    )


def asked(*changes):
    return observation(requests=tuple(request(i, **change) for i, change in enumerate(changes)))


def metered(*, joules, watts=300.0, events=0, **change):
    """Two requests of 0.06 s, with readings of the board before, between and after them."""
    times = (0.1, 0.2, 0.4)
    counters = tuple(Counters(t, j, power_watt=watts, events=events) for t, j in zip(times, joules, strict=True))
    return of_gpu(counters=counters, **change)


def energies(*joules):
    return tuple(request(i, energy_joule=j) for i, j in enumerate(joules))


ONE = "one-timeline"
VIOLATIONS = [
    (ONE, observation(load_s=0.0)),
    (ONE, observation(load_s=-0.1)),
    (ONE, observation(load_s=0.13)),  # after the first request was sent
    (ONE, asked({}, {"started_s": 0.15})),  # sent while the first one still ran
    (ONE, asked({}, {"started_s": 0.45})),  # ends after the run's end
    (ONE, observation(wall_s=0.49)),
    (ONE, trace(during=(Reading(0.2, BASE, None), Reading(0.1, BASE + 12 * MIB, None)))),
    (ONE, trace(during=(Reading(0.1, BASE, None), Reading(0.6, BASE + 12 * MIB, None)))),
    (ONE, trace(during=(Reading(-0.1, BASE, None), Reading(0.4, BASE + 12 * MIB, None)))),
    (ONE, trace(after=(Reading(0.1, None, None),))),
    (ONE, replace(host(elapsed_s=2.0), wall_s=2.0)),  # nothing was read in the last 1.8 s
    (ONE, observation(counters=(Counters(0.3), Counters(0.2)))),
    ("host-memory-possible", observation(host_rss_peak_bytes=0)),
    ("host-memory-possible", observation(host_rss_peak_bytes=39 * MIB)),  # all of a file of 40 MiB was read
    ("host-memory-possible", observation(host_rss_peak_bytes=9 << 30)),  # of 8 GiB of RAM
    ("host-memory-possible", observation(host_rss_peak_bytes=5 << 30)),  # of a file of 42 MiB
    ("cpu-time-possible", observation(watch_cpu_s=0.0)),
    ("cpu-time-possible", observation(watch_cpu_s=-0.001)),
    ("cpu-time-possible", observation(watch_cpu_s=1.9e-5)),  # for a reading and a last one
    ("cpu-time-possible", observation(watch_cpu_s=0.51)),
    ("cpu-time-possible", host(busy_s=2.2)),
    ("cpu-time-possible", host(own_s=-0.1)),
    ("cpu-time-possible", host(minor_faults=-1)),
    ("cpu-time-possible", host(major_faults=-1)),
    ("cpu-time-possible", host(minor_faults=0)),
    ("clocks-possible", observation(counters=(Counters(0.1, sm_clock_mhz=-1980),))),
    ("clocks-possible", observation(counters=(Counters(0.1, sm_clock_mhz=1_980_000),))),
    ("clocks-possible", observation(counters=(Counters(0.1, memory_clock_mhz=0),))),
]
ON_GPU = [
    ("energy-possible", metered(joules=(0, 60, 120), requests=energies(-1.0, 20.0))),
    ("energy-possible", metered(joules=(0, 600, 1200), requests=energies(20.0, 300.0))),  # 0.06 s of 700 W and 0.25 s
    ("energy-possible", metered(joules=(0, 60, 30), requests=energies(20.0, 20.0))),
    ("energy-possible", metered(joules=(0, 1, 2), requests=energies(20.0, 20.0))),
    ("energy-possible", metered(joules=(0, 60, 120), watts=2000.0)),
    ("energy-possible", metered(joules=(0, 60, 120), watts=-300.0)),
    ("bus-traffic-possible", of_gpu(prompt_traffic=(PromptTraffic("plan-short", 8, -1, 5),))),
    ("bus-traffic-possible", of_gpu(prompt_traffic=(PromptTraffic("plan-short", 8, 0, 5),))),  # not even the prompt
    ("bus-traffic-possible", of_gpu(prompt_traffic=(PromptTraffic("plan-short", 8, 5, -1),))),
    ("bus-traffic-possible", of_gpu(prompt_traffic=(PromptTraffic("plan-short", 8, 300 * MIB, 5),))),
]


@pytest.mark.parametrize(("check", "observed"), VIOLATIONS)
def test_each_limit_alone_is_broken(check, observed):
    assert failed(observed) == {check}


@pytest.mark.parametrize(("check", "observed"), ON_GPU)
def test_each_limit_of_a_gpu_alone_is_broken(check, observed):
    assert failed(observed, device=GPU) == {check}


def test_every_limit_has_its_violation():
    shown = {check for check, _ in VIOLATIONS + ON_GPU}
    assert shown | {"below-memory-bound", "device-memory-possible"} == OWN
    for name in OWN:
        assert INVARIANTS[name].reason.endswith(".")
        assert not INVARIANTS[name].degrades


def test_what_is_possible_passes():
    for placement in ("baseline", "cpu-moe"):
        assert failed(observation(placement), placement) == set()
    fine = metered(joules=(0, 60, 120), requests=energies(20.0, 20.0))
    assert failed(fine, device=GPU) == set()
    assert failed(of_gpu(prompt_traffic=(PromptTraffic("plan-short", 8, 200 * MIB, None),)), device=GPU) == set()


def big(rate):
    """A run of a file of 8 GiB, a quarter of it on the device, decoding at `rate` tokens a second."""
    observed = observation("cpu-moe")
    placement = replace(observed.placement, moved_bytes=6 << 30, host_read_bytes=1 << 30, device_read_bytes=1 << 30)
    steps = (request(0, step=1 / rate), request(1, step=1 / rate, started_s=30.0))
    return replace(observed, placement=placement, requests=steps, device_kind="cuda")


def test_no_token_comes_before_its_weights_can_be_read():
    """1 GiB at 3,352 GB/s and 1 GiB at 100 GB/s: 11.06 ms, 90.4 tokens a second."""
    ram = HOST.model_copy(update={"ram_read_bytes_per_s": 100e9})
    for rate, right in ((90.0, True), (91.0, False)):
        assert ("below-memory-bound" not in failed(big(rate), "cpu-moe", GPU, ram)) == right
    assert "below-memory-bound" not in failed(big(1e4), "cpu-moe", GPU, HOST)  # RAM's speed is not known
    unknown = GPU.model_copy(update={"bandwidth_bytes_per_s": None})
    assert "below-memory-bound" not in failed(big(1e4), "cpu-moe", unknown, ram)


def test_small_experts_may_be_in_the_cpus_caches():
    ram = HOST.model_copy(update={"ram_read_bytes_per_s": 1e6})
    assert failed(observation("cpu-moe"), "cpu-moe", host=ram) == set()


def test_host_memory_holds_what_was_copied_there():
    observed = observation("cpu-moe")
    buffers = (*observed.report.buffers[:2], Buffer("CUDA_Host", "model", EXPERTS))
    pinned = remembered(replace(observed, report=replace(observed.report, buffers=buffers)))
    full = EXPERTS + MANIFEST.file_bytes  # copied and mapped
    for rss, right in ((full, True), (full * 94 // 100, False)):
        failures = failed(replace(pinned, host_rss_peak_bytes=rss), "cpu-moe")
        assert (failures == set()) == right
    paging = replace(pinned, host=replace(pinned.host, major_faults=100))
    for rss, right in ((EXPERTS, True), (EXPERTS * 94 // 100, False)):
        assert (failed(replace(paging, host_rss_peak_bytes=rss), "cpu-moe") == set()) == right
    scarce = HOST.model_copy(update={"ram_bytes": 79 * MIB})  # less than twice the file
    assert failed(replace(pinned, host_rss_peak_bytes=EXPERTS), "cpu-moe", host=scarce) == set()
    assert failed(observation(host_rss_peak_bytes=None)) == set()  # the system keeps no peak


def test_nothing_is_larger_than_its_card():
    small = GPU.model_copy(update={"total_bytes": 20 * MIB})
    assert "device-memory-possible" in failed(of_gpu(), device=small)
    assert "device-memory-possible" not in failed(of_gpu(), device=GPU)
    assert "device-memory-possible" not in failed(of_gpu())


def test_energy_follows_the_boards_own_meter():
    """Two requests of 10 s at 300 W; the meter reads what it reads."""

    def drawn(watts, joules):
        requests = tuple(request(i, step=2.5, started_s=1.0 + 11 * i, energy_joule=joules) for i in (0, 1))
        counters = tuple(Counters(t, t * joules / 10, power_watt=watts) for t in (0.5, 11.5, 23.0))
        observed = of_gpu(requests=requests, counters=counters)
        return failed(replace(observed, host=replace(observed.host, elapsed_s=23.0), wall_s=24.0), device=GPU)

    assert "energy-possible" not in drawn(300.0, 3000.0)
    assert "energy-possible" not in drawn(121.0, 3000.0)
    assert "energy-possible" in drawn(119.0, 3000.0)
    assert "energy-possible" in drawn(300.0, 700.0)


def test_a_faster_link_carries_more():
    observed = of_gpu(prompt_traffic=(PromptTraffic("plan-short", 8, 240 * MIB, 5),))
    slow = GPU.model_copy(update={"pcie_bytes_per_s": 1e9})
    assert "bus-traffic-possible" in failed(observed, device=slow)
    assert "bus-traffic-possible" not in failed(observed, device=GPU)


def test_a_bus_of_memory_is_one_that_exists():
    clocked = of_gpu(counters=(Counters(0.1, memory_clock_mhz=2619),))
    assert "clocks-possible" not in failed(clocked, device=GPU)
    for wrong in (1e9, 1e14):
        device = GPU.model_copy(update={"bandwidth_bytes_per_s": wrong})
        assert "clocks-possible" in failed(clocked, device=device)
    capped = GPU.model_copy(update={"max_sm_clock_mhz": 1980})
    for mhz, right in ((1980, True), (1995, False)):
        failures = failed(of_gpu(counters=(Counters(0.1, sm_clock_mhz=mhz),)), device=capped)
        assert ("clocks-possible" not in failures) == right
