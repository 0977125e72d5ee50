"""Invariants of a run, a round and a study: each has records that break it alone, and passes honest ones.

Those of bounds, logs and cells are in files of their own.
"""

from dataclasses import replace

import pytest
from factory import (
    BASE,
    EXPERTS,
    MIB,
    argv,
    block,
    measured,
    observation,
    record_of,
    request,
    spec,
    with_facts,
    with_observed,
    with_spec,
)
from pynvml import nvmlClocksEventReasonSwPowerCap as POWER_CAP

from moelib.audit import audit, bounds, record
from moelib.audit.invariants import INVARIANTS, agrees
from moelib.engine.buffers import Buffer, Report
from moelib.measure import memory, nvml
from moelib.measure.memory import Reading, reconcile
from moelib.measure.nvml import Counters
from moelib.measure.run import PromptTraffic


def ids(scope):
    return {i.id for i in INVARIANTS.values() if i.scope == scope}


def failed(checks):
    return {c.id for c in checks if not c.passed}


def words(checks):
    return {c.id: c.measured for c in checks}


def reconciled(observed, peak=None):
    """`observed` with the memory that its readings and its report now give."""
    m = observed.memory
    peak = m.process_bytes if peak is None else peak
    buffers = observed.report.device_by_kind, observed.report.pinned_bytes
    again = reconcile(observed.device_kind, m.trace, *buffers, m.weights_bytes, m.context_bytes, peak or None)
    return replace(observed, memory=again)


# one run: honest in all but one thing
def broken(placement="baseline", load_mode="mmap", **change):
    return measured(spec(placement=placement, load_mode=load_mode), observation(placement, **change))


def one_request(**change):
    return broken(requests=(request(0, **change), request(1)))


def first_token(first_s, prompt_s):
    return one_request(engine_prompt_s=prompt_s, token_s=tuple(first_s + 0.01 * i for i in range(5)))


def arrivals(token_s, token_n):
    return one_request(token_s=token_s, token_n=token_n)


def report(placement="baseline", **change):
    observed = observation(placement)
    changed = replace(observed, report=replace(observed.report, **change))
    return measured(spec(placement=placement), reconciled(changed))


def renamed(name, kinds=("model", "KV"), device_kind="loopback"):
    """A run whose buffers on the device have another name."""
    observed = observation(device_kind=device_kind)
    buffers = tuple(replace(b, name=name) if b.on_device and b.kind in kinds else b for b in observed.report.buffers)
    return measured(spec(), reconciled(replace(observed, report=replace(observed.report, buffers=buffers))))


def device_weights(placement, nbytes):
    observed = observation(placement)
    buffers = tuple(
        replace(b, size_bytes=nbytes) if b.on_device and b.kind == "model" else b for b in observed.report.buffers
    )
    grown = nbytes - observed.report.device_bytes("model")
    larger = replace(observed, report=replace(observed.report, buffers=buffers))
    return measured(spec(placement=placement), reconciled(larger, observed.memory.process_bytes + grown))


def moving(placement, nbytes):
    observed = observation(placement)
    return measured(
        spec(placement=placement), replace(observed, placement=replace(observed.placement, moved_bytes=nbytes))
    )


def host(**change):
    return broken(host=replace(observation().host, **change))


def account(**change):
    return broken(memory=replace(observation().memory, **change))


def commanded(line, placement="baseline", load_mode="mmap"):
    """A run with this command line."""
    kind = "baseline" if placement == "baseline" else "cpu-moe"
    return measured(spec(placement=placement, load_mode=load_mode), observation(kind, argv=tuple(line)))


def without_device(placement):
    observed = observation(placement, device_kind="none", argv=(*argv(placement)[:-4], "--device", "none"))
    on_host = tuple(b for b in observed.report.buffers if not b.on_device)
    changed = replace(observed, report=replace(observed.report, buffers=on_host, offloaded_layers=0))
    return measured(spec(placement=placement), reconciled(changed))


