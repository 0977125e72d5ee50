"""What a server of the Hub may send, and how long it may take: bounds around the official client's connections.

The client itself waits for ever, follows any `Retry-After`, unpacks what is compressed and keeps it all. Each question
is asked inside an `Asked`, whose bounds hold for all requests, tries and pages of it together.
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

WAIT_S = 60.0  # for an answer to begin, or to go on
ANSWER_S = 600.0  # for all of a question, or for each PIECE of a file
SLOWEST_BYTES_PER_S = 20e3  # of a file that is sent
PIECE = 1 << 20
ANSWER_BYTES = 32 << 20  # of all answers to a question together: a listing of 100,000 files
RETRY_S = 120  # that a server may ask to wait before the next try
REDIRECTS = 5
SLOW = "the Hub answers too slowly: check the network, then run the same command again"


class TooMuchError(Exception):
    """A server sent more, or something else, than the question can have for an answer."""


class Asked:
    """One question to the Hub, with what it may cost. `receives`, `sends`: bytes of files that come and go with it."""

    open: "list[Asked]" = []  # noqa: RUF012 - uploads ask from threads of their own, which inherit no context

    def __init__(self, receives: int = 0, sends: int = 0):
        self.limit_bytes = 2 * receives + ANSWER_BYTES  # twice: where a range is not kept to, a file begins anew
        self.received, self.piece = 0, PIECE if receives else None
        self._more_s = process.patience(ANSWER_S)
        self.deadline = time.monotonic() + self._more_s + sends / SLOWEST_BYTES_PER_S
        self._done = threading.Event()

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def count(self, nbytes: int) -> None:
        """Take note of bytes that came. Raises TooMuchError for more than may come, or too late."""
        self.received += nbytes
        if self.received > self.limit_bytes:
            raise TooMuchError(
                f"more than {self.limit_bytes:,} bytes came, which is no answer to this: check HF_ENDPOINT"
            )
        if self.late:
            raise TooMuchError(SLOW)
        if self.piece and self.received >= self.piece:
            self.piece, self.deadline = self.received + PIECE, max(self.deadline, time.monotonic() + self._more_s)

    def __enter__(self) -> "Asked":
        self.open.append(self)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.open.remove(self)

    def _watch(self) -> None:
        """End the connections at the deadline: the head of an answer may drip, where nobody counts."""
        from huggingface_hub import close_session

        while not self._done.wait(max(0.0, self.deadline - time.monotonic())):
            if self.late:
                close_session()
                return


@cache
def install() -> None:
    """Have the official client keep to the bounds, in this process."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client() -> "Client":
        session = default_client_factory()
        session.event_hooks = {"request": [_asks, *session.event_hooks["request"]], "response": [_answers]}
        session.max_redirects = REDIRECTS
        return session

    set_client_factory(client)


def _asks(request: "Request") -> None:
    # the library passes timeout=None with many requests, which a client's own timeout does not override
    given, limit = request.extensions.get("timeout", {}), process.patience(WAIT_S)
    request.extensions["timeout"] = {k: given.get(k) or limit for k in ("connect", "read", "write", "pool")}
    request.headers["Accept-Encoding"] = "identity"
    if any(question.late for question in Asked.open):
        raise TooMuchError(SLOW)


def _answers(response: "Response") -> None:
    for name, wait in (("retry-after", r"^\s*(\d+)\s*$"), ("ratelimit", r"\bt\s*=\s*(\d+)")):
        match = re.search(wait, response.headers.get(name, ""))
        if match and (len(match[1]) > 9 or int(match[1]) > RETRY_S):
            raise TooMuchError(f"the Hub asks to wait {match[1][:9]} s: run the same command again then")
    if not Asked.open:
        return
    encoding = response.headers.pop("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        response.headers.pop("Content-Length", None)
    response.stream = _stream(response.stream, encoding, Asked.open[-1])


def _stream(raw: Any, encoding: str, asked: Asked) -> Any:
    from httpx2 import SyncByteStream

    class Counted(SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            for piece in _unpacked(raw, encoding):
                asked.count(len(piece))
                yield piece

        def close(self) -> None:
            raw.close()

    return Counted()


def _unpacked(raw: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """What was sent, unpacked a little at a time: 1 kB may stand for 1 MB."""
    if encoding in ("identity", ""):
        yield from raw
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise TooMuchError(
            f"the answer is packed as {encoding[:40]!r}, which was not asked for: check the network's proxy"
        )
    packed = zlib.decompressobj(wbits=47)  # gzip or zlib, by its head
    try:
        for piece in raw:
            while piece:
                yield packed.decompress(piece, PIECE)
                piece = packed.unconsumed_tail
        yield packed.flush()
    except zlib.error as err:
        raise TooMuchError(f"the answer cannot be unpacked ({err}): check the network's proxy") from None
