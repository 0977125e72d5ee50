"""The client alone: limits of time and size, and what it makes of a stream. Servers are sockets on loopback."""

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
from factory import request

from moelib.catalogue import params
from moelib.engine import client
from moelib.engine.client import RunError
from moelib.measure import llama_server


@contextmanager
def answering(*pieces, forever=b"", every_s=0.0):
    """A server that sends `pieces` to whatever it is asked, then `forever` again and again; its port."""
    over = threading.Event()

    def serve(listening):
        with listening:
            while not over.is_set():
                c, _ = listening.accept()
                threading.Thread(target=one, args=(c,), daemon=True).start()

    def one(c):
        with c:
            try:
                c.recv(65536)
                for piece in pieces:
                    c.sendall(piece)
                while forever and not over.is_set():
                    c.sendall(forever)
                    over.wait(every_s)
            except OSError:
                pass

    listening = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(listening,), daemon=True).start()
    port = listening.getsockname()[1]
    try:
        yield port
    finally:
        over.set()
        with contextlib.suppress(OSError):  # it sees the end at its next connection, and may have had it
            socket.create_connection(("127.0.0.1", port)).close()


def head(length=None, more=""):
    size = f"Content-Length: {length}\r\n" if length is not None else ""
    return f"HTTP/1.1 200 OK\r\n{size}{more}Connection: close\r\n\r\n".encode()


def plain(**data):
    body = json.dumps(data).encode()
    return head(len(body)) + body


ASKS = {
    "props": lambda c, path: llama_server.check_ours(c, path),
    "tokenize": lambda c, path: llama_server.prompt_ids(c, params.workload("smoke")),
    "likeliest": lambda c, path: llama_server.top_logprobs(c, [1, 2]),
    "stream": lambda c, path: client.stream(c, "/completion", {"prompt": [1]}, 8),
}


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("forever", [b"x" * 65536, b"data: {}\n\n" * 4096], ids=["a line", "lines"])
def test_an_answer_without_end_is_ended(tmp_path, ask, forever):
    started = time.monotonic()
    with answering(head(), forever=forever) as port:
        with pytest.raises(RunError) as caught, client.connect(port, "k") as c:
            ASKS[ask](c, tmp_path)
    assert caught.value.reason == "answer-too-large"
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("ask", ["props", "tokenize"])
def test_an_answer_that_trickles_is_ended(tmp_path, monkeypatch, ask):
    monkeypatch.setenv("MOELIB_PATIENCE", "0.003")  # of two minutes
    with answering(head(), forever=b" ", every_s=0.05) as port:
        with pytest.raises(RunError) as caught, client.connect(port, "k") as c:
            ASKS[ask](c, tmp_path)
    assert caught.value.reason == "engine-stalled"


@pytest.mark.parametrize("ask", ["props", "tokenize", "likeliest"])
@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b"9" * 5000, b'{"tokens": "x", "completion_probabilities": 5}', b"[]", b"null", b"\xff\x00"],
    ids=["deep", "long number", "wrong type", "list", "null", "not UTF-8"],
)
def test_an_answer_that_is_not_what_was_asked_for_has_a_reason(tmp_path, ask, body):
    with answering(head(len(body)) + body) as port:
        with pytest.raises(RunError) as caught, client.connect(port, "k") as c:
            ASKS[ask](c, tmp_path)
    assert caught.value.reason in ("answer-unreadable", "tokenizer", "not-our-server")


def test_a_compressed_answer_is_not_unpacked(tmp_path):
    import gzip

    bomb = gzip.compress(bytes(50 << 20))
    with answering(head(len(bomb), "Content-Encoding: gzip\r\n") + bomb) as port:
        with pytest.raises(RunError, match="UnicodeDecodeError|JSON") as caught, client.connect(port, "k") as c:
            llama_server.prompt_ids(c, params.workload("smoke"))
    assert caught.value.reason == "answer-unreadable"


def test_the_likeliest_tokens_are_as_many_as_were_asked_for(tmp_path):
    sent = plain(completion_probabilities=[{"top_logprobs": [{"logprob": -1.0}] * 1000}])
    with answering(sent) as port, client.connect(port, "k") as c:
        assert llama_server.top_logprobs(c, [1]) == (-1.0,) * llama_server.PROBS


def test_the_name_of_a_build_is_a_short_text_or_unknown(tmp_path):
    path = tmp_path / "m.gguf"
    for sent, want in (("b" * 1000, "b" * 200), (["b1"], None), (None, None)):
        with answering(plain(model_path="m.gguf", build_info=sent)) as port, client.connect(port, "k") as c:
            assert llama_server.check_ours(c, path) == want


# the line reader
def lines(*chunks, **how):
    return [line for _, line in client.arrivals(chunks, lambda: 0.0, 1.0, **how)]


def test_lines_are_whole_however_they_were_cut():
    assert lines(b"a\nb", b"c", b"d\n\ne", b"\nrest") == [b"a", b"bcd", b"", b"e"]


def test_a_line_may_be_long_and_no_longer(monkeypatch):
    monkeypatch.setattr(client, "LINE_BYTES", 100)
    assert lines(b"x" * 99, b"\ny\n", tokens=1) == [b"x" * 99, b"y"]
    with pytest.raises(RunError) as caught:
        lines(b"x" * 60, b"x" * 60, tokens=1)
    assert caught.value.reason == "answer-too-large"


