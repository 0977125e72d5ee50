"""The host's identity, facts and use; a value that cannot be read is never 0."""

import json
import os
import re
import signal
import subprocess
import sys

import psutil
import pytest

from moelib.machine import host, process

BOOT, MACHINE = "/proc/sys/kernel/random/boot_id", "/etc/machine-id"


@pytest.fixture
def system(monkeypatch):
    """Ids by the file that holds them."""
    files = {}
    monkeypatch.setattr(host.sys, "platform", "linux")
    monkeypatch.setattr(host, "_system_id", files.get)
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


def test_one_of_the_two_ids_is_enough_and_they_cannot_stand_for_one_another(system):
    assert host.identity() is None
    system[BOOT] = "a"
    by_boot = host.identity()
    system |= {BOOT: None, MACHINE: "a"}
    by_machine = host.identity()
    assert re.fullmatch("[0-9a-f]{16} [0-9a-f]{16}", f"{by_boot} {by_machine}")
    assert by_boot != by_machine


@pytest.mark.parametrize(("text", "value"), [("x\n", "x"), ("\n", None), ("uninitialized\n", None), (None, None)])
def test_an_id_that_is_not_set_yet_is_none(tmp_path, text, value):
    path = tmp_path / "id"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert host._system_id(str(path)) == value


def test_the_hosts_use_has_its_cpus_and_this_processs_time():
    use = host.Stopwatch().stop(os.getpid(), None)
    assert 0 <= use.elapsed_s < 60
    assert use.cpus == psutil.cpu_count()
    assert use.own_s > 0


def test_a_time_that_cannot_be_read_fails_the_run_and_is_not_0(monkeypatch):
    watch = host.Stopwatch()
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
        host.Stopwatch()


def test_a_tree_has_the_children_of_a_process_and_theirs():
    code = (
        "import subprocess, sys\n"
        "argv = [sys.executable, '-c', 'import subprocess; subprocess.Popen([\"sleep\", \"60\"]).wait()']\n"
        "child = subprocess.Popen(argv)\n"
        "while not (grandchild := open(f'/proc/{child.pid}/task/{child.pid}/children').read()): pass\n"
        "print(child.pid, grandchild, flush=True); child.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        descendants = set(map(int, parent.stdout.readline().split()))
        try:
            assert len(descendants) == 2
            assert host.tree(parent.pid) == {parent.pid, *descendants}
        finally:
            for pid in (*descendants, parent.pid):
                os.kill(pid, signal.SIGKILL)
    assert host.tree(parent.pid) == {parent.pid}


def test_the_last_cache_is_counted_once_for_all_cpus_that_share_it(tmp_path, monkeypatch):
    for cpu in range(4):
        for index, (level, size, shared) in enumerate(
            [("1", "32K", f"{cpu}"), ("3", "8192K", "0-1" if cpu < 2 else "2-3")]
        ):
            folder = tmp_path / f"cpu{cpu}/cache/index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{text}\n", encoding="utf-8")
    monkeypatch.setattr(host, "CPUS", tmp_path)
    for ids, size in (([0, 1], 8 << 20), ([0, 1, 2, 3], 16 << 20), ([2], 8 << 20), ([7], None)):
        monkeypatch.setattr(host, "cpu_ids", lambda ids=ids: ids)
        assert host.cache_bytes() == size


def test_a_clone_is_dirty_by_what_measures_and_not_by_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELIB_HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def facts():
        result = host.facts.__wrapped__()
        return result["commit"], result["dirty"]

    def git(*args):
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.check_output(["git", *who, *args], cwd=tmp_path, text=True, encoding="utf-8")

    def notebook(code, outputs=()):
        cell = {
            "cell_type": "code",
            "source": [code],
            "outputs": list(outputs),
            "execution_count": len(outputs) or None,
        }
        text = json.dumps({"cells": [{"cell_type": "markdown", "source": "text"}, cell], "metadata": {}})
        (tmp_path / "notebooks/run.ipynb").write_text(text, encoding="utf-8")

    assert facts() == (None, None)
    for name in ("params/a", "outputs/b", "docs/c", "notebooks/run.ipynb"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("as committed", encoding="utf-8")
    notebook("measure()")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    commit = git("rev-parse", "HEAD").strip()
    assert facts() == (commit, False)
    (tmp_path / "new").write_text("not tracked", encoding="utf-8")
    (tmp_path / "outputs/b").write_text("a product made again", encoding="utf-8")
    (tmp_path / "docs/c").unlink()
    assert facts() == (commit, False)
    notebook("measure()", ["opened and saved by somebody who looked"])
    assert facts() == (commit, False)
    for harm in (lambda: notebook("measure(); measure()"), (tmp_path / "notebooks/run.ipynb").unlink):
        harm()
        assert facts() == (commit, True)
    git("checkout", "notebooks")
    assert facts() == (commit, False)
    (tmp_path / "params/a").write_text("changed", encoding="utf-8")
    assert facts() == (commit, True)
