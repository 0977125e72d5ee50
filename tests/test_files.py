import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelib import files

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
def test_a_digest_survives_a_trip_through_a_file_and_key_order(data):
    again = json.loads(json.dumps(data))
    if isinstance(again, dict):
        again = dict(reversed(again.items()))
    assert files.digest(again) == files.digest(data)


def test_a_digest_refuses_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.digest({"x": float("nan")})


def test_a_known_digest():
    # printf '{"a":1}' | sha256sum
    assert files.digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x"
    files.write_bytes(path, b"old")
    with pytest.raises(FileNotFoundError), files.replacing(path) as partial:
        partial.write_bytes(b"new, but")
        partial.with_name("missing").read_bytes()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_partials_of_the_dead_are_swept_and_those_of_the_living_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".x.{dead.pid}.partial").touch()
    living = tmp_path / f".x.{os.getppid()}.partial"
    living.touch()
    files.write_bytes(tmp_path / "x", b"1")
    assert sorted(os.listdir(tmp_path)) == sorted([living.name, "x"])


def test_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    """50 kills of a process that rewrites a file without pause."""
    path = tmp_path / "x.json"
    code = (
        "import sys; from pathlib import Path; from moelib import files\n"
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


def _hold(path, ready, go):
    with files.lock(path, "it"):
        ready.set()
        go.wait(30)


def test_a_lock_is_held_by_one_and_freed_by_death(tmp_path):
    path, context = tmp_path / "lock", multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    owner = context.Process(target=_hold, args=(path, ready, go))
    owner.start()
    assert ready.wait(30)
    with pytest.raises(files.FileError, match=f"it is in use by process {owner.pid}"), files.lock(path, "it", 0.2):
        pass
    owner.kill()
    owner.join()
    with files.lock(path, "it", wait_s=5):
        assert path.read_text(encoding="utf-8") == f"process {os.getpid()}"


def test_a_planted_link_is_not_followed_and_its_target_kept(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "lock"
    victim.write_text("years of work", encoding="utf-8")
    path.symlink_to(victim)
    with pytest.raises(files.FileError, match="it is a symbolic link; remove it"), files.lock(path, "it", 0):
        pass
    path.unlink()
    os.link(victim, path)
    with pytest.raises(files.FileError, match="moelib did not write it"), files.lock(path, "it", 0):
        pass
    assert victim.read_text(encoding="utf-8") == "years of work"


def test_what_is_no_lock_of_ours_is_not_written_to(tmp_path):
    path = tmp_path / "poetry.lock"
    path.write_text("[[package]]", encoding="utf-8")
    with pytest.raises(files.FileError, match="did not write it; move it elsewhere"), files.lock(path, "it", 0):
        pass
    assert path.read_text(encoding="utf-8") == "[[package]]"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(files.FileError, match="moelib did not write it"), files.lock(tmp_path / "pipe", "it", 0):
        pass
    with pytest.raises(files.FileError, match="cannot be used: Is a directory"), files.lock(tmp_path, "it", 0):
        pass


def test_a_lock_is_readable_by_its_owner_alone_and_outlives_no_child(tmp_path):
    path = tmp_path / "lock"
    with files.lock(path, "it"):
        assert path.stat().st_mode & 0o777 == 0o600
        child = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=-1)
        child.stdout.readline()
    with files.lock(path, "it", wait_s=0):  # the child did not inherit it
        child.kill()
    child.wait()
    child.stdout.close()


def test_a_system_without_locks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    with pytest.raises(files.FileError, match="Linux and macOS; on Windows, run it under WSL2"):
        with files.lock(tmp_path / "lock", "it"):
            pass
    assert not list(tmp_path.iterdir())


def test_too_little_space_names_what_is_needed(tmp_path):
    with pytest.raises(files.FileError, match=r"the file needs 9313225\.75 GiB .* MOELIB_MODELS"):
        files.need_space(tmp_path, 10**16, "the file")
