"""Who holds a device, from other processes, folders and users."""

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moelib.base import files
from moelib.locks import claim

HOLD = """
import sys
from moelib.locks import claim
claim.PREFIX = sys.argv[2]
with claim.device(sys.argv[1] or None, "device cuda", 0):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def own_names(monkeypatch):
    """Names of this test's own: others measure on this host."""
    monkeypatch.setattr(claim, "PREFIX", f"moelib-test-{secrets.token_hex(8)}-")


@pytest.fixture
def uuid():
    """The id of a GPU that no other test has."""
    return f"GPU-{secrets.token_hex(4)}-9608-67cf-9bce-a8c85c7c1cd0"


@pytest.fixture
def holder(uuid):
    """Starts processes that try to hold the device, with variables of their own: (process, "held" or "")."""
    started = []

    def hold(**env):
        argv = [sys.executable, "-c", HOLD, uuid, claim.PREFIX]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(argv, env={**os.environ, **env}, **pipes))
        return started[-1], started[-1].stdout.readline().strip()

    yield hold
    for child in started:
        child.kill()
        child.communicate()


def refusal(uuid, wait_s=0.0):
    """The message to one who wants the device; None if it is free."""
    try:
        with claim.device(uuid, "device cuda", wait_s):
            return None
    except files.FileError as err:
        return str(err)


def test_two_folders_for_temporary_files_do_not_measure_at_once(holder, uuid, tmp_path):
    first, line = holder(TMPDIR=str(tmp_path / "a"), HOME=str(tmp_path))
    assert line == "held"
    assert refusal(uuid) == f"device cuda is in use by process {first.pid}; wait for it to end, then run again"
    second, line = holder(TMPDIR=str(tmp_path / "b"))
    assert line == ""
    assert f"in use by process {first.pid}" in second.communicate()[1]
    assert f"in use by process {first.pid}" in refusal(f"{uuid}-another"), "the host is its own, too"


def refusals(*wanted):
    """Of each (GPU, shared), whether it is refused."""
    refused = []
    for uuid, shared in wanted:
        try:
            with claim.device(uuid, "device cuda", 0, shared):
                refused.append(False)
        except files.InUse as err:
            refused.append(f"in use by process {os.getpid()}; wait" in str(err))
    return refused


def test_a_host_is_shared_among_those_that_share_it_and_no_others(uuid):
    other = f"{uuid}-another"
    with claim.device(uuid, "device cuda", 0, shared=True):
        assert refusals((other, True), (other, False), (None, False), (uuid, True)) == [False, True, True, True]
        with claim.device(other, "device cuda", 0, shared=True):
            assert refusals((uuid, True), (other, True), (None, False)) == [True, True, True]
    with claim.device(uuid, "device cuda", 0):
        assert refusals((other, True), (other, False), (None, False)) == [True, True, True]
    with claim.device(None, "device loopback", 0):
        assert refusals((uuid, True), (uuid, False)) == [True, True]
    assert refusals((uuid, True), (uuid, False), (None, False)) == [False, False, False]


def test_who_shares_waits_for_the_host_without_holding_up_who_has_it(uuid):
    """Neither waits for the other with what the other waits for."""
    got = []

    def take(shared):
        with claim.device(uuid, "device cuda", 30, shared):
            got.append(shared)
            time.sleep(0.2)

    with claim.device(f"{uuid}-another", "device cuda", 0, shared=True):
        threads = [threading.Thread(target=take, args=(s,)) for s in (False, True, False, True)]
        for t in threads:
            t.start()
        time.sleep(0.5)
    for t in threads:
        t.join(40)
    assert sorted(got) == [False, False, True, True]


def test_the_kernel_frees_a_device_whose_holder_was_killed(holder, uuid):
    first, line = holder()
    assert line == "held"
    first.kill()
    assert refusal(uuid, wait_s=10) is None


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_a_name_in_the_kernel_is_held_as_long_as_a_run(uuid):
    with claim.device(uuid, "device cuda", 0):
        assert "in use by process" in refusal(uuid)
        assert f"@{claim.PREFIX}{uuid}" in Path("/proc/net/unix").read_text(encoding="utf-8").split()
    assert refusal(uuid) is None


