"""How accurate the harness is: ratios of kept rates, and what a document says of them."""

import json
from dataclasses import replace

import pytest
import slots
from conftest import REPO
from factory import HOST, request

from moelib.base import files
from moelib.evidence import appendix
from moelib.report import results as report
from moelib.study import overhead, study

ABOUT = {
    "model": "a-model",
    "quant": "Q8_0",
    "scale": "tiny",
    "weights": "twin",
    "file_sha256": "a" * 64,
    "workload": "plan-short",
    "engine": "llama.cpp b11434",
    "device": {"kind": "cuda", "name": "a GPU", "uuid": "GPU-1"},
    "host": HOST.model_dump() | {"commit": "c" * 40},
}


def rounds(unwatched=100.0, client=100.0, bench=100.0, placement="cpu-moe", n=3):
    """Rounds of a server at 100 tokens per second, a little apart."""

    def rates(here, server):
        return {"client": [here, here], "server": [server, server]}

    order = ["watched", "unwatched", "bench"]
    return [
        {
            "placement": placement,
            "order": order,
            "watched": rates(client * (1 + i * 1e-4), 100.0),
            "unwatched": rates(unwatched * (1 - i * 1e-4), 100.0),
            "bench": [bench, bench],
        }
        for i in range(n)
    ]


NAME = f"{overhead.FOLDER}/a-file.json"


def kept(tmp_path, *parts):
    return overhead.write(tmp_path / NAME, ABOUT, [r for some in parts for r in some])


def test_ratios_have_known_values_and_their_aims(tmp_path):
    measurement = kept(tmp_path, rounds(unwatched=125.0, client=99.0, bench=102.0))
    e = {r.name: e for placement, r, e in overhead.ratios(measurement)}
    assert e["client / server"].value == pytest.approx(0.9901, abs=1e-4)
    assert e["server / llama-bench"].value == pytest.approx(100 / 102)
    assert e["monitored / unmonitored"].value == pytest.approx(99 / 125, abs=1e-3)
    assert {r.name: r.met(e[r.name]) for r in overhead.RATIOS if r.name in e} == {
        "client / server": "no",
        "server / llama-bench": "yes",
        "monitored / unmonitored": "no",
    }
    assert overhead.CLIENT.estimate(measurement, "baseline") is None
    with_device = [{**r, "on_device": r["watched"], "bare": [98.0, 98.0]} for r in rounds(bench=100.0)]
    measurement = kept(tmp_path, with_device, rounds(placement="baseline"))
    estimates = {(placement, r.name): e for placement, r, e in overhead.ratios(measurement)}
    assert estimates["cpu-moe", overhead.ON_DEVICE.name].value == pytest.approx(1.0)
    assert ("baseline", overhead.ON_DEVICE.name) not in estimates
    assert estimates["cpu-moe", overhead.BARE.name].value == pytest.approx(0.98)
    without_bench = [{**r, "bench": None, "unwatched": None} for r in with_device]
    assert [ratio for _, ratio, _ in overhead.ratios(kept(tmp_path, without_bench))] == [overhead.CLIENT]


def test_slots_of_one_generation_are_compared_with_their_neighbours(tmp_path):
    """A stream that takes 20 ms a token while it is watched and 10 ms else, and has been slowing down all the time."""
    t, arrived, drift = 0.0, [], 1.0
    while t < 60 * slots.SLOT_S:
        arrived.append(t)
        t += (0.02 if slots.watched(t) else 0.01) * drift
        drift *= 1.0002
    n = len(arrived)
    stream = request(n=n, token_s=tuple(arrived), started_s=0.0)
    pairs = list(slots.by_slots([stream, stream]))
    assert len(pairs) == 60
    assert pairs[:30] == pairs[30:]
    assert all(0.48 < a / b < 0.52 for a, b in pairs)
    assert {slots.watched(p * 2 * slots.SLOT_S) for p in range(30)} == {
        True,
        False,
    }  # which comes first is by lot
    first = {**rounds()[0], "toggled": pairs, "unwatched": None}
    measurement = kept(tmp_path, [first, {**first, "toggled": pairs[:5]}])
    e = overhead.WATCHED.estimate(measurement, "cpu-moe")
    assert (e.value, e.n) == (pytest.approx(0.5, rel=0.02), 65)
    assert overhead.WATCHED.met(e) == "no"
    assert "Monitoring slowed" in overhead.bias([measurement])
    assert list(slots.by_slots([request(n=5)])) == []  # too short for two slots