HONEST = broken()
SILENT = measured(spec(), reconciled(observation(report=Report((), None, None, ()))))
RUN = {
    "requests-complete": ("2 of 2 requests", broken(requests=(request(0),)), "1 of 2 requests"),
    "counts-exact": (
        "2 requests",
        one_request(prompt_n=7),
        "plan-short[0]: prompt, predicted (7, 5), asked (8, 5); streamed 5, 5 ids",
    ),
    "stream-finished": ("2 requests", one_request(finished=False), "plan-short[0]: no final event"),
    "cache-not-hit": ("2 requests", one_request(cache_n=3), "plan-short[0]: cache_n 3"),
    "times-ordered": (
        "2 requests",
        one_request(token_s=(0.02, 0.03, 0.025, 0.05, 0.06)),
        "plan-short[0]: an earlier one after a later one",
    ),
    "ttft-bounded": (
        "2 requests",
        one_request(engine_prompt_s=0.021),
        "plan-short[0]: first token after 0.0200 s, the prompt took 0.0210 s",
    ),
    "clocks-agree": (
        "2 requests",
        one_request(engine_predicted_s=0.08),
        "plan-short[0]: 0.0400 s here, 0.08 s by the engine",
    ),
    "layers-offloaded": ("5 of 5", report(offloaded_layers=4), "4 of 5"),
    "device-is-the-one": ("RPC0[127.0.0.1:5]", renamed("Vulkan0[127.0.0.1:5]"), "Vulkan0[127.0.0.1:5]"),
    "placement-moves": ("0 bytes moved", moving("cpu-moe", 0), "0 bytes in 9 tensors moved"),
    "placement-on-device": (
        "engine 41943040, header 41943040 bytes",
        device_weights("cpu-moe", BASE),  # the flag did nothing
        "engine 41943040, header 10485760 bytes",
    ),
    "command-as-asked": ("as asked", broken(argv=(*argv(), "--cpu-moe")), "wrong: --cpu-moe"),
    "environment-clean": ("3 allowed", broken(env=("LLAMA_ARG_CPU_MOE", "PATH")), "LLAMA_ARG_CPU_MOE"),
    "build-optimised": (
        "11434 (b11434) with GNU for Linux",
        report(built="11434 (b11434) with GNU for Linux (debug)"),
        "11434 (b11434) with GNU for Linux (debug)",
    ),
    "output-alive": ("-6.5, -6.6", broken(top_logprobs=(None, None)), "None, None"),
    "file-is-its-sheet": (
        "file aaaaaaaaaaaa, sheet aaaaaaaaaaaa",
        broken(file_sha256="b" * 64),
        "file bbbbbbbbbbbb, sheet aaaaaaaaaaaa",
    ),
    "memory-known": ("valid", measured(spec(), reconciled(observation(), BASE - MIB)), "below-engine-buffers"),
    "memory-follows": (
        "54525952, its readings give 54525952",
        account(value_bytes=BASE + 13 * MIB),
        "55574528, its readings give 54525952",
    ),
    "memory-undoubted": ("all accounts taken", measured(spec(), reconciled(observation(), 0)), "sampled-peak"),
    "not-slowed": ("0 readings", broken(counters=(Counters(0.1, events=nvml.SLOWED["hw-thermal"]),)), "hw-thermal"),
    "host-quiet": ("0.0% by others", host(busy_s=0.71), "11.0% by others"),
    "watched-lightly": ("None CPU seconds of 0.50 s", broken(watch_cpu_s=0.126), "0.126 CPU seconds of 0.50 s"),
    "clock-steady": ("step 0.000 s, sleep 0.000 s", host(clock_step_s=-0.2), "step -0.200 s, sleep 0.000 s"),
    "clean-end": ("exit 0", broken(exit_code=-9, exit_killed=True), "exit -9"),
}
"""Invariant -> what it says of an honest run, a run that breaks it alone, what it says of that one."""
DEGRADING = {"memory-undoubted", "not-slowed", "host-quiet", "watched-lightly", "clock-steady", "clean-end"}
DEGRADING |= {"file-cached"}


@pytest.mark.parametrize("check", RUN)
def test_a_run_that_breaks_one_invariant_is_flagged_by_it_alone_and_told_why(check):
    honest, run, finding = RUN[check]
    assert words(audit.run(HONEST))[check] == honest
    checks = audit.run(run)
    assert words(checks)[check] == finding
    assert audit.verdict(checks) == ("degraded" if check in DEGRADING else "invalid", (check,))


@pytest.mark.parametrize("placement", ["baseline", "cpu-moe"])
def test_an_unbroken_run_is_valid(placement):
    assert audit.verdict(audit.run(broken(placement))) == ("valid", ())


def test_every_invariant_has_its_row_its_limit_and_its_reason():
    assert set(RUN) == {i for i in ids("run") if INVARIANTS[i].find.__module__ != bounds.__name__}
    assert {i.id for i in INVARIANTS.values() if i.degrades} == DEGRADING
    assert {i.scope for i in INVARIANTS.values()} == {"run", "log", "block", "cell", "study"}
    for i in INVARIANTS.values():
        assert i.limit
        assert i.reason.endswith(".")


TWO = {"predicted_n": 2, "generate_tokens": 2, "token_n": (1, 2), "tokens": (7, 8), "token_s": (0.02, 0.03)}
SETTINGS = ("-ub", "64", "--no-op-offload", "-ctk", "q8_0", "-ctv", "q8_0")
SET = "cpu-moe,ubatch=64,op-offload=off,kv=q8_0"
OLDER = " ".join(argv()).replace(" --load-mode mmap", "").replace(" --fit off", "").split()
STEPS = (0.02, 0.03, 0.04, 0.05, 0.06)


