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


class Listing:
    """A GPU that lists processes, and a system that knows their parents."""

    def __init__(self, monkeypatch):
        self.there, self.tree, self.looks = {}, {}, 0
        monkeypatch.setattr(device.host, "tree", self.look)

    def look(self, pid):
        self.looks += 1
        return {pid, *self.tree.get(pid, ())}

    def read(self, ours, t_s):
        mine = [n for pid, n in self.there.items() if pid in ours]
        others = tuple(sorted((pid, n) for pid, n in self.there.items() if pid not in ours))
        return Reading(t_s, sum(mine) or None, sum(self.there.values()), bool(mine), others)


def test_all_processes_are_gone_through_only_when_somebody_came(monkeypatch):
    gpu = Listing(monkeypatch)
    family = device.Family(gpu)
    gpu.there = {7: 100}  # a desktop, before the run
    assert family.read(None, 0.0).others == ((7, 100),)
    assert gpu.looks == 0
    assert family.read(50, 0.1).process_bytes is None
    gpu.there |= {50: 1000}
    for t in (0.2, 0.3, 60.0):
        assert family.read(50, t).process_bytes == 1000
    assert gpu.looks == 0
    gpu.tree, gpu.there = {50: [51]}, gpu.there | {51: 10}  # the server's child
    for t in (60.1, 60.2):
        found = family.read(50, t)
        assert (found.process_bytes, found.others) == (1010, ((7, 100),))
    assert gpu.looks == 1
    gpu.there |= {99: 5}  # a stranger
    for t in (60.3, 60.4):
        found = family.read(50, t)
        assert (found.process_bytes, found.others) == (1010, ((7, 100), (99, 5)))
    assert gpu.looks == 2
    gpu.there = {7: 100}  # it ended
    assert not family.read(50, 60.5).listed


def test_a_stranger_of_before_stays_one(monkeypatch):
    gpu = Listing(monkeypatch)
    family = device.Family(gpu)
    gpu.there = {50: 1000}
    family.read(None, 0.0)
    assert family.read(60, 0.1).others == ((50, 1000),)
