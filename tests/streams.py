"""A recorded stream of the server, and what the line reader makes of it in pieces."""

from __future__ import annotations

import shutil
from dataclasses import replace

import stub_server
from fault_lab import Lab

from moelib.engine import client
from moelib.measure import llama_server

KEY = "faults"
TOKENS = 3  # of a recorded stream


def recorded(lab: Lab) -> bytes:
    """A real stream of three tokens."""
    folder = lab.home / "stream"
    body = {**llama_server.SAMPLING, "stream": True, "prompt": [1, 292, 294], "n_predict": TOKENS}
    with stub_server.serving(lab.stub, lab.nano().path, folder, lab.where, KEY) as (port, _):
        with client.connect(port, KEY) as c:
            stream = c.post("/completion", json=body).content
    shutil.rmtree(folder)
    return stream


def parsed(chunks: list[bytes]) -> client.Answer:
    lines = client.arrivals(chunks, iter(range(1, 10**6)).__next__, 1e9)
    return llama_server.read_stream(list(lines), TOKENS)


def timeless(answer: client.Answer) -> client.Answer:
    return replace(answer, token_s=())