def exchanged(old, new):
    return commanded(new if word == old else word for word in argv())


EDGES = [
    ("counts-exact", False, one_request(predicted_n=4)),
    ("counts-exact", False, one_request(prompt_n=None)),
    ("counts-exact", False, one_request(predicted_n=None)),
    ("counts-exact", False, one_request(tokens=(1, 2, 3, 4, 5, 6))),
    ("counts-exact", False, one_request(token_n=(1, 2, 3, 4, 6))),
    (
        "counts-exact",
        False,
        one_request(predicted_n=1, generate_tokens=1, tokens=(7,), token_n=(1,), token_s=(0.02,)),
    ),
    # an incomplete character at the end has no event
    ("counts-exact", True, one_request(token_s=(0.02, 0.04), token_n=(1, 3), tokens=(7, 8))),
    ("counts-exact", True, one_request(**TWO)),
    ("cache-not-hit", False, one_request(cache_n=-1)),
    ("cache-not-hit", False, one_request(cache_n=None)),
    ("cache-not-hit", False, one_request(cache_n=1)),
    ("times-ordered", False, arrivals((), ())),
    ("times-ordered", False, arrivals((0.0, 0.01, 0.02, 0.03, 0.04), (1, 2, 3, 4, 5))),
    ("times-ordered", False, arrivals(STEPS[:4], (1, 2, 3, 4, 5))),  # an event without its time
    ("times-ordered", False, arrivals(STEPS, (2, 2, 3, 4, 5))),  # the first token's time is not known
    ("times-ordered", False, arrivals(STEPS, (1, 3, 2, 4, 5))),
    ("times-ordered", False, arrivals(STEPS, (0, 2, 3, 4, 5))),
    ("times-ordered", False, one_request(**TWO | {"token_n": (2,), "token_s": (0.02,)})),
    ("ttft-bounded", True, first_token(0.0201, 0.0201)),
    ("ttft-bounded", False, first_token(0.0201, 0.0202)),  # before the prompt was done
    ("ttft-bounded", True, first_token(1.0, 1.00009)),  # times are kept to microseconds
    ("ttft-bounded", False, first_token(1.0, 1.00011)),
    ("ttft-bounded", True, first_token(1.074, 1.0)),  # 5 % and 25 ms
    ("ttft-bounded", False, first_token(1.076, 1.0)),
    ("ttft-bounded", False, first_token(0.02, None)),
    # four steps of 10 ms; 1 % + 20 ms and one step are allowed
    ("clocks-agree", True, one_request(engine_predicted_s=0.04)),
    ("clocks-agree", True, one_request(engine_predicted_s=0.0706)),
    ("clocks-agree", False, one_request(engine_predicted_s=0.0708)),
    ("clocks-agree", True, one_request(engine_predicted_s=0.01)),
    ("clocks-agree", False, one_request(engine_predicted_s=0.0098)),
    ("clocks-agree", False, one_request(engine_predicted_s=None)),
    ("clocks-agree", True, one_request(**TWO, engine_predicted_s=0.01)),
    ("clocks-agree", False, one_request(**TWO, engine_predicted_s=0.05)),
    ("layers-offloaded", True, report(offloaded_layers=int("1000"), total_layers=int("1000"))),  # two objects
    ("device-is-the-one", True, renamed("CUDA0", device_kind="cuda")),
    ("device-is-the-one", False, renamed("RPC0", device_kind="cuda")),
    ("device-is-the-one", False, renamed("RPC0", device_kind="none")),
    ("device-is-the-one", False, renamed("Vulkan0", kinds=("model",))),  # whatever its caches are on
    ("placement-moves", False, moving("baseline", 1)),
    ("placement-moves", True, moving("cpu-moe", 1)),
    ("command-as-asked", False, commanded(argv(), "cpu-moe")),
    ("command-as-asked", True, commanded((*argv(), "--cpu-moe"), "cpu-moe")),
    ("command-as-asked", True, commanded((*argv(), "--n-cpu-moe", "3"), "n-cpu-moe=3")),
    ("command-as-asked", False, commanded((*argv(), "--n-cpu-moe", "2"), "n-cpu-moe=3")),
    ("command-as-asked", False, commanded((*argv(), "--n-cpu-moe", "3"))),
    ("command-as-asked", False, exchanged("off", "on")),
    ("command-as-asked", False, exchanged("999", "99")),
    ("command-as-asked", False, exchanged("1024", "4096")),
    ("command-as-asked", False, exchanged("mmap", "none")),
    ("command-as-asked", False, exchanged("1", "2")),
    ("command-as-asked", False, commanded((*argv(), "--no-mmap"))),
    ("command-as-asked", True, commanded(OLDER)),
    ("command-as-asked", False, commanded(())),
    ("command-as-asked", False, commanded((*argv(), "-ot", ".*=CPU"))),
    ("command-as-asked", False, commanded((*argv(), "--no-kv-offload"))),
    ("command-as-asked", False, commanded((*argv(), "-ngl", "0"))),
    ("command-as-asked", False, commanded((*argv(), "-c"))),
    ("command-as-asked", False, commanded(("llama-server", "x", *argv()[1:]))),
    ("command-as-asked", False, commanded((*argv()[:-4], "--rpc", "10.0.0.1:5", "--device", "RPC0"))),
    ("command-as-asked", False, commanded((*argv()[:-2], "--device", "CUDA0"))),
    # a placement's settings are on the command line, each of them
    ("command-as-asked", True, commanded((*argv("cpu-moe"), *SETTINGS), SET)),
    ("command-as-asked", False, commanded(argv("cpu-moe"), SET)),
    ("command-as-asked", False, commanded((*argv("cpu-moe"), *SETTINGS[:-2]), SET)),
    ("command-as-asked", False, commanded((*argv("cpu-moe"), "-ub", "32", *SETTINGS[2:]), SET)),
    ("command-as-asked", False, commanded((*argv("cpu-moe"), *SETTINGS), "cpu-moe")),
    ("command-as-asked", False, commanded(argv(), load_mode="none")),
    ("command-as-asked", True, commanded(argv(load_mode="none"), load_mode="none")),
    ("command-as-asked", True, commanded((*OLDER, "--no-mmap"), load_mode="none")),
    ("environment-clean", False, broken(env=())),
    ("output-alive", False, broken(top_logprobs=())),
    ("output-alive", False, broken(top_logprobs=(-1.0,))),
    ("output-alive", False, broken(top_logprobs=(float("nan"), -1.0))),
    ("output-alive", False, broken(top_logprobs=(-1.0, float("-inf")))),
    ("output-alive", False, broken(top_logprobs=(None, -2.0))),
    ("output-alive", False, broken(top_logprobs=(-10.3, -10.3, -10.3))),
    # a status that its reasons do not give, or reasons without a status
    ("memory-follows", False, account(status="degraded")),
    ("memory-follows", False, account(reasons=("host-pid",))),
    ("memory-follows", False, account(engine_bytes=5)),
    ("memory-follows", False, account(method=None)),
    ("memory-known", False, account(reasons=(memory.INVALID[0],))),
    ("memory-known", False, account(status="invalid")),
    ("memory-undoubted", False, account(status="degraded")),
    # a GPU whose driver says nothing is not known to have had its own clocks
    ("not-slowed", False, broken(device_kind="cuda", counters=())),
    ("not-slowed", False, broken(device_kind="cuda", counters=(Counters(0.1),))),
    ("not-slowed", True, broken(device_kind="cuda", counters=(Counters(0.1, events=0),))),
    ("not-slowed", True, broken(counters=(Counters(0.1, events=POWER_CAP), Counters(0.2)))),
    ("host-quiet", True, host(busy_s=0.7)),  # 0.1 of 2 x 0.5 CPU seconds
    ("host-quiet", True, host(busy_s=0.0)),  # the counters' ticks are coarse
    ("clock-steady", True, host(clock_step_s=0.1)),
    ("clock-steady", False, host(clock_step_s=0.11)),
    ("clock-steady", False, host(suspended_s=0.11)),
    # a twentieth of a CPU for 0.5 s, and a look of 0.1 s at a new context
    ("watched-lightly", True, broken(watch_cpu_s=0.001)),
    ("watched-lightly", True, broken(watch_cpu_s=0.125)),
    ("watched-lightly", False, broken(watch_cpu_s=0.1251)),
    ("clean-end", False, broken(exit_code=1)),
    ("clean-end", False, broken(exit_code=-15)),
    ("clean-end", False, broken(exit_code=None)),
    ("clean-end", False, broken(exit_killed=True)),
]
BESIDE = {
    "times-ordered": {"counts-exact", "ttft-bounded"},
    "ttft-bounded": {"one-timeline"},  # a request of a second in a run of half a second
    "memory-follows": {"memory-undoubted"},
    "memory-known": {"memory-follows"},
    "memory-undoubted": {"memory-follows"},
    "device-is-the-one": {"command-as-asked", "memory-known", "memory-undoubted", "not-slowed"},
    "not-slowed": {"command-as-asked", "memory-follows", "device-is-the-one"},
}
"""What else such a change breaks: of a run on another kind of device, for one."""


