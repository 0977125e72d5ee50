"""Limits on the size and duration of the Hub's answers, applied to the official client's connections.

The client itself has no such limits: it waits for ever, follows any `Retry-After`, and decompresses and keeps whatever
is sent. Each operation runs inside a `Budget`, which limits all its requests, retries and pages together.
"""

import re
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from moelib import process

if TYPE_CHECKING:
    from httpx2 import Client, Request, Response

WAIT_S = 60.0  # until an answer begins, or continues
ANSWER_S = 600.0  # for a whole operation, or for each PIECE of a file
SLOWEST_BYTES_PER_S = 20e3  # of an upload
PIECE = 1 << 20
ANSWER_BYTES = 32 << 20  # all answers of an operation together; enough to list 100,000 files
RETRY_S = 120  # longest wait before a retry that a server may ask for
REDIRECTS = 5
SLOW = "the Hub answers too slowly: check the network, then run the same command again"


class TooMuchError(Exception):
    """A server sent too much, took too long, or sent something else than an answer."""


class Budget:
    """Size and time limits of one operation on the Hub. `receives`, `sends`: bytes of its downloads and uploads."""

    open: "list[Budget]" = []  # noqa: RUF012 - uploads run in threads of their own, which inherit no context

    def __init__(self, receives: int = 0, sends: int = 0):
        self.limit_bytes = 2 * receives + ANSWER_BYTES  # twice: a server that ignores ranges sends a file again
        self.received, self.piece = 0, PIECE if receives else None
        self._more_s = process.patience(ANSWER_S)
        self.deadline = time.monotonic() + self._more_s + sends / SLOWEST_BYTES_PER_S
        self._done = threading.Event()

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def count(self, nbytes: int) -> None:
        """Count received bytes. Raises TooMuchError if they are too many or too late."""
        self.received += nbytes
        if self.received > self.limit_bytes:
            raise TooMuchError(
                f"more than {self.limit_bytes:,} bytes were sent, too many for this answer: check HF_ENDPOINT"
            )
        if self.late:
            raise TooMuchError(SLOW)
        if self.piece and self.received >= self.piece:
            self.piece, self.deadline = self.received + PIECE, max(self.deadline, time.monotonic() + self._more_s)

    def __enter__(self) -> "Budget":
        self.open.append(self)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.open.remove(self)

    def _watch(self) -> None:
        """Close the connections at the deadline; `count` does not see headers that arrive slowly."""
        from huggingface_hub import close_session

        while not self._done.wait(max(0.0, self.deadline - time.monotonic())):
            if self.late:
                close_session()
                return


@cache
def install() -> None:
    """Apply the limits to the official client, in this process."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client() -> "Client":
        session = default_client_factory()
        session.event_hooks = {"request": [_asks, *session.event_hooks["request"]], "response": [_answers]}
        session.max_redirects = REDIRECTS
        return session

    set_client_factory(client)


def _asks(request: "Request") -> None:
    # the library passes timeout=None with many requests, which overrides the client's own timeout
    given, limit = request.extensions.get("timeout", {}), process.patience(WAIT_S)
    request.extensions["timeout"] = {k: given.get(k) or limit for k in ("connect", "read", "write", "pool")}
    request.headers["Accept-Encoding"] = "identity"
    if any(budget.late for budget in Budget.open):
        raise TooMuchError(SLOW)


def _answers(response: "Response") -> None:
    for name, wait in (("retry-after", r"^\s*(\d+)\s*$"), ("ratelimit", r"\bt\s*=\s*(\d+)")):
        match = re.search(wait, response.headers.get(name, ""))
        if match and (len(match[1]) > 9 or int(match[1]) > RETRY_S):
            raise TooMuchError(f"the Hub asks to wait {match[1][:9]} s: run the same command again then")
    if not Budget.open:
        return
    encoding = response.headers.pop("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        response.headers.pop("Content-Length", None)
    response.stream = _stream(response.stream, encoding, Budget.open[-1])


def _stream(raw: Any, encoding: str, budget: Budget) -> Any:
    from httpx2 import SyncByteStream

    class Counted(SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            for piece in _unpacked(raw, encoding):
                budget.count(len(piece))
                yield piece

        def close(self) -> None:
            raw.close()

    return Counted()


def _unpacked(raw: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """The decompressed body, a piece at a time: 1 kB may expand to 1 MB."""
    if encoding in ("identity", ""):
        yield from raw
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise TooMuchError(
            f"the answer is compressed as {encoding[:40]!r}, which was not requested: check the network's proxy"
        )
    packed = zlib.decompressobj(wbits=47)  # gzip or zlib, by its header
    try:
        for piece in raw:
            while piece:
                yield packed.decompress(piece, PIECE)
                piece = packed.unconsumed_tail
        yield packed.flush()
    except zlib.error as err:
        raise TooMuchError(f"the answer cannot be decompressed ({err}): check the network's proxy") from None
