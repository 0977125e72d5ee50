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
    text = path.read_text(encoding="utf-8").replace("rounds: 3", "rounds: 1").replace("chunks: 12", "chunks: 4")
    path.write_text(text, encoding="utf-8")
    done = command(home, models_folder, "study", "run", "demo")
    assert done.returncode == 0, done.stderr
    assert "20 of 20 runs usable" in done.stdout
    results = study.Study.read(home / "outputs/demo")
    assert results.problems == []
    assert all(r.done for r in results.records)
    assert {reason for r in results.records for reason in r.reasons} <= SHARED
    assert len(results.manifests) == 6
    # the quants of a model took turns: of each round of one all were done before the next
    begun = sorted((r.started_utc, r.spec.model, r.spec.block) for r in results.records)
    assert len({model for _, model, _ in begun[:10]}) == 1
    # every file: device memory falls by the expert bytes that its own header counts; of so few MB, in resident memory
    # of one round, 50 kB less were seen
    rows = [c for c in frames.comparisons(results.runs, "vram_bytes") if c.side[0] == "cpu-moe"]
    assert len(rows) == 6
    for row in rows:
        file = models_folder / row.model / "real" / f"{row.model}-{row.quant}.gguf"
        moved = gguf_file.read_header(file).moved_bytes("cpu-moe")
        assert row.difference.value >= moved - (256 << 10) > 2 << 20
    text = (home / "outputs/demo/MOE-TECHNICAL-VALIDATION.md").read_text(encoding="utf-8")
    evidence = (home / "outputs/demo/EVIDENCE.md").read_text(encoding="utf-8")
    for model in ("trained-phimoe", "trained-deepseek"):
        for quant in ("Q4_K_M", "Q2_K", "Q8_0"):
            assert re.search(rf"^\| {model} +\| {quant} +\| cpu-moe ", text, re.M)  # load times
            assert re.search(rf"^\| {model} +\| {quant} +\| n-cpu-moe=2 ", evidence, re.M)  # those between
            for workload, where in (("plan-short", evidence), ("prose", text)):
                part = where.split(f"### {model}, {workload}")[1].split("###")[0]
                assert len(re.findall(rf"^\| {quant} +\| (?:baseline|n-cpu-moe=2|cpu-moe) ", part, re.M)) == 3
    assert "### 4. What is the minimum VRAM" in text
    for shown in (
        "| F16, other batches |",
        "99.9 % KLD",
        "It was late in the evening",
        "Offload changed nothing but rounding",
    ):
        assert shown in text
    assert len(text.splitlines()) <= 350
    assert all(r.run_id in evidence for r in results.records)
    for told in (text, evidence):
        assert not re.search(r"\b(nan|None|inf)\b", told)
    assert len(list((home / "outputs/demo/notebooks").glob("*.ipynb"))) == 3
    assert len(record.read_all(home / "outputs/demo")[0]) == 20
