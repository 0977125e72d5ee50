"""A session's look at its device before and after a run, and the measured size of an empty context."""

import pytest

from moelib import device
from moelib.device import Cuda, Session
from moelib.memory import SETTLED_BYTES, Reading

GIB = 1 << 30


def session(*readings, **change):
    """A session whose device is read from a list; the last reading stays."""
    left = list(readings)
    return Session([], lambda pid, t_s: left.pop(0) if len(left) > 1 else left[0], shared=True, **change)


def idle(nbytes, listed=False):
    return Reading(0.0, None, nbytes, listed)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(device, "IDLE_S", 0.0)
    monkeypatch.setattr(device, "SAMPLE_S", 0.0)
    monkeypatch.setattr(device, "SETTLE_S", 0.2)


def test_a_shared_device_is_read_several_times_before_and_one_of_its_own_once():
    assert len(session(idle(0)).idle()) == device.IDLE_READINGS
    assert len(Session([]).idle()) == 1


@pytest.mark.parametrize(
    ("after", "looks"),
    [
        ([idle(GIB)], 1),
        ([idle(GIB + SETTLED_BYTES)], 1),
        ([idle(GIB + SETTLED_BYTES + 1), idle(GIB)], 2),
        ([idle(GIB, listed=True), idle(GIB)], 2),  # the driver still lists the process
        ([idle(None)], 1),  # a total that cannot be read is not waited for
        ([idle(None, listed=True), idle(None)], 2),
    ],
)
def test_the_end_of_a_run_is_waited_for(after, looks):
    assert len(session(*after).settled((idle(GIB),), 1, lambda: 0.0)) == looks


def test_a_device_that_never_comes_back_is_not_waited_for_without_end():
    seen = session(idle(9 * GIB)).settled((idle(GIB),), 1, lambda: 0.0)
    assert seen[-1].device_bytes == 9 * GIB


class Card:
    """Memory before and with the context of an empty program."""

    def __init__(self, *readings):
        self.left = list(readings)

    def read(self, ours, t_s):
        return self.left.pop(0)


@pytest.mark.parametrize(
    ("seen", "context"),
    [
        (Reading(0.0, 500, 1600), 500),  # the list is ours, what grew may be another's
        (Reading(0.0, None, 1600), 600),
        (Reading(0.0, None, 1000), None),
        (Reading(0.0, None, None), None),
    ],
)
def test_an_empty_context_is_measured(tmp_path, monkeypatch, seen, context):
    monkeypatch.setattr(device, "_CONTEXT", "import time\nprint('context', 0, 0, flush=True)\ntime.sleep(60)\n")
    card = Cuda.__new__(Cuda)
    card.gpu, card.uuid = Card(Reading(0.0, None, 1000), seen), "GPU-1"
    card.calibrate(tmp_path)
    assert card.context_bytes == context


def test_where_no_context_can_be_made_its_size_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_CONTEXT", "print('context', 100, 0)\n")  # cuInit found no device
    card = Cuda.__new__(Cuda)
    card.gpu, card.uuid = Card(Reading(0.0, None, 1000)), "GPU-1"
    card.calibrate(tmp_path)
    assert card.context_bytes is None
