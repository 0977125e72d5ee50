"""A thread that monitors a run, and the run's failure when it dies, hangs or never samples."""

import gc
import threading
import time

import psutil
import pytest

from moelib.machine import monitor, process


def wait_until(condition, within_s=30):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def failing(after, error):
    """An action that raises from its call number `after` on, and counts its calls."""
    calls = []

    def act():
        calls.append(1)
        if len(calls) > after:
            raise error

    return act, calls


def test_an_action_is_repeated_and_its_cpu_time_is_known_at_the_end():
    calls, enough = [], threading.Event()

    def act():
        calls.append(1)
        if len(calls) >= 3:
            enough.set()

    with monitor.repeating(act, 0.001) as spent:
        assert spent.cpu_s is None
        assert enough.wait(30)
    assert 0 < spent.cpu_s < 30
    assert len(calls) == spent.calls + 1  # the last one is the block's


@pytest.mark.parametrize("error", [OSError("no such device"), psutil.NoSuchProcess(7), SystemExit(3), KeyError("x")])
def test_a_monitor_that_dies_fails_the_run(error):
    act, calls = failing(0, error)
    with pytest.raises(process.ProcessError, match=f"monitor ended with {type(error).__name__}") as caught:
        with monitor.repeating(act, 0.001) as spent:
            wait_until(lambda: calls)
    assert caught.value.reason == "monitor-failed"
    assert caught.value.__cause__ is error
    assert spent.cpu_s is None
    assert len(calls) == 1


def test_a_last_sample_that_fails_fails_the_run():
    act, _ = failing(0, OSError("gone"))
    with pytest.raises(process.ProcessError, match="ended with OSError: gone") as caught, monitor.repeating(act, 60):
        pass
    assert caught.value.reason == "monitor-failed"


@pytest.mark.parametrize("every_s", [0.001, 60])
def test_the_runs_own_error_takes_precedence(every_s):
    act, calls = failing(0, OSError("gone"))
    with pytest.raises(ZeroDivisionError), monitor.repeating(act, every_s):
        if every_s < 1:
            wait_until(lambda: calls)
        raise ZeroDivisionError


def test_a_monitor_that_hangs_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(monitor, "MONITOR_S", 0.05)
    release, inside = threading.Event(), threading.Event()

    def hang():
        inside.set()
        release.wait(30)

    with pytest.raises(process.ProcessError, match=r"did not end in 0\.05 s") as caught:
        with monitor.repeating(hang, 0.001) as spent:
            assert inside.wait(30)
    release.set()
    assert caught.value.reason == "monitor-failed"
    assert spent.cpu_s is None


def test_a_monitor_that_took_no_sample_fails_the_run(monkeypatch):
    clock = iter([0.0, 2.5])
    monkeypatch.setattr(monitor.time, "monotonic", lambda: next(clock))
    calls = []
    with pytest.raises(process.ProcessError, match=r"took no sample in 2\.5 s, though one is due every 0\.1 s"):
        with monitor.repeating(lambda: calls.append(1), 0.1):
            # its thread waits for its first turn: time went by without it
            assert calls == []


def test_no_garbage_collection_falls_into_a_run():
    """It is on again afterwards, unless it was off before."""
    collected = []
    gc.callbacks.append(lambda phase, info: collected.append(info["generation"]))
    try:
        with monitor.unhindered():
            collected.clear()  # the one before the run
            for _ in range(3 * gc.get_threshold()[0]):
                loop = []
                loop.append(loop)
            assert collected == []
        assert gc.isenabled()
        gc.collect()
        assert collected
    finally:
        gc.callbacks.pop()
    gc.disable()
    try:
        with pytest.raises(KeyError), monitor.unhindered():
            raise KeyError
        assert not gc.isenabled()
    finally:
        gc.enable()
