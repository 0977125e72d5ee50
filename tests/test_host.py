"""What is known of the host, and that what is not known is not 0."""

import os
import re
import signal
import subprocess
import sys

import psutil
import pytest

from moelib import host, process

BOOT, MACHINE = "/proc/sys/kernel/random/boot_id", "/etc/machine-id"


@pytest.fixture
def system(monkeypatch):
    """Files of the system that say what a test wants."""
    files = {}
    monkeypatch.setattr(host.sys, "platform", "linux")
    monkeypatch.setattr(host, "_first_line", files.get)
    return files


def test_an_identity_tells_equal_hosts_from_different_ones_and_nothing_else(system):
    system |= {BOOT: "6b7b21d3-ffd4-47df-8059-368bb032c9b3", MACHINE: "3d1219c7c4c5404aaa1f6d2a48adfda4"}
    here = host.identity()
    assert re.fullmatch("[0-9a-f]{16}", here)
    assert host.identity() == here
    assert here not in (system[BOOT].replace("-", "")[:16], system[MACHINE][:16])
    system[BOOT] = "11111111-ffd4-47df-8059-368bb032c9b3"  # a clone of the image, or the same host after a reboot
    clone = host.identity()
    system[MACHINE] = "00001111c4c5404aaa1f6d2a48adfda4"
    assert len({here, clone, host.identity()}) == 3


@pytest.mark.parametrize("known", [{BOOT: "b"}, {MACHINE: "m"}])
def test_one_of_the_two_ids_is_enough(system, known):
    system |= known
    assert re.fullmatch("[0-9a-f]{16}", host.identity())


def test_the_two_ids_cannot_stand_for_one_another(system):
    system[BOOT] = "a"
    first = host.identity()
    system |= {BOOT: "", MACHINE: "a"}
    assert host.identity() != first


def test_where_nothing_is_told_there_is_no_identity(system):
    assert host.identity() is None
    assert host.UNIDENTIFIED


@pytest.mark.parametrize(("text", "read"), [("x\n", "x"), ("\n", None), ("uninitialized\n", None), (None, None)])
def test_an_id_that_is_not_set_yet_is_none(tmp_path, text, read):
    path = tmp_path / "id"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert host._first_line(str(path)) == read


def test_this_host_is_the_same_as_itself():
    assert host.identity() == host.identity()


def test_the_hosts_use_counts_what_was_there():
    use = host.Watch().stop(os.getpid(), None)
    assert 0 <= use.elapsed_s < 60
    assert use.cpus == psutil.cpu_count()
    assert use.own_s > 0


def test_a_time_that_cannot_be_read_fails_the_run_and_is_not_0(monkeypatch):
    watch = host.Watch()
    gone = next(pid for pid in range(2**21, 2**22) if not psutil.pid_exists(pid))
    for pids in ((gone, None), (os.getpid(), gone)):
        with pytest.raises(process.ProcessError, match=f"the CPU time of process {gone} could not be read") as caught:
            watch.stop(*pids)
        assert caught.value.reason == "monitor-failed"
    monkeypatch.setattr(host.psutil, "cpu_count", lambda: None)
    with pytest.raises(process.ProcessError, match="does not tell how many CPUs"):
        watch.stop(os.getpid(), None)
    monkeypatch.setattr(host.psutil, "cpu_times", lambda: (_ for _ in ()).throw(OSError("no /proc/stat")))
    with pytest.raises(process.ProcessError, match="the host's CPU time could not be read .no /proc/stat"):
        host.Watch()


FAMILY = """
import subprocess, sys, threading, time
start = lambda *argv: subprocess.Popen([sys.executable, "-c", *argv], stdout=subprocess.PIPE)
nested = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
children = []
thread = threading.Thread(target=lambda: (children.append(start(nested)), time.sleep(60)), daemon=True)
thread.start()
while not children:
    time.sleep(0.01)
print(children[0].pid, int(children[0].stdout.readline()), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("listed", [True, False])
def test_a_tree_has_the_children_of_every_thread_and_theirs(monkeypatch, listed):
    """By the system's own list of a thread's children, and without it by looking through all processes."""
    if not listed:
        monkeypatch.setattr(host.os, "getpid", lambda: 0)  # of which there is no list
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE) as parent:
        try:
            below = set(map(int, parent.stdout.readline().split()))
            assert host.tree(parent.pid) == {parent.pid, *below}
            assert len(below) == 2
        finally:
            for pid in (*host.tree(parent.pid) - {parent.pid}, parent.pid):
                os.kill(pid, signal.SIGKILL)
    assert host.tree(parent.pid) == {parent.pid}
    assert host.tree(None) == set()
