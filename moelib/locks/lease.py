"""Hold a file among all hosts that share its folder: a lease that its holder renews, and that ends when it does not.

A lock of the kernel (`files.lock`) tells processes of one host apart, and is free the moment its owner ends. A shared
folder may not pass such locks on (NFS with `nolock` or `local_lock`), and may keep one whose host is gone. So a holder
also writes a file and renews it. Clocks of hosts differ: no time of another host is ever compared, only for how long a
lease stayed as it was, by one's own.

Generations are numbered, and a lease is taken by making the file of the next number, which one alone can do. The last
one's file stays, marked as free, so that no number is taken twice.
"""

import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from moelib.base import files

RENEW_S = 5.0
DEAD_S = 60.0  # a holder that renewed nothing for so long has ended: its host was lost, or hung
LOOK_S = 0.25
TRIES = 100  # for a generation of one's own, where others take theirs
HELD, FREE = "held", "free"
BYTES = 200  # of a lease's file, so that each state is written over the last one in one piece


@dataclass
class Lease:
    """What is held, from its generation on."""

    path: Path
    subject: str
    generation: int
    holder: str
    _renewed: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def require(self) -> None:
        """Raise InUse if it was lost: this process was stopped for so long that another one took it."""
        last = _last(self.path)
        if last is None or last[0] != self.generation:
            raise files.InUse(f"{self.subject} was taken by another process while this one was stopped: run again")

    def text(self, state: str) -> bytes:
        self._renewed += 1
        told = {"holder": self.holder, "renewed": self._renewed, "state": state}
        return json.dumps(told).ljust(BYTES).encode()

    def write(self, state: str) -> None:
        """Say how it stands, unless it was lost: a file that a later holder removed is not made anew."""
        with suppress(OSError), open(_file(self.path, self.generation), "r+b", buffering=0) as f:
            f.write(self.text(state))

    def keep(self) -> None:
        """Renew it until it ends."""
        while not self._ended.wait(RENEW_S):
            self.write(HELD)

    def end(self) -> None:
        self._ended.set()


@contextmanager
def hold(path: Path, subject: str, host: str | None, wait_s: float = 0.0) -> Iterator[Lease]:
    """Hold `path` alone among the processes of all hosts that share its folder.

    host: this one's identity. A holder of this host that has ended is known by its lock; one of another host by a lease
    that was not renewed for DEAD_S. Waits `wait_s`, or as long as it takes to tell a live holder from a dead one; then
    raises InUse, which names it.
    """
    deadline = time.monotonic() + wait_s
    with files.lock(path, subject, wait_s):
        held = _take(path, subject, host, deadline)
        keeper = threading.Thread(target=held.keep, name=f"lease of {subject}", daemon=True)
        keeper.start()
        try:
            yield held
        finally:
            held.end()
            keeper.join()
            held.write(FREE)


def require_free(path: Path, subject: str, host: str | None, wait_s: float = 0.0) -> None:
    """Raise InUse if another process holds `path`. Whoever is told nothing may still come second."""
    if path.exists():
        with hold(path, subject, host, wait_s):
            pass


def _take(path: Path, subject: str, host: str | None, deadline: float) -> Lease:
    """The next generation, once the last one is free or dead. Raises InUse."""
    where = host or secrets.token_hex(8)  # a host without identity knows none of its own leases
    for _ in range(TRIES):
        last = _last(path)
        if last is not None:
            _wait_free(path, subject, where, last, deadline)
        generation = 1 + (last[0] if last else 0)
        mine = Lease(path, subject, generation, f"{where} process {os.getpid()} of host {where[:8]}")
        if not files.write_new(_file(path, generation), mine.text(HELD)):
            continue
        now = _last(path)
        if now is not None and now[0] > generation:  # the one that was seen is long gone, and its number was free again
            _file(path, generation).unlink(missing_ok=True)
            continue
        for number, old in _generations(path):
            if number < generation:
                old.unlink(missing_ok=True)
        return mine
    raise files.InUse(f"{subject} is wanted by many at once: run again later")


def _wait_free(path: Path, subject: str, where: str, last: tuple[int, str], deadline: float) -> None:
    """Return when the last generation is free, of this host, dead, or no longer the last. Raises InUse if it lives."""
    since = time.monotonic()
    while True:
        state = _state(last[1])
        holder, _, name = state.get("holder", "").partition(" ")
        if state.get("state") == FREE or holder == where:  # this host's lock is held here, so by none of its others
            return
        if time.monotonic() - since > DEAD_S:
            return
        time.sleep(LOOK_S)
        now = _last(path)
        if now is None or now[0] != last[0]:
            return
        if now != last:
            if _state(now[1]).get("state") != FREE and time.monotonic() >= deadline:
                raise files.in_use(subject, name or "another process")
            last, since = now, time.monotonic()


def _state(text: str) -> dict[str, str]:
    """What a lease says; empty for one that cannot be read."""
    try:
        read = json.loads(text)
    except ValueError:
        return {}
    return {k: str(v) for k, v in read.items()} if isinstance(read, dict) else {}


def _file(path: Path, generation: int) -> Path:
    return path.with_name(f".{path.name}-{generation:06}")


def _generations(path: Path) -> list[tuple[int, Path]]:
    name = re.compile(r"\." + re.escape(path.name) + r"-(\d{6,9})")
    return sorted((int(m[1]), p) for p in path.parent.iterdir() if (m := name.fullmatch(p.name)))


def _last(path: Path) -> tuple[int, str] | None:
    """(number, content) of the last generation; None where nobody ever held it."""
    for number, file in reversed(_generations(path)):
        with suppress(OSError):
            return number, file.read_text(encoding="utf-8", errors="replace")
    return None
