"""What the order of time and the hardware's own limits allow: each limit has a run that breaks it, and it alone."""

from dataclasses import replace

import pytest
from factory import BASE, DEVICE, EXPERTS, HOST, MANIFEST, MIB, measured, observation, request, spec
from test_audit import reconciled

from moelib.audit import audit, bounds
from moelib.audit.invariants import INVARIANTS
from moelib.engine.buffers import Buffer
from moelib.measure.memory import Reading
from moelib.measure.nvml import Counters
from moelib.measure.run import UNCOUNTED, PromptTraffic

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


HOST_WITH_RAM_SPEED = HOST.model_copy(update={"ram_read_bytes_per_s": 100e9})


def failed(observed, placement="baseline", device=DEVICE, host=HOST):
    """Those of this module's checks that fail."""
    checks = audit.run(measured(spec(placement=placement), observed, MANIFEST, device, host))
    return {c.id for c in checks if not c.passed} & OWN


def gpu(**change):
    return GPU.model_copy(update=change)


def of_gpu(**change):
    """A run whose readings are a GPU's."""
    return replace(observation(**change), device_kind="cuda")


def host(observed=None, **change):
    observed = observed or observation()
    return replace(observed, host=replace(observed.host, **change))


def trace(**change):
    observed = observation()
    changed = replace(observed.memory.trace, **change)
    return reconciled(replace(observed, memory=replace(observed.memory, trace=changed)))


def second_request(**change):
    return observation(requests=(request(0), request(1, **change)))


def metered(*counter, joules, watts=300.0):
    """Two requests of 0.06 s, with readings of the board before, between and after them."""
    requests = tuple(request(i, energy_joule=j) for i, j in enumerate(joules))
    readings = zip((0.1, 0.2, 0.4), counter, strict=True)
    return of_gpu(counters=tuple(Counters(t, j, power_watt=watts, events=0) for t, j in readings), requests=requests)


def drawn(watts, joules):
    """Two requests of 10 s at 300 W; the meter reads `watts`."""
    requests = tuple(request(i, step=2.5, started_s=1.0 + 11 * i, energy_joule=joules) for i in (0, 1))
    counters = tuple(Counters(t, t * joules / 10, power_watt=watts) for t in (0.5, 11.5, 23.0))
    memory = trace(during=(Reading(23.0, BASE, None),)).memory
    observed = of_gpu(requests=requests, counters=counters, memory=memory, wall_s=24.0)
    return host(observed, elapsed_s=23.0)


def bus(received, sent=5):
    return of_gpu(prompt_traffic=(PromptTraffic("plan-short", 8, received, sent),))


def copied(times):
    """A run whose prompt moves so many times the experts that are on the CPU, of 32 GiB."""
    observed = observation("cpu-moe")
    placement = replace(observed.placement, moved_bytes=32 << 30)
    traffic = (PromptTraffic("plan-short", 8, int(times * (32 << 30)), 5),)
    return replace(observed, placement=placement, prompt_traffic=traffic, device_kind="cuda")


def clocked(**mhz):
    return observation(counters=(Counters(0.1, **mhz),))


def big(rate):
    """A run of a file of 8 GiB, a quarter of it on the device, decoding at `rate` tokens a second."""
    observed = observation("cpu-moe")
    placement = replace(observed.placement, moved_bytes=6 << 30, host_read_bytes=1 << 30, device_read_bytes=1 << 30)
    steps = (request(0, step=1 / rate), request(1, step=1 / rate, started_s=30.0))
    return replace(observed, placement=placement, requests=steps, device_kind="cuda")


def pinned(rss, **of_host):
    """An offload run that copied its experts to the host, beside the mapped file."""
    observed = observation("cpu-moe", host_rss_peak_bytes=rss)
    buffers = (*observed.report.buffers[:2], Buffer("CUDA_Host", "model", EXPERTS))
    return host(reconciled(replace(observed, report=replace(observed.report, buffers=buffers))), **of_host)


