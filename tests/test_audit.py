"""Each invariant has a record that violates it alone and is flagged by it alone."""

from dataclasses import replace

import pytest
from factory import BASE, EXPERTS, MANIFEST, MIB, argv, block, made, measured, observation, request, spec

from moelib.audit import audit, bounds, record
from moelib.audit.invariants import INVARIANTS, agrees
from moelib.engine.buffers import Buffer, Report
from moelib.measure import memory, nvml
from moelib.measure.memory import Reading, reconcile
from moelib.measure.nvml import Counters
from moelib.measure.run import PromptTraffic


def checked(*what):
    return audit.run(measured(*what))


def of(kind):
    return {i.id for i in INVARIANTS.values() if i.scope == kind}


def broken(arm="baseline", **change):
    return arm, replace(observation(arm), **change)


def one_request(**change):
    return broken(requests=(request(0, **change), request(1)))


def report(placement="baseline", **change):
    observed = observation(placement)
    return placement, remembered(replace(observed, report=replace(observed.report, **change)))


def remembered(observed, peak=None):
    """`observed` with the memory that its readings and its report now give."""
    m = observed.memory
    peak = m.process_bytes if peak is None else peak
    buffers = observed.report.device_by_kind, observed.report.pinned_bytes
    again = reconcile(observed.device_kind, m.trace, *buffers, m.weights_bytes, m.context_bytes, peak or None)
    return replace(observed, memory=again)


def device_weights(placement, nbytes):
    observed = observation(placement)
    buffers = tuple(
        replace(b, size_bytes=nbytes) if b.on_device and b.kind == "model" else b for b in observed.report.buffers
    )
    grown = nbytes - observed.report.device_bytes("model")
    again = replace(observed, report=replace(observed.report, buffers=buffers))
    return placement, remembered(again, observed.memory.process_bytes + grown)


def host(**change):
    return broken(host=replace(observation().host, **change))


ON_ANOTHER = tuple(replace(b, name=b.name.replace("RPC0", "Vulkan0")) for b in observation().report.buffers)
ARGV = argv()
OLDER = tuple(" ".join(ARGV).replace(" --load-mode mmap", "").replace(" --fit off", "").split())

VIOLATIONS = {
    "requests-complete": broken(requests=(request(0),)),
    "counts-exact": one_request(prompt_n=7),
    "stream-finished": one_request(finished=False),
    "cache-not-hit": one_request(cache_n=3),
    "times-ordered": one_request(token_s=(0.02, 0.03, 0.025, 0.05, 0.06)),
    "ttft-bounded": one_request(engine_prompt_s=0.021),
    "clocks-agree": one_request(engine_predicted_s=0.08),
    "layers-offloaded": report(offloaded_layers=4),
    "device-is-the-one": report(buffers=ON_ANOTHER),
    "placement-moves": broken("cpu-moe", placement=replace(observation("cpu-moe").placement, moved_bytes=0)),
    "placement-on-device": device_weights("cpu-moe", BASE),  # the flag did nothing
    "command-as-asked": broken(argv=(*ARGV, "--cpu-moe")),
    "environment-clean": broken(env=("LLAMA_ARG_CPU_MOE", "PATH")),
    "build-optimised": report(built="11434 (b11434) with GNU for Linux (debug)"),
    "output-alive": broken(top_logprobs=(None, None)),
    "file-is-its-sheet": broken(file_sha256="b" * 64),
    "memory-known": ("baseline", remembered(observation(), peak=BASE - MIB)),
    "memory-follows": broken(memory=replace(observation().memory, value_bytes=BASE + 13 * MIB)),
    "memory-undoubted": ("baseline", remembered(observation(), peak=0)),
    "not-slowed": broken(counters=(Counters(0.1, events=nvml.SLOWED["hw-thermal"]),)),
    "host-quiet": host(busy_s=0.71),
    "watched-lightly": broken(watch_cpu_s=0.126),
    "clock-steady": host(clock_step_s=-0.2),
    "clean-end": broken(exit_code=-9, exit_killed=True),
}


def failed(placement, observed, sheet=MANIFEST):
    return audit.verdict(checked(spec(placement=placement), observed, sheet))


@pytest.mark.parametrize("placement", ["baseline", "cpu-moe"])
def test_an_unbroken_run_is_valid(placement):
    assert failed(placement, observation(placement)) == ("valid", ())


def test_every_invariant_has_its_violation_its_limit_and_its_reason():
    assert set(VIOLATIONS) == {i for i in of("run") if INVARIANTS[i].find.__module__ != bounds.__name__}
    assert of("run") | of("log") | of("block") | of("cell") | of("study") == set(INVARIANTS)
    for i in INVARIANTS.values():
        assert i.limit
        assert i.reason.endswith(".")


@pytest.mark.parametrize("check", VIOLATIONS)
def test_a_violation_is_flagged_by_its_check_alone(check):
    status, reasons = failed(*VIOLATIONS[check])
    assert reasons == (check,)
    assert status == ("degraded" if INVARIANTS[check].degrades else "invalid")


DEGRADING = {"memory-undoubted", "not-slowed", "host-quiet", "watched-lightly", "clock-steady", "clean-end"}


def test_only_what_leaves_the_numbers_standing_degrades():
    assert {i.id for i in INVARIANTS.values() if i.degrades} == DEGRADING


