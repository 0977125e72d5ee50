"""What a run waits for, and how long: servers that are objects, no engine."""

import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from factory import spec

from moelib.engine import client
from moelib.machine import process
from moelib.measure import device, llama_server, run


class Dying:
    """A server whose process is still there for `looks` looks after its connection broke."""

    name = "llama-server"

    def __init__(self, looks, code=-signal.SIGKILL, said="", flood=False):
        self.looks, self.code, self.said, self.flood = looks, code, said, flood

    def running(self):
        self.looks -= 1
        return self.looks >= 0

    def stop(self):
        return process.Exit(self.code, False)

    def text(self):
        return self.said

    def tail(self):
        return self.said[-100:]

    def check_log(self):
        if self.flood:
            raise process.ProcessError("engine-log-flood", "too much")


def reason_of(server, broke="connection-lost"):
    with pytest.raises(process.ProcessError) as caught, llama_server.reporting_its_end(server):
        raise client.RunError(broke, "as it looked from here")
    return caught.value.reason


@pytest.mark.parametrize(
    ("code", "said", "want"),
    [
        (-signal.SIGKILL, "", "engine-killed"),
        (-signal.SIGSEGV, "", "engine-crashed"),
        (3, "", "engine-ended"),
        (1, "cudaMalloc failed: out of memory", "out-of-memory"),
    ],
)
def test_a_server_that_takes_a_moment_to_die_is_told_by_how_it_died(code, said, want):
    assert reason_of(Dying(50, code, said)) == want


def test_a_server_that_goes_on_is_not_waited_for_longer_than_its_end_takes(monkeypatch):
    monkeypatch.setattr(llama_server, "END_S", 0.1)
    started = time.monotonic()
    assert reason_of(Dying(10**9)) == "connection-lost"
    assert 0.1 <= time.monotonic() - started < 5


def test_only_a_broken_connection_is_waited_upon():
    server = Dying(10**6)
    assert reason_of(server, "engine-stalled") == "engine-stalled"
    assert server.looks == 10**6 - 1


def test_a_flood_is_told_before_all_else():
    assert reason_of(Dying(0, flood=True)) == "engine-log-flood"


@pytest.mark.parametrize(("size", "patience", "want"), [(0, "1", 120), (50e9, "1", 1120), (100e9, "0.5", 2060)])
def test_a_large_file_has_longer_to_load(tmp_path, monkeypatch, size, patience, want):
    monkeypatch.setenv("MOELIB_PATIENCE", patience)
    limits = []

    class Child(Dying):
        pid, started, argv = 1, 0.0, ["llama-server", "-m", "m.gguf"]

        def __init__(self, *_):
            super().__init__(0, 1)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait_for(self, pattern, timeout_s):
            limits.append(timeout_s)
            raise process.ProcessError("engine-timeout", "was not ready")

    monkeypatch.setattr(process, "Child", Child)
    file = SimpleNamespace(path=Path("m.gguf"), header=SimpleNamespace(file_bytes=size))
    llama = SimpleNamespace(server_argv=lambda *_: ["llama-server", "-m", "m.gguf"])
    outcome = run.execute(spec(), file, llama_server.LlamaServer(llama), device.NoDevice(), tmp_path / "work")
    assert outcome.reason == "engine-ended", outcome.message
    assert limits == [pytest.approx(want)]