ONE = "one-timeline"
RUNS = [
    ("", observation()),
    (ONE, observation(load_s=0.0)),
    (ONE, observation(load_s=-0.1)),
    (ONE, observation(load_s=0.13)),  # after the first request was sent
    (ONE, second_request(started_s=0.15)),  # sent while the first one still ran
    (ONE, second_request(started_s=0.45)),  # ends after the run's end
    (ONE, observation(wall_s=0.49)),
    (ONE, trace(during=(Reading(0.2, BASE, None), Reading(0.1, BASE + 12 * MIB, None)))),
    (ONE, trace(during=(Reading(0.1, BASE, None), Reading(0.6, BASE + 12 * MIB, None)))),
    (ONE, trace(during=(Reading(-0.1, BASE, None), Reading(0.4, BASE + 12 * MIB, None)))),
    (ONE, trace(after=(Reading(0.1, None, None),))),
    (ONE, replace(host(elapsed_s=2.0), wall_s=2.0)),  # nothing was read in the last 1.8 s
    (ONE, observation(counters=(Counters(0.3), Counters(0.2)))),
    ("", observation(host_rss_peak_bytes=None)),  # the system keeps no peak
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
    ("clocks-possible", clocked(sm_clock_mhz=-1980)),
    ("clocks-possible", clocked(sm_clock_mhz=1_980_000)),
    ("clocks-possible", clocked(memory_clock_mhz=0)),
]
ON_GPU = [
    ("", metered(0, 60, 120, joules=(20.0, 20.0)), GPU),
    ("energy-possible", metered(0, 60, 120, joules=(-1.0, 20.0)), GPU),
    ("energy-possible", metered(0, 600, 1200, joules=(20.0, 300.0)), GPU),  # 0.06 s of 700 W and 0.25 s
    ("energy-possible", metered(0, 60, 30, joules=(20.0, 20.0)), GPU),
    ("energy-possible", metered(0, 1, 2, joules=(20.0, 20.0)), GPU),
    ("energy-possible", metered(0, 60, 120, joules=(20.0, 20.0), watts=2000.0), GPU),
    ("energy-possible", metered(0, 60, 120, joules=(20.0, 20.0), watts=-300.0), GPU),
    ("", drawn(300.0, 3000.0), GPU),
    ("", drawn(121.0, 3000.0), GPU),
    ("energy-possible", drawn(119.0, 3000.0), GPU),
    ("energy-possible", drawn(300.0, 700.0), GPU),
    ("", bus(200 * MIB, None), GPU),
    ("bus-traffic-possible", bus(-1), GPU),
    ("bus-traffic-possible", bus(0), GPU),  # not even the prompt
    ("bus-traffic-possible", bus(5, -1), GPU),
    ("bus-traffic-possible", bus(300 * MIB), GPU),
    ("", bus(240 * MIB), GPU),
    ("bus-traffic-possible", bus(240 * MIB), gpu(pcie_bytes_per_s=1e9)),
    ("", copied(1.08), gpu(pcie_bytes_per_s=None)),
    ("", copied(1.19), gpu(pcie_bytes_per_s=None)),  # packets of 128 bytes
    ("bus-traffic-possible", copied(1.3), gpu(pcie_bytes_per_s=None)),
    ("", of_gpu(), GPU),
    ("", of_gpu(), DEVICE),  # of unknown size
    ("device-memory-possible", of_gpu(), gpu(total_bytes=20 * MIB)),
    # the bus of a card's memory is one that exists
    ("", clocked(memory_clock_mhz=2619), GPU),
    ("clocks-possible", clocked(memory_clock_mhz=2619), gpu(bandwidth_bytes_per_s=1e9)),
    ("clocks-possible", clocked(memory_clock_mhz=2619), gpu(bandwidth_bytes_per_s=1e14)),
    ("", clocked(sm_clock_mhz=1980), gpu(max_sm_clock_mhz=1980)),
    ("clocks-possible", clocked(sm_clock_mhz=1995), gpu(max_sm_clock_mhz=1980)),
]
OFFLOADED = [
    ("", observation("cpu-moe"), HOST),
    # host memory holds what was copied there and what was mapped
    ("", pinned(EXPERTS + MANIFEST.file_bytes), HOST),
    ("host-memory-possible", pinned((EXPERTS + MANIFEST.file_bytes) * 94 // 100), HOST),
    ("", pinned(EXPERTS, major_faults=100), HOST),  # pages came and went
    ("host-memory-possible", pinned(EXPERTS * 94 // 100, major_faults=100), HOST),
    ("", pinned(EXPERTS), HOST.model_copy(update={"ram_bytes": 79 * MIB})),  # less than twice the file
    # small experts may be in the CPU's caches
    ("", observation("cpu-moe"), HOST.model_copy(update={"ram_read_bytes_per_s": 1e6})),
]


SIZE = MANIFEST.file_bytes


def of_file(cached, read, **change):
    """A run of whose file so many bytes were cached, and so many read from disks."""
    return observation(cached_bytes=cached, disk_read_bytes=read, **change)


WHERE_THE_FILE_WAS = [
    ("", "baseline", of_file(None, None)),  # of earlier code
    ("", "baseline", of_file(None, 0, absent={"cached_bytes": "this system does not tell"})),
    ("", "baseline", of_file(SIZE, 0)),
    ("", "baseline", of_file(SIZE, None, absent=UNCOUNTED)),  # of a server that was not started here
    ("file-cached", "baseline", of_file(SIZE, None)),  # nobody looks at one alone
    ("file-cached", "baseline", of_file(None, SIZE)),
    ("", "baseline", of_file(SIZE - SIZE // 100, SIZE // 100)),
    ("file-cached", "baseline", of_file(SIZE - SIZE // 100 - 1, SIZE // 100)),
    ("file-cached", "baseline", of_file(0, SIZE)),
    ("file-cached", "baseline", of_file(SIZE + 1, 0)),  # more than there is
    ("", "baseline", of_file(SIZE, 256 * MIB)),  # its libraries
    ("file-cached", "baseline", of_file(SIZE, 257 * MIB)),  # of the file, after all
    ("", "baseline,cache=cold", of_file(0, SIZE)),
    ("", "baseline,cache=cold", of_file(SIZE // 100, SIZE * 9 // 10)),
    ("file-cold", "baseline,cache=cold", of_file(SIZE // 100 + 1, SIZE)),
    ("file-cold", "baseline,cache=cold", of_file(0, SIZE * 9 // 10 - 1)),  # from a cache that nobody sees
    ("file-cold", "baseline,cache=cold", of_file(None, None)),
    ("file-cold", "baseline,cache=cold", of_file(None, SIZE, absent={"cached_bytes": "this system does not tell"})),
    ("file-cold", "baseline,cache=cold", of_file(0, None, absent=UNCOUNTED)),
]


ROWS = [
    *((check, failed(observed, placement)) for check, placement, observed in WHERE_THE_FILE_WAS),
    *((check, failed(observed)) for check, observed in RUNS),
    *((check, failed(observed, device=device)) for check, observed, device in ON_GPU),
    *((check, failed(observed, "cpu-moe", host=host)) for check, observed, host in OFFLOADED),
]


@pytest.mark.parametrize(("check", "failures"), ROWS)
def test_what_is_impossible_fails_alone(check, failures):
    assert failures == set(check.split())


@pytest.mark.parametrize(
    ("rate", "device", "host", "right"),
    [
        (90.0, GPU, HOST_WITH_RAM_SPEED, True),
        (91.0, GPU, HOST_WITH_RAM_SPEED, False),
        (1e4, GPU, HOST, True),  # RAM's speed is not known
        (1e4, gpu(bandwidth_bytes_per_s=None), HOST_WITH_RAM_SPEED, True),
    ],
)
def test_no_token_comes_before_its_weights_can_be_read(rate, device, host, right):
    """1 GiB at 3,352 GB/s and 1 GiB at 100 GB/s: 11.06 ms, 90.4 tokens a second."""
    assert ("below-memory-bound" not in failed(big(rate), "cpu-moe", device, host)) == right


def test_every_limit_is_broken_in_some_row():
    assert {check for check, _ in ROWS} - {""} | {"below-memory-bound"} == OWN
    assert {name for name in OWN if INVARIANTS[name].degrades} == {"file-cached"}


def said(name, observed, placement="baseline", host=HOST):
    (check,) = [c for c in audit.run(measured(spec(placement=placement), observed, host=host)) if c.id == name]
    return check.passed, check.measured


def test_where_the_file_was_is_said_with_its_numbers():
    small = HOST.model_copy(update={"ram_bytes": SIZE - 1})
    numbers = f"5 of {SIZE} bytes were cached, {SIZE} read from disks"
    assert said("file-cached", of_file(5, SIZE)) == (False, numbers)
    assert said("file-cached", of_file(5, SIZE), host=small) == (False, f"{numbers}: RAM has {SIZE - 1}")
    assert said("file-cached", of_file(None, None)) == (True, "not recorded")
    assert said("file-cached", of_file(None, 0, absent={"cached_bytes": "no"})) == (True, "no")
    assert said("file-cold", of_file(5, SIZE), "baseline,cache=cold") == (True, numbers)
    passed, why = said("file-cold", of_file(5, None, absent=UNCOUNTED), "baseline,cache=cold")
    assert (passed, why.endswith("no account was kept of what the server read from disks")) == (None, True)
    assert said("file-cached", of_file(None, 7))[1].endswith("7 read from disks: one was taken out, or put in")


def test_a_run_of_a_file_that_was_not_cached_is_degraded_and_a_cold_one_that_was_is_invalid():
    def verdict(placement, cached):
        run = measured(spec(placement=placement), of_file(cached, SIZE))
        return audit.verdict(audit.run(run))

    assert verdict("baseline", SIZE // 2) == ("degraded", ("file-cached",))
    assert verdict("baseline,cache=cold", 0) == ("valid", ())
    assert verdict("baseline,cache=cold", SIZE) == ("invalid", ("file-cold",))
