"""Files in the page cache: real ones on a disk, looked at, read in and dropped; and where the system does not tell."""

import mmap
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import need_disk
from hypothesis import given
from hypothesis import strategies as st

from moelib.machine import pagecache, process
from moelib.machine.pagecache import NotTold

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not tell")
SIZE = 3 * pagecache.READ_BYTES + 5  # the last page is not whole


@pytest.fixture
def file(tmp_path):
    need_disk(tmp_path)
    path = tmp_path / "x.gguf"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_a_file_is_dropped_to_nothing_and_read_in_to_its_last_byte(file):
    assert pagecache.cached_bytes([file]) == SIZE  # just written, and not on the disk yet
    assert pagecache.drop([file]) == pagecache.cached_bytes([file]) == 0
    before = process.disk_reads(os.getpid())
    pagecache.warm([file])
    assert pagecache.cached_bytes([file]) == SIZE
    assert process.disk_reads(os.getpid()) - before >= SIZE
    pagecache.warm([file])
    assert pagecache.cached_bytes([file]) == SIZE


def test_a_part_that_is_cached_is_told_to_the_page(file):
    pagecache.drop([file])
    with file.open("rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
        os.pread(f.fileno(), 1, 5 * mmap.PAGESIZE)
        os.pread(f.fileno(), 1, SIZE - 1)
    assert pagecache.cached_bytes([file]) == mmap.PAGESIZE + 5


def test_looking_reads_nothing(file):
    pagecache.drop([file])
    before = process.disk_reads(os.getpid())
    assert [pagecache.cached_bytes([file]) for _ in range(3)] == [0, 0, 0]
    assert process.disk_reads(os.getpid()) == before


def test_all_parts_of_a_model_count_and_a_large_one_is_looked_at_piece_by_piece(file, tmp_path):
    large = tmp_path / "large.gguf"
    with large.open("wb") as f:
        f.truncate(24 << 30)  # nothing of it was ever read
    assert pagecache.cached_bytes([file, large]) == SIZE
    with large.open("rb") as f:
        f.seek(20 << 30)
        f.read(SIZE)
    assert SIZE < pagecache.cached_bytes([large]) < 10 * SIZE
    assert pagecache.drop([file, large]) == 0


def test_what_a_process_has_mapped_and_used_stays(file):
    with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        assert sum(mapping[i] for i in range(0, SIZE, mmap.PAGESIZE))
        assert pagecache.drop([file]) == SIZE
    assert pagecache.drop([file]) == 0


def test_a_file_that_is_nowhere_but_in_ram_stays():
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("this system has no /dev/shm to write to")
    path = shm / f"moelib-test-{os.getpid()}"
    try:
        path.write_bytes(b"x" * SIZE)
        assert pagecache.drop([path]) == SIZE
    finally:
        path.unlink()


def test_an_empty_file_and_one_that_is_gone(tmp_path):
    empty = tmp_path / "empty"
    empty.touch()
    assert pagecache.cached_bytes([empty]) == pagecache.drop([empty]) == 0
    for call in (pagecache.cached_bytes, pagecache.drop, pagecache.warm):
        with pytest.raises(FileNotFoundError):
            call([tmp_path / "gone"])


def test_a_file_that_ram_has_no_room_for_is_not_read(file, monkeypatch):
    pagecache.drop([file])
    monkeypatch.setattr(pagecache.psutil, "virtual_memory", lambda: SimpleNamespace(available=SIZE - 1))
    pagecache.warm([file])
    assert pagecache.cached_bytes([file]) == 0
    monkeypatch.setattr(pagecache.psutil, "virtual_memory", lambda: SimpleNamespace(available=SIZE))
    pagecache.warm([file])
    assert pagecache.cached_bytes([file]) == SIZE


def everything_is_there(address, length, answers):
    """mincore as a system that only imitates Linux has it."""
    pagecache.ctypes.memset(answers, 1, -(-length // mmap.PAGESIZE))
    return 0


@pytest.mark.parametrize("why", ["another system", "an imitation", "another owner"])
def test_where_the_system_does_not_tell_nothing_is_dropped_and_all_is_read(file, monkeypatch, why):
    pagecache.drop([file])
    with monkeypatch.context() as m:
        if why == "another system":
            m.setattr(pagecache.sys, "platform", "darwin")
        elif why == "an imitation":
            m.setattr(pagecache, "_mincore", lambda: everything_is_there)
            m.setattr(pagecache, "_truthful", pagecache._truthful.__wrapped__)
        else:
            m.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
            m.setattr(os, "access", lambda *_, **__: False)
        says = "only who may write to x.gguf" if why == "another owner" else "does not tell what of a file"
        m.setattr(os, "posix_fadvise", lambda *_: pytest.fail("it was dropped unseen"))
        for call in (pagecache.cached_bytes, pagecache.drop):
            with pytest.raises(NotTold, match=says):
                call([file])
        pagecache.warm([file])
    assert pagecache.cached_bytes([file]) == SIZE


def test_who_may_write_to_a_file_of_somebody_else_is_told(file, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
    assert pagecache.cached_bytes([file]) == SIZE


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (1.0, "cached"),
        (0.99, "cached"),
        (0.98, "98% cached"),
        (0.011, "1% cached"),
        (0.01, "cold"),
        (0.0, "cold"),
        (None, "not recorded"),
        (float("nan"), "not recorded"),
    ],
)
def test_a_share_in_words(share, words):
    assert pagecache.state(share) == words


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_of_a_file_is_never_colder(a, b):
    less, more = sorted((a, b))
    rank = [0 if (s := pagecache.state(share)) == "cold" else 2 if s == "cached" else 1 for share in (less, more)]
    assert rank == sorted(rank)


def test_of_no_process_nothing_is_known():
    assert process.disk_reads(1 << 30) is None
