"""The demo's whole path, as `make demo` goes it, with one block instead of three."""

import re

import pytest
from factory import SHARED
from test_study import command

from moelib.audit import record
from moelib.gguf import gguf_file
from moelib.study import frames, study


@pytest.mark.engine
def test_the_demo_from_nothing_to_its_document(home, models_folder):
    path = home / "params/studies/demo.yaml"
    path.write_text(re.sub(r"rounds: 3", "rounds: 1", path.read_text(encoding="utf-8")), encoding="utf-8")
    done = command(home, models_folder, "study", "run", "demo")
    assert done.returncode == 0, done.stderr
    assert "12 of 12 runs usable" in done.stdout
    results = study.Study.read(home / "outputs/demo")
    assert results.problems == []
    assert all(r.done for r in results.records)
    assert {reason for r in results.records for reason in r.reasons} <= SHARED
    assert len(results.manifests) == 6
    # every file: device memory falls by at least the expert bytes that its own header counts
    rows = frames.comparisons(results.runs, "vram_bytes")
    assert len(rows) == 6
    for row in rows:
        file = models_folder / row.model / "twin-tiny" / f"{row.model}-{row.quant}.gguf"
        assert row.difference.value >= gguf_file.read_header(file).moved_bytes("cpu-moe") > 10 << 20
    text = (home / "outputs/demo/MOE-TECHNICAL-VALIDATION.md").read_text(encoding="utf-8")
    for model in ("phi-3.5-moe", "deepseek-moe-16b"):
        for quant in ("Q4_K_M", "Q2_K", "Q8_0"):
            assert len(re.findall(rf"^\| {model} +\| {quant} +\| cpu-moe", text, re.M)) >= 8
    assert not re.search(r"\b(nan|None|inf)\b", text)
    assert len(list((home / "outputs/demo/notebooks").glob("*.ipynb"))) == 7
    assert len(record.read_all(home / "outputs/demo")[0]) == 12
