"""A Hugging Face Hub on loopback whose state a test may look into, and which fails on demand.

    with Hub(tmp_path) as hub:
        api = HfApi(endpoint=hub.url, token="hf_write")

It speaks what huggingface_hub 2.4 sends for moelib about model repositories; tests/test_hub.py holds it to that.
With `xet=True` it also gives xet tokens: the official code then keeps the chunks in a folder (`local://`), and only the
commit comes here. Storage is another origin (another port), as the real one is, and takes no tokens. hub_state.py is
what it knows; hub_api.py is what it answers.

Where it is not like the real one: the 401 for a repository that an anonymous client may not see says `RepoNotFound`,
which huggingface_hub concludes from the 401 alone, but only over https; with xet the client is believed what SHA-256 a
file has; the front matter of a card is parsed, not judged; listings come whole; repository names are case-sensitive;
nothing is scanned, converted, counted or limited.
"""

import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
import traceback
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from types import SimpleNamespace
from unittest import mock
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import hub_hostile
from hub_api import ROUTES
from hub_state import MAIN, Entry, Refused, State, regular

HOWS = ("401", "403", "404", "409", "412", "429", "500", "503", "timeout", "reset", "lost", "short", "corrupt")
PORTAL = b"<html><body>Please sign in to this network</body></html>"


@dataclass
class Request:
    """What came and what went back; a status of 0: no answer. `path` has no signatures."""

    method: str
    path: str
    token: bool
    status: int = 0
    received: int = 0  # bytes of body
    sent: int = 0
    fault: str | None = None

    @property
    def line(self):
        return f"{self.method} {self.path}"


@dataclass
class Fault:
    how: str
    match: str
    nth: int | None
    times: int | None
    after: int | None
    matched: int = 0
    struck: int = 0
    line: str | None = None  # of the nth request, which it stays with

    def strikes(self, line):
        if self.line is None and re.search(self.match, line):
            self.matched += 1
            hit = self.nth in (None, self.matched)
            self.line = line if hit and self.nth else None
        else:
            hit = line == self.line
        hit = hit and (self.times is None or self.struck < self.times)
        self.struck += hit
        return hit