@pytest.mark.parametrize(
    "change",
    [
        {"predicted_n": 4},
        {"prompt_n": None},
        {"predicted_n": None},
        {"tokens": (1, 2, 3, 4, 5, 6)},
        {"token_n": (1, 2, 3, 4, 6)},
        {"predicted_n": 1, "generate_tokens": 1, "tokens": (7,), "token_n": (1,), "token_s": (0.02,)},
    ],
)
def test_counts_have_many_ways_to_be_wrong(change):
    assert failed(*one_request(**change)) == ("invalid", ("counts-exact",))


def test_an_incomplete_character_at_the_end_is_not_an_error():
    held = {"token_s": (0.02, 0.04), "token_n": (1, 3), "tokens": (7, 8)}
    assert failed(*one_request(**held)) == ("valid", ())


@pytest.mark.parametrize(
    ("token_s", "token_n"),
    [
        ((), ()),
        ((0.0, 0.01, 0.02, 0.03, 0.04), (1, 2, 3, 4, 5)),
        ((0.02, 0.03, 0.04, 0.05), (1, 2, 3, 4, 5)),  # an event without its time
        ((0.02, 0.03, 0.04, 0.05, 0.06), (2, 2, 3, 4, 5)),  # the first token's time is not known
        ((0.02, 0.03, 0.04, 0.05, 0.06), (1, 3, 2, 4, 5)),
        ((0.02, 0.03, 0.04, 0.05, 0.06), (0, 2, 3, 4, 5)),
    ],
)
def test_times_have_many_ways_to_be_wrong(token_s, token_n):
    assert "times-ordered" in failed(*one_request(token_s=token_s, token_n=token_n))[1]


@pytest.mark.parametrize(
    ("first", "prompt", "right"),
    [
        (0.0201, 0.0201, True),
        (0.0201, 0.0202, False),  # before the prompt was done
        (1.074, 1.0, True),  # 5 % and 25 ms
        (1.076, 1.0, False),
        (0.02, None, False),
    ],
)
def test_the_first_token_comes_after_the_prompt_and_soon(first, prompt, right):
    token_s = tuple(first + 0.01 * i for i in range(5))
    reasons = failed(*one_request(engine_prompt_s=prompt, token_s=token_s))[1]
    assert ("ttft-bounded" not in reasons) == right


@pytest.mark.parametrize(
    ("engine", "right"), [(0.04, True), (0.0706, True), (0.0708, False), (0.01, True), (0.0098, False), (None, False)]
)
def test_the_clocks_may_differ_by_a_step_and_a_little(engine, right):
    """Four steps of 10 ms; 1 % + 20 ms and one step are allowed."""
    assert ("clocks-agree" not in failed(*one_request(engine_predicted_s=engine))[1]) == right


@pytest.mark.parametrize(
    ("placement", "argv", "right"),
    [
        ("cpu-moe", ARGV, False),
        ("cpu-moe", (*ARGV, "--cpu-moe"), True),
        ("n-cpu-moe=3", (*ARGV, "--n-cpu-moe", "3"), True),
        ("n-cpu-moe=3", (*ARGV, "--n-cpu-moe", "2"), False),
        ("baseline", (*ARGV, "--n-cpu-moe", "3"), False),
        ("baseline", tuple("on" if a == "off" else a for a in ARGV), False),
        ("baseline", tuple("99" if a == "999" else a for a in ARGV), False),
        ("baseline", tuple("4096" if a == "1024" else a for a in ARGV), False),
        ("baseline", tuple("none" if a == "mmap" else a for a in ARGV), False),
        ("baseline", (*ARGV, "--no-mmap"), False),
        ("baseline", OLDER, True),
        ("baseline", (), False),
        ("baseline", (*ARGV, "-ot", ".*=CPU"), False),
        ("baseline", (*ARGV, "--no-kv-offload"), False),
        ("baseline", (*ARGV, "-ngl", "0"), False),
        ("baseline", (*ARGV, "-c"), False),
        ("baseline", ("llama-server", "x", *ARGV[1:]), False),
        ("baseline", (*ARGV[:-4], "--rpc", "10.0.0.1:5", "--device", "RPC0"), False),
        ("baseline", (*ARGV[:-2], "--device", "CUDA0"), False),
        ("baseline", tuple("2" if a == "1" else a for a in ARGV), False),
    ],
)
def test_the_command_is_the_placement_and_nothing_else(placement, argv, right):
    arm = "baseline" if placement == "baseline" else "cpu-moe"
    checks = checked(spec(placement=placement), replace(observation(arm), argv=argv), MANIFEST)
    assert next(c.passed for c in checks if c.id == "command-as-asked") == right


def test_a_placements_settings_are_on_the_command_line():
    text = "cpu-moe,ubatch=64,op-offload=off,kv=q8_0"
    line = argv("cpu-moe")
    settings = ("-ub", "64", "--no-op-offload", "-ctk", "q8_0", "-ctv", "q8_0")
    for placement, flags, right in (
        (text, (*line, *settings), True),
        (text, line, False),
        (text, (*line, *settings[:-2]), False),
        (text, (*line, "-ub", "32", *settings[2:]), False),
        ("cpu-moe", (*line, *settings), False),
    ):
        checks = checked(spec(placement=placement), replace(observation("cpu-moe"), argv=flags), MANIFEST)
        assert next(c.passed for c in checks if c.id == "command-as-asked") == right


def test_load_mode_none_must_be_told():
    observed = observation()
    for line, right in ((ARGV, False), (argv(load_mode="none"), True), ((*OLDER, "--no-mmap"), True)):
        checks = checked(spec(load_mode="none"), replace(observed, argv=line), MANIFEST)
        assert next(c.passed for c in checks if c.id == "command-as-asked") == right


