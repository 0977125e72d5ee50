"""What watches a run, from a thread of its own: one that dies, hangs or never looks fails what it watched."""

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moelib import process

MONITOR_S = 10.0  # for a monitor's last look
STARVED = 10  # looks that a monitor may be late before its first one


@dataclass
class Spent:
    cpu_s: float | None = None
    """CPU seconds of a thread; None until it ended by itself."""
    calls: int = 0
    """How often it did what it is there for."""


@contextmanager
def repeating(action: Callable[[], object], every_s: float) -> Iterator[Spent]:
    """Call `action` every `every_s` seconds from a sleeping thread while the block runs, and once at its end.

    Raises ProcessError (monitor-failed) if `action` raised, did not end, or was not called in all the time: what was
    not watched is not known. An error of the block itself comes first.
    """
    halt, spent, raised, started = threading.Event(), Spent(), [], time.monotonic()

    def follow() -> None:
        try:
            while not halt.wait(every_s):
                action()
                spent.calls += 1
            spent.cpu_s = time.thread_time()
        except BaseException as err:  # of a thread nobody sees it
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
            raise _unwatched(f"was not called once in {lasted:.1f} s, though it was to be every {every_s:g} s")
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
    """What `action` returns. Raises ProcessError (monitor-failed) if it raised."""
    try:
        return action()
    except Exception as err:
        raise _unwatched(f"ended with {_words(err)}") from err


@contextmanager
def unhindered() -> Iterator[None]:
    """Search no objects for cycles while the block runs: in a notebook's process one search takes some 80 ms, in
    which no other thread runs: neither what watches a run nor what times its tokens."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _unwatched(what: str) -> process.ProcessError:
    return process.ProcessError(
        "monitor-failed", f"what watches the run {what}: its readings are not whole; run it again"
    )


def _words(err: BaseException) -> str:
    return f"{type(err).__name__}: {err}" if str(err) else type(err).__name__