class Hub(State):
    """The server, in threads of this process, from `with` to the end of it.

    `folder`: for xet's chunks. `part_bytes`: LFS files above it come in parts. `silence_s`: how long a `timeout` keeps
    silent at most. `accepts_ranges`: a test may turn this off.
    """

    def __init__(self, folder, xet=False, part_bytes=4 << 20, silence_s=30.0):
        super().__init__(Path(folder) / "cas" if xet else None)
        self.part_bytes, self.silence_s, self.accepts_ranges = part_bytes, silence_s, True
        self.requests: list[Request] = []
        self.gaps: list[str] = []  # what this Hub should have known how to answer
        self.connections = set()
        self.twist = None  # (status, body, headers) -> the same, of every answer: for answers that nobody thought of
        self._faults, self._public = [], [(0, {})]
        self._lock, self._go = threading.RLock(), threading.Event()

    def __enter__(self):
        self._servers = [_Server(("127.0.0.1", 0), _Handler) for _ in range(2)]
        self.url, self.storage = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)
        for s, is_storage in zip(self._servers, (False, True), strict=True):
            s.hub, s.is_storage = self, is_storage
            threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind, *_):
        """Close everything. AssertionError if the fault was not the client's: this Hub could not answer a request."""
        self._go.set()
        for s in self._servers:
            s.shutdown()
            s.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        assert kind or not self.gaps, "\n".join(["the Hub of the tests could not answer:", *self.gaps])

    def put(self, repo_id, files, private=False):
        """A commit of `files` ({path: bytes}) on main, without a request; the repository is made if need be. Its id."""
        with self._lock:
            repo = self.repos.get(repo_id) or self.create(repo_id, private)
            tree = dict(repo.files())
            for path, content in files.items():
                tree[path] = e = regular(content)
                if self.is_lfs(tree, path, e.size, content[:512]):
                    tree[path], repo.objects[e.sha256] = Entry(e.size, e.sha256), content
            commit = self.commit(repo, MAIN, tree, "Add files")
            self._note_public()
            return commit.id

    def read(self, repo_id, path, ref=MAIN):
        """The bytes that a download would get."""
        return self.content(self.repos[repo_id], self.repos[repo_id].files(ref)[path])

    def public_history(self):
        """[(requests so far, {repository: {ref: {path: SHA-256}}})] of what anyone could see, at each change of it."""
        with self._lock:
            return list(self._public)

    def _note_public(self):
        if (shown := self.public()) != self._public[-1][1]:
            self._public.append((len(self.requests), shown))

    def fail(self, how, *, match="", nth=None, times=1, after=None):
        """Let requests fail: those whose "METHOD path" matches, or the nth of these and its repetitions; `times` times.

        A number: that status. timeout: silence. reset: the connection is reset after `after` bytes of the body (half).
        lost: it is done, and reset instead of answered. short: the answer breaks off halfway. corrupt: storage keeps or
        sends wrong bytes (with xet: after a commit); anything else is answered by an HTML page, as by a portal.
        A name of hub_hostile.WAYS: that harm. times=None: always. Returns the fault, whose `struck` says how often it
        was.
        """
        if how not in HOWS and how not in hub_hostile.WAYS:
            raise ValueError(f"{how} is none of {', '.join((*HOWS, *hub_hostile.WAYS))}")
        with self._lock:
            self._faults.append(Fault(how, match, nth, times, after))
            return self._faults[-1]

    def let_go(self):
        """End all silences, now and later."""
        self._go.set()

    # a request

    def serve(self, h):
        """Answer one request whose head the handler `h` has read."""
        url = urlsplit(h.path)
        query = {k: v[-1] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        signature = query.pop("Signature", None)
        credential = (h.headers.get("Authorization") or "").removeprefix("Bearer ")
        shown = _shown(url.path, query)
        with self._lock:
            r = Request(h.command, shown, bool(credential))
            self.requests.append(r)
            number = len(self.requests)
            fault = next((f for f in self._faults if f.strikes(r.line)), None)
            r.fault = how = fault and fault.how
        if how == "reset":
            half = int(h.headers.get("Content-Length", 0)) // 2
            r.received = len(h.rfile.read(half if fault.after is None else fault.after))
            return _reset(h)
        ask = SimpleNamespace(method=h.command, url=url.path, query=query, headers=h.headers, body=_body(h), how=how)
        ask.credential, ask.signed, ask.accepts_ranges = credential, signature == self._sign(shown), self.accepts_ranges
        r.received = len(ask.body)
        if how == "timeout":
            self._go.wait(self.silence_s)
            return _reset(h)
        if how in hub_hostile.WAYS:
            h.close_connection = True
            for piece in hub_hostile.WAYS[how](h.path):
                if self._go.is_set():
                    break
                h.wfile.write(piece)
                r.sent += len(piece)
            return None
        try:
            with self._lock:
                status, body, headers = self._answer(ask, h.server.is_storage)
                self._note_public()
        except Refused as e:
            status, body, headers = e.status, e.body, e.headers
        except Exception:
            self.gaps.append(f"{r.line}: {traceback.format_exc()}")
            status, body, headers = 500, {"error": "of the Hub of the tests, see its gaps"}, {}
        if self.twist:
            status, body, headers = self.twist(status, body, headers)
        if not isinstance(body, bytes):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json; charset=utf-8"
        length, body = len(body), b"" if h.command == "HEAD" else body
        if how == "lost" or (how == "short" and not body):
            return _reset(h)
        r.status, r.sent = status, len(body) // 2 if how == "short" else len(body)
        h.close_connection = h.close_connection or how == "short"
        h.send_response(status)
        for name, value in {"X-Request-Id": f"request-{number}", "Content-Length": str(length), **headers}.items():
            h.send_header(name, value)
        h.end_headers()
        h.wfile.write(body[: r.sent])

    def _answer(self, ask, is_storage):
        """(status, body, headers): bytes as they are, anything else as JSON."""
        if ask.how and ask.how.isdigit():
            wait = {"Retry-After": "0"} if ask.how == "429" else {}
            raise Refused(int(ask.how), HTTPStatus(int(ask.how)).phrase, headers=wait)
        if ask.how == "corrupt" and not is_storage and not (self.cas and "/commit/" in ask.url):
            return 200, PORTAL, {"Content-Type": "text/html"}
        if not is_storage and ask.credential and ask.credential not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        ask.token = self.tokens.get(ask.credential)
        for methods, pattern, function in ROUTES:
            match = pattern.fullmatch(ask.url)
            if match and ask.method in methods and is_storage == ask.url.startswith("/storage/"):
                vars(ask).update({k: v and unquote(v) for k, v in match.groupdict().items()})
                answer = function(self, ask)
                return answer if isinstance(answer, tuple) else (200, answer, {})
        self.gaps.append(f"{ask.method} {ask.url}: no such endpoint")
        raise Refused(404, "Sorry, we can't find the page you are looking for.")

    def _sign(self, shown):
        return hashlib.sha256(f"{id(self)} {shown}".encode()).hexdigest()

    def signed(self, origin, path, **query):
        """A URL that lets its holder do one thing without a token."""
        shown = _shown(path, query)
        return f"{origin}{shown}{'&' if query else '?'}Signature={self._sign(shown)}"


def _shown(path, query):
    return path + (f"?{urlencode(query)}" if query else "")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self):
        TCPServer.server_bind(self)  # the one in between asks the name service
        self.server_name, self.server_port = self.server_address

    def shutdown_request(self, request):
        self.close_request(request)  # without a goodbye first, so that a reset can be one


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.server.hub.connections.add(self.connection)

    def handle(self):
        with suppress(OSError):  # the client is gone
            super().handle()

    def finish(self):
        self.server.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_):
        pass

    def serve(self):
        self.server.hub.serve(self)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve


