"""Access to the Hugging Face Hub: limits on time and size, and every error as one message with the next step.

The token is the Hub's own login (`hf auth login`, HF_TOKEN) and appears in no message. The official client itself has
no limits: it waits for ever, follows any `Retry-After`, and decompresses and keeps whatever is sent. So each operation
runs inside a `Budget`, which limits all its requests, retries and pages together.
"""

import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from moelib.base import files, neutral
from moelib.base.bar import tqdm
from moelib.base.schema import UserError
from moelib.machine import process

if TYPE_CHECKING:
    from httpx2 import Client, Request, Response
    from huggingface_hub import HfApi

MAX_FILES = 20_000  # in a repository's listing; the largest repositories of GGUFs have some hundreds
WAIT_S = 60.0  # until an answer begins, or continues
ANSWER_S = 600.0  # for a whole operation, or for each PIECE of a file
SLOWEST_BYTES_PER_S = 20e3  # of an upload
PIECE = 1 << 20
ANSWER_BYTES = 32 << 20  # all answers of an operation together; enough to list 100,000 files
RETRY_S = 120  # longest wait before a retry that a server may ask for
REDIRECTS = 5
BREAKS = 5  # of a download's connection, one after the other, with no byte between them
BREAK_S = 1.0  # wait after each
NO_RANGES = "the server sends whole files, not parts of them: download the file, then name it by its local path"
SLOW = "the Hub answers too slowly: check the network, then run the same command again"
WEB = re.compile(r"https?://[A-Za-z0-9._~\[\]:-]+(/[\x21-\x7e]*)?")


class HubError(UserError):
    """The Hub could not be reached, or refused; the message says why and what to do."""


class TooMuchError(Exception):
    """A server sent too much, took too long, or sent something else than an answer."""


def require() -> None:
    """Raise HubError if a variable of the environment makes the official client unusable."""
    try:
        from huggingface_hub import HfApi  # it reads its variables when it is imported

        endpoint = HfApi().endpoint
        port = urlsplit(endpoint).port
    except ValueError as err:
        raise HubError(f"an HF_... variable of the environment is invalid ({err}): unset or correct it") from None
    if port == 0 or not WEB.fullmatch(endpoint):
        raise HubError(f"HF_ENDPOINT is {neutral.plain(endpoint)!r}, which is not a web address: unset or correct it")


def api(endpoint: str | None = None) -> "HfApi":
    """The official client with the user's login; `endpoint` defaults to HF_ENDPOINT or the Hub. Raises HubError."""
    require()
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint)


def is_here(client: "HfApi") -> bool:
    """Whether the Hub is one on this machine, for tests and rehearsals."""
    return urlsplit(client.endpoint).hostname in ("127.0.0.1", "::1", "localhost")