@pytest.mark.parametrize(
    "top", [(), (-1.0,), (float("nan"), -1.0), (-1.0, float("-inf")), (None, -2.0), (-10.3, -10.3, -10.3)]
)
def test_output_that_is_not_a_distribution_is_dead(top):
    assert failed(*broken(top_logprobs=top)) == ("invalid", ("output-alive",))


def test_nothing_is_not_valid():
    assert audit.verdict(()) == ("invalid", ("nothing-checked",))
    empty = observation(requests=())
    wrong = {"requests-complete", "counts-exact", "stream-finished", "cache-not-hit", "times-ordered"}
    assert set(failed("baseline", empty)[1]) == wrong | {"ttft-bounded", "clocks-agree"}
    silent = remembered(observation(report=Report((), None, None, ())))
    wrong = {"layers-offloaded", "placement-on-device", "build-optimised", "device-is-the-one"}
    assert set(failed("baseline", silent)[1]) - {"memory-undoubted"} == wrong
    assert failed(*broken(env=())) == ("invalid", ("environment-clean",))
    nobody = spec(workloads=(), requests=1)
    assert "requests-complete" in audit.verdict(checked(nobody, empty, MANIFEST))[1]


def test_a_device_that_is_not_there_can_offload_nothing():
    def gone(arm):
        observed = observation(arm, device_kind="none", argv=(*argv(arm)[:-4], "--device", "none"))
        host_only = tuple(b for b in observed.report.buffers if not b.on_device)
        return remembered(replace(observed, report=replace(observed.report, buffers=host_only, offloaded_layers=0)))

    assert failed("baseline", gone("baseline")) == ("degraded", ("memory-undoubted",))
    assert failed("cpu-moe", gone("cpu-moe")) == ("invalid", ("placement-moves", "memory-undoubted"))
    elsewhere = observation(device_kind="none")
    assert "device-is-the-one" in failed("baseline", remembered(elsewhere))[1]


def test_a_baseline_that_moved_something_is_none():
    assert failed(*broken(placement=replace(observation().placement, moved_bytes=1))) == (
        "invalid",
        ("placement-moves",),
    )


def test_a_gpu_run_is_on_the_gpu():
    cuda = tuple(replace(b, name=b.name.replace("RPC0[127.0.0.1:5]", "CUDA0")) for b in observation().report.buffers)
    observed = observation(device_kind="cuda")
    for buffers, right in ((cuda, True), (observed.report.buffers, False)):
        again = remembered(replace(observed, report=replace(observed.report, buffers=buffers)))
        assert ("device-is-the-one" not in failed("baseline", again)[1]) == right


def test_a_gpu_whose_driver_does_not_tell_is_not_known_to_be_its_own():
    for counters, right in (((), False), ((Counters(0.1),), False), ((Counters(0.1, events=0),), True)):
        checks = checked(spec(), observation(device_kind="cuda", counters=counters), MANIFEST)
        assert next(c.passed for c in checks if c.id == "not-slowed") == right


def test_a_power_cap_is_not_a_slowdown_and_every_slowdown_is_one():
    assert failed(*broken(counters=(Counters(0.1, events=nvml.POWER_CAP), Counters(0.2)))) == ("valid", ())
    for name, bit in nvml.SLOWED.items():
        checks = checked(spec(), observation(counters=(Counters(0.1), Counters(0.2, events=bit))), MANIFEST)
        assert next(c for c in checks if c.id == "not-slowed").measured == name


@pytest.mark.parametrize(
    ("change", "right"),
    [
        ({"busy_s": 0.7}, True),  # 0.1 of 2 x 0.5 CPU seconds
        ({"busy_s": 0.0}, True),  # the counters' ticks are coarse
        ({"clock_step_s": 0.1}, True),
        ({"clock_step_s": 0.11}, False),
        ({"suspended_s": 0.11}, False),
    ],
)
def test_the_hosts_limits(change, right):
    assert (failed(*host(**change))[0] == "valid") == right


@pytest.mark.parametrize(("spent", "right"), [(None, True), (0.001, True), (0.125, True), (0.1251, False)])
def test_watching_may_take_a_twentieth_of_a_cpu_and_a_look_at_a_new_context(spent, right):
    """The run lasted 0.5 s, and the look 0.1 s."""
    assert failed(*broken(watch_cpu_s=spent)) == (("valid", ()) if right else ("degraded", ("watched-lightly",)))


def test_memory_verdicts_cannot_be_given_by_hand():
    """A status that its reasons do not give, or reasons without a status, is seen."""
    m = observation().memory
    for change in ({"status": "degraded"}, {"reasons": ("host-pid",)}, {"engine_bytes": 5}, {"method": None}):
        assert "memory-follows" in failed(*broken(memory=replace(m, **change)))[1]
    assert "memory-known" in failed(*broken(memory=replace(m, reasons=(memory.INVALID[0],))))[1]
    assert "memory-known" in failed(*broken(memory=replace(m, status="invalid")))[1]
    assert "memory-undoubted" in failed(*broken(memory=replace(m, status="degraded")))[1]


def test_placement_tolerance_is_a_mebibyte_and_a_thousandth():
    assert agrees(BASE + MIB, BASE)
    assert agrees(1000 * MIB + 2 * MIB, 1000 * MIB)
    assert not agrees(1000 * MIB + 2 * MIB + 1, 1000 * MIB)
    assert not agrees(MIB + 1, 0)
    assert not agrees(998 * MIB - 1, 1000 * MIB)


