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
    """A server whose process is still there for `looks` looks after its connection broke, and then killed."""

    name = "llama-server"

    def __init__(self, looks):
        self.looks = looks

    def running(self):
        self.looks -= 1
        return self.looks >= 0

    def stop(self):
        return process.Exit(-signal.SIGKILL, False)

    def text(self):
        return ""

    def tail(self):
        return ""

    def check_log(self):
        pass


def reason_of(server, broke="connection-lost"):
    with pytest.raises(process.ProcessError) as caught, llama_server.reporting_its_end(server):
        raise client.RunError(broke, "as it looked from here")
    return caught.value.reason


def test_a_server_that_takes_a_moment_to_die_is_told_by_how_it_died():
    assert reason_of(Dying(50)) == "engine-killed"


def test_a_server_that_goes_on_is_not_waited_for_longer_than_its_end_takes(monkeypatch):
    monkeypatch.setattr(llama_server, "END_S", 0.1)
    started = time.monotonic()
    assert reason_of(Dying(10**9)) == "connection-lost"
    assert 0.1 <= time.monotonic() - started < 5


def test_only_a_broken_connection_is_waited_upon():
    server = Dying(10**6)
    assert reason_of(server, "engine-stalled") == "engine-stalled"
    assert server.looks == 10**6 - 1


@pytest.mark.parametrize(("size", "patience", "want"), [(0, "1", 120), (50e9, "1", 1120), (100e9, "0.5", 2060)])
def test_a_large_file_has_longer_to_load(tmp_path, monkeypatch, size, patience, want):
    monkeypatch.setenv("MOELIB_PATIENCE", patience)
    limits = []

    class Child(Dying):
        pid, started, argv = 1, 0.0, ["llama-server", "-m", "m.gguf"]

        def __init__(self, *_):
            super().__init__(0)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait_for(self, pattern, timeout_s):
            limits.append(timeout_s)
            raise process.ProcessError("engine-timeout", "was not ready")

    monkeypatch.setattr(process, "Child", Child)
    content = SimpleNamespace(paths=())
    file = SimpleNamespace(path=Path("m.gguf"), content=content, header=SimpleNamespace(file_bytes=size))
    llama = SimpleNamespace(server_argv=lambda *_: ["llama-server", "-m", "m.gguf"])
    outcome = run.execute(spec(), file, llama_server.LlamaServer(llama), device.NoDevice(), tmp_path / "work")
    assert outcome.reason == "engine-killed", outcome.message
    assert limits == [pytest.approx(want)]