def locate(client: "HfApi", repository: str, name: str, revision: str) -> tuple[str, dict[str, str]]:
    """(address, headers) to download a file from; storage on another host does not get the token."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repository, name, revision=revision, endpoint=client.endpoint)
    address = get_hf_file_metadata(url, endpoint=client.endpoint).location
    return address, build_hf_headers() if address.startswith(f"{client.endpoint}/") else {}


def download(
    address: str, headers: dict[str, str], start: int, stop: int, name: str = "", whole: bool = True
) -> Iterator[bytes]:
    """Yield the bytes [start, stop) of the file at `address`, fewer if it ends earlier; with a progress bar if it has a
    `name`.

    whole: accept a server that ignores ranges and sends the file from its start; else raise TooMuchError.

    A connection that breaks is continued where it broke: the library's own download starts over with every call, and
    cannot begin in the middle of a file.
    """
    from httpx2 import TransportError

    bar: dict[str, Any] = {"initial": start, "total": stop, "desc": name, "unit": "B", "unit_scale": True}
    breaks = 0
    with tqdm(**bar, disable=None if name else True, leave=False) as progress:
        while start < stop:
            try:
                for data in _ranged(address, headers, start, stop, whole):
                    yield data
                    start, breaks = start + len(data), 0
                    progress.update(len(data))
                return
            except TransportError:
                breaks += 1
                if breaks > BREAKS:
                    raise
                time.sleep(process.patience(BREAK_S))


def _ranged(address: str, headers: dict[str, str], start: int, stop: int, whole: bool) -> Iterator[bytes]:
    from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

    ranged = {**headers, "Range": f"bytes={start}-{stop - 1}"}
    with http_stream_backoff("GET", address, headers=ranged, retry_on_exceptions=()) as response:
        if response.status_code == 416:  # it ends before `start`
            return
        hf_raise_for_status(response)
        partial = response.status_code == 206
        if partial and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise ValueError("the server sent another range than requested")
        if not partial and not whole:
            raise TooMuchError(NO_RANGES)
        skip, left = 0 if partial else start, stop - start  # 200: the server ignored the range
        for chunk in response.iter_bytes():
            data = chunk[skip : skip + left]
            skip, left = max(0, skip - len(chunk)), left - len(data)
            if data:
                yield data
            if not left:
                return


@contextmanager
def asking(operation: str, receives: int = 0, sends: int = 0) -> Iterator[None]:
    """Turn any error of the client into a HubError that begins with `operation`, without signatures or tokens.

    The `with` body should hold only requests to the Hub and the parsing of its answers, because an answer in an
    unexpected form counts as an error of the Hub. `receives`, `sends`: bytes of files to download and upload. The body
    ends with a HubError if the Hub sends much more than that, or takes too long.
    """
    require()
    budget = Budget(receives, sends)
    try:
        _limit_connections()
        with budget:
            yield
    except TooMuchError as err:
        raise HubError(f"{operation}: {err}") from None
    except Exception as err:
        if isinstance(err, UserError) or (isinstance(err, OSError) and err.errno in files.NO_SPACE):
            raise
        reason = SLOW if budget.late else f"{_step(err)} ({_summary(err)})"
        raise HubError(f"{operation}: {reason}") from None


def _step(err: Exception) -> str:
    """What to do about an error of the client."""
    from huggingface_hub import errors

    login = "log in with `hf auth login`, or set HF_TOKEN"
    steps = {
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set: unset it, or give a local file with `moelib fetch --from`",
        errors.GatedRepoError: f"its owner requires consent: give it on the repository's page, then {login}",
        errors.RepositoryNotFoundError: f"there is no such repository, or it is private: check its name, or {login}",
        errors.RevisionNotFoundError: "there is no such revision: check it, or pin another",
        errors.EntryNotFoundError: "there is no such file in that revision: pin it again",
        errors.LocalTokenNotFoundError: login,
    }
    by_status = {
        401: f"the token is not valid: {login}",
        403: "the token may not do this: use one with the right to write to that namespace",
        404: "the Hub does not have it: check the names",
        429: "the Hub asks to slow down: wait some minutes, then run the same command again",
    }
    if step := next((step for kind, step in steps.items() if isinstance(err, kind)), None):
        return step
    if isinstance(err, errors.HfHubHTTPError):
        status = err.response.status_code if err.response is not None else 0
        other = "the Hub has a server error: run the command again later" if status >= 500 else "the Hub refused"
        return by_status.get(status, other)
    if _of_this_machine(err):
        variables = _set("SSL_CERT_FILE", "SSL_CERT_DIR", "HF_HOME")
        return f"a file of this machine cannot be used{variables}: correct its path or its rights"
    if isinstance(err, errors.HTTPError | OSError | RuntimeError | ValueError | KeyError):
        proxy = _set("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        return f"the Hub cannot be reached, or disconnected: check the network{proxy}, then run the command again"
    return "the answer is not in the Hub's format: check HF_ENDPOINT and the network, or update huggingface_hub"


def _of_this_machine(err: BaseException) -> bool:
    is_net = isinstance(err, ConnectionError | TimeoutError)
    return isinstance(err, OSError) and err.errno is not None and not is_net


def _set(*names: str) -> str:
    """The variables among `names` that are set, in brackets: they may be the cause."""
    present = [n for n in names if os.environ.get(n) or os.environ.get(n.lower())]
    return f" ({', '.join(present)} is set)" if present else ""


def _summary(err: BaseException) -> str:
    """The first line of an error, without tokens and signatures."""
    from huggingface_hub import get_token

    try:
        token = get_token()
    except (OSError, ValueError):  # the token's own file cannot be read
        token = None
    lines = [line for line in str(err).splitlines() if line.strip()] or [""]
    text = re.sub(r"\?[^\s'\")]+", "?...", f"{type(err).__name__}: {lines[0]}")
    return neutral.plain(re.sub(r"hf_\w+", "hf_...", text.replace(token, "hf_...") if token else text), 300)


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
def _limit_connections() -> None:
    """Apply the limits to the official client, in this process."""
    from huggingface_hub import get_session, set_client_factory

    default = get_session()  # its own class and hooks, which refuse requests where HF_HUB_OFFLINE is set

    def client() -> "Client":
        asks: list[Callable[..., Any]] = [_asks, *default.event_hooks["request"]]
        hooks = {"request": asks, "response": [_answers]}
        return type(default)(event_hooks=hooks, follow_redirects=True, max_redirects=REDIRECTS, timeout=WAIT_S)

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
