"""The committed demo study: its document follows from its records, byte by byte."""

import json
import shutil

import pytest
from conftest import REPO
from test_study import tree

from moelib import notebook, params, record, study

EXAMPLE = REPO / "docs/example/demo"


@pytest.fixture
def copy(tmp_path, monkeypatch):
    shutil.copytree(EXAMPLE, tmp_path / "demo")
    monkeypatch.setenv("MOELIB_OUTPUTS", str(tmp_path))
    params._yaml.cache_clear()
    return tmp_path / "demo"


def products(folder):
    return {k: v for k, v in tree(folder).items() if k.startswith(("MOE", "figures/", "provenance"))}


def test_the_example_is_whole():
    found = study.results(EXAMPLE)
    assert found.problems == []
    assert len(found.records) == 36
    assert {r.host["dirty"] for r in found.records} == {False}
    for r in found.records:
        raw = EXAMPLE / "raw"
        assert {name: record.files.sha256(raw / name) for name in r.raw} == r.raw


def test_its_document_is_rebuilt_byte_by_byte(copy):
    before = products(copy)
    shutil.rmtree(copy / "figures")
    (copy / "provenance.json").unlink()
    notebook.report("demo", progress=False)
    assert products(copy) == before


def test_a_changed_record_shows(copy):
    provenance = json.loads((copy / "provenance.json").read_text())
    path = sorted((copy / "records").glob("*.json"))[0]
    path.write_text(path.read_text().replace('"exit_code":0', '"exit_code":1'))
    before = products(copy)
    notebook.report("demo", progress=False)
    after = products(copy)
    assert after != before
    cited = json.loads((copy / "provenance.json").read_text())
    assert path.stem in provenance["sources"]
    assert path.stem not in cited["sources"]
    assert f"damaged: {path.name}" in (copy / notebook.DOCUMENT).read_text()


def test_the_readmes_figure_is_the_examples():
    assert "docs/example/demo/figures/trade.png" in (REPO / "README.md").read_text()
    assert (EXAMPLE / "figures/trade.png").exists()
