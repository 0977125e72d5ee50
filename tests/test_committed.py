"""The committed studies: each document follows from its records, byte by byte, and from nothing else."""

import json
import os
import re
import shutil
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import pytest
from conftest import REPO, link_small_studies
from test_study import tree

from moelib.audit import record
from moelib.campaign import bench
from moelib.catalogue import params
from moelib.catalogue.facts import LLAMA_SERVER
from moelib.evidence.table import cite, cite_manifest, cite_overhead, resolved
from moelib.publish import cards
from moelib.report import document
from moelib.runners.endpoint import Address
from moelib.study import study


class Committed(NamedTuple):
    study: Path
    document: Path
    """Folder of the document, its figures and its provenance."""
    cards: bool = True


COMMITTED = {
    "demo": Committed(REPO / "docs/example/demo", REPO / "docs/example/demo"),
    "h200": Committed(REPO / "outputs/h200", REPO / "docs"),
    **{
        name: Committed(REPO / "outputs" / name, REPO / "outputs" / name, cards=False)
        for name in (
            *("h100", "h100-prompts", "h100-threads", "h100-least-vram", "h200-context", "h200-cold"),
            *("h100-twins", "h200-twins", "local-12gib", "trained", "demo-shimmy", "demo-shimmy-generate"),
            *("two-gpus-alone", "two-gpus", "two-gpus-lone", "two-gpus-divided"),
        )
    },
}


def products(folder):
    names = ("MOE-TECHNICAL-VALIDATION.md", "EVIDENCE.md", "provenance.json")
    figures = {f"figures/{k}": v for k, v in tree(folder / "figures").items()}
    return {k: v for k, v in tree(folder).items() if k in names} | figures


@pytest.fixture(params=COMMITTED)
def name(request):
    return request.param


@pytest.fixture
def copy(name, tmp_path, monkeypatch):
    """The study's evidence, without anything that was made from it."""
    shutil.copytree(COMMITTED[name].study, tmp_path / name, ignore=shutil.ignore_patterns("figures", "*.md"))
    link_small_studies(COMMITTED[name].study, tmp_path)
    monkeypatch.setenv("MOELIB_OUTPUTS", str(tmp_path))
    params._yaml.cache_clear()
    return tmp_path / name


def rebuilt(folder, tmp_path):
    into = tmp_path / "rebuilt"
    into.mkdir(exist_ok=True)
    document.report(folder.name, into, progress=False)
    return products(into)


def test_every_record_stands_and_was_measured_by_committed_code(name):
    results = study.Study.read(COMMITTED[name].study)
    assert not results.evidence.damaged
    assert results.tally["planned"] == sum(results.tally[k] for k in ("usable", "invalid", "missing"))
    assert results.tally["usable"] == results.tally["valid"] + results.tally["degraded"]
    assert results.tally["invalid"] == 0
    assert all(p.endswith("not run") for p in results.problems)
    assert {r.host.dirty for r in results.records} == {False}
    raw = COMMITTED[name].study / "raw"
    for r in results.records:
        assert {kept: record.files.sha256(raw / kept) for kept in r.raw} == r.raw


def test_the_document_is_rebuilt_byte_by_byte(name, copy, tmp_path):
    assert rebuilt(copy, tmp_path) == products(COMMITTED[name].document)


def test_the_cards_are_rebuilt_byte_by_byte_and_have_no_fault(name):
    committed = COMMITTED[name].study
    if not COMMITTED[name].cards:
        assert not (committed / "cards").exists()  # a model's card is made of one study
        return
    assert cards.check(committed / "cards", study.Study.read(committed), "moelib") == []


@pytest.mark.parametrize("harm", ["deleted", "changed"])
@pytest.mark.parametrize("name", ["demo", "h200", "h100-twins", "h200-twins"], indirect=True)
def test_a_cited_record_that_is_gone_or_changed_shows(name, copy, tmp_path, harm, provenance):
    path = sorted((copy / "records").glob("*.json"))[-1]
    assert path.stem in provenance["sources"]
    if harm == "deleted":
        path.unlink()
    else:
        path.write_text(path.read_text(encoding="utf-8").replace('"exit_code":0', '"exit_code":1'), encoding="utf-8")
    assert rebuilt(copy, tmp_path) != products(COMMITTED[name].document)
    text = (tmp_path / "rebuilt" / document.DOCUMENT).read_text(encoding="utf-8")
    assert (f"damaged: {path.name}" in text) == (harm == "changed")


@pytest.fixture
def provenance(name):
    return json.loads((COMMITTED[name].document / "provenance.json").read_text(encoding="utf-8"))


