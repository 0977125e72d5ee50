"""Which quant, which placement: the rule, and the tables that the document and the cards share."""

import json
import re

import pytest
from conftest import REPO
from hypothesis import given
from hypothesis import strategies as st

from moelib.base import stats
from moelib.report import advice
from moelib.report.advice import GB, Choice
from moelib.study import study

FULL = REPO / "outputs/h100-twins"
MODEL = "deepseek-moe-16b"


def choice(quant, vram_bytes, bits, rate, place="all on the GPU"):
    return Choice(quant, place, vram_bytes, bits, stats.Estimate(rate, None, None, 1), {quant: "a digest"})


@pytest.fixture(scope="module")
def full():
    return study.Study.read(FULL)


@pytest.fixture(scope="module")
def demo():
    return study.Study.read(REPO / "docs/example/demo")


CHOICES = st.lists(
    st.builds(choice, st.sampled_from("ABC"), st.integers(1, 100 * GB), st.floats(1, 16), st.floats(0.1, 1e4)),
    min_size=1,
)


@given(CHOICES, st.integers(1, 100 * GB), st.integers(0, 100 * GB))
def test_more_vram_never_makes_the_advice_slower_or_coarser(choices, gpu, more):
    small, large = advice.fitting(choices, gpu), advice.fitting(choices, gpu + more)
    assert all(c.vram_bytes <= gpu for c in small)
    assert len(small) == sum(c.vram_bytes <= gpu for c in choices)
    if small:
        assert advice.fastest(large).rate.value >= advice.fastest(small).rate.value == max(c.rate.value for c in small)
        assert advice.finest(large).bits_per_weight >= advice.finest(small).bits_per_weight
        assert advice.finest(small).bits_per_weight == max(c.bits_per_weight for c in small)


def test_a_file_fits_to_the_byte_and_the_faster_of_equal_bits_is_taken():
    whole, part = choice("Q8_0", 8 * GB, 8.5, 300), choice("Q8_0", 2 * GB, 8.5, 30, "experts on the CPU")
    assert advice.fitting([whole, part], 8 * GB) == [whole, part]
    assert advice.fitting([whole, part], 8 * GB - 1) == [part]
    assert advice.finest([part, whole]) is whole
    assert advice.fitting([], GB) == []


def test_which_file_says_it_gpu_by_gpu(full, monkeypatch):
    away = "experts on the CPU"
    listed = [
        choice("Q8_0", 18 * GB, 8.5, 290),
        choice("Q2_K", 7 * GB, 3.3, 320),
        choice("Q8_0", 5 * GB, 8.5, 30, away),
        choice("Q2_K", 5 * GB - 1, 3.3, 40.04, away),
    ]
    monkeypatch.setattr(advice, "choices", lambda results, model: listed)
    table = advice.which_file(full, MODEL)
    first, second = f"Q2_K {away}, 40.0 tokens/s", f"Q8_0 {away}, 30.0 tokens/s"
    assert [tuple(row.values()) for row in table.rows] == [
        ("4 GB", "none", "none", "none fits", "none fits"),
        ("6 GB", "none", "Q2_K, **Q8_0**", first, second),
        ("8 to 16 GB", "**Q2_K**", "Q2_K, **Q8_0**", "Q2_K all on the GPU, 320 tokens/s", second),
        (
            "20 GB and more",
            "Q2_K, **Q8_0**",
            "Q2_K, **Q8_0**",
            "Q2_K all on the GPU, 320 tokens/s",
            "Q8_0 all on the GPU, 290 tokens/s",
        ),
    ]
    assert table.sources == {"Q8_0": "a digest", "Q2_K": "a digest"}


def raw_vram(table):
    """(quant, placement) -> the largest VRAM of the records that the table cites, read from their files."""
    largest = {}
    for run_id in (k for k in table.sources if not k.startswith("quants/")):
        record = json.loads((FULL / "records" / f"{run_id}.json").read_text(encoding="utf-8"))
        key = (record["spec"]["quant"], record["spec"]["placement"])
        largest[key] = max(largest.get(key, 0), record["observed"]["memory"]["value_bytes"])
    return largest


def test_the_committed_advice_is_what_the_records_say(full):
    table = advice.which_file(full, MODEL)
    memory, sizes = raw_vram(table), []
    assert {p for _, p in memory} == {"baseline", "cpu-moe"}
    columns = {"baseline": "fits, all on the GPU", "cpu-moe": "fits, experts on the CPU"}
    for row in table.rows:
        gpus = row["VRAM of the GPU"]
        low, high = (re.findall(r"\d+", gpus) * 2)[:2] if "more" not in gpus else (gpus[:2], "80")
        sizes += [gb for gb in advice.GPUS_GB if int(low) <= gb <= int(high)]
        for gb in (int(low), int(high)):
            for placement, column in columns.items():
                fits = {q for (q, p), b in memory.items() if p == placement and b <= gb * 10**9}
                assert set(re.findall(r"Q\w+", row[column])) == fits
    assert sizes == list(advice.GPUS_GB)


def test_the_comparison_has_a_row_for_each_quant_with_known_values(full):
    table = advice.comparison(full, MODEL)
    assert [row["quant"] for row in table.rows] == [
        q for q in full.parameters.quants if f"{MODEL}/{q}" in full.measured
    ]
    by_id = {r.run_id: r for r in full.records}
    for row, sources in zip(table.rows, table.row_sources, strict=True):
        runs = [by_id[k] for k in sources if k in by_id]
        assert {r.spec.quant for r in runs} == {row["quant"]}
        assert {r.spec.load_mode for r in runs} == {"mmap"}
        assert row["rounds"] == len({r.spec.block for r in runs})
        means = []
        for placement in ("baseline", "cpu-moe"):
            placed = [r for r in runs if r.spec.placement == placement]
            rates = [[q.tps for q in r.observed.requests if q.workload == "long-512"] for r in placed]
            means.append(stats.geometric_mean([sum(v) / len(v) for v in rates]).value)
        assert row["tokens/s"] == f"{stats.number(means[0])} → {stats.number(means[1])}"
        assert row["tokens/s, ratio"].startswith(stats.number(means[1] / means[0]))
        assert f"quants/{MODEL}-{row['quant']}.json" in sources


def test_without_a_gpu_none_is_advised_and_nothing_is_called_one(demo):
    table = advice.which_file(demo, MODEL)
    assert not table.rows
    assert "no GPU took part" in table.markdown()
    assert "no GPU took part" in advice.comparison(demo, MODEL).note
    assert "all on the device" in advice.verdict(demo, MODEL).text
    assert "fits" not in advice.limits(demo).text


def test_sentences_follow_from_the_comparisons(full):
    table = advice.verdict(full, MODEL)
    ratios = [float(r["tokens/s, ratio"].split()[0]) for r in advice.comparison(full, MODEL).rows]
    low, high = map(float, re.search(r"decoding was ([\d.]+) to ([\d.]+) times", table.text).groups())
    assert low == pytest.approx(1 / max(ratios), rel=0.01)
    assert high == pytest.approx(1 / min(ratios), rel=0.01)
    assert table.sources
    assert advice.limits(full).text.count("Quality was not measured") == 1


def test_a_model_of_which_nothing_is_measured_is_recommended_nothing(full):
    assert "nothing is recommended" in advice.verdict(full, "gpt-oss-20b").text
    assert not advice.comparison(full, "gpt-oss-20b").rows
    assert advice.choices(full, "gpt-oss-20b") == []