def flagged(runs):
    return {c.id for c in audit.block(runs) if not c.passed}


def test_a_whole_block_passes_every_block_check():
    checks = audit.block(block())
    assert {c.id for c in checks} == of("block")
    assert all(c.passed for c in checks)


def seen_as(record, **change):
    return record.model_copy(update={"observed": replace(record.observed, **change)})


def with_report(record, **change):
    return seen_as(record, report=replace(record.observed.report, **change))


def test_block_checks_flag_what_only_a_comparison_shows():
    base, moe = block()
    assert flagged([]) == {"block-complete"}
    assert flagged([moe]) == {"block-complete"}
    assert flagged([base]) == {"block-complete"}
    assert flagged([base, base]) == {"block-complete"}
    assert flagged([base, moe, moe]) == {"block-complete"}
    assert flagged([base, made(load_mode="none", order=1)]) == {"block-complete"}
    assert flagged([base, made(status="failed", placement="cpu-moe", order=1)]) == {"block-complete"}
    assert flagged([base, with_report(moe, graph_splits=(2,))]) == {"block-placement"}
    assert flagged([base, with_report(moe, graph_splits=())]) == {"block-placement"}
    for part, change in [
        ("sheet", {"sha256": "c" * 64}),
        ("engine", {"server_sha256": "c" * 64}),
        ("device", {"name": "another"}),
        ("device", {"uuid": "GPU-2"}),
        ("device", {"driver": "581.1"}),
        ("device", {"power_limit_watt": 350.0}),
        ("host", {"host_id": "f" * 32}),
        ("host", {"system": "Linux other"}),
        ("host", {"ram_bytes": 16 << 30}),
    ]:
        other = moe.model_copy(update={part: getattr(moe, part).model_copy(update=change)})
        assert flagged([base, other]) == {"block-alike"}, part
    exchanged = seen_as(moe, engine_files={"libggml.so": "c" * 64})
    assert flagged([seen_as(base, engine_files={"libggml.so": "d" * 64}), exchanged]) == {"block-alike"}
    libc = {"libc.so.6": "e" * 64}
    late = seen_as(moe, system_files={**libc, "libcuda.so.1": "f" * 64})
    assert flagged([seen_as(base, system_files=libc), late]) == set()
    assert flagged([seen_as(base, system_files={"libc.so.6": "0" * 64}), late]) == {"block-alike"}
    assert flagged([base, seen_as(moe, threads=2)]) == {"block-alike"}
    both = with_report(seen_as(moe, threads=2), graph_splits=())  # one failure hides no other
    assert flagged([base, both]) == {"block-alike", "block-placement"}


def test_a_placements_own_settings_are_no_difference_of_its_block():
    base, moe = block()
    asked = moe.model_copy(update={"spec": replace(moe.spec, placement="cpu-moe,threads=2")})
    assert flagged([base, seen_as(asked, threads=2)]) == set()
    # a baseline with other settings moves nothing, and its graph need not be cut
    small = base.model_copy(update={"spec": replace(base.spec, placement="baseline,ubatch=64", order=2)})
    assert flagged([base, moe, small]) == set()
    assert flagged([small, moe]) == {"block-complete"}  # and is not what the others are compared with


def test_a_flag_that_did_nothing_fails_the_block():
    base, moe = block()
    ignored = tuple(
        Buffer(b.name, b.kind, b.size_bytes + EXPERTS) if b.on_device and b.kind == "model" else b
        for b in moe.observed.report.buffers
    )
    assert flagged([base, with_report(moe, buffers=ignored)]) == {"block-placement"}
    assert flagged([with_report(base, buffers=()), moe]) == {"block-placement"}


def test_without_a_device_there_is_no_placement_to_compare():
    base, moe = (seen_as(r, device_kind="none") for r in block())
    assert flagged([base, with_report(moe, graph_splits=())]) == set()


def test_a_first_token_that_is_a_share_of_the_total_was_not_measured():
    def share(record, shares):
        asked = []
        for q, part in zip(record.observed.requests, shares, strict=True):
            total = q.token_s[-1]
            asked.append(replace(q, token_s=(round(part * total, 6), *q.token_s[1:])))
        return seen_as(record, requests=tuple(asked))

    base, moe = block()
    assert flagged([share(base, (0.1, 0.1)), share(moe, (0.1, 0.1))]) == {"block-ttft-measured"}
    assert flagged([share(base, (0.1, 0.1)), share(moe, (0.1, 0.101))]) == set()


def plan_of(runs):
    return [r.key for r in runs]


def of_study(planned, runs, **more):
    return audit.study(audit.Matrix(planned, runs, **{"records": runs, **more}))


def study_flagged(planned, runs, **more):
    return {c.id for c in of_study(planned, runs, **more) if not c.passed}


@pytest.fixture
def runs():
    return [*block(), *block(block=1)]


def test_a_whole_study_passes_every_study_check(runs):
    checks = of_study(plan_of(runs), runs)
    assert {c.id for c in checks} == of("study")
    assert all(c.passed for c in checks)


def test_study_checks_flag_what_only_all_runs_show(runs):
    planned = plan_of(runs)
    assert study_flagged(planned, runs[:-1]) == {"matrix-complete"}
    assert study_flagged([], []) == {"matrix-complete"}