def test_all_of_a_studys_evidence_is_cited_with_its_digest(name, provenance):
    results = study.Study.read(COMMITTED[name].study)
    evidence = cite(results.records) | cite_overhead(results.overhead)
    for manifest in results.manifests:
        evidence |= cite_manifest(manifest)
    assert evidence.items() <= provenance["sources"].items()
    tables = provenance["tables"]
    measured = {r.spec.model for r in results.records}
    speed = {f"speed-{m}-{w}" for m in measured for w in results.parameters.workloads}
    vram = {f"vram-{model}" for model in measured}
    assert {"load", "placement", "environment", *speed, *vram} <= set(tables)
    assert any(name.startswith("what-to-run") for name in tables)
    used = {r.run_id for r in results.used}
    # without a device, and of answers that come at once, there is neither VRAM nor a rate
    shown = (vram, speed) if results.parameters.runner == LLAMA_SERVER else ()
    if not shown:
        assert used <= {k for row in tables["beside"]["rows"] for k in resolved(row["from"], provenance)}
    for names in shown:
        rows = [row for name in names for row in tables[name]["rows"]]
        assert {k for row in rows for k in resolved(row["from"], provenance)} == used
    rows = [row for table in tables.values() for row in table["rows"]]
    if shown:
        assert all(row["from"] for row in rows if row["cells"].get("missing", "0") == "0"), "what was not run has none"
    assert {k for row in rows for k in resolved(row["from"], provenance)} <= set(provenance["sources"])


def test_every_line_with_a_number_is_in_the_provenance_or_the_notebooks_prose(name, provenance):
    cells = json.loads((REPO / "notebooks/analysis.ipynb").read_text(encoding="utf-8"))["cells"]
    known = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    known += "\n".join(t["text"] for t in provenance["texts"].values())
    known += "\n".join(t["note"] for t in provenance["tables"].values())
    rows = [row["cells"] for t in provenance["tables"].values() for row in t["rows"]]
    known_rows = {tuple(sorted(cells)) for row in rows for cells in (row.values(), row.keys())}
    text = (COMMITTED[name].document / document.DOCUMENT).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if re.search(r"\d", line)]
    assert len(lines) > 30
    for line in lines:
        if line.startswith("| "):
            assert tuple(sorted(c.strip() for c in line.strip("|").split(" | "))) in known_rows, line
        elif not line.startswith(("![", "*Table `")):
            assert line in known, line


def test_what_an_endpoint_on_a_gpu_gave_follows_from_its_records():
    """Each is valid or degraded with reasons: an endpoint does not tell all."""
    folder = REPO / "outputs/endpoint-deepseek-moe-16b-q4-k-m-twin-666ac117"
    runs, damaged = record.read_all(folder)[:2]
    runs = sorted(runs, key=lambda r: r.spec.block)
    assert (len(runs), not damaged) == (3, True)
    assert {r.device.name for r in runs} == {"NVIDIA H200"}
    assert all(r.done and r.reasons and r.host.dirty is False for r in runs)
    address = Address.of("http://127.0.0.1:18123")
    told = "\n".join(bench.seen(Path(runs[0].sheet.file_name), address, "cpu-moe", runs))
    assert f"{told}\n" == (folder / bench.ANSWER).read_text(encoding="utf-8")


def test_the_study_of_the_document_is_whole():
    results = study.Study.read(COMMITTED["h200"].study)
    assert results.tally == {"planned": 138, "usable": 138, "valid": 138, "degraded": 0, "invalid": 0, "missing": 0}
    assert results.problems == []


def test_what_was_watched_lightly_is_degraded():
    results = study.Study.read(COMMITTED["h100-twins"].study)
    assert results.tally == {"planned": 90, "usable": 90, "valid": 57, "degraded": 33, "invalid": 0, "missing": 0}
    assert {reason for r in results.done for reason in r.reasons} == {"watched-lightly"}
    assert results.problems == []


def test_the_readmes_figures_are_committed_documents():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    for figure in ("docs/example/demo/figures/trade.png", "docs/figures/trade.png"):
        if figure in text:
            assert (REPO / figure).exists()
    for committed in COMMITTED.values():
        assert os.path.relpath(committed.document, REPO) + "/MOE-TECHNICAL-VALIDATION.md" in text


def test_device_memory_is_the_same_on_both_cards():
    """The README says so, with the same numbers."""
    by_placement = {}
    for name in ("h100-twins", "h200-twins"):
        for r in study.Study.read(COMMITTED[name].study).done:
            of = by_placement.setdefault((r.cell, r.spec.label), {})
            of.setdefault(name, []).append(r.observed.memory.value_bytes)
    more = [fmean(of["h100-twins"]) / fmean(of["h200-twins"]) - 1 for of in by_placement.values() if len(of) == 2]
    assert (len(more), more.count(0)) == (15, 14)
    assert f"{max(more):.2%}" == "0.14%"