@pytest.mark.parametrize(("lasted", "pairs"), [(1.6, 0), (1.8, 1), (2.6, 1), (3.6, 1), (3.8, 2)])
def test_a_slot_counts_where_a_generation_fills_most_of_it(lasted, pairs):
    n = round(lasted * slots.SLOT_S / 0.01)
    stream = request(n=n, token_s=tuple(i * 0.01 for i in range(n)), started_s=0.0)
    assert len(list(slots.by_slots([stream]))) == pairs


def test_faster_than_unwatched_is_no_fault(tmp_path):
    measurement = kept(tmp_path, rounds(unwatched=90.0))
    assert overhead.WATCHED.met(overhead.WATCHED.estimate(measurement, "cpu-moe")) == "yes"
    assert overhead.bias([measurement]) is None


@pytest.mark.parametrize(("unwatched", "slowed"), [(100.0, False), (100.4, False), (125.0, True)])
def test_what_surely_slowed_the_runs_is_said(tmp_path, unwatched, slowed):
    measurement = kept(tmp_path, rounds(unwatched=unwatched), rounds(placement="baseline"))
    text = overhead.bias([measurement])
    assert bool(text) is slowed
    if slowed:
        assert "a-model at Q8_0, cpu-moe, decoded at 0.800" in text
        assert "baseline," not in text


def test_one_noisy_round_proves_nothing(tmp_path):
    measurement = kept(tmp_path, rounds(unwatched=80.0, n=1), rounds(unwatched=125.0, n=1))
    assert overhead.bias([measurement]) is None
    assert overhead.WATCHED.met(overhead.WATCHED.estimate(measurement, "cpu-moe")) == "undecided"
    assert overhead.bias([kept(tmp_path, rounds(unwatched=125.0, n=1))]) is None
    assert overhead.bias([]) is None


def test_what_was_kept_is_read_back_and_a_change_is_seen(tmp_path):
    path = tmp_path / NAME
    measurement = kept(tmp_path, rounds())
    assert overhead.read(path) == measurement
    good = path.read_text(encoding="utf-8")
    path.unlink()
    with pytest.raises(files.FileError, match="measure it again"):
        overhead.read(path)
    for bad in (good.replace("100.0", "101.0", 1), good[:-20], "{}", good.replace('"bench"', '"bank"', 1)):
        path.write_text(bad, encoding="utf-8")
        with pytest.raises(files.FileError, match="measure it again"):
            overhead.read(path)


@pytest.mark.parametrize("name", ["h100-twins", "h200-twins"])
def test_the_committed_documents_say_what_their_files_hold(name):
    results = study.Study.read(REPO / "outputs" / name)
    table, files_of = appendix.harness_table(results), results.overhead
    assert len(table.rows) == sum(len(list(overhead.ratios(a))) for a in files_of.values()) >= 6
    first, kept = next(iter(files_of.items()))
    e = overhead.CLIENT.estimate(kept, "baseline")
    assert table.rows[0]["measured"] == f"{e.value:.4f} [{e.low:.4f}, {e.high:.4f}]"
    assert table.row_sources[0] == {first: kept.digest}
    assert table.sources == {name: a.digest for name, a in files_of.items()}
    slowed = overhead.bias(files_of.values())
    text = report.limits(results)
    assert ("Monitoring slowed" in text.text) is bool(slowed)
    assert files_of.keys() & text.sources.keys() == (files_of.keys() if slowed else set())
    without = study.Study(results.path, results.plan, replace(results.contents, overhead={}))
    assert "not measured in this study" in appendix.harness_table(without).markdown()
    assert "Monitoring slowed" not in report.limits(without).text


def test_a_damaged_file_is_told_with_the_study(tmp_path):
    import shutil

    copy = tmp_path / "demo"
    shutil.copytree(REPO / "tests/fixtures/twins", copy, ignore=shutil.ignore_patterns("raw", "figures"))
    measurement = kept(copy, rounds())
    assert study.Study.read(copy).overhead == {NAME: measurement}
    data = json.loads((copy / NAME).read_text(encoding="utf-8"))
    data["rounds"][0]["bench"] = [1.0]
    (copy / NAME).write_text(json.dumps(data), encoding="utf-8")
    damaged = study.Study.read(copy)
    assert damaged.overhead == {}
    assert any(NAME in d for d in damaged.evidence.damaged)
