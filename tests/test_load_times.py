"""Wherever a load time stands, it says whether the file was cached, if its records do."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from factory import DEVICE, ENGINE, HOST, MANIFEST, spec
from test_frames import CELL, measured

from moelib.campaign import bench
from moelib.evidence import appendix
from moelib.measure import run
from moelib.report import advice, findings

MODES = ("baseline/mmap", "cpu-moe/mmap", "cpu-moe,cache=cold/mmap", "cpu-moe/none", "cpu-moe,cache=cold/none")
WARM, COLD = 1.0, 0.0
LOADS = (1.0, 2.0, 4.0, 3.0, 6.0)


def study(*shares):
    """One of two rounds, each of which has these shares of its file cached, by placement; None: not recorded."""
    of_one = measured(*[LOADS] * len(shares), modes=MODES)
    (status,) = of_one.statuses.values()
    rounds = []
    for runs, cached in zip(status.rounds, shares, strict=True):
        pairs = zip(runs, cached, strict=True)
        known = [(r, None if s is None else round(s * r.sheet.file_bytes)) for r, s in pairs]
        rounds.append(tuple(r.model_copy(update={"observed": replace(r.observed, cached_bytes=n)}) for r, n in known))
    of_one.__dict__["statuses"] = {CELL: replace(status, rounds=tuple(rounds))}
    return of_one


NEW = (WARM, WARM, COLD, WARM, COLD)
OLD = (None,) * 5


def cells(table, column):
    return [row[column] for row in table.rows]


def test_each_row_of_the_load_times_says_it():
    table = findings.load_table(study(NEW, NEW))
    assert cells(table, "page cache") == ["cached", "cold", "cached", "cold"]
    assert [ratio.split()[0] for ratio in cells(table, "CPU offload / baseline")] == ["2.00", "4.00", "3.00", "6.00"]
    assert "page cache" not in table.numbers
    assert "*cold*: not in RAM (1.0 % at most)" in table.note
    assert table.note.endswith("The file of baseline was cached.")


def test_runs_of_one_placement_that_differ_are_all_named():
    table = findings.load_table(study(NEW, OLD, (WARM, 0.38, COLD, WARM, COLD)))
    assert cells(table, "page cache") == [
        "38% cached, cached, not recorded",
        "cold, not recorded",
        "cached, not recorded",
        "cold, not recorded",
    ]
    assert table.note.endswith("The file of baseline was cached, not recorded.")


def test_where_no_record_says_it_nothing_is_said():
    old = study(OLD, OLD)
    assert "page cache" not in findings.load_table(old).rows[0]
    assert "cache" not in findings.load_table(old).note + findings.load_mode_table(old).note
    assert "cached" not in str(cells(appendix.runs_table(old.records), "load, s"))


def test_other_load_times_say_it_too():
    new = study(NEW, NEW)
    assert findings.load_mode_table(new).note.endswith("as the table of load times says.")
    runs = [r for status in new.statuses.values() for runs in status.rounds for r in runs]
    assert cells(appendix.runs_table(runs[:3]), "load, s") == ["1.00, cached", "2.00, cached", "4.00, cold"]


@pytest.mark.parametrize(
    ("shares", "words"), [(NEW, "1.50 times, that of the mapped file (files cached)."), (OLD, ".")]
)
def test_the_advice_is_about_files_that_are_cached(shares, words):
    text = advice.verdict(study(shares, shares), "deepseek-moe-16b").text
    assert "load time 1.50 times, that of the mapped file" in text
    assert text.endswith(words)
    assert "cold" not in text


def test_where_all_rows_say_the_same_the_note_says_it():
    table = findings.load_table(study((WARM,) * 5, (WARM,) * 5))
    assert all("page cache" not in row for row in table.rows)
    assert table.note.endswith(" In every row: *page cache* cached.")
    few = replace(table, rows=table.rows[:1])
    assert findings.said_once(few, "placement") == few, "a row alone keeps what it is of"
    other = findings.said_once(table, "model", "placement", "rounds")
    assert other.note.endswith(" In every row: *model* deepseek-moe-16b, *rounds* 2.")
    assert set(table.rows[0]) - set(other.rows[0]) == {"model", "rounds"}
    assert set(table.numbers) - set(other.numbers) == {"rounds"}


@pytest.mark.parametrize(
    ("placement", "steps"), [("cpu-moe", ["read in", "clock", "run"]), ("cpu-moe,cache=cold", ["clock", "run"])]
)
def test_a_file_is_read_in_before_the_clock_of_its_run_starts(tmp_path, monkeypatch, placement, steps):
    """However long that takes: the board's energy and the whole run are counted from then on."""
    done = []

    def read_in(paths):
        done.append("read in")
        raise FileNotFoundError(paths)  # what became of the file is the run's to say

    class Clock(bench.datetime):
        @classmethod
        def now(cls, tz):
            done.append("clock")
            return super().now(tz)

    def execute(*_):
        done.append("run")
        return run.Outcome(None, "file-gone", "x.gguf cannot be read", ())

    monkeypatch.setattr(bench.pagecache, "warm", read_in)
    monkeypatch.setattr(bench, "datetime", Clock)
    monkeypatch.setattr(bench.run, "execute", execute)
    path = tmp_path / "x.gguf"
    quantised = SimpleNamespace(path=path, manifest=MANIFEST.model_dump(), content=SimpleNamespace(paths=(path,)))
    runner = SimpleNamespace(tools=None, facts=lambda: ENGINE)
    ready = bench.Bench(quantised, runner, None, tmp_path, DEVICE, HOST)
    r = ready.perform(tmp_path, spec(placement=placement))
    assert (r.status, r.reasons, done) == ("failed", ("file-gone",), steps)