def test_an_attempt_that_went_away_is_missed(runs):
    planned = plan_of(runs)
    again = [made(attempt=n) for n in (1, 2, 3)]
    assert study_flagged(planned, runs, records=[*runs[1:], *again]) == set()
    assert study_flagged(planned, runs, records=[*runs[1:], *again[1:]]) == {"attempts-kept"}
    assert study_flagged(planned, runs, records=[*runs[1:], again[0], again[2]]) == {"attempts-kept"}
    # damaged, it was moved away and is still known of
    assert study_flagged(planned, runs, records=[*runs[1:], *again[1:]], set_aside=[again[0].run_id]) == set()
    assert said(of_study(planned, runs, records=[made(attempt=7)]))["attempts-kept"].endswith(": [7]")


def test_a_later_judgement_is_one_of_a_record_that_is_there(runs):
    planned, first = plan_of(runs), runs[0].model_copy(update={"digest": "1" * 64})
    named = record.Reaudit(record=first.run_id, digest="1" * 64, commit="c" * 40)
    again = first.model_copy(update={"attempt": 2, "run_id": record.run_id(first.spec, 2), "judged": named})
    assert study_flagged(planned, runs, records=[first, *runs[1:], again]) == set()
    wrong = {
        "nothing": named.model_copy(update={"record": "nobody"}),
        "another content": named.model_copy(update={"digest": "2" * 64}),
        "another run": named.model_copy(update={"record": runs[1].run_id, "digest": runs[1].digest or "1" * 64}),
    }
    for judged in wrong.values():
        other = again.model_copy(update={"judged": judged})
        assert study_flagged(planned, runs, records=[first, *runs[1:], other]) == {"audited-again-from-a-record"}
    faster = seen_as(again, load_s=0.05)
    assert study_flagged(planned, runs, records=[first, *runs[1:], faster]) == {"audited-again-from-a-record"}


def test_a_cards_clocks_are_its_own(runs):
    def clocked(*mhz, events=0):
        pairs = zip(runs, mhz, strict=False)
        return [seen_as(r, counters=(Counters(0.1, sm_clock_mhz=n, events=events),)) for r, n in pairs]

    for mhz, right in (((1980, 1822), True), ((1980, 1821), False), ((1980,), True)):
        clocks = clocked(*mhz, *[1980] * (4 - len(mhz)))
        assert (study_flagged(plan_of(runs), clocks) == set()) == right
    assert study_flagged(plan_of(runs), clocked(1980, 300, 300, 300, events=1)) == set()  # idle, and says so


def of_device(r, **change):
    return r.model_copy(update={"device": r.device.model_copy(update={"uuid": "GPU-1", **change})})


def of_host(r, **change):
    return r.model_copy(update={"host": r.host.model_copy(update=change)})


def test_a_machine_is_the_same_in_every_cell(runs):
    planned, check = plan_of(runs), {"machines-are-themselves"}

    def cells(*changed):
        """The study with its second block in another cell, and that cell changed."""
        return [*runs[:2], *(r.model_copy(update={"spec": replace(r.spec, quant="Q2_K")}) for r in changed)]

    for fact in ("total_bytes", "bandwidth_bytes_per_s", "pcie_bytes_per_s"):
        mixed = [of_device(r, **{fact: 10**10 + (i > 1)}) for i, r in enumerate(runs)]
        assert study_flagged(planned, mixed) == check
    for speed, right in ((140e9, True), (141e9, False)):
        hosts = [
            of_host(of_device(r, kind="cuda"), ram_read_bytes_per_s=100e9 if i < 2 else speed)
            for i, r in enumerate(runs)
        ]
        assert (study_flagged(planned, hosts) == set()) == right
    for watts, right in ((130.0, True), (131.0, False)):
        idle = cells(*(seen_as(r, counters=(Counters(0.1, power_watt=watts),)) for r in runs[2:]))
        idle[:2] = [seen_as(r, counters=(Counters(0.1, power_watt=100.0),)) for r in runs[:2]]
        assert (check <= study_flagged(planned, idle)) == (not right)


def test_libraries_take_as_much_memory_beside_every_file(runs):
    """Resident memory less weights: of a mapped file all, of a copied one its buffers on the host."""
    planned, check = plan_of(runs), {"libraries-one-size"}
    usual = runs[0].observed.host_rss_peak_bytes

    def larger(by, **device):
        other = seen_as(runs[3], host_rss_peak_bytes=usual + by)
        return [of_device(r, uuid="GPU-1", **device) for r in (*runs[:3], other)]

    for by, right in ((32 * MIB, True), (32 * MIB + 1, False)):
        assert (study_flagged(planned, larger(by)) == set()) == right
    for by, right in ((512 * MIB, True), (512 * MIB + 1, False)):
        assert (study_flagged(planned, larger(by, kind="cuda")) == set()) == right
    grown = larger(64 * MIB)
    apart = [*grown[:3], of_device(grown[3], uuid="GPU-2")]
    assert check & study_flagged(planned, apart) == set()  # of another machine
    paging = seen_as(grown[3], host=replace(grown[3].observed.host, major_faults=100))
    assert study_flagged(planned, [*grown[:3], paging]) == set()  # pages came and went


def test_a_page_that_holds_copies_is_touched_once(runs):
    """Runs of load mode none on a GPU, with 10,000 pages of resident memory."""

    def touched(*faults, mode="none"):
        return [
            seen_as(
                of_device(r, kind="cuda").model_copy(update={"spec": replace(r.spec, load_mode=mode)}),
                host_rss_peak_bytes=4096 * 10_000,
                host=replace(r.observed.host, minor_faults=n),
            )
            for r, n in zip(runs, faults, strict=True)
        ]

    check = {"pages-one-size"}
    for most, right in ((10_400, True), (10_600, False)):
        assert (check & study_flagged([], touched(10_000, 10_000, 10_000, most)) == set()) == right
    assert check & study_flagged([], touched(400, 4000, 10_000, 10_000)) == set()  # of large pages
    assert check & study_flagged([], touched(10_000, 10_000, 10_000, 20_000, mode="mmap")) == set()


