"""Who holds a file of a shared folder: other processes, other hosts, and those that are gone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from moelib.base import files
from moelib.locks import lease

HERE, ELSEWHERE = "a" * 16, "b" * 16
HOLD = """
import sys
from pathlib import Path
from moelib.locks import lease
lease.RENEW_S = 0.1
with lease.hold(Path(sys.argv[1]), "the file", sys.argv[2]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Seconds in place of minutes."""
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    monkeypatch.setattr(lease, "DEAD_S", 1.0)
    monkeypatch.setattr(lease, "LOOK_S", 0.02)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cell"


@pytest.fixture
def holder(path):
    """Another process that holds the file, as one of the host that it is told to be of."""
    started = []

    def hold(host):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", HOLD, str(path), host], **pipes))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for child in started:
        child.kill()
        child.communicate()


@pytest.fixture
def no_locks_between_hosts(monkeypatch):
    """A shared folder that does not pass the kernel's locks on, as NFS with `nolock`."""
    monkeypatch.setattr(files, "_locked", lambda fd: True)


def refusal(path, host, wait_s=0.0):
    try:
        with lease.hold(path, "the file", host, wait_s):
            return None
    except files.InUse as err:
        return str(err)


def left(path):
    return sorted(p.name for p in path.parent.iterdir() if p != path)


def state(path):
    (name,) = left(path)
    return json.loads((path.parent / name).read_text(encoding="utf-8"))["state"]


def test_one_after_another_and_each_generation_is_a_new_one(path):
    for n in (1, 2, 3):
        with lease.hold(path, "the file", HERE) as held:
            assert (held.generation, state(path)) == (n, "held")
            held.require()
        assert (left(path), state(path)) == ([f".cell-{n:06}"], "free")


def test_a_process_of_this_host_is_named_and_free_when_it_is_killed(path, holder):
    other = holder(HERE)
    assert refusal(path, HERE) == f"the file is in use by process {other.pid}; wait for it to end, then run again"
    other.send_signal(signal.SIGKILL)
    other.wait()
    started = time.monotonic()
    assert refusal(path, HERE) is None
    assert time.monotonic() - started < lease.DEAD_S / 2


@pytest.mark.usefixtures("no_locks_between_hosts")
def test_a_live_process_of_another_host_is_named(path, holder):
    other = holder(ELSEWHERE)
    said = f"the file is in use by process {other.pid} of host bbbbbbbb; wait for it to end, then run again"
    assert refusal(path, HERE) == said
    with pytest.raises(files.InUse, match=f"process {other.pid} of host bbbbbbbb"):
        lease.require_free(path, "the file", HERE)
    other.communicate("end\n")
    assert refusal(path, HERE) is None


@pytest.mark.usefixtures("no_locks_between_hosts")
def test_a_holder_whose_host_is_gone_is_outlived_and_not_before(path, holder):
    other = holder(ELSEWHERE)
    other.kill()
    other.wait()
    started = time.monotonic()
    assert refusal(path, HERE) is None
    assert time.monotonic() - started >= lease.DEAD_S


@pytest.mark.usefixtures("no_locks_between_hosts")
def test_a_process_that_was_stopped_too_long_knows_that_it_lost(path, holder):
    other = holder(ELSEWHERE)
    other.send_signal(signal.SIGSTOP)
    with lease.hold(path, "the file", HERE) as held:
        other.send_signal(signal.SIGCONT)
        time.sleep(5 * lease.RENEW_S)
        held.require()
        assert left(path) == [".cell-000002"], "the one that lost it writes nothing any more"
    with lease.hold(path, "the file", HERE) as held, lease.hold(path, "the file", HERE, wait_s=9):
        with pytest.raises(files.InUse, match="taken by another process while this one was stopped"):
            held.require()


@pytest.mark.usefixtures("no_locks_between_hosts")
def test_times_of_other_hosts_do_not_count(path, holder):
    """A host whose clock is off by years writes times that say nothing."""
    holder(ELSEWHERE)
    (name,) = left(path)
    for t in (0, time.time() + 1e8):
        os.utime(path.parent / name, (t, t))
        assert "in use by" in refusal(path, HERE)


@pytest.mark.usefixtures("no_locks_between_hosts")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"holder": 3}', "\0" * 200])
def test_a_lease_that_cannot_be_read_is_a_dead_ones(path, text):
    path.parent.joinpath(".cell-000007").write_text(text, encoding="utf-8")
    with lease.hold(path, "the file", HERE) as held:
        assert held.generation == 8


@pytest.mark.usefixtures("no_locks_between_hosts")
def test_of_many_at_once_one_has_it_at_a_time(path):
    inside, most, seen = [], [], []

    def take(host):
        for _ in range(5):
            with lease.hold(path, "the file", host, wait_s=60):
                inside.append(host)
                most.append(len(inside))
                time.sleep(0.01)
                inside.remove(host)
                seen.append(host)

    threads = [threading.Thread(target=take, args=(f"{i:016}",)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert (max(most), len(seen)) == (1, 20)
    assert len(left(path)) == 1