@pytest.mark.parametrize(("check", "right", "run"), EDGES)
def test_a_limit_is_where_it_is_said_to_be(check, right, run):
    failures = failed(audit.run(run))
    assert (check not in failures) == right
    assert failures <= {check} | BESIDE.get(check, set())


def test_placement_tolerance_is_a_mebibyte_and_a_thousandth():
    assert agrees(BASE + MIB, BASE)
    assert agrees(1000 * MIB + 2 * MIB, 1000 * MIB)
    assert not agrees(1000 * MIB + 2 * MIB + 1, 1000 * MIB)
    assert not agrees(MIB + 1, 0)
    assert not agrees(998 * MIB - 1, 1000 * MIB)


def test_a_device_that_is_not_there_can_offload_nothing():
    assert audit.verdict(audit.run(without_device("baseline"))) == ("degraded", ("memory-undoubted",))
    assert audit.verdict(audit.run(without_device("cpu-moe"))) == ("invalid", ("placement-moves", "memory-undoubted"))


def test_nothing_is_not_valid_and_nothing_is_made_up_for_it():
    assert audit.verdict(()) == ("invalid", ("nothing-checked",))
    assert {c.id: c.measured for c in audit.run(SILENT) if not c.passed} == {
        "layers-offloaded": "None of None",
        "device-is-the-one": "none",
        "placement-on-device": "engine None, header 41943040 bytes",
        "build-optimised": "the engine's log names no build",
        "memory-undoubted": "engine-silent",
    }
    empty = measured(spec(workloads=()), observation(requests=(), env=(), top_logprobs=()))
    per_request = "counts-exact stream-finished cache-not-hit times-ordered ttft-bounded clocks-agree".split()
    assert {c.id: c.measured for c in audit.run(empty) if not c.passed} == {
        **dict.fromkeys(per_request, "0 requests"),
        "requests-complete": "0 of 0 requests",
        "environment-clean": "0 allowed",
        "output-alive": "no log-probabilities",
    }


