import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelib.engine import Buffer, Report
from moelib.memory import CONTEXT_BYTES, REASONS, Reading, reconcile

MIB, GIB = 1 << 20, 1 << 30


def report(model, cache=0, device="CUDA0"):
    return Report((Buffer(device, "model", model), Buffer(device, "KV", cache), Buffer("CPU", "model", 7)), 1, 1, (2,))


def cuda(process, device, foreign=0, idle=GIB, model=4 * GIB):
    readings = [Reading(0.1, p, d, foreign) for p, d in zip(process, device, strict=True)]
    return reconcile("cuda", readings, Reading(0, None, idle, 0), report(model), None)


def test_loopback_takes_the_systems_peak():
    m = reconcile("loopback", [Reading(0.1, 50 * MIB, None)], Reading(0, 8 * MIB, None), report(40 * MIB), 60 * MIB)
    assert (m.value_bytes, m.status, m.method, m.residual_bytes) == (60 * MIB, "valid", "rss-peak", 20 * MIB)
    assert m.idle_bytes == 8 * MIB


def test_without_a_peak_the_highest_sample_is_degraded():
    readings = [Reading(0.1, 50 * MIB, None), Reading(0.2, 45 * MIB, None), Reading(0.3, None, None)]
    m = reconcile("loopback", readings, Reading(0, None, None), report(40 * MIB), None)
    assert (m.value_bytes, m.status, m.method, m.reasons) == (50 * MIB, "degraded", "rss-samples", ("sampled-peak",))


def test_cuda_takes_the_process_list_held_against_growth():
    m = cuda([4 * GIB, 5 * GIB], [5 * GIB, 6 * GIB])
    assert (m.value_bytes, m.status, m.method) == (5 * GIB, "valid", "nvml-process")
    assert m.residual_bytes == GIB


@pytest.mark.parametrize(
    ("memory", "value", "status", "reason"),
    [
        (cuda([None], [6 * GIB]), 5 * GIB, "degraded", "process-not-listed"),
        (cuda([None], [6 * GIB], foreign=1), None, "invalid", "foreign-process"),
        (cuda([5 * GIB], [9 * GIB], foreign=1), 5 * GIB, "degraded", "foreign-process"),
        (cuda([5 * GIB], [8 * GIB]), 5 * GIB, "degraded", "accounts-disagree"),
        (cuda([3 * GIB], [4 * GIB]), None, "invalid", "below-engine-buffers"),
        (cuda([2], [GIB + 2]), None, "invalid", "below-engine-buffers"),  # a struct skew's handful of bytes
        (cuda([0], [None]), None, "invalid", "no-samples"),
        (cuda([], []), None, "invalid", "no-samples"),
        (cuda([None], [GIB]), None, "invalid", "no-samples"),  # nothing grew: nothing was measured
        (cuda([4 * GIB + CONTEXT_BYTES + 1], [5 * GIB + CONTEXT_BYTES + 1]), None, "invalid", "above-ceiling"),
        (reconcile("none", [], Reading(0, None, None), report(0), None), None, "degraded", "no-device"),
    ],
)
def test_what_is_doubtful_says_why(memory, value, status, reason):
    assert (memory.value_bytes, memory.status) == (value, status)
    assert reason in memory.reasons


def test_a_silent_engine_leaves_the_value_unproven():
    m = reconcile("cuda", [Reading(0.1, GIB, 2 * GIB, 0)], Reading(0, None, GIB, 0), Report((), None, None, ()), None)
    assert (m.value_bytes, m.status, m.reasons) == (GIB, "degraded", ("engine-silent",))
    assert m.engine_bytes is None
    assert m.residual_bytes is None


BYTES = st.none() | st.integers(0, 200 * GIB)


@given(
    kind=st.sampled_from(["cuda", "loopback", "none"]),
    readings=st.lists(st.builds(Reading, st.floats(0, 9), BYTES, BYTES, st.none() | st.integers(0, 2)), max_size=5),
    idle=BYTES,
    model=st.integers(0, 100 * GIB),
    peak=BYTES,
)
def test_a_value_is_never_zero_and_never_below_the_weights(kind, readings, idle, model, peak):
    m = reconcile(kind, readings, Reading(0, idle, idle, 0), report(model), peak or None)
    assert set(m.reasons) <= set(REASONS)
    assert (m.status == "valid") == (not m.reasons)
    if m.value_bytes is None:
        assert m.reasons
    else:
        assert m.value_bytes >= max(model, 1)
        assert m.status != "invalid"