def test_monitors_take_as_much_of_a_cpu_in_every_cell(runs):
    """Of arms with three runs and more in each of two cells."""
    check = {"monitors-one-price"}

    def shares(one, other, cell=3):
        made_ = []
        for quant, share in (("Q4_K_M", one), ("Q2_K", other)):
            for b in range(cell):
                for r in runs[:2]:
                    of = replace(r.spec, quant=quant, block=b)
                    spent = share * r.observed.host.elapsed_s
                    made_.append(seen_as(r, watch_cpu_s=spent).model_copy(update={"spec": of}))
        return made_

    # of runs of 0.5 s: 60 ms of them are 12 %
    for other, right in ((0.1354, True), (0.1356, False)):
        assert (check & study_flagged([], shares(0.01, other)) == set()) == right
    for other, right in ((0.26, True), (0.25, False)):
        assert (check & study_flagged([], shares(0.5, other)) == set()) == right
    assert check & study_flagged([], shares(0.01, 0.4, cell=2)) == set()  # too few to tell
    busy = [seen_as(r, host=replace(r.observed.host, busy_s=0.8)) for r in shares(0.01, 0.4)]
    assert check & study_flagged([], busy) == set()


def test_an_energy_counter_only_grows_or_begins_anew(runs):
    """Runs 10 s apart, and blocks a minute."""
    planned, check = plan_of(runs), {"counters-have-one-course"}

    def counted(*joules):
        return [
            seen_as(r, counters=(Counters(0.1, j), Counters(0.4, j + 50))) for r, j in zip(runs, joules, strict=True)
        ]

    assert study_flagged(planned, counted(1e5, 1.01e5, 1.05e5, 1.06e5)) == set()
    assert study_flagged(planned, counted(1e5, 1.01e5, 100, 1100)) == set()  # the driver was loaded again
    assert study_flagged(planned, counted(1e6, 1.001e6, 9e5, 9.01e5)) == check  # that much it cannot have drawn since
    assert study_flagged(planned, counted(1e5, 1e6, 1.001e6, 1.002e6)) == check


def test_quants_of_a_model_have_its_parameters_and_its_traffic(runs):
    planned, check = plan_of(runs), {"quants-of-one-model"}
    sheet = MANIFEST.model_copy(update={"parameters": 66_000_000})
    assert study_flagged(planned, [*runs[:3], runs[3].model_copy(update={"sheet": sheet})]) == check

    def moving(*shares, size=1 << 30):
        def bus(r, share):
            moved = replace(r.observed.placement, moved_bytes=size if r.observed.placement.moved_bytes else 0)
            return seen_as(r, placement=moved, prompt_traffic=(PromptTraffic("plan-short", 8, int(share * size), 5),))

        return [bus(r, share) for r, share in zip(runs, shares, strict=True)]

    assert study_flagged(planned, moving(1.0, 0.6, 1.04, 0.62)) == set()
    assert study_flagged(planned, moving(1.0, 0.6, 1.04, 0.67)) == check
    assert study_flagged(planned, moving(1.0, 0.6, 1.2, 0.6)) == check
    assert study_flagged(planned, moving(1.0, 0.1, 1.0, 0.15)) == set()  # most were computed where they are
    assert (
        study_flagged(planned, moving(1.0, 0.6, 1.04, 0.9, size=1 << 29)) == set()
    )  # and of a few, other traffic tells


def test_a_reading_is_evidence_of_the_value():
    """The same trace with one reading taken out of it no longer gives the value that stands."""
    observed = observation()
    m = observed.memory
    buffers = observed.report.device_by_kind, observed.report.pinned_bytes
    assert reconcile("loopback", m.trace, *buffers, m.weights_bytes, None, m.process_bytes) == m
    shorter = replace(m, trace=replace(m.trace, during=()))
    assert failed(*broken(memory=shorter)) == ("valid", ())  # loopback's value is the system's own peak
    sampled = reconcile("loopback", m.trace, *buffers, m.weights_bytes, None, None)
    moved = replace(m.trace, during=(Reading(0.1, BASE + 20 * MIB, None),))
    assert failed(*broken(memory=replace(sampled, trace=moved)))[1] == ("memory-follows", "memory-undoubted")