def test_a_reading_is_evidence_of_the_value():
    """The same trace with one reading taken out of it no longer gives the value that stands."""
    observed = observation()
    m = observed.memory
    assert reconciled(observed).memory == m
    shorter = account(trace=replace(m.trace, during=()))
    assert failed(audit.run(shorter)) == set()  # loopback's value is the system's own peak
    sampled = reconciled(observed, 0).memory
    other_trace = replace(m.trace, during=(Reading(0.1, BASE + 20 * MIB, None),))
    run = broken(memory=replace(sampled, trace=other_trace))
    assert failed(audit.run(run)) == {"memory-follows", "memory-undoubted"}


# one round
BASELINE, MOE = block()


def with_report(r, **change):
    return with_observed(r, report=replace(r.observed.report, **change))


def flag_ignored(r):
    """The offload run with its experts still on the device."""
    buffers = tuple(
        Buffer(b.name, b.kind, b.size_bytes + EXPERTS) if b.on_device and b.kind == "model" else b
        for b in r.observed.report.buffers
    )
    return with_report(r, buffers=buffers)


def shares(r, *parts):
    """A run whose first tokens came after these parts of the whole time."""
    return with_observed(
        r,
        requests=tuple(
            replace(q, token_s=(part * q.token_s[-1], *q.token_s[1:]))
            for q, part in zip(r.observed.requests, parts, strict=True)
        ),
    )


