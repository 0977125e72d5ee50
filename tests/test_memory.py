import json
from dataclasses import dataclass, replace

import pytest
from conftest import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from moelib.engine.buffers import Buffer, Report
from moelib.measure.memory import INVALID, LEAST_CONTEXT_BYTES, REASONS, Memory, Reading, Trace, reconcile

MIB, GIB = 1 << 20, 1 << 30
CONTEXT, ENGINE, WEIGHTS = 500 * MIB, 4 * GIB, 3 * GIB
PEAK = ENGINE + 620 * MIB  # of the run's process
USED = PEAK + 9 * MIB  # of the device, which was idle at 0
SILENT = Report((), None, None, ())


UNKNOWN = Report((Buffer("NPU7", "model", GIB),), 1, 1, (2,))


def engine_report(model=WEIGHTS, cache=ENGINE - WEIGHTS, device="CUDA0"):
    return Report((Buffer(device, "model", model), Buffer(device, "KV", cache), Buffer("CPU", "model", 7)), 1, 1, (2,))


def at(device, process=None, others=(), *errors, listed=None, drawing=()):
    return Reading(0.1, process, device, process is not None if listed is None else listed, others, errors, drawing)


IDLE, RUN = at(0), at(USED, PEAK)
REPORT, REPORT_RPC = engine_report(), engine_report(40 * MIB, 2 * MIB, "RPC0")


def graph(compute) -> Report:
    return replace(REPORT_RPC, buffers=(*REPORT_RPC.buffers, Buffer("RPC0", "compute", compute)))


def cuda(
    *during, before=(IDLE, IDLE), after=(IDLE,), report=REPORT, weights=WEIGHTS, context: int | None = CONTEXT
) -> Memory:
    return reconcile("cuda", Trace(before, during, after), report.device_by_kind, report.pinned_bytes, weights, context)


def loopback(peak, *samples, report=REPORT_RPC, weights=40 * MIB) -> Memory:
    trace = Trace((at(None, 8 * MIB),), tuple(at(None, n) for n in samples))
    return reconcile("loopback", trace, report.device_by_kind, report.pinned_bytes, weights, None, peak)


F = (90, 2 * GIB)  # another process
STILL = at(F[1], None, (F,))
BESIDE = {"before": (STILL, STILL), "after": (STILL,)}
CASES = {
    "no-samples": (cuda(), None),
    "gpu-lost": (cuda(RUN, at(None, None, (), "gpu-lost"), RUN), None),
    "unstable-baseline": (cuda(at(USED + GIB, PEAK), before=(at(0), at(17 * MIB))), None),
    "not-returned": (cuda(at(USED + GIB, PEAK), after=(RUN, at(17 * MIB))), None),
    "foreign-changed": (cuda(RUN, at(USED, PEAK, ((90, None),))), None),
    "accounts-disagree": (cuda(at(USED, PEAK - 60 * MIB)), None),
    "below-engine-buffers": (cuda(at(ENGINE, ENGINE)), None),
    "below-header-weights": (cuda(RUN, weights=2 * PEAK), None),
    "above-ceiling": (cuda(at(USED + GIB, PEAK + GIB)), None),
    "no-device": (reconcile("none", Trace((), ()), {}, 0, 0), None),
    "process-not-listed": (cuda(at(USED)), None),
    "running-before": (cuda(RUN, before=()), PEAK),
    "list-unsupported": (cuda(at(USED, None, (), "list-unsupported")), None),
    "host-pid": (cuda(at(USED, None, ((70411, PEAK),))), PEAK),
    "bytes-not-listed": (cuda(at(USED, listed=True)), USED),
    "device-total-unknown": (cuda(at(None, PEAK, (), "memory-unsupported")), PEAK),
    "foreign-process": (cuda(at(USED + F[1], PEAK, (F,)), **BESIDE), PEAK),
    "engine-silent": (cuda(RUN, report=SILENT), PEAK),
    "context-unmeasured": (cuda(RUN, context=None), PEAK),
    "sampled-peak": (loopback(None, 50 * MIB, 45 * MIB, None), 50 * MIB),
    "memory-shared": (cuda(at(None, PEAK, (), "memory-shared")), PEAK),
    "unseen-change": (cuda(RUN, after=(at(120 * MIB),)), PEAK),
    "buffers-unknown": (cuda(RUN, report=UNKNOWN), PEAK),
}
"""Every reason -> a run that has it alone: its memory and the value."""


