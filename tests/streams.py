"""A recorded stream of the server, and a server that plays it back in pieces."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import stub_server
from fault_lab import Lab

from moelib.engine import client
from moelib.measure import llama_server

KEY = "faults"
TOKENS = 3  # of a recorded stream


def recorded(lab: Lab) -> bytes:
    """The bytes of a real answer with a stream of three tokens."""
    folder = lab.home / "stream"
    body = {"temperature": 0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True, "cache_prompt": False}
    body |= {"return_tokens": True, "timings_per_token": True, "stream": True, "prompt": [1, 292, 294], "n_predict": 3}
    data = json.dumps(body).encode()
    head = f"POST /completion HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(data)}\r\n\r\n"
    with stub_server.serving(lab.stub, lab.nano().path, folder, lab.where, KEY) as (port, _):
        with socket.create_connection(("127.0.0.1", port)) as c:
            c.sendall(head.encode() + data)
            whole = b""
            while more := c.recv(65536):
                whole += more
    shutil.rmtree(folder)
    return whole


class Pieces(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.close_connection = True
        with contextlib.suppress(OSError):
            for piece in self.server.pieces:
                self.wfile.write(piece)
                time.sleep(0.0005)  # a packet of its own


@contextlib.contextmanager
def replaying():
    """A server that answers /health and then plays back its `pieces` of an answer, and closes the connection."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Pieces) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def streamed(port: int) -> client.Answer:
    body = {**llama_server.SAMPLING, "stream": True, "prompt": [1, 292, 294], "n_predict": TOKENS}
    with client.connect(port, KEY) as c:
        llama_server.connect(c)
        return llama_server.read_stream(client.stream(c, "/completion", body, TOKENS)[1], TOKENS)


def timeless(answer: client.Answer) -> client.Answer:
    return replace(answer, token_s=())


def sse(answer: bytes) -> bytes:
    """The stream in an answer, without the frames of its chunks."""
    rest, out = answer.partition(b"\r\n\r\n")[2], b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        out, rest = out + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return out


def parsed(chunks: list[bytes]) -> client.Answer:
    lines = client.arrivals(chunks, iter(range(1, 10**6)).__next__, 1e9)
    return llama_server.read_stream(list(lines), TOKENS)