SMALL = with_spec(BASELINE, placement="baseline,ubatch=64", order=2)
LIBC = {"libc.so.6": "e" * 64}
LATE_DRIVER = with_observed(MOE, system_files={**LIBC, "libcuda.so.1": "f" * 64})
NO_DEVICE = [with_observed(r, device_kind="none") for r in (BASELINE, MOE)]
ROUNDS = [
    ("", [BASELINE, MOE]),
    ("block-complete", []),
    ("block-complete", [MOE]),
    ("block-complete", [BASELINE]),
    ("block-complete", [BASELINE, BASELINE]),
    ("block-complete", [BASELINE, MOE, MOE]),
    ("block-complete", [BASELINE, record_of(load_mode="none", order=1)]),
    ("block-complete", [BASELINE, record_of(status="failed", placement="cpu-moe", order=1)]),
    ("block-complete", [BASELINE, record_of(load_mode="none", order=2), MOE]),
    ("block-placement", [BASELINE, with_report(MOE, graph_splits=(2,))]),
    ("block-placement", [BASELINE, with_report(MOE, graph_splits=())]),
    # a graph that the engine says nothing of is not one that was cut
    ("block-placement", [with_report(r, graph_splits=()) for r in (BASELINE, MOE)]),
    ("block-placement", [BASELINE, flag_ignored(MOE)]),
    ("block-placement", [with_report(BASELINE, buffers=()), MOE]),
    ("", [NO_DEVICE[0], with_report(NO_DEVICE[1], graph_splits=())]),
    ("block-alike", [BASELINE, with_facts(MOE, "sheet", sha256="c" * 64)]),
    ("block-alike", [BASELINE, with_facts(MOE, "engine", server_sha256="c" * 64)]),
    ("block-alike", [BASELINE, with_facts(MOE, "device", name="another")]),
    ("block-alike", [BASELINE, with_facts(MOE, "device", uuid="GPU-2")]),
    ("block-alike", [BASELINE, with_facts(MOE, "device", driver="581.1")]),
    ("block-alike", [BASELINE, with_facts(MOE, "device", power_limit_watt=350.0)]),
    ("block-alike", [BASELINE, with_facts(MOE, "host", host_id="f" * 32)]),
    ("block-alike", [BASELINE, with_facts(MOE, "host", system="Linux other")]),
    ("block-alike", [BASELINE, with_facts(MOE, "host", ram_bytes=16 << 30)]),
    ("block-alike", [BASELINE, with_observed(MOE, threads=2)]),
    (
        "block-alike",
        [with_observed(r, engine_files={"libggml.so": digit * 64}) for r, digit in ((BASELINE, "d"), (MOE, "c"))],
    ),
    # a driver maps some libraries late: those that both have are compared
    ("", [with_observed(BASELINE, system_files=LIBC), LATE_DRIVER]),
    ("block-alike", [with_observed(BASELINE, system_files={"libc.so.6": "0" * 64}), LATE_DRIVER]),
    # one failure hides no other
    ("block-alike block-placement", [BASELINE, with_report(with_observed(MOE, threads=2), graph_splits=())]),
    # a placement's own settings are no difference of its round
    ("", [BASELINE, with_observed(with_spec(MOE, placement="cpu-moe,threads=2"), threads=2)]),
    # a baseline with other settings moves nothing, and is not what the others are compared with
    ("", [BASELINE, MOE, SMALL]),
    ("", [SMALL, MOE]),
    # a first token that is a share of the total was not measured
    ("block-ttft-measured", [shares(BASELINE, 0.1, 0.1), shares(MOE, 0.1, 0.1)]),
    ("block-ttft-measured", [shares(BASELINE, 0.1, 0.1), shares(MOE, 0.1, 0.100009)]),
    ("", [shares(BASELINE, 0.1, 0.1), shares(MOE, 0.1, 0.100012)]),
]


@pytest.mark.parametrize(("checks", "runs"), ROUNDS)
def test_a_rounds_invariants_flag_what_only_a_comparison_shows(checks, runs):
    assert failed(audit.block(runs)) == set(checks.split())


def test_a_round_may_have_several_placements_but_one_baseline():
    copied = record_of(placement="cpu-moe", load_mode="none", order=2)
    assert audit.block([BASELINE, MOE, copied])[0].passed


def test_the_baseline_is_found_wherever_it_stands():
    for runs in ([BASELINE, MOE], [MOE, BASELINE], [record_of(placement="n-cpu-moe=3", order=2), BASELINE]):
        assert audit.reference(runs) is BASELINE
    assert audit.reference([with_spec(MOE, placement="auto"), BASELINE]) is BASELINE


def test_without_a_baseline_the_placement_with_most_on_the_gpu_takes_its_part():
    few, more = (record_of(placement=f"n-cpu-moe={n}", order=n) for n in (2, 3))
    assert audit.reference([MOE, more, few]) is few
    assert words(audit.block([MOE, more]))["block-complete"] == "cpu-moe/mmap, n-cpu-moe=3/mmap"
    assert words(audit.block([few]))["block-complete"] == "n-cpu-moe=2/mmap"
    assert "block-complete" in failed(audit.block([few]))
    assert "block-complete" in failed(audit.block([few, few]))


def test_findings_of_a_round():
    assert words(audit.block([BASELINE, MOE])) == {
        "block-complete": "baseline/mmap, cpu-moe/mmap",
        "block-alike": "2 runs alike",
        "block-placement": "header and engine agree",
        "block-ttft-measured": "spread 0.032 over 4 requests",
    }
    assert words(audit.block([])) == {"block-complete": "no runs"}
    uncut = with_report(MOE, graph_splits=(), buffers=BASELINE.observed.report.buffers)
    assert words(audit.block([BASELINE, uncut]))["block-placement"] == (
        "cpu-moe/mmap: device weights 41943040 -> 41943040, header moves 31457280; "
        "cpu-moe/mmap: graph splits (2,) -> ()"
    )
    other = with_facts(with_observed(MOE, threads=2), "sheet", sha256="c" * 64)
    assert words(audit.block([BASELINE, other]))["block-alike"] == "differ in file, threads"
    empty = [with_observed(r, requests=()) for r in (BASELINE, MOE)]
    assert words(audit.block(empty))["block-ttft-measured"] == "spread 0 over 0 requests"


# a study
RUNS = [*block(), *block(block=1)]


