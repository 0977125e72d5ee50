"""The files that a process has mapped: an engine is all of them, and an exchanged one is noticed."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import copy_of, library_of
from factory import spec

from moelib.engine import engine as engines
from moelib.machine import mapped
from moelib.machine.process import ProcessError
from moelib.measure import device, run
from moelib.measure.llama_server import LlamaServer
from moelib.models import models, quantize

HOLD = """
import ctypes, mmap, sys
held = [ctypes.CDLL(p) for p in sys.argv[2:]]
data = open(sys.argv[1], "rb")
m = mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def library(tmp_path):
    """A small shared library: a copy of one of Python's."""
    import _ctypes

    path = tmp_path / "build/libggml-test.so"
    path.parent.mkdir()
    shutil.copy(_ctypes.__file__, path)
    time.sleep(0.02)  # a file system keeps times in steps of some milliseconds
    return path


@contextlib.contextmanager
def holding(*libraries):
    """A process that has the libraries and a data file mapped, and the wall clock before it started."""
    data = Path(libraries[0]).parent / "model.gguf"
    data.write_bytes(b"GGUF" + bytes(5000))
    since = time.time()
    argv = [sys.executable, "-c", HOLD, str(data), *map(str, libraries)]
    p = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        assert p.stdout.readline() == "ready\n"
        yield p.pid, since
    finally:
        p.communicate("")


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_programs_and_libraries_are_listed_and_data_is_not(library):
    with holding(library) as (pid, since):
        mappings = {m.path: m for m in mapped.look(pid, since)}
        program = Path(os.readlink(f"/proc/{pid}/exe"))
    assert mappings[library].own, "by its name, wherever it lies"
    assert mappings[program].own, "the program itself"
    libc = next(p for p in mappings if p.name.startswith("libc.so"))
    assert not mappings[libc].own
    assert library.parent / "model.gguf" not in mappings
    hashes = mapped.Hashes().of(mappings.values())
    assert hashes[library.name] == sha256(library)
    assert hashes[libc.name] == sha256(libc)


def test_a_library_beside_the_tools_is_the_engines_whatever_its_name(library):
    other = library.with_name("libcudart.so.12")
    shutil.copy(library, other)
    time.sleep(0.02)
    with holding(library, other) as (pid, since):
        own, without = ({m.path for m in mapped.look(pid, since, f) if m.own} for f in ([library.parent], []))
    assert own - without == {other}


def exchange(path):
    shutil.copy(path, new := path.with_name("new"))
    os.replace(new, path)


def write(path):
    with path.open("r+b") as f:
        f.seek(0, os.SEEK_END)
        f.write(b"more")


@pytest.mark.parametrize("harm", [exchange, write, Path.unlink])
def test_a_file_that_is_exchanged_written_to_or_removed_fails_the_run(library, harm):
    with holding(library) as (pid, since):
        mapped.look(pid, since)
        harm(library)
        with pytest.raises(ProcessError, match="^libggml-test.so was replaced, removed or written") as caught:
            mapped.look(pid, since)
    assert caught.value.reason == "engine-changed"


def test_data_may_be_removed(library):
    with holding(library) as (pid, since):
        (library.parent / "model.gguf").unlink()
        assert library in {m.path for m in mapped.look(pid, since)}


def test_a_file_that_changes_before_it_is_hashed_fails_the_run(library):
    with holding(library) as (pid, since):
        mappings = mapped.look(pid, since)
        exchange(library)
    with pytest.raises(ProcessError, match="changed after the run") as caught:
        mapped.Hashes().of(mappings)
    assert caught.value.reason == "engine-changed"


def test_another_device_number_in_the_map_is_no_change(library, monkeypatch):
    """As on overlays and btrfs: this process's own map is what the file is compared with."""
    real = mapped._maps

    def shifted(pid):
        return {(path, device + 1, inode): runs for (path, device, inode), runs in real(pid).items()}

    monkeypatch.setattr(mapped, "_maps", shifted)
    with holding(library) as (pid, since):
        assert library in {m.path for m in mapped.look(pid, since)}
        exchange(library)
        with pytest.raises(ProcessError):
            mapped.look(pid, since)


