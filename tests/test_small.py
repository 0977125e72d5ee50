"""Small studies told beside another: what they vary decides what is told, and the numbers are their records'."""

import json
import math
import re
import shutil
from statistics import fmean

import pytest
from conftest import REPO

from moelib.base.stats import number, sizes
from moelib.catalogue import params
from moelib.evidence import small
from moelib.study import plan as plans
from moelib.study.study import Study

NAMED = ("h100-prompts", "h100-threads", "h100-least-vram", "h200-context", "h200-cold")


def observed(study):
    """Placement and load mode -> what each run of it observed, from the raw JSON."""
    found = {}
    for path in sorted((REPO / "outputs" / study / "records").glob("*.json")):
        r = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault((r["spec"]["placement"], r["spec"]["load_mode"]), []).append(r["observed"])
    return found


@pytest.fixture(scope="module")
def lines():
    _, text = small.told(Study.read(REPO / "outputs/h100"))
    found = [line for line in text.text.splitlines() if line.startswith("- ")]
    assert len(found) == len(NAMED)
    return dict(zip(NAMED, found, strict=True)), text.sources


def test_threads_are_told_by_tokens_per_second(lines):
    line, sources = lines[0]["h100-threads"], lines[1]
    runs = observed("h100-threads")
    assert f"(h100-threads, {sum(map(len, runs.values()))} of 15 runs on NVIDIA H100 80GB HBM3)" in line
    assert "tokens/s of mixed-512. deepseek-moe-16b Q4_K_M: baseline " in line
    frame = Study.read(REPO / "outputs/h100-threads").runs
    for (placement, _), of in runs.items():
        rates = frame.loc[frame["placement"] == placement, "tokens_per_s/mixed-512"]
        told = number(math.exp(fmean(map(math.log, rates))))
        assert re.search(rf"{re.escape(placement)} {re.escape(told)} \[[\d., ]+\]", line), placement
        assert len(of) == len(rates)
    assert sum(name.startswith("h100-threads/") for name in sources) == 15


def test_what_takes_vram_is_told_by_vram_and_ttft(lines):
    line = lines[0]["h100-least-vram"]
    assert "15 of 30 runs" in line
    assert "VRAM and TTFT of warm mixed-512 in ms. deepseek-moe-16b Q2_K: " in line
    assert "phi" not in line
    for (placement, _), of in observed("h100-least-vram").items():
        mean = fmean(o["memory"]["value_bytes"] for o in of)
        assert f"{placement} {mean / 2**30:.2f} GiB, " in line
    assert sizes(None) not in line


def test_prompts_are_told_by_the_step_and_the_longest(lines):
    line = lines[0]["h100-prompts"]
    assert "TTFT in ms of a warm prompt of 31, 32 and 1,024 tokens. deepseek-moe-16b Q4_K_M: baseline, mmap " in line
    warm = [
        fmean(q["token_s"][0] for q in o["requests"] if q["workload"] == "drawn-32" and q["index"])
        for o in observed("h100-prompts")["cpu-moe", "none"]
    ]
    told = number(1e3 * math.exp(fmean(map(math.log, warm))))
    assert re.search(rf"cpu-moe, none \d+ \[[\d, ]+\], {told} \[", line)


def test_contexts_are_told_by_vram_and_tokens_per_second(lines):
    line = lines[0]["h200-context"]
    assert "18 of 18 runs on NVIDIA H200): VRAM and tokens/s of mixed-512. phi-3.5-moe Q2_K: " in line
    for (placement, _), of in observed("h200-context").items():
        assert f"{placement} {fmean(o['memory']['value_bytes'] for o in of) / 2**30:.2f} GiB, " in line


def test_cold_loads_are_told_by_how_long_they_take(lines):
    line = lines[0]["h200-cold"]
    assert "15 of 15 runs on NVIDIA H200): load time in s. deepseek-moe-16b Q4_K_M: " in line
    for (placement, mode), of in observed("h200-cold").items():
        told = number(math.exp(fmean(math.log(o["load_s"]) for o in of)))
        assert re.search(rf"{placement}, {mode} {re.escape(told)} \[", line), (placement, mode)


def test_what_was_not_measured_says_so(tmp_path, monkeypatch):
    shutil.copytree(REPO / "outputs/h200-cold", tmp_path / "h200-cold")
    first = min((tmp_path / "h200-cold/records").glob("*cpu-moe_mmap_b0*"))
    for path in (tmp_path / "h200-cold/records").glob("*.json"):
        if path != first:
            path.unlink()
    monkeypatch.setenv("MOELIB_OUTPUTS", str(tmp_path))
    text = small.told(Study.read(REPO / "outputs/h100"))[1].text.splitlines()
    assert "- h200-context: not measured yet." in text
    assert text[-1].endswith("(h200-cold, 1 of 15 runs): no round is complete.")


def test_a_study_that_names_none_tells_none():
    assert small.told(Study.read(REPO / "outputs/h100-threads")) == []


def test_a_small_study_is_one_that_there_is(home):
    path = home / "params/studies/whole.yaml"
    smoke = (home / "params/studies/smoke.yaml").read_text(encoding="utf-8")
    path.write_text(smoke + "small_studies: [smoke]\n", encoding="utf-8")
    assert plans.of(params.study("whole")).study.small_studies == ("smoke",)
    path.write_text(smoke + "small_studies: [smokes]\n", encoding="utf-8")
    params._yaml.cache_clear()
    with pytest.raises(params.ParamsError, match="unknown study 'smokes'; did you mean 'smoke'"):
        params.study("whole")
