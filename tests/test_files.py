"""Digests, atomic writes, locks and disk space."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelib.base import files

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_a_digest_depends_neither_on_a_file_nor_on_the_order_of_keys(data):
    again = json.loads(json.dumps(data))
    if isinstance(again, dict):
        again = dict(reversed(again.items()))
    assert files.digest(again) == files.digest(data)


def test_a_known_digest_and_none_of_nan():
    # printf '{"a":1}' | sha256sum
    assert files.digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.digest({"x": float("nan")})


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x"
    files.write_bytes(path, b"old")
    with pytest.raises(FileNotFoundError), files.replacing(path) as partial:
        partial.write_bytes(b"new, but")
        partial.with_name("missing").read_bytes()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path, replaced = tmp_path / "x", []
    path.write_bytes(b"old")
    monkeypatch.setattr(files.os, "replace", lambda new, old: replaced.append((new.read_bytes(), old.read_bytes())))
    files.write_bytes(path, b"new")
    assert replaced == [(b"new", b"old")]


def test_partial_files_of_ended_processes_are_removed_and_those_of_running_ones_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".x.{files.node()}.{dead.pid}.partial").touch()
    living = tmp_path / f".x.{files.node()}.{os.getppid()}.partial"
    elsewhere = tmp_path / f".x.another-host.{dead.pid}.partial"
    living.touch()
    elsewhere.touch()
    files.write_bytes(tmp_path / "x", b"1")
    assert sorted(os.listdir(tmp_path)) == sorted([living.name, elsewhere.name, "x"])


def test_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    """50 kills of a process that rewrites a file without pause."""
    path = tmp_path / "x.json"
    code = (
        "import sys; from pathlib import Path; from moelib.base import files\n"
        "i = 0\nwhile True:\n    i += 1; files.write_json(Path(sys.argv[1]), {'i': i, 'fill': 'y' * 200000})"
    )
    for k in range(50):
        child = subprocess.Popen([sys.executable, "-c", code, str(path)])
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.0007 * k)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert len(json.loads(path.read_text(encoding="utf-8"))["fill"]) == 200000


def refusal(path, wait_s=0.0):
    """The message to one who wants the lock; None if it is free."""
    try:
        with files.lock(path, "it", wait_s):
            return None
    except files.FileError as err:
        return str(err)


HOLD = """
import sys, time; from pathlib import Path; from moelib.base import files
with files.lock(Path(sys.argv[1]), "it"):
    print(flush=True); time.sleep(60)
"""


def test_a_lock_is_held_by_one_process_and_freed_by_its_death(tmp_path):
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as owner:
        owner.stdout.readline()
        message = refusal(path, 0.2)
        owner.kill()
    assert message == f"it is in use by process {owner.pid}; wait for it to end, then run again"
    with files.lock(path, "it", wait_s=5):
        assert path.read_text(encoding="utf-8") == f"process {os.getpid()}"


def test_a_lock_is_readable_by_its_owner_alone_and_not_inherited(tmp_path):
    path = tmp_path / "lock"
    argv = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    with files.lock(path, "it"):
        assert path.stat().st_mode & 0o777 == 0o600
        # a child that inherits what may be inherited
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, close_fds=False)
        child.stdout.readline()
    free = refusal(path) is None
    child.kill()
    child.communicate()
    assert free


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda path, other: path.symlink_to(other), "it is a symbolic link; remove it"),
        (lambda path, other: path.hardlink_to(other), "moelib did not write it; move it elsewhere"),
        (lambda path, other: path.write_text("[[package]]", encoding="utf-8"), "moelib did not write it"),
        (lambda path, other: os.mkfifo(path), "moelib did not write it"),
        (lambda path, other: path.mkdir(), "cannot be used: Is a directory"),
    ],
    ids=["link", "second name", "file", "pipe", "folder"],
)
def test_a_planted_lock_is_refused_and_nothing_is_written_to_it(tmp_path, plant, words):
    other, path = tmp_path / "other", tmp_path / "lock"
    other.write_text("years of work", encoding="utf-8")
    plant(path, other)
    before = path.stat()
    assert words in refusal(path)
    assert other.read_text(encoding="utf-8") == "years of work"
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_system_without_locks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    assert "Linux and macOS; on Windows, run it under WSL2" in refusal(tmp_path / "lock")
    assert not list(tmp_path.iterdir())


def test_too_little_space_names_what_is_needed(tmp_path):
    with pytest.raises(files.FileError, match=r"the file needs 9313225\.75 GiB .* MOELIB_MODELS"):
        files.need_space(tmp_path, 10**16, "the file")