def study_of_runs(runs, planned=None, **change):
    """What a study's invariants look at; its records are its runs unless given."""
    keys = [r.key for r in runs] if planned is None else planned
    return audit.Matrix(keys, runs, **{"records": runs, **change})


def attempts(*numbers, **change):
    """The study whose first run has these attempts."""
    return study_of_runs(RUNS, records=[*RUNS[1:], *(record_of(attempt=n) for n in numbers)], **change)


FIRST = RUNS[0].model_copy(update={"digest": "1" * 64})
NAMED = record.Reaudit(record=FIRST.run_id, digest="1" * 64, commit="c" * 40)


def judged(by=NAMED, **change):
    """The study whose first run was audited again, by a judgement that names its first record."""
    update = {"attempt": 2, "run_id": record.run_id(FIRST.spec, 2), "judged": by}
    again = with_observed(FIRST.model_copy(update=update), **change)
    return study_of_runs(RUNS, records=[FIRST, *RUNS[1:], again])


def each(*values, of=RUNS):
    """The study with one changed run for each of `values`: (function of a run and a value, values)."""
    change, *values = values
    return study_of_runs([change(r, value) for r, value in zip(of, values, strict=True)])


def clocks(*mhz, events=0):
    return each(lambda r, n: with_observed(r, counters=(Counters(0.1, sm_clock_mhz=n, events=events),)), *mhz)


def of_gpu(r, kind="cuda", uuid="GPU-1", **change):
    return with_facts(r, "device", kind=kind, uuid=uuid, **change)


def device_fact(name):
    return each(lambda r, n: of_gpu(r, "loopback", **{name: 10**10 + n}), 0, 0, 1, 1)


def ram_speeds(*speeds):
    return each(lambda r, speed: with_facts(of_gpu(r), "host", ram_read_bytes_per_s=speed), *speeds)


def idle_power(*watts, clock=None):
    """Two cells of two runs."""

    def idle(r, watt):
        quant = "Q2_K" if r.spec.block else "Q4_K_M"
        counters = (Counters(0.1, power_watt=watt, sm_clock_mhz=clock),)
        return with_facts(
            with_spec(with_observed(r, counters=counters), quant=quant), "device", max_sm_clock_mhz=clock and 1980
        )

    return each(idle, *watts)


def larger(nbytes, kind="loopback", uuid="GPU-1", **change):
    """The study whose last run has so much more resident memory."""
    more = with_observed(RUNS[3], host_rss_peak_bytes=RUNS[3].observed.host_rss_peak_bytes + nbytes, **change)
    return study_of_runs([*(of_gpu(r, kind) for r in RUNS[:3]), of_gpu(more, kind, uuid)])


def faults(*counts, load_mode="none"):
    """Runs on a GPU with 10,000 pages of resident memory and so many page faults."""

    def touched(r, n):
        of_pages = with_observed(r, host_rss_peak_bytes=4096 * 10_000, host=replace(r.observed.host, minor_faults=n))
        return with_spec(of_gpu(of_pages), load_mode=load_mode)

    return each(touched, *counts)


def watched(one, other, rounds=3, **of_host):
    """Two cells of so many rounds, whose monitors take these shares of a CPU."""
    return study_of_runs(
        [
            with_spec(
                with_observed(
                    r, watch_cpu_s=share * r.observed.host.elapsed_s, host=replace(r.observed.host, **of_host)
                ),
                quant=quant,
                block=b,
            )
            for quant, share in (("Q4_K_M", one), ("Q2_K", other))
            for b in range(rounds)
            for r in RUNS[:2]
        ]
    )


def counted(*joules):
    """Runs 10 s apart, and rounds a minute; the counter moves by 50 J in each."""
    return each(lambda r, j: with_observed(r, counters=(Counters(0.1, j), Counters(0.4, j + 50))), *joules)


def over_the_bus(*parts, size=1 << 30):
    """Runs whose prompts move these parts of experts of `size` bytes over the bus."""

    def bus(r, part):
        placement = replace(r.observed.placement, moved_bytes=size if r.observed.placement.moved_bytes else 0)
        traffic = (PromptTraffic("plan-short", 8, int(part * size), 5),)
        return with_observed(r, placement=placement, prompt_traffic=traffic)

    return each(bus, *parts)