def test_a_stream_has_room_for_its_tokens_and_no_more(monkeypatch):
    monkeypatch.setattr(client, "LINE_BYTES", 100)
    monkeypatch.setattr(client, "EVENT_BYTES", 10)
    monkeypatch.setattr(client, "SPARE_LINES", 20)
    event = b"x" * 9 + b"\n"
    assert len(lines(*[event] * 20, tokens=10)) == 20
    with pytest.raises(RunError, match="210 bytes in 21 lines are more than 10 tokens can be"):
        lines(*[event] * 21, tokens=10)
    assert len(lines(b"\n" * 28, tokens=1)) == 28
    with pytest.raises(RunError, match="29 bytes in 29 lines"):
        lines(b"\n" * 29, tokens=1)


def test_tokens_without_end_in_few_events_are_refused():
    event = b"data: " + json.dumps({"tokens": [1] * 20_000, "timings": {"predicted_n": 20_000}}).encode()
    with pytest.raises(RunError, match="20000 tokens came for") as caught:
        llama_server.read_stream([(0.1, event)], 3)
    assert caught.value.reason == "answer-too-large"


# limits and sums that a change would move unseen
def test_a_request_has_its_own_limit_times_the_patience_and_its_tokens(monkeypatch):
    taken = []

    def stop(chunks, clock, *rest):
        taken.append(rest)
        return iter(())

    monkeypatch.setattr(client, "arrivals", stop)
    monkeypatch.setenv("MOELIB_PATIENCE", "0.5")
    with answering(head()) as port, client.connect(port, "k") as c:
        client.stream(c, "/completion", {}, 7)
    assert taken == [(900.0, 7)]


def test_a_request_beyond_its_limit_is_ended_at_the_next_bytes():
    clock = iter([0.9, 1.0, 1.1]).__next__
    with pytest.raises(RunError, match="more than 1 s") as caught:
        list(client.arrivals([b"a\n", b"b\n", b"c\n"], clock, 1.0))
    assert caught.value.reason == "engine-stalled"


def test_prompt_and_generated_tokens_must_fit_together(monkeypatch):
    workload = params.workload("smoke")
    monkeypatch.setattr(llama_server, "prompt_ids", lambda c, w: [1] * 10)
    need = 10 + workload.generate_tokens
    assert llama_server.prepare(None, [workload], need) == [(workload, [1] * 10, 10)]
    with pytest.raises(
        RunError, match=f"10 \\+ {workload.generate_tokens} tokens, the context is {need - 1}"
    ) as caught:
        llama_server.prepare(None, [workload], need - 1)
    assert caught.value.reason == "context-too-small"


def test_rates_and_latencies_are_derived_and_a_first_event_of_several_tokens_has_none():
    assert (request(n=5, first=0.02).ttft_s, request(n=5, first=0.02).tps) == (0.02, pytest.approx(4 / 0.04))
    assert replace(request(), token_s=(0.02,), token_n=(1,)).tps is None
    several = replace(request(n=5), token_n=(2, 3, 4, 5, 6))
    assert several.ttft_s is None
    assert several.tps is not None, "the distance of later tokens is still known"
    assert replace(request(), token_s=(), token_n=(), tokens=()).ttft_s is None


def test_the_first_tokens_count_for_no_rate_where_as_many_follow():
    slow, fast = client.WARM_UP, 0.01

    def arrivals(n):
        times = [0.5 + 0.02 * i for i in range(min(n, slow))]
        return tuple(times + [times[-1] + fast * i for i in range(1, n - len(times) + 1)])

    for n, rate in ((2 * slow, 1 / fast), (100, 1 / fast), (2 * slow - 1, None)):
        whole = request(n=n, token_s=arrivals(n))
        uncounted = replace(whole, token_n=(), tokens=())
        expected = rate or (n - 1) / (arrivals(n)[-1] - arrivals(n)[0])
        assert (whole.tps, uncounted.tps) == (pytest.approx(expected), pytest.approx(expected)), n
    assert replace(request(n=100), token_n=(), predicted_n=None).tps is None
    in_one = request(n=100, token_s=(0.5, 1.0), token_n=(1, 100))
    assert in_one.tps is None, "the time of the last of the first tokens is not known"


def test_the_answer_keeps_status_and_words():
    body = b'{"error": 1}'
    with answering(b"HTTP/1.1 500 x\r\nContent-Length: 12\r\nConnection: close\r\n\r\n" + body) as port:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as c:
            answer = client.answer(c, "GET", "/x")
    assert (answer.status_code, answer.json()) == (500, {"error": 1})
    with pytest.raises(httpx.HTTPStatusError):
        answer.raise_for_status()


@pytest.mark.parametrize(("count", "length"), [(2048, 512), (512, 512), (300, 512), (100, 512), (512, 1)])
def test_a_drawn_prompt_is_of_different_tokens_as_far_as_the_vocabulary_goes(count, length):
    """Of a smaller vocabulary every token comes as often as every other one, or once more."""
    workload = params.Workload(name="w", title="t", drawn=7, prompt_tokens=length, generate_tokens=8)
    prompts = []
    for _ in range(2):
        with answering(plain(data=[{"meta": {"n_vocab": count}}])) as port, client.connect(port, "k") as c:
            prompts.append(llama_server.prompt_ids(c, workload))
    ids, again = prompts
    assert ids == again
    assert len(ids) == length
    assert set(ids) <= set(range(count))
    times = Counter(ids)
    assert max(times.values()) - (min(times.values()) if len(times) == count else 0) <= 1