def test_every_reason_of_the_closed_list_can_come_alone():
    assert list(CASES) == list(REASONS)


@pytest.mark.parametrize("reason", CASES)
def test_a_doubt_says_why_and_leaves_a_value_only_where_it_is_proven(reason):
    memory, value = CASES[reason]
    assert (memory.value_bytes, memory.reasons) == (value, (reason,))
    assert memory.status == ("invalid" if reason in INVALID else "degraded")


@pytest.mark.parametrize(
    ("memory", "value", "reasons"),
    [
        (cuda(RUN), PEAK, ""),
        (cuda(at(2 * MIB, PEAK // 2), at(USED, PEAK), at(USED - MIB, PEAK - MIB)), PEAK, ""),
        # readings of exactly 0 are failed ones
        (cuda(at(0, 0), at(USED, PEAK)), PEAK, ""),
        (cuda(at(0, 0, listed=True)), None, "bytes-not-listed device-total-unknown"),
        (cuda(at(0, PEAK)), PEAK, "device-total-unknown"),
        (cuda(at(MIB, PEAK), before=(at(MIB),)), None, "accounts-disagree"),  # this one says that nothing grew
        (cuda(at(MIB, None, listed=True), before=(at(MIB),)), None, "accounts-disagree bytes-not-listed"),
        # a struct skew's handful of bytes
        (cuda(at(4096, 4096), report=SILENT, weights=0), None, "below-engine-buffers engine-silent"),
        (cuda(at(4096, 4096), report=engine_report(0, 0), weights=0), None, "below-engine-buffers"),
        # what says nothing contradicts nothing
        (cuda(at(None, None)), None, "process-not-listed device-total-unknown"),
        (cuda(at(USED), before=()), None, "process-not-listed device-total-unknown"),
        (cuda(at(None, listed=True)), None, "bytes-not-listed device-total-unknown"),
        (
            cuda(at(None, None, (), "list-unsupported", "memory-unsupported")),
            None,
            "list-unsupported device-total-unknown",
        ),
        # a server that ran before: the list against the header, or the engine
        (cuda(RUN, before=(), report=SILENT), PEAK, "running-before engine-silent"),
        (cuda(RUN, after=()), None, "not-returned"),
        # the driver gave back late, or a neighbour that it does not list came: the list and the growth agree
        (cuda(RUN, after=(at(GIB),)), PEAK, "unseen-change"),
        (cuda(at(USED + GIB, PEAK), after=(at(GIB),)), PEAK, "unseen-change"),
        (cuda(at(USED + GIB + 65 * MIB, PEAK), after=(at(GIB),)), None, "not-returned"),
        (cuda(at(USED, None, (), "list-unsupported"), after=(at(GIB),)), None, "not-returned list-unsupported"),
        # with one account and no sum of the engine's buffers there is nothing to hold it against
        (cuda(at(None, PEAK), report=UNKNOWN), None, "device-total-unknown buffers-unknown"),
        (cuda(RUN, after=(at(None),)), PEAK, "device-total-unknown"),
        # one account, and nothing to hold it against
        (cuda(at(None, PEAK), report=SILENT), None, "device-total-unknown engine-silent"),
        (cuda(at(USED, listed=True), report=SILENT), None, "bytes-not-listed engine-silent"),
        # the last reading holds the peak
        (cuda(RUN, at(None, PEAK)), PEAK, "device-total-unknown"),
        (cuda(at(None, PEAK), at(None)), None, "process-not-listed device-total-unknown"),
        (cuda(RUN, at(USED)), PEAK, ""),
        # nobody tells how the growth is to be shared
        (
            cuda(
                at(USED, None, ((90, None),), listed=True),
                before=(at(0, None, ((90, None),)),) * 2,
                after=(at(0, None, ((90, None),)),),
            ),
            None,
            "bytes-not-listed foreign-process",
        ),
        (cuda(at(USED + F[1] + 17 * MIB, PEAK, ((90, F[1] + 17 * MIB),)), **BESIDE), PEAK, "foreign-process"),
        # the list says that it grew by what the device did not: somebody is wrong
        (cuda(at(USED + F[1], PEAK, ((90, F[1] + GIB),)), **BESIDE), None, "accounts-disagree foreign-process"),
        # who was there before and left is not the run
        (
            cuda(at(USED + F[1], None, (F,)), at(USED), before=(STILL,) * 2),
            None,
            "not-returned foreign-changed process-not-listed",
        ),
        # two newcomers: either may be ours
        (cuda(at(USED, None, ((70411, PEAK), F))), None, "foreign-changed process-not-listed"),
        (cuda(at(USED, None, ((70411, None),))), None, "foreign-changed process-not-listed"),
        # the newcomer stayed, so it was not the run
        (
            cuda(at(USED, None, ((70411, PEAK),)), after=(at(0, None, ((70411, 1),)),)),
            None,
            "foreign-changed process-not-listed",
        ),
        # a list that failed once is not an empty one
        (cuda(at(None, None, (), "list-unsupported"), at(USED + F[1], PEAK, (F,)), **BESIDE), PEAK, "foreign-process"),
    ],
)
def test_on_a_gpu_the_accounts_decide(memory, value, reasons):
    assert (memory.value_bytes, memory.reasons) == (value, tuple(reasons.split()))


@pytest.mark.parametrize(
    ("memory", "value", "method", "reasons"),
    [
        (loopback(50 * MIB, 45 * MIB), 50 * MIB, "rss-peak", ""),
        (loopback(0, 45 * MIB), 45 * MIB, "rss-samples", "sampled-peak"),
        (loopback(None), None, "rss-samples", "no-samples sampled-peak"),
        (loopback(39 * MIB), None, "rss-peak", "below-engine-buffers"),
        (loopback(49 * MIB), None, "rss-peak", "below-engine-buffers"),  # weights, cache and 8 MiB of before
        (loopback(50 * MIB), 50 * MIB, "rss-peak", ""),
        (loopback(None, 42 * MIB), 42 * MIB, "rss-samples", "sampled-peak"),
        (loopback(None, 41 * MIB), None, "rss-samples", "below-engine-buffers sampled-peak"),
        (loopback(50 * MIB, report=graph(58 * MIB)), 50 * MIB, "rss-peak", ""),  # not all of it was touched
        (loopback(50 * MIB, report=graph(59 * MIB)), None, "rss-peak", "below-engine-buffers"),
        (loopback(50 * MIB, report=UNKNOWN), None, "rss-peak", "buffers-unknown"),
        (loopback(106 * MIB), 106 * MIB, "rss-peak", ""),  # the engine's buffers and 64 MiB
        (loopback(106 * MIB + 1), None, "rss-peak", "above-ceiling"),
        (loopback(50 * MIB, report=SILENT), None, "rss-peak", "engine-silent"),
        (loopback(50 * MIB, weights=60 * MIB), None, "rss-peak", "below-header-weights"),
    ],
)
def test_on_loopback_the_process_is_the_device(memory, value, method, reasons):
    assert (memory.value_bytes, memory.method, memory.reasons) == (value, method, tuple(reasons.split()))


def test_what_the_engine_does_not_explain_is_the_rest():
    m = cuda(RUN)
    assert (m.status, m.method, m.process_bytes, m.growth_bytes) == ("valid", "nvml-process", PEAK, USED)
    assert (m.engine_bytes, m.weights_bytes, m.residual_bytes) == (ENGINE, WEIGHTS, 620 * MIB)
    odd = replace(m, value_bytes=8 * MIB + 5, engine_bytes=3 * MIB + 6)
    assert odd.residual_bytes == 5 * MIB - 1
    assert cuda(RUN, before=(at(8 * MIB), at(0))).growth_bytes == USED - 8 * MIB
    assert cuda(RUN, report=SILENT).residual_bytes is None
    assert cuda().residual_bytes is None


def test_an_h200s_recording_gives_what_was_allocated_and_a_context():
    probe = json.loads((FIXTURES / "nvml-probe-h200.json").read_text(encoding="utf-8"))

    def reading(label: str) -> Reading:
        snap = next(s for s in probe["snaps"] if s["label"] == label)
        assert snap["v2"]["total"] == snap["v2"]["reserved"] + snap["v2"]["free"] + snap["v2"]["used"]
        assert snap["v1"]["used"] == snap["v2"]["used"] + snap["v2"]["reserved"]
        ours = [p["used"] for p in snap["compute"] if p["ours"]]
        return Reading(snap["t"], sum(ours) if ours else None, snap["v2"]["used"], bool(ours))

    trace = Trace(*(tuple(map(reading, labels)) for labels in (("idle", "idle2"), ("ctx", "alloc"), ("after_exit",))))
    allocated, context = probe["alloc_bytes"], probe["verdict"]["context_bytes_device"]
    m = reconcile("cuda", trace, engine_report(allocated, 0).device_by_kind, 0, allocated, context)
    assert (m.status, m.method, m.reasons) == ("valid", "nvml-process", ())
    listed = probe["verdict"]["our_pid_bytes"][0]
    assert abs(m.value_bytes - listed) <= max(64 * MIB, 0.01 * listed)
    assert abs(m.residual_bytes - context) <= 16 * MIB
    assert m.growth_bytes == allocated + context


def test_page_tables_of_pinned_memory_are_charged_to_no_process():
    fixture = json.loads((FIXTURES / "pinned-h200.json").read_text(encoding="utf-8"))
    trace = Trace(**{k: TypeAdapter(tuple[Reading, ...]).validate_python(v) for k, v in fixture["trace"].items()})
    report = TypeAdapter(Report).validate_python(fixture["report"])
    pinned = report.pinned_bytes
    assert pinned == sum(b["size_bytes"] for b in fixture["report"]["buffers"] if b["name"] == "CUDA_Host") > 40e9
    m = reconcile(
        "cuda", trace, report.device_by_kind, report.pinned_bytes, fixture["weights_bytes"], fixture["context_bytes"]
    )
    assert (m.status, m.method, m.value_bytes) == ("valid", "nvml-process", m.process_bytes)
    # 8 bytes a page of 4 KiB, in steps of 2 MiB, and what any process costs the device beside
    assert m.growth_bytes - m.process_bytes - 9240576 == pytest.approx(pinned / 512, abs=2 * MIB)
    bare = replace(report, buffers=tuple(replace(b, name=b.name.replace("_Host", "")) for b in report.buffers))
    unpinned = replace(report, buffers=tuple(b for b in bare.buffers if b in report.buffers))
    again = reconcile(
        "cuda",
        trace,
        unpinned.device_by_kind,
        unpinned.pinned_bytes,
        fixture["weights_bytes"],
        fixture["context_bytes"],
    )
    assert again.reasons == ("accounts-disagree",)


@pytest.mark.parametrize(
    ("pinned", "apart", "right"),
    [
        (0, 64 * MIB, True),
        (0, 65 * MIB, False),
        (40 * GIB, 144 * MIB, True),
        (40 * GIB, 145 * MIB, False),
        (40 * GIB, 0, True),  # a driver with larger pages
        (40 * GIB, -64 * MIB, True),
        (40 * GIB, -65 * MIB, False),  # tables are on the device, never in the list alone
    ],
)
def test_page_tables_explain_growth_and_nothing_else(pinned, apart, right):
    report = replace(REPORT, buffers=(*REPORT.buffers, Buffer("CUDA_Host", "model", pinned)))
    m = cuda(at(PEAK + apart, PEAK), report=report)
    assert (m.reasons == ()) is right
    assert (m.value_bytes == PEAK) is right


def test_growth_alone_is_no_value_where_page_tables_may_be_in_it():
    for pinned, value in ((24 * GIB, USED), (24 * GIB + 2048, None)):
        report = replace(REPORT, buffers=(*REPORT.buffers, Buffer("CUDA_Host", "model", pinned)))
        m = cuda(at(USED, listed=True), report=report)
        assert (m.value_bytes, m.reasons) == (value, ("bytes-not-listed",))


OURS, LIST = (411, 412), ("own", "host", "empty", "no-bytes", "unsupported", "skewed")
KINDS = ("still", "joining", "growing", "leaving", "visiting")


@dataclass(frozen=True)
class World:
    """What is true of a device and a run, what disturbs it, and what the driver shows of it."""

    context: int
    engine: int
    """Buffers, all of them in the run's memory."""
    beyond: float
    """What the run holds beyond the buffers, in contexts."""
    ramp: tuple[float, ...]
    """Share of the peak in each of the readings while it rises; then comes the plateau."""
    plateau: int
    child: float
    """Share of the peak in a second process; 0 for none."""
    overhead: int
    """What the processes cost the device beyond what the list says."""
    foreign: tuple[tuple[str, int], ...]
    """(kind, bytes) of the other processes."""
    baseline: tuple[int, int, int]
    """Memory of no process: in the first idle reading, from the second on, late in the run and after it."""
    shown: str
    """What the driver's list shows, of all processes alike."""
    list_fails: frozenset[int]
    """Readings, by number, in which the list fails; and the bytes in it, and the device's total."""
    bytes_fail: frozenset[int]
    total_fails: frozenset[int]
    lost: bool
    silent: bool
    measured: bool
    """Whether the size of a context was measured."""
    weights: float
    """By the header, as a share of the engine's buffers: more than 1 is wrong."""
    ours_first: bool
    drawing: bool
    """Whether the other processes only draw."""
    pinned: int = 0
    """Host memory that the device reads by itself, through page tables of its own."""

    @property
    def tables(self) -> int:
        return self.pinned * 8 // 4096

    @property
    def peak(self) -> int:
        return self.engine + round(self.context * self.beyond)


def skew(processes: list[tuple[int, int | None]]) -> list[tuple[int, int | None]]:
    """Entries of 16 bytes (id, bytes) read as entries of 24 bytes, in an array of zeros."""
    words = [w for pid, n in processes for w in (pid, n)] + [0] * len(processes)
    return [(words[3 * i] % 2**32, words[3 * i + 1] or None) for i in range(len(processes))]


def show(world: World) -> Trace:
    """What moelib.nvml reads in this world."""
    shares = (*world.ramp, *(1.0,) * world.plateau)
    moments = [("before", 0.0), ("before", 0.0), *(("during", s) for s in shares), ("after", 0.0)]
    split = {OURS[0]: 1 - world.child, **({OURS[1]: world.child} if world.child else {})}

    def others(phase: str, late: bool) -> list[tuple[int, int]]:
        present = {
            "still": True,
            "growing": True,
            "joining": late,
            "leaving": not late,
            "visiting": late and phase == "during",
        }
        grown = {"growing": GIB if late else 0}
        return [(90 + k, n + grown.get(kind, 0)) for k, (kind, n) in enumerate(world.foreign) if present[kind]]

    def look(i: int, phase: str, share: float) -> Reading:
        run = [(pid, round(world.peak * share * part)) for pid, part in split.items()] if share else []
        late = phase == "after" or i > 2  # from the second reading of the run
        foreign, base = others(phase, late), world.baseline[2 if late else min(i, 1)]
        errors, mine = [], set(OURS) if phase != "before" else set()
        used = base + sum(n for _, n in run + foreign) + (world.overhead + world.tables if run else 0)
        lost = world.lost and i >= len(moments) - 2
        shown = run + foreign if world.ours_first else foreign + run
        if world.shown == "host":
            shown = [(pid + 70000 if pid in OURS else pid, n) for pid, n in shown]
        if world.shown == "no-bytes" or i in world.bytes_fail:
            shown = [(pid, None) for pid, _ in shown]
        elif world.shown == "skewed":
            shown = skew(shown)
        if lost or world.shown == "unsupported" or i in world.list_fails:
            errors.append("gpu-lost" if lost else "list-unsupported")
        if errors or world.shown == "empty":
            shown = []
        if lost or i in world.total_fails:
            used = None
            errors += [] if lost else ["memory-unsupported"]
        listed = {pid: n for pid, n in shown if pid in mine}
        known = bool(listed) and None not in listed.values()
        return Reading(
            t_s=float(i),
            process_bytes=sum(listed.values()) if known else None,
            device_bytes=used,
            listed=bool(listed),
            others=tuple(sorted({pid: n for pid, n in shown if pid not in mine}.items())),
            errors=tuple(sorted(errors)),
            drawing=tuple(pid for pid, _ in shown if pid not in mine) if world.drawing else (),
        )

    readings = [(phase, look(i, phase, share)) for i, (phase, share) in enumerate(moments)]
    return Trace(*(tuple(r for p, r in readings if p == phase) for phase in ("before", "during", "after")))


def size(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high).map(lambda n: n * MIB + 12345)


QUIET = st.builds(
    World,
    context=size(200, 900),
    engine=size(0, 2 * 1024) | size(0, 100 * 1024),
    beyond=st.floats(1.0, 1.35),
    ramp=st.lists(st.floats(0.01, 1.0) | st.just(0.9), max_size=4).map(lambda shares: tuple(sorted(shares))),
    plateau=st.integers(1, 3),
    child=st.just(0.0),
    overhead=st.integers(0, 16 * MIB),
    foreign=st.just(()),
    baseline=st.just((0, 0, 0)),
    shown=st.just("own"),
    list_fails=st.just(frozenset()),
    bytes_fail=st.just(frozenset()),
    total_fails=st.just(frozenset()),
    lost=st.just(False),
    silent=st.just(False),
    measured=st.just(True),
    weights=st.floats(0.0, 1.0),
    ours_first=st.booleans(),
    drawing=st.booleans(),
)
READINGS = range(10)  # of the longest trace: two before, at most seven of the run, one after
SOME = st.one_of(  # some, or all from one on
    st.frozensets(st.sampled_from(READINGS), min_size=1, max_size=4),
    st.sampled_from(READINGS).map(lambda first: frozenset(READINGS[first:])),
)
LEVEL = st.sampled_from([0, 8 * MIB, 16 * MIB, 17 * MIB, 300 * MIB, GIB])
DISTURBANCES = {
    "child": st.sampled_from([0.1, 0.5]),
    "foreign": st.lists(st.tuples(st.sampled_from(KINDS), size(1, 8 * 1024)), min_size=1, max_size=3).map(tuple),
    "baseline": st.tuples(LEVEL, LEVEL, LEVEL) | LEVEL.map(lambda n: (n, n, n)),
    "list_fails": SOME,
    "bytes_fail": SOME,
    "total_fails": SOME,
    "weights": st.sampled_from([0.0, 1.5, 20.0]),
    "pinned": size(1, 80 * 1024),
}
# a driver's list and the wide bound are drawn each time: together they leave the most room for a wrong value
ANY = st.builds(
    lambda world, shown, measured, kind, changes: replace(
        world, shown=shown, measured=measured, lost=kind == "lost", silent=kind == "silent", **dict(changes)
    ),
    QUIET,
    st.sampled_from(LIST),
    st.booleans(),
    st.sampled_from(["as it should be"] * 8 + ["lost", "silent"]),
    st.lists(
        st.sampled_from(list(DISTURBANCES)).flatmap(lambda name: st.tuples(st.just(name), DISTURBANCES[name])),
        max_size=3,
    ),
)


def measure(world: World) -> Memory:
    buffers = (*engine_report(world.engine, 0).buffers, Buffer("CUDA_Host", "model", world.pinned))
    report, context = (
        SILENT if world.silent else replace(REPORT, buffers=buffers),
        world.context if world.measured else None,
    )
    return reconcile(
        "cuda", show(world), report.device_by_kind, report.pinned_bytes, round(world.weights * world.engine), context
    )


@settings(max_examples=1000, deadline=None)
@given(ANY)
def test_a_value_is_the_truth_whatever_the_driver_shows(world):
    m = measure(world)
    assert list(m.reasons) == [r for r in REASONS if r in m.reasons]
    assert (m.status == "valid") == (not m.reasons)
    assert (m.status == "invalid") == any(r in INVALID for r in m.reasons)
    if m.value_bytes is None:
        assert m.status != "valid"
        return
    assert m.status != "invalid"
    assert abs(m.value_bytes - world.peak) <= max(64 * MIB, 0.01 * world.peak, m.bound_bytes or 0)
    assert (m.bound_bytes is not None) == (m.method == "nvml-growth")
    assert m.value_bytes >= (m.engine_bytes or 0) + LEAST_CONTEXT_BYTES
    if m.status == "valid":
        apart = m.growth_bytes - m.process_bytes
        bound = max(64 * MIB, 0.01 * max(m.process_bytes, m.growth_bytes))
        assert -bound <= apart <= bound + world.tables


@settings(max_examples=300, deadline=None)
@given(QUIET, st.sampled_from(LIST))
def test_an_undisturbed_run_has_the_value_that_its_driver_can_prove(world, shown):
    m = measure(replace(world, shown=shown))
    status, value, reasons = {
        "own": ("valid", world.peak, ()),
        "skewed": ("valid", world.peak, ()),  # the first entry is right, and the only one
        "host": ("degraded", world.peak, ("host-pid",)),
        "no-bytes": ("degraded", world.peak + world.overhead, ("bytes-not-listed",)),
        "empty": ("degraded", None, ("process-not-listed",)),
        "unsupported": ("degraded", None, ("list-unsupported",)),
    }[shown]
    assert (m.status, m.value_bytes, m.reasons) == (status, value, reasons)


def accounts(whole, apart):
    """A run of `whole` GiB whose device grew by `apart` bytes more."""
    used = whole * GIB
    return cuda(at(used + apart, used), report=engine_report((whole - 1) * GIB, 512 * MIB), weights=GIB)


def alone(nbytes, **change):
    """A run of which both accounts have so many bytes."""
    return cuda(at(nbytes, nbytes), **change)


def idle_moved(nbytes):
    """Runs before or after which the idle device moved by so much."""
    return [cuda(at(USED, PEAK), before=(at(0), at(nbytes)), after=(at(nbytes),)), cuda(RUN, after=(at(nbytes),))]


HEADER = int((PEAK + MIB) / 0.999)
CEILING = int(ENGINE * 1.01 + 1.5 * CONTEXT)
UNMEASURED = int(ENGINE * 1.01 + 2048 * MIB)
FLOOR = ENGINE + 64 * MIB
EDGES = [
    # two accounts agree within 64 MiB or one percent of the larger
    (accounts(4, 64 * MIB), ""),
    (accounts(4, 64 * MIB + 1), "accounts-disagree"),
    (accounts(4, -64 * MIB), ""),
    (accounts(4, -64 * MIB - 1), "accounts-disagree"),
    (accounts(100, GIB), ""),
    (accounts(100, GIB + 12 * MIB), "accounts-disagree"),
    (accounts(100, -GIB), ""),
    (accounts(100, -GIB - 2 * MIB), "accounts-disagree"),
    # the header is held to a thousandth and a mebibyte
    (cuda(RUN, weights=HEADER), ""),
    (cuda(RUN, weights=HEADER + 2), "below-header-weights"),
    # the ceiling is one and a half contexts and a hundredth, the floor the least context above the engine
    (alone(CEILING), ""),
    (alone(CEILING + 1), "above-ceiling"),
    (alone(FLOOR), ""),
    (alone(FLOOR - 1), "below-engine-buffers"),
    (alone(64 * MIB, report=SILENT, weights=0), "engine-silent"),
    (alone(64 * MIB - 1, report=SILENT, weights=0), "below-engine-buffers engine-silent"),
    # without a measured context the ceiling is 2 GiB above the engine
    (alone(UNMEASURED, context=None), "context-unmeasured"),
    (alone(UNMEASURED + 1, context=None), "above-ceiling context-unmeasured"),
    # an idle device may move by 16 MiB
    *((m, "") for m in idle_moved(16 * MIB)),
    *((m, "unseen-change") for m in idle_moved(16 * MIB + 1)),
]


@pytest.mark.parametrize(("memory", "reasons"), EDGES)
def test_a_bound_is_where_it_is_said_to_be(memory, reasons):
    assert memory.reasons == tuple(reasons.split())
    assert (memory.value_bytes is None) == any(r in INVALID for r in memory.reasons)


def test_only_the_last_reading_after_a_run_must_be_idle():
    assert cuda(RUN, after=(RUN, IDLE)).reasons == ()
    mine = ((70411, PEAK),)
    assert cuda(at(USED, None, mine), after=(at(USED, None, mine), IDLE)).value_bytes == PEAK


@pytest.mark.parametrize("other", [90, 99999])
def test_a_process_that_was_there_all_the_time_is_told_from_the_newcomer(other):
    still = at(0, None, ((other, GIB),))
    run = cuda(at(USED, None, ((other, GIB), (70411, PEAK))), before=(still, still), after=(still,))
    assert (run.value_bytes, run.reasons) == (PEAK, ("host-pid", "foreign-process"))


def test_a_device_that_shrank_measured_nothing():
    full = at(10 * GIB)
    run = cuda(at(9 * GIB, listed=True), before=(full, full), after=(full,))
    assert (run.value_bytes, run.growth_bytes, run.status) == (None, None, "invalid")
    assert cuda(at(9 * GIB, PEAK), before=(full, full), after=(full,)).reasons == ("accounts-disagree",)


DESK = 300 * MIB


def desktop(moved, total, drawing=(77,)):
    """A run beside a desktop that takes `moved` on the way and gives it back, while the total moves by `total`."""

    def look(used, mine, taken):
        return at(DESK + used, mine, ((77, DESK + taken),), drawing=drawing)

    idle = look(0, None, 0)
    return cuda(look(USED, PEAK, 0), look(USED + total, PEAK, moved), before=(idle, idle), after=(idle,))


@pytest.mark.parametrize("moved", [0, 20 * MIB, 60 * MIB, 3 * GIB])
def test_what_the_list_explains_exactly_does_not_void_a_run(moved):
    m = desktop(moved, moved)
    assert (m.status, m.value_bytes, m.growth_bytes, m.reasons) == ("valid", PEAK, USED, ())
    assert desktop(moved, moved, drawing=()).reasons == ("foreign-process",)  # it may have computed
    assert desktop(moved, moved + GIB).reasons == ("accounts-disagree",)  # and what it does not explain is one


def test_a_list_that_failed_on_the_way_is_made_up_for_only_where_the_others_kept_still():
    still, moving = ((77, DESK),), ((77, DESK + 60 * MIB),)

    def run(last):
        failed = at(DESK + USED, None, (), "list-unsupported")
        mine = at(DESK + USED, PEAK, still, drawing=(77,))
        idle = at(DESK, None, still, drawing=(77,))
        return cuda(mine, failed, last, before=(idle, idle), after=(idle,))

    assert run(at(DESK + USED, PEAK, still, drawing=(77,))).growth_bytes == USED
    assert run(at(DESK + USED + 60 * MIB, PEAK, moving, drawing=(77,))).growth_bytes == USED
    assert run(at(DESK + USED, None, (), "list-unsupported")).reasons == ()  # the others' sum is known: it kept still


@pytest.mark.parametrize("unseen", [-100 * MIB, -20 * MIB, 0, 100 * MIB])
def test_a_growth_that_others_may_be_in_says_how_far_it_may_be_off(unseen):
    """Under WSL2 no bytes are listed, and programs of Windows not at all."""
    m = cuda(at(PEAK + unseen, listed=True), at(PEAK + min(unseen, 0), listed=True))
    assert (m.status, m.value_bytes, m.reasons) == ("degraded", PEAK + unseen, ("bytes-not-listed",))
    assert abs(m.value_bytes - PEAK) <= m.bound_bytes
    # the truth may be anything that the engine's buffers and a context allow
    low, high = ENGINE + LEAST_CONTEXT_BYTES, ENGINE * 1.01 + 1.5 * CONTEXT
    assert m.bound_bytes == pytest.approx(max(m.value_bytes - low, high - m.value_bytes), abs=1)
    moved = cuda(at(PEAK, listed=True), before=(at(0), at(20 * MIB)))
    assert moved.reasons == ("bytes-not-listed", "unseen-change")
    assert moved.value_bytes + 20 * MIB == PEAK
    assert moved.bound_bytes >= 20 * MIB
    assert cuda(RUN).bound_bytes is None


@pytest.mark.parametrize("kind", ["compute", "KV"])
def test_buffers_said_to_be_ten_times_as_large_are_not_believed_on_loopback(kind):
    """DeepSeek-MoE at scale tiny, Q8_0, context 1024, as measured: 84.5 MiB, 5.7 of them before the run."""
    honest = {"model": 57.1, "KV": 4.0, "compute": 15.4}

    def run(sizes):
        buffers = tuple(Buffer("RPC0", k, round(mib * MIB)) for k, mib in sizes.items())
        trace = Trace((at(None, round(5.7 * MIB)),), ())
        return reconcile(
            "loopback", trace, Report(buffers, 5, 5, (2,)).device_by_kind, 0, 57 * MIB, None, round(84.5 * MIB)
        )

    assert run(honest).reasons == ()
    assert run({**honest, kind: 10 * honest[kind]}).reasons == ("below-engine-buffers",)
