"""Folders of one study from several machines, made into one: united, refused, and the same in any order."""

import itertools
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import REPO, link_small_studies, tree

from moelib.audit import record
from moelib.base import files
from moelib.merge import merge, setups
from moelib.merge.merge import MergeError
from moelib.study.study import Study

H100 = REPO / "outputs/h100"
DEMO = REPO / "docs/example/demo"


def part(source, folder, keep):
    """A copy of a study's folder with those records alone that `keep` takes, and what they name; no documents."""
    shutil.copytree(
        source, folder, ignore=shutil.ignore_patterns("figures", "*.md", "provenance.json", "cards", "notebooks")
    )
    for path in (folder / "records").glob("*.json"):
        r = record.read(path)
        if not keep(r):
            path.unlink()
            for log in r.raw:
                (folder / "raw" / log).unlink()
    return folder


def changed(path, **change):
    """Change keys of a record's parts, such as host__system, and seal it again."""
    data = json.loads(path.read_bytes())
    for name, value in change.items():
        *parts, key = name.split("__")
        of = data
        for p in parts:
            of = of[p]
        of[key] = value
    path.write_bytes(files.sealed(data))


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The committed study of two machines, each with its rounds."""
    home = tmp_path_factory.mktemp("machines")
    first = part(H100, home / "first", lambda r: r.spec.block < 3)
    return first, part(H100, home / "second", lambda r: r.spec.block >= 3)


@pytest.fixture
def two(halves, tmp_path):
    """Copies of them, to be harmed."""
    return [shutil.copytree(h, tmp_path / h.name) for h in halves]


def test_two_machines_make_the_study_that_they_measured(halves, tmp_path):
    done = merge.merge(tmp_path / "both", halves)
    whole = Study.read(H100)
    assert done.records == len(whole.records) == 70
    assert Study.read(tmp_path / "both").tally == whole.tally
    assert {r.digest for r in Study.read(tmp_path / "both").records} == {r.digest for r in whole.records}
    # of one kind: the same card, CPU, link and engine, and RAM within 10 %
    assert [(s.hosts, len(s.cells)) for s in done.setups] == [(2, 3)]


def test_the_order_does_not_matter_byte_for_byte(halves, tmp_path):
    third = part(DEMO, tmp_path / "other", lambda r: True)
    thirds = [part(DEMO, tmp_path / f"demo-{i}", lambda r, i=i: r.spec.block == i) for i in range(3)]
    every = []
    for i, order in enumerate(itertools.permutations(thirds)):
        merge.merge(tmp_path / f"m{i}", order)
        every.append(tree(tmp_path / f"m{i}"))
    assert all(t == every[0] for t in every)
    # nor whether one of them is the place where they come together, one after another
    for s in thirds[1:]:
        merge.merge(thirds[0], [s])
    assert tree(thirds[0]) == every[0]
    whole = tree(third)
    assert {k: v for k, v in every[0].items() if "records/" in k} == {k: v for k, v in whole.items() if "records/" in k}


def test_a_merge_again_changes_nothing(halves, tmp_path):
    merge.merge(tmp_path / "both", halves)
    before = tree(tmp_path / "both")
    assert merge.merge(tmp_path / "both", halves).new == 0
    assert tree(tmp_path / "both") == before


def test_the_document_of_the_whole_is_the_same_however_it_came_together(halves, tmp_path, monkeypatch):
    from moelib.report import document

    texts = []
    for i, order in enumerate((halves, halves[::-1])):
        home = tmp_path / str(i)
        merge.merge(home / "h100", order)
        link_small_studies(H100, home)
        monkeypatch.setenv("MOELIB_OUTPUTS", str(home))
        made = document.report("h100", progress=False)
        texts.append(made.path.read_bytes())
    assert texts[0] == texts[1] == (H100 / "MOE-TECHNICAL-VALIDATION.md").read_bytes()


def refusal(into, sources):
    before = tree(into) if into.exists() else None
    with pytest.raises(MergeError) as err:
        merge.merge(into, sources)
    assert (tree(into) if into.exists() else None) == before, "a refused merge writes nothing"
    assert "\n" not in str(err.value)
    return str(err.value)


def some(folder, pattern):
    return sorted((folder / "records").glob(pattern))[0]


def test_what_is_no_study_is_refused(two, tmp_path):
    first, second = two
    assert refusal(tmp_path / "x", [first, tmp_path / "none"]) == f"{tmp_path / 'none'} is not there"
    (tmp_path / "empty").mkdir()
    assert "has no plan.json: it is no study's folder, or half-copied" in refusal(tmp_path / "x", [tmp_path / "empty"])
    for into, sources in ((first, [first]), (tmp_path / "x", [first, first]), (first, [second, tmp_path / "first/."])):
        assert "a folder is not merged with itself" in refusal(into, sources)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter").touch()
    assert "is there and no study's folder" in refusal(tmp_path / "full", two)


def test_another_plan_is_refused_by_what_differs(two, tmp_path):
    said = refusal(tmp_path / "x", [two[0], part(DEMO, tmp_path / "demo", lambda r: True)])
    assert re.search(r"is of another plan than .* \(they differ in name, .*models", said)


@pytest.mark.parametrize("lost", ["records", "raw", "cut", "manifest"])
def test_a_half_copied_folder_is_refused(two, tmp_path, lost):
    first, second = two
    path = some(second, "*Q2_K*")
    if lost == "records":  # its document tells of more
        sources = {p.relative_to(second).as_posix().split("/")[-1][:-5]: "0" * 64 for p in second.glob("records/*")}
        (second / "provenance.json").write_text(json.dumps({"sources": sources}), encoding="utf-8")
        path.unlink()
    elif lost == "raw":
        next((second / "raw").glob("*Q2_K*")).unlink()
    elif lost == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        next((second / "quants").glob("*")).write_text("{", encoding="utf-8")
    said = refusal(tmp_path / "x", [first, second])
    assert f"{second} is half-copied or damaged: " in said
    assert said.endswith("; copy it again")


def test_two_records_of_one_run_are_refused(two, tmp_path):
    first, second = two
    path = some(first, "*_b0_*")
    shutil.copytree(first, tmp_path / "again")
    changed(tmp_path / "again/records" / path.name, started_utc="2026-11-01T00:00:00+00:00")
    said = refusal(tmp_path / "x", [first, second, tmp_path / "again"])
    assert "are two with one name: the same run was measured twice, or one of them was changed" in said
    assert path.name in said


def test_a_record_that_claims_more_than_its_readings_is_refused(two, tmp_path):
    path = some(two[0], "*cpu-moe_none_b0_*")
    data = json.loads(path.read_bytes())
    data["observed"]["requests"][0]["token_s"][0] += 5.0
    path.write_bytes(files.sealed(data))
    assert re.search(r"is valid, but its audit says invalid: ", refusal(tmp_path / "x", two))


@pytest.mark.parametrize(
    ("change", "of", "said"),
    [
        ({"host__host_id": "f" * 16}, "round", "host"),
        ({"device__uuid": "GPU-1"}, "round", "GPU"),
        ({"device__driver": "1.2"}, "round", "driver"),
        ({"host__system": "Linux 9"}, "round", "kernel"),
        ({"engine__server_sha256": "e" * 64}, "cell", "engine"),
        ({"device__name": "NVIDIA Other"}, "cell", "device's kind or model"),
        ({"sheet__sha256": "e" * 64}, "cell", "file"),
    ],
)
def test_what_cannot_be_compared_is_named(change, of, said):
    runs = [r for r in Study.read(H100).records if r.cell == "deepseek-moe-16b/Q2_K"]
    assert list(setups.faults(runs)) == []
    i = next(i for i, r in enumerate(runs) if r.spec.block == 3)
    ((name, value),) = change.items()
    part_name, key = name.split("__")
    r = runs[i]
    runs[i] = r.model_copy(update={part_name: getattr(r, part_name).model_copy(update={key: value})})
    where = "deepseek-moe-16b/Q2_K" + (" round 4" if of == "round" else "")
    assert list(setups.faults(runs)) == [f"{where}: its runs differ in {said}"]


def test_a_round_of_two_machines_is_refused_and_nothing_is_written(two, tmp_path):
    _, second = two
    for path in (second / "records").glob("*Q2_K*_b3_*"):
        if "baseline" in path.name:
            changed(path, host__host_id="f" * 16)
    said = refusal(tmp_path / "x", two)
    assert "Q2_K round 4: its runs differ in host; take the runs of one machine alone" in said


def runs_of(kinds):
    """Runs of cells on hosts: (cell's quant, host, GB/s of its RAM, change of the device)."""
    base = next(r for r in Study.read(H100).records if r.done)
    for quant, host, ram, device in kinds:
        facts = base.host.model_copy(update={"host_id": host * 16, "ram_read_bytes_per_s": ram and ram * 1e9})
        spec = type(base.spec)(**{**{f: getattr(base.spec, f) for f in base.spec.__slots__}, "quant": quant})
        update = {"host": facts, "spec": spec, "device": base.device.model_copy(update=device)}
        yield base.model_copy(update=update)


@pytest.mark.parametrize(
    ("kinds", "groups"),
    [
        ([("A", "1", 90, {}), ("B", "2", 98, {})], [("A", "B")]),
        ([("A", "1", 90, {}), ("B", "2", 100, {})], [("A",), ("B",)]),
        ([("A", "1", 90, {}), ("B", "2", None, {})], [("A",), ("B",)]),
        ([("A", "1", 90, {}), ("B", "1", 120, {}), ("C", "1", 100, {})], [("A", "B", "C")]),
        ([("A", "1", 90, {}), ("B", "2", 90, {"power_limit_watt": 350.0})], [("A",), ("B",)]),
        ([("A", "1", 90, {}), ("B", "2", 90, {"pcie_link": (4, 16)})], [("A",), ("B",)]),
    ],
)
def test_kinds_of_machine_are_told_apart(kinds, groups):
    found = setups.setups(runs_of(kinds))
    assert [tuple(c.partition("/")[2] for c in s.cells) for s in found] == groups
    assert bool(setups.said(found)) == (len(groups) > 1)


def test_kinds_are_said_with_what_differs():
    found = setups.setups(runs_of([("A", "1", 90, {}), ("B", "2", 120, {"power_limit_watt": 350.0})]))
    assert setups.said(found) == [
        "deepseek-moe-16b/A: 1 host; power limit 700.0; RAM 90.0 GB/s",
        "deepseek-moe-16b/B: 1 host; power limit 350.0; RAM 120 GB/s",
    ]


def test_the_command_says_what_came_of_it(halves, tmp_path):
    argv = [sys.executable, "-m", "moelib.cli", "merge", str(tmp_path / "both")]
    how = {"capture_output": True, "encoding": "utf-8", "timeout": 60}
    done = subprocess.run([*argv, *map(str, halves)], **how)
    assert (done.returncode, done.stderr) == (0, "")
    assert "70 records" in done.stdout
    assert "69 of 138 runs usable" in done.stdout
    refused = subprocess.run(
        [*argv, str(tmp_path / "both")], capture_output=True, encoding="utf-8", timeout=60, check=False
    )
    assert refused.returncode == 1
    assert "a folder is not merged with itself" in refused.stderr


def test_a_document_names_the_kinds_of_machine_that_its_numbers_are_of():
    from moelib.report import results

    threads = Study.read(REPO / "outputs/h100-threads")
    assert "Machines of 2 kinds: deepseek-moe-16b/Q4_K_M: 1 host; RAM 63.9 GB/s" in results.limits(threads).text
    assert "kinds:" not in results.limits(Study.read(H100)).text