LIMITS = {
    "requests-complete": "exact",
    "counts-exact": "exact",
    "stream-finished": "the engine's final event",
    "cache-not-hit": "0 tokens",
    "times-ordered": "each at or after the one before, the first alone",
    "ttft-bounded": "the engine's prompt time, and at most 5% + 25 ms more",
    "clocks-agree": "1% + 20 ms",
    "layers-offloaded": "all layers",
    "device-is-the-one": "buffers named after the device",
    "placement-moves": "more than 0 bytes, none for a baseline",
    "placement-on-device": "0.1 % + 1 MiB",
    "command-as-asked": "these flags and no others",
    "environment-clean": "names on the allow-list",
    "build-optimised": "no `(debug)`",
    "output-alive": "finite, and not all equal",
    "file-is-its-sheet": "SHA-256",
    "memory-known": "not invalid",
    "memory-follows": "equal",
    "memory-undoubted": "a value from two accounts",
    "not-slowed": "no thermal, power-brake or hardware slowdown",
    "host-quiet": "10% of the host's CPU time",
    "watched-lightly": "5% of one CPU + 100 ms",
    "clock-steady": "100 ms",
    "clean-end": "exit 0 within the grace time",
    "block-complete": "one baseline and at least one more, each placement and load mode once",
    "block-alike": "equal",
    "block-placement": "0.1 % + 1 MiB, and more graph splits",
    "block-ttft-measured": "relative spread above 0.0001",
    "matrix-complete": "every planned run",
    "attempts-kept": "1 to the last",
    "audited-again-from-a-record": "a record with that digest and those readings",
    "clocks-one-cards": "8% between readings of one card",
    "machines-are-themselves": "equal facts of one device; RAM within 1.4 times, idle power 1.3",
    "libraries-one-size": "512 MiB apart with a GPU, 32 without",
    "pages-one-size": "5% apart, faults for each page",
    "monitors-one-price": "1.5 times + 0.05% of a CPU + 60 ms, in the median of a placement",
    "counters-have-one-course": "2000 W at the most since the reading before",
    "quants-of-one-model": "equal parameters; experts over the bus within 1.1 times",
}

SAID = {
    "requests-complete": ("2 of 2 requests", "1 of 2 requests"),
    "counts-exact": ("2 requests", "plan-short[0]: prompt, predicted (7, 5), asked (8, 5); streamed 5, 5 ids"),
    "stream-finished": ("2 requests", "plan-short[0]: no final event"),
    "cache-not-hit": ("2 requests", "plan-short[0]: cache_n 3"),
    "times-ordered": ("2 requests", "plan-short[0]: an earlier one after a later one"),
    "ttft-bounded": ("2 requests", "plan-short[0]: first token after 0.0200 s, the prompt took 0.0210 s"),
    "clocks-agree": ("2 requests", "plan-short[0]: 0.0400 s here, 0.08 s by the engine"),
    "layers-offloaded": ("5 of 5", "4 of 5"),
    "device-is-the-one": ("RPC0[127.0.0.1:5]", "Vulkan0[127.0.0.1:5]"),
    "placement-moves": ("0 bytes moved", "0 bytes in 9 tensors moved"),
    "placement-on-device": ("engine 41943040, header 41943040 bytes", "engine 41943040, header 10485760 bytes"),
    "command-as-asked": ("as asked", "wrong: --cpu-moe"),
    "environment-clean": ("3 allowed", "LLAMA_ARG_CPU_MOE"),
    "build-optimised": ("11434 (b11434) with GNU for Linux", "11434 (b11434) with GNU for Linux (debug)"),
    "output-alive": ("-6.5, -6.6", "None, None"),
    "file-is-its-sheet": ("file aaaaaaaaaaaa, sheet aaaaaaaaaaaa", "file bbbbbbbbbbbb, sheet aaaaaaaaaaaa"),
    "memory-known": ("valid", "below-engine-buffers"),
    "memory-follows": ("54525952, its readings give 54525952", "55574528, its readings give 54525952"),
    "memory-undoubted": ("all taken", "sampled-peak"),
    "not-slowed": ("0 readings", "hw-thermal"),
    "host-quiet": ("0.0% by others", "11.0% by others"),
    "watched-lightly": ("None CPU seconds of 0.50 s", "0.126 CPU seconds of 0.50 s"),
    "clock-steady": ("step 0.000 s, sleep 0.000 s", "step -0.200 s, sleep 0.000 s"),
    "clean-end": ("exit 0", "exit -9"),
}


def test_every_limit_is_the_documented_one():
    elsewhere = {"log", "cell"}, {bounds.__name__}
    here = [i for i in INVARIANTS.values() if i.scope not in elsewhere[0] and i.find.__module__ not in elsewhere[1]]
    assert {i.id: i.limit for i in here} == LIMITS


def test_what_was_found_is_said_with_what_it_was_held_against():
    """What holds, and what the invariant's own violation says."""
    holds = {c.id: c.measured for c in checked(spec(), observation(), MANIFEST)}
    for check, (arm, observed) in VIOLATIONS.items():
        check_result = next(c for c in checked(spec(placement=arm), observed, MANIFEST) if c.id == check)
        assert (holds[check], check_result.measured) == SAID[check]


def test_nothing_says_what_was_not_there():
    silent = remembered(observation(report=Report((), None, None, ())))
    assert {c.id: c.measured for c in checked(spec(), silent) if not c.passed} == {
        "layers-offloaded": "None of None",
        "device-is-the-one": "none",
        "placement-on-device": "engine None, header 41943040 bytes",
        "build-optimised": "the engine told no build",
        "memory-undoubted": "engine-silent",
    }
    empty = observation(requests=(), env=(), top_logprobs=())
    nothing = dict.fromkeys(("stream-finished", "cache-not-hit", "times-ordered", "counts-exact"), "0 requests")
    nothing |= dict.fromkeys(("ttft-bounded", "clocks-agree"), "0 requests")
    nothing |= {"requests-complete": "0 of 0 requests", "environment-clean": "0 allowed"}
    nothing |= {"output-alive": "nothing told"}
    assert {c.id: c.measured for c in checked(spec(workloads=()), empty) if not c.passed} == nothing
    moved = {c.id: c.measured for c in checked(spec(placement="cpu-moe"), observation("cpu-moe"), MANIFEST)}
    assert moved["placement-moves"] == "31457280 bytes in 9 tensors moved"


def said(checks):
    return {c.id: c.measured for c in checks}