def test_another_users_holder_is_seen_though_its_folder_is_not(uuid, tmp_path, monkeypatch):
    """Each user has a folder; the name in the kernel is the same for all."""
    monkeypatch.setattr(claim, "ROOT", tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").mkdir()
    with claim.device(uuid, "device cuda", 0):
        monkeypatch.setattr(claim, "ROOT", tmp_path / "theirs")
        assert "in use by process" in refusal(uuid)
        real = os.getuid()
        monkeypatch.setattr(claim.os, "getuid", lambda: real + 1)  # asked by somebody else
        assert f"another user's process (process {os.getpid()}, user " in refusal(uuid)
    assert not list((tmp_path / "theirs").iterdir())


def test_on_a_system_without_such_names_the_file_holds_the_device(uuid, tmp_path, monkeypatch):
    """As on macOS, and for two containers of one user that share a folder and no network."""
    monkeypatch.setattr(claim.sys, "platform", "darwin")
    monkeypatch.setattr(claim, "ROOT", tmp_path)
    with claim.device(uuid, "device cuda", 0):
        assert refusal(uuid) == f"device cuda is in use by process {os.getpid()}; wait for it to end, then run again"
    assert refusal(uuid) is None


def test_a_planted_folder_or_link_is_refused_and_nothing_is_written_through_it(uuid, tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "ROOT", tmp_path)
    own, victim = tmp_path / f"moelib-{os.getuid()}", tmp_path / "victim"
    victim.mkdir()
    own.symlink_to(victim)
    assert "is not a folder of this user" in refusal(uuid)
    assert not list(victim.iterdir())
    own.unlink()
    own.write_text("", encoding="utf-8")
    assert "remove what blocks its path" in refusal(uuid)
    own.unlink()
    own.mkdir(mode=0o777)
    (victim / "thesis").write_text("whole", encoding="utf-8")
    (own / f"{claim.PREFIX}{uuid}.lock").symlink_to(victim / "thesis")
    assert "it is a symbolic link" in refusal(uuid)
    assert (victim / "thesis").read_text(encoding="utf-8") == "whole"
    assert own.stat().st_mode & 0o777 == 0o700  # and from now on nobody else plants anything
    real = os.getuid()
    monkeypatch.setattr(claim, "ROOT", tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / f"moelib-{real + 1}").mkdir()
    monkeypatch.setattr(claim.os, "getuid", lambda: real + 1)
    assert "is not a folder of this user but belongs to" in refusal(uuid)


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_a_holder_that_does_not_listen_is_another_process(uuid):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as squatter:
        squatter.bind(f"\0{claim.PREFIX}{uuid}")
        assert refusal(uuid) == "device cuda is in use by another process; wait for it to end, then run again"


def test_in_a_sandbox_that_refuses_the_name_the_file_holds_the_device(uuid, tmp_path, monkeypatch):
    class Refused(socket.socket):
        def bind(self, address):
            raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(claim.socket, "socket", Refused)
    monkeypatch.setattr(claim, "ROOT", tmp_path)
    with claim.device(uuid, "device cuda", 0):
        assert f"in use by process {os.getpid()}" in refusal(uuid)


def test_an_id_cannot_lead_out_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "ROOT", tmp_path)
    with claim.device("MIG-GPU-1/../../7/0", "device cuda", 0):
        host, lock = sorted(
            (tmp_path / f"moelib-{os.getuid()}").iterdir(), key=lambda p: p.name != f"{claim.PREFIX}host.lock"
        )
        assert host.name == f"{claim.PREFIX}host.lock"
    assert lock.name == f"{claim.PREFIX}MIG-GPU-1_______7_0.lock"