PAGING = replace(RUNS[0].observed.host, major_faults=100)
STUDIES = [
    ("", study_of_runs(RUNS)),
    ("matrix-complete", study_of_runs(RUNS[:-1], [r.key for r in RUNS])),
    ("matrix-complete", study_of_runs([])),
    ("", attempts(1, 2, 3)),
    ("attempts-kept", attempts(2, 3)),
    ("attempts-kept", attempts(1, 3)),
    # damaged, it was moved away and is still known of
    ("", attempts(2, 3, set_aside=[record_of(attempt=1).run_id])),
    ("", judged()),
    ("audited-again-from-a-record", judged(NAMED.model_copy(update={"record": "nobody"}))),
    ("audited-again-from-a-record", judged(NAMED.model_copy(update={"digest": "2" * 64}))),
    ("audited-again-from-a-record", judged(NAMED.model_copy(update={"record": RUNS[1].run_id}))),
    ("audited-again-from-a-record", judged(load_s=0.05)),
    ("", clocks(1980, 1822, 1980, 1980)),
    ("clocks-one-cards", clocks(1980, 1821, 1980, 1980)),
    ("", clocks(1980, 300, 300, 300, events=1)),  # idle, and says so
    ("machines-are-themselves", device_fact("total_bytes")),
    ("machines-are-themselves", device_fact("bandwidth_bytes_per_s")),
    ("machines-are-themselves", device_fact("pcie_bytes_per_s")),
    ("", ram_speeds(100e9, 100e9, 140e9, 140e9)),
    ("machines-are-themselves", ram_speeds(100e9, 100e9, 141e9, 141e9)),
    ("", idle_power(100.0, 100.0, 130.0, 130.0)),
    ("machines-are-themselves", idle_power(100.0, 100.0, 131.0, 131.0)),
    ("machines-are-themselves", idle_power(100.0, 100.0, 131.0, 131.0, clock=1980)),
    ("", idle_power(70.0, 70.0, 131.0, 131.0, clock=720)),  # on its way from sleep
    # resident memory less weights: of a mapped file all, of a copied one its buffers on the host
    ("", larger(32 * MIB)),
    ("libraries-one-size", larger(32 * MIB + 1)),
    ("", larger(512 * MIB, "cuda")),
    ("libraries-one-size", larger(512 * MIB + 1, "cuda")),
    ("", larger(64 * MIB, uuid="GPU-2")),  # of another machine
    ("", larger(64 * MIB, host=PAGING)),  # pages came and went
    ("", faults(10_000, 10_000, 10_000, 10_490)),
    ("pages-one-size", faults(10_000, 10_000, 10_000, 10_510)),
    ("", faults(4990, 8000, 10_000, 10_000)),  # of large pages
    ("pages-one-size", faults(5010, 8000, 10_000, 10_000)),
    ("", faults(10_000, 10_000, 10_000, 20_000, load_mode="mmap")),
    # of runs of 0.5 s: 60 ms of them are 12 %
    ("", watched(0.01, 0.13549)),
    ("monitors-one-price", watched(0.01, 0.13551)),
    ("", watched(0.5, 0.26)),
    ("monitors-one-price", watched(0.5, 0.25)),
    ("", watched(0.01, 0.4, rounds=2)),  # too few to tell
    ("", watched(0.01, 0.4, busy_s=0.8)),
    ("", counted(1e5, 1.01e5, 1.05e5, 1.06e5)),
    ("", counted(1e5, 1.01e5, 100, 1100)),  # the driver was loaded again
    ("counters-have-one-course", counted(1e6, 1.001e6, 9e5, 9.01e5)),  # that much it cannot have drawn since
    # 9.7 s and 2 for the rounding of starts, of 2000 W
    ("", counted(1e5, 123_440, 124_000, 125_000)),
    ("counters-have-one-course", counted(1e5, 123_460, 124_000, 125_000)),
    ("", counted(1e5, 98_051, 99_000, 100_000)),
    ("counters-have-one-course", counted(1e5, 98_049, 99_000, 100_000)),
    ("quants-of-one-model", study_of_runs([*RUNS[:3], with_facts(RUNS[3], "sheet", parameters=66_000_000)])),
    ("", over_the_bus(1.0, 0.6, 1.04, 0.62)),
    ("quants-of-one-model", over_the_bus(1.0, 0.6, 1.04, 0.67)),
    ("quants-of-one-model", over_the_bus(1.0, 0.6, 1.2, 0.6)),
    ("", over_the_bus(1.0, 0.199, 1.0, 0.175)),  # most were computed where they are
    ("quants-of-one-model", over_the_bus(1.0, 0.201, 1.0, 0.25)),
    ("", over_the_bus(1.0, 0.6, 1.04, 0.9, size=1 << 29)),  # and of a few, other traffic tells
    ("", over_the_bus(100e3 / 2**30, 0.6, 121e3 / 2**30, 0.6)),  # 101 and 121 kB for one token seen
]


@pytest.mark.parametrize(("check", "matrix"), STUDIES)
def test_a_studys_invariants_flag_what_only_all_runs_show(check, matrix):
    assert failed(audit.study(matrix)) == ({check} if check else set())


def test_every_invariant_of_rounds_and_studies_is_broken_in_some_row():
    assert {check for checks, _ in ROUNDS for check in checks.split()} == ids("block")
    assert {check for check, _ in STUDIES if check} == ids("study")