def test_blocks_and_studies_say_what_was_found(runs):
    base, moe = block()
    assert said(audit.block([base, moe])) == {
        "block-complete": "baseline/mmap, cpu-moe/mmap",
        "block-alike": "2 runs alike",
        "block-placement": "header and engine agree",
        "block-ttft-measured": "spread 0.032 over 4 requests",
    }
    assert said(audit.block([])) == {"block-complete": "no runs"}
    cut = with_report(moe, graph_splits=())
    assert said(audit.block([base, cut]))["block-placement"] == "cpu-moe/mmap: graph splits (2,) -> ()"
    more = with_report(moe, graph_splits=(), buffers=base.observed.report.buffers)
    assert said(audit.block([base, more]))["block-placement"] == (
        "cpu-moe/mmap: device weights 41943040 -> 41943040, header moves 31457280; "
        "cpu-moe/mmap: graph splits (2,) -> ()"
    )
    other = seen_as(moe, threads=2).model_copy(update={"sheet": MANIFEST.model_copy(update={"sha256": "c" * 64})})
    assert said(audit.block([base, other]))["block-alike"] == "differ in file, threads"
    asked = seen_as(moe, requests=())
    assert said(audit.block([seen_as(base, requests=()), asked]))["block-ttft-measured"] == "spread 0 over 0 requests"
    assert said(of_study(plan_of(runs), runs)) == {
        "matrix-complete": "0 of 4 missing",
        "attempts-kept": "4 runs with all attempts",
        "audited-again-from-a-record": "each names its first record",
        "clocks-one-cards": "0 readings",
        "machines-are-themselves": "0 hosts",
        "libraries-one-size": "1 machines",
        "pages-one-size": "0 machines",
        "monitors-one-price": "0 arms",
        "counters-have-one-course": "0 boards",
        "quants-of-one-model": "1 models",
    }
    assert said(of_study(plan_of(runs), runs[:2]))["matrix-complete"] == "2 of 4 missing"


def test_two_tokens_are_enough_to_count_and_to_time():
    two = {"predicted_n": 2, "generate_tokens": 2, "token_n": (1, 2), "tokens": (7, 8), "token_s": (0.02, 0.03)}
    assert failed(*one_request(**two, engine_predicted_s=0.01)) == ("valid", ())
    assert failed(*one_request(**two, engine_predicted_s=0.05)) == ("invalid", ("clocks-agree",))
    one = {"predicted_n": 2, "generate_tokens": 2, "token_n": (2,), "tokens": (7, 8), "token_s": (0.02,)}
    assert failed(*one_request(**one)) == ("invalid", ("times-ordered",))


def test_the_first_event_is_named_by_what_it_carried():
    late = one_request(token_n=(2, 2, 3, 4, 5))
    check_result = next(c for c in checked(spec(), late[1], MANIFEST) if c.id == "times-ordered")
    assert check_result.measured == "plan-short[0]: the first event carried 2 tokens"


def test_layers_are_compared_by_their_number():
    many = {"offloaded_layers": int("1000"), "total_layers": int("1000")}  # two objects, as read from a file
    assert "layers-offloaded" not in failed(*report(**many))[1]


def test_one_byte_that_moved_has_moved():
    observed = observation("cpu-moe")
    least = replace(observed, placement=replace(observed.placement, moved_bytes=1))
    assert "placement-moves" not in failed("cpu-moe", least)[1]


def test_the_baseline_is_found_wherever_it_stands():
    base, moe = block()
    for runs in ([base, moe], [moe, base], [made(placement="n-cpu-moe=3", order=2), base]):
        assert audit.baseline(runs) is base
    early = moe.model_copy(update={"spec": replace(moe.spec, placement="auto")})
    assert audit.baseline([early, base]) is base


def test_a_block_may_have_several_arms_but_one_baseline():
    base, moe = block()
    pinned = made(placement="cpu-moe", load_mode="none", order=2)
    checks = {c.id: c.passed for c in audit.block([base, moe, pinned])}
    assert checks["block-complete"]
    copied = made(placement="baseline", load_mode="none", order=2)
    assert flagged([base, copied, moe]) == {"block-complete"}


def test_a_graph_that_nobody_told_is_not_one_that_was_cut():
    base, moe = block()
    blind = [with_report(r, graph_splits=()) for r in (base, moe)]
    assert flagged(blind) == {"block-placement"}


@pytest.mark.parametrize("cache_n", [-1, None, 1])
def test_only_no_token_of_a_cache_is_none(cache_n):
    assert failed(*one_request(cache_n=cache_n)) == ("invalid", ("cache-not-hit",))


def test_times_are_kept_to_microseconds_and_may_meet():
    token_s = tuple(1.0 + 0.01 * i for i in range(5))
    for prompt, right in ((1.00009, True), (1.00011, False)):
        assert ("ttft-bounded" not in failed(*one_request(token_s=token_s, engine_prompt_s=prompt))[1]) == right


def test_the_weights_must_be_on_the_device_whatever_its_caches_are_on():
    observed = observation()
    elsewhere = tuple(
        replace(b, name="Vulkan0") if b.on_device and b.kind == "model" else b for b in observed.report.buffers
    )
    again = remembered(replace(observed, report=replace(observed.report, buffers=elsewhere)))
    assert failed("baseline", again) == ("invalid", ("device-is-the-one",))


@pytest.mark.parametrize(("code", "killed"), [(1, False), (-15, False), (None, False), (0, True)])
def test_only_an_end_of_its_own_is_clean(code, killed):
    assert failed(*broken(exit_code=code, exit_killed=killed)) == ("degraded", ("clean-end",))
