"""The contract: the stub and the real llama-server are asked the same and answer alike in all that moelib reads."""

import json
import socket

import httpx
import pytest
import stub_server
from factory import SHARED, measured, spec

from moelib.audit import audit
from moelib.catalogue.facts import Manifest
from moelib.engine.logs import parse_log
from moelib.machine import process
from moelib.measure import device, run
from moelib.measure.llama_server import LlamaServer
from moelib.models import models, quantize

pytestmark = pytest.mark.engine

KEY = "contract"
LOOPBACK = device.Loopback()
PROMPT = [1, 292, 294, 296, 269]
STREAM = {"temperature": 0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True, "cache_prompt": False}
STREAM |= {"return_tokens": True, "timings_per_token": True, "stream": True, "prompt": PROMPT, "n_predict": 4}
CHATTY = "generation_settings"  # of the final event: not read


@pytest.fixture
def quantised(home, engine, tmp_path):
    return quantize.make(models.make_twin("deepseek-moe-16b", "nano"), "Q8_0", engine, tmp_path / "q")


@pytest.fixture
def stub(engine, tmp_path):
    return stub_server.install(tmp_path / "tools", engine)


def serving(llama, quantised, work, placement="baseline", load_mode="mmap", where=LOOPBACK):
    return stub_server.serving(llama, quantised.path, work, where, KEY, placement, load_mode)


def shape(value):
    """Names and types, as far as moelib reads; numbers are one type, as JSON has it."""
    if isinstance(value, dict):
        return {k: shape(v) for k, v in value.items() if k != CHATTY}
    if isinstance(value, list):
        return [shape(v) for v in value[:1]]
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


def answers(port):
    """Status, content type and shape of every kind of request that moelib sends or may send by mistake."""
    right, wrong = ({"Authorization": f"Bearer {k}"} for k in (KEY, "other"))
    probs = {"prompt": PROMPT, "n_predict": 1, "n_probs": 5, "temperature": 0, "cache_prompt": False}
    queries = {
        "health": ("GET", "/health", {}, None),
        "props": ("GET", "/props", right, None),
        "props without a key": ("GET", "/props", {}, None),
        "props with another key": ("GET", "/props", wrong, None),
        "nothing there": ("GET", "/nowhere", right, None),
        "tokenize": ("POST", "/tokenize", right, {"content": "Explain quantum computing", "add_special": True}),
        "tokenize without a key": ("POST", "/tokenize", {}, {"content": "x"}),
        "completion without a key": ("POST", "/completion", {}, STREAM),
        "too long": ("POST", "/completion", right, {**STREAM, "prompt": [1] * 300}),
        "likeliest tokens": ("POST", "/completion", right, probs),
    }
    results = {}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as c:
        for name, (method, path, headers, body) in queries.items():
            a = c.request(method, path, headers=headers, json=body)
            kind = shape(a.json())
            if name == "props":  # the real one says much more
                kind = {k: kind[k] for k in ("model_path", "build_info", "total_slots")}
            results[name] = (a.status_code, a.headers["content-type"], kind)
    return results


def streamed(port):
    """(head of the answer, events) of a completion, from the bytes as they come."""
    body = json.dumps(STREAM).encode()
    head = f"POST /completion HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as c:
        c.sendall(head.encode() + body)
        whole = b""
        while not whole.endswith(b"\r\n0\r\n\r\n") and (more := c.recv(65536)):
            whole += more
        c.settimeout(5)
        assert c.recv(1) == b"", "the server closes the connection after a stream"
    head, _, rest = whole.partition(b"\r\n\r\n")
    kept = ("http/1.1", "content-type", "transfer-encoding")
    head = sorted(line.lower() for line in head.decode().split("\r\n") if line.lower().startswith(kept))
    events = [json.loads(line[6:]) for line in rest.decode().splitlines() if line.startswith("data: ")]
    return head, events


def order(events):
    """What tells one event from another, in order."""
    return [(e["stop"], len(e["tokens"]), e["tokens_predicted"], e["timings"]["predicted_n"]) for e in events]


def test_it_answers_as_the_real_one(engine, stub, quantised, tmp_path):
    servers = []
    for name, llama in (("real", engine), ("stub", stub)):
        with serving(llama, quantised, tmp_path / name) as (port, server):
            servers.append((answers(port), *streamed(port), server.stop()))
    (real, real_head, real_events, real_end), (ours, head, events, end) = servers
    assert ours == real
    assert head == real_head
    assert [shape(e) for e in events] == [shape(e) for e in real_events]
    assert order(events) == order(real_events)
    for e in (events[-1], real_events[-1]):
        assert (e["timings"]["prompt_n"], e["timings"]["cache_n"], e["stop_type"]) == (len(PROMPT), 0, "limit")
    assert end == real_end == process.Exit(0, False)


@pytest.mark.parametrize(
    ("placement", "load_mode", "where"),
    [
        ("baseline", "mmap", LOOPBACK),
        ("cpu-moe", "mmap", LOOPBACK),
        ("n-cpu-moe=2", "none", LOOPBACK),
        ("baseline", "mmap", device.NoDevice()),
    ],
)
def test_it_logs_as_the_real_one(engine, stub, quantised, tmp_path, placement, load_mode, where):
    reports = []
    for name, llama in (("real", engine), ("stub", stub)):
        with serving(llama, quantised, tmp_path / name, placement, load_mode, where) as (_, server):
            reports.append(parse_log(server.text()))
    real, ours = reports
    assert ours.built == real.built
    assert (ours.offloaded_layers, ours.total_layers) == (real.offloaded_layers, real.total_layers)
    assert names(ours) == names(real)
    assert {any(b.on_device for b in r.buffers) for r in reports} == {where.kind != "none"}
    for kind in ("model", "KV"):
        assert audit.agrees(ours.device_bytes(kind), real.device_bytes(kind))
    assert len(ours.graph_splits) == len(real.graph_splits)
    assert (max(ours.graph_splits) > 2) == (max(real.graph_splits) > 2) == (placement != "baseline")


def names(report):
    """Kinds of buffers by the names that they have; the RPC port differs."""
    return {(b.name.split("[")[0], b.kind) for b in report.buffers}


@pytest.mark.parametrize("placement", ["baseline", "cpu-moe"])
def test_a_run_of_it_is_valid(stub, quantised, tmp_path, placement):
    run_spec = spec(workloads=("smoke",), context=256, placement=placement)
    outcome = run.execute(run_spec, quantised, LlamaServer(stub), stub_server.loopback(), tmp_path / "work")
    assert outcome.reason is None, outcome.message
    checks = audit.run(measured(run_spec, outcome.observation, Manifest(**quantised.manifest)))
    assert {c.id for c in checks if not c.passed} - SHARED == set()