def _body(h):
    """What the request carries; OSError if it ends early."""
    if h.headers.get("Transfer-Encoding") == "chunked":
        parts = []
        while size := int(h.rfile.readline().split(b";")[0], 16):
            parts.append(h.rfile.read(size))
            h.rfile.readline()
        h.rfile.readline()
        return b"".join(parts)
    size = int(h.headers.get("Content-Length", 0))
    if len(body := h.rfile.read(size)) < size:
        raise ConnectionError("the client stopped sending")
    return body


def _reset(h):
    h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    h.close_connection = True


@contextmanager
def official_client(hub, pace=0.01):
    """huggingface_hub, as this process has it, made fit for `hub`: with xet or without, and hurried.

    Between its tries it waits `pace` of what it would; what it tries again, and how often, stays its own. Yields its
    waits (s), as they would be; hf_xet's are not among them.
    """
    from huggingface_hub import close_session, constants, file_download
    from huggingface_hub.utils import _http, _xet

    from moelib.models import hub as client

    waits = []

    def sleep(seconds):
        waits.append(seconds)
        time.sleep(seconds * pace)

    clock = SimpleNamespace(**(vars(time) | {"sleep": sleep}))
    with ExitStack() as stack:
        for module in (_http, file_download, client):
            stack.enter_context(mock.patch.object(module, "time", clock))
        stack.enter_context(mock.patch.object(constants, "HF_HUB_DISABLE_XET", hub.cas is None))
        stack.enter_context(mock.patch.object(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder()))  # reads the next
        stack.enter_context(mock.patch.dict(os.environ, HF_XET_CLIENT_RETRY_BASE_DELAY=f"{pace * 3000:.0f}ms"))
        stack.enter_context(mock.patch.dict(_xet.XET_CONNECTION_INFO_CACHE, clear=True))  # ports come again
        stack.callback(close_session)
        yield waits
