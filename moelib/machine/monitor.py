"""Monitor a run from a separate thread; if the monitor fails, hangs or never samples, the run fails."""

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moelib.machine import process

MONITOR_S = 10.0  # time limit of a monitor's last sample
STARVED = 10  # intervals that may pass before a monitor's first sample


@dataclass
class Spent:
    cpu_s: float | None = None
    """CPU seconds of the monitor's thread; None until it has ended normally."""
    calls: int = 0
    """How often it called its action."""


@contextmanager
def repeating(action: Callable[[], object], every_s: float) -> Iterator[Spent]:
    """Call `action` every `every_s` seconds from another thread while the `with` body runs, and once at its end.

    Raises ProcessError (monitor-failed) if `action` raised, did not end, or was never called: the run was then not
    monitored. An error of the body itself takes precedence.
    """
    halt, spent, raised, started = threading.Event(), Spent(), [], time.monotonic()

    def follow() -> None:
        try:
            while not halt.wait(every_s):
                action()
                spent.calls += 1
            spent.cpu_s = time.thread_time()
        except BaseException as err:  # an error in a thread is not reported otherwise
            raised.append(err)

    def finish() -> None:
        lasted, limit_s = time.monotonic() - started, process.patience(MONITOR_S)
        halt.set()
        thread.join(limit_s)
        if thread.is_alive():
            raise _unwatched(f"did not end in {limit_s:g} s")
        if raised:
            raise _unwatched(f"ended with {_words(raised[0])}") from raised[0]
        if spent.calls == 0 and lasted > STARVED * every_s + 1:
            raise _unwatched(f"took no sample in {lasted:.1f} s, though one is due every {every_s:g} s")
        once(action)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield spent
    except BaseException:
        with contextlib.suppress(Exception):
            finish()
        raise
    finish()


def once(action: Callable[[], Any]) -> Any:
    """Return `action()`. Raises ProcessError (monitor-failed) if it raises."""
    try:
        return action()
    except Exception as err:
        raise _unwatched(f"ended with {_words(err)}") from err


@contextmanager
def unhindered() -> Iterator[None]:
    """Disable garbage collection while the `with` body runs.

    In a notebook's process one collection stops all threads for some 80 ms, the monitor and the timing of tokens too.
    """
    gc.collect()
    with uncollected():
        yield


@contextmanager
def uncollected() -> Iterator[None]:
    """Leave garbage collection off while the `with` body runs, and then as it was."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _unwatched(failure: str) -> process.ProcessError:
    return process.ProcessError("monitor-failed", f"the run's monitor {failure}: readings are missing; run it again")


def _words(err: BaseException) -> str:
    return f"{type(err).__name__}: {err}" if str(err) else type(err).__name__