def test_a_path_that_is_another_file_in_this_process_fails_the_run(library, monkeypatch):
    """As of a server in a sandbox with mounts of its own."""
    real = mapped._maps

    def other_inodes(pid):
        shift = pid != os.getpid()
        return {(path, device, inode + shift): runs for (path, device, inode), runs in real(pid).items()}

    monkeypatch.setattr(mapped, "_maps", other_inodes)
    with holding(library) as (pid, since), pytest.raises(ProcessError):
        mapped.look(pid, since)


def test_a_file_is_read_once_for_as_long_as_it_stays(library, monkeypatch):
    read = []
    monkeypatch.setattr(mapped.files, "sha256", lambda p: read.append(p) or str(len(read)))
    hashes = mapped.Hashes()
    with holding(library) as (pid, since):
        first = [hashes.of(mapped.look(pid, since)) for _ in range(2)]
    assert first[0] == first[1]
    assert len(read) == len(set(read)) == len(first[0])
    exchange(library)
    time.sleep(0.02)
    with holding(library) as (pid, since):
        now = hashes.of(mapped.look(pid, since))
    assert read[-1] == library
    assert {name for name in now if now[name] != first[0][name]} == {library.name}


def test_two_files_of_one_name_are_two(library, tmp_path):
    other = tmp_path / "other" / library.name
    other.parent.mkdir()
    write(Path(shutil.copy(library, other)))
    time.sleep(0.02)
    with holding(library, other) as (pid, since):
        hashes = mapped.Hashes().of(mapped.look(pid, since))
    assert {hashes["libggml-test.so"], hashes["libggml-test.so (2)"]} == {sha256(library), sha256(other)}


LOAD = "import sys, ctypes; ctypes.CDLL(sys.argv[1]); print(1, flush=True); sys.stdin.read()"


def test_the_files_of_a_child_process_count_too(library):
    """A wrapper script may not become the tool that it calls."""
    since, how = time.time(), {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    shell = subprocess.Popen(["/bin/sh", "-c", '"$@"; exit', "sh", sys.executable, "-c", LOAD, str(library)], **how)
    assert shell.stdout.readline() == "1\n"
    assert library in {m.path for m in mapped.look(shell.pid, since)}
    shell.communicate("")


def test_a_system_that_lists_no_files_is_a_recorded_reason(monkeypatch, tmp_path):
    gone = subprocess.Popen(["/bin/true"])
    gone.wait()
    with pytest.raises(mapped.NotListed, match="does not say which files a process has mapped"):
        mapped.look(gone.pid, time.time())
    monkeypatch.setattr(mapped, "Path", lambda p: tmp_path / "no" / str(p).lstrip("/"))  # a system without /proc
    llama = engines.Engine(tmp_path, "test", {}, 1, "v", engines.Help(""))
    digests, unlisted = llama.mapped_files(os.getpid(), None, time.time())
    assert list(unlisted) == ["engine_files"]
    assert digests() == {}


@pytest.mark.engine
def test_a_library_exchanged_between_two_runs_changes_the_engines_digest(engine, home, tmp_path):
    """The launcher stays the same."""
    llama = copy_of(engine, tmp_path / "build")
    made = quantize.make(models.make_twin("deepseek-moe-16b", "nano"), "Q8_0", llama, tmp_path / "q")
    library = library_of(llama)
    observations = []
    for _ in range(2):
        asked = spec(workloads=("smoke",), context=256)
        outcome = run.execute(asked, made, LlamaServer(llama), device.Loopback(), tmp_path / "work")
        assert outcome.reason is None, outcome.message
        observations.append(outcome.observation)
        shutil.copy(library, new := library.with_name("new"))
        write(new)
        os.replace(new, library)
        time.sleep(0.02)
    first, second = observations
    names = {"llama-server", library.name}
    assert names <= first.engine_files.keys()
    assert "ggml-rpc-server" in first.device_files
    assert any(name.startswith("libc.so") for name in first.system_files)
    assert first.system_files == second.system_files
    for before, after in ((first.engine_files, second.engine_files), (first.device_files, second.device_files)):
        assert {name for name in before if before[name] != after.get(name)} == {library.name}
    assert first.engine_files["llama-server"] == engine.server_sha256
    assert first.engine_digest != second.engine_digest
    assert not any("/" in name for name in first.engine_files)
