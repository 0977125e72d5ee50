"""Tables of laws: their numbers are those of the laws, what was held out is said, estimates are called so."""

import dataclasses

import pytest
from conftest import REPO
from factory import swept

from moelib.laws import law, speed
from moelib.report import laws
from moelib.study import frames, study

DDR4, DDR5 = laws.EXAMPLES.values()


@pytest.fixture(scope="module")
def h100():
    return study.Study.read(REPO / "outputs/h100-twins")


@pytest.fixture(scope="module")
def demo():
    return study.Study.read(REPO / "tests/fixtures/twins")


@pytest.fixture(scope="module")
def points():
    return swept()


def tables(results, workload):
    yield laws.decode_table(results, workload)
    yield laws.ttft_table(results, workload)
    yield laws.vram_table(results)
    yield laws.estimates(results, workload, *DDR4)


def test_the_terms_of_a_token_are_those_that_the_runs_were_made_with(points):
    table = laws.decode_table(points, "prompt-512")
    mmap, none = table.rows
    assert mmap["model"] == "deepseek-moe-16b"
    assert (mmap["quant"], mmap["load mode"], mmap["host"]) == ("Q2_K, Q4_K_M, Q8_0", "mmap", "d" * 6)
    assert mmap["GPU time, ms"] == "3.00"
    assert mmap["per layer, µs"].startswith("200 [")
    assert mmap["bytes, GB/s"].startswith("80.0 [")
    assert (mmap["without"], none["without"]) == (
        "that placement",
        "that model and quant on the CPU",
    )
    assert table.note.startswith(
        "A token of prompt-512 takes: GPU time + cost per layer × layers with experts on the CPU + bytes that it reads "
        "of host RAM / their speed. On a GPU; scale tiny, load mode mmap and none, context 1,024, 1 CPU threads, RAM "
        "that reads 80.0 GB/s; each fitted to 18 to 45 runs; intervals 95 %; error: median (largest) of what is "
        "predicted without what the last"
    )
    assert table.numbers == ("GPU time, ms", "per layer, µs", "bytes, GB/s", "error, %")


def test_the_committed_laws_are_few_rows_with_their_records(h100):
    table = laws.decode_table(h100, "long-512")
    assert [(r["model"], r["quant"]) for r in table.rows[::2]] == [
        ("phi-3.5-moe", "Q4_K_M, Q8_0"),
        ("deepseek-moe-16b", "Q4_K_M, Q2_K, Q8_0"),
        ("phi-3.5-moe", "Q2_K"),
    ]
    told = law.standing(speed.decode(h100.runs, "long-512"))
    assert [one.n for one in told] == [20, 20, 30, 30, 10, 10]
    assert "; each fitted to 10 to 30 runs; " in table.note
    assert list(table.row_sources) == [one.sources for one in told]
    assert table.sources == frames.sources(h100.runs)
    off = told[3].errors("cell")
    assert table.rows[3]["error, %"] == f"{100 * off.median:.1f} ({100 * off.largest:.1f})" == "5.9 (6.0)"
    any_fits = {"error, %": "n/a", "without": "nothing: any runs fit it"}
    assert table.rows[4].items() >= any_fits.items()
    assert table.rows[4]["per layer, µs"] == "n/a"
    assert "No law" not in table.note, "that of one quant stands where there is none to share"
    assert table.note.endswith(
        "No cost per layer on the CPU for phi-3.5-moe (Q2_K), load mode mmap and none: the layers of one quant do not "
        "tell a cost per layer from one per byte: it is in the speed."
    )
    short = laws.decode_table(h100, "plan-short")
    assert short.rows[2]["bytes, GB/s"] == "n/a"
    which = "deepseek-moe-16b (Q4_K_M, Q2_K, Q8_0), load mode mmap"
    assert f"No speed of host bytes for {which}: 38.1 GB/s or any" in short.note


def test_a_prompts_law_has_the_speed_of_the_bus_or_the_reason_why_not(h100, demo):
    table = laws.ttft_table(h100, "long-512")
    assert [(r["load mode"], r["hosts"]) for r in table.rows] == [("mmap", 2), ("none", 2)]
    assert table.rows[1]["bytes, GB/s"] == "53.8 [52.5, 55.3]"
    assert table.rows[1]["GPU time, ms"] == "39.1 to 128"
    assert table.note.startswith(
        "TTFT of a warm prompt of long-512: GPU time + bytes counted on the bus / their speed. long-512 repeats one "
        "sentence: it may need few of the experts, and its TTFT be too short. On"
    )
    assert "repeats one sentence" in laws.estimates(h100, "long-512", *DDR4).note
    assert "repeats" not in laws.decode_table(h100, "long-512").note
    short = laws.ttft_table(h100, "plan-short")
    assert not short.rows
    assert short.why_empty == (
        "No law for phi-3.5-moe (Q4_K_M, Q2_K, Q8_0), deepseek-moe-16b (Q4_K_M, Q2_K, Q8_0), load mode mmap and none: "
        "llama.cpp copies experts to the GPU for prompts from 32 tokens on; this has 8."
    )
    assert "without a GPU no experts are copied" in laws.ttft_table(demo, "mixed-512").why_empty


def test_vram_is_by_parts_in_mib_without_an_interval_where_nothing_varies(points, h100, demo):
    table = laws.vram_table(points)
    assert [r["quant"] for r in table.rows] == ["Q2_K", "Q4_K_M", "Q8_0"]
    row = {k: v for k, v in table.rows[0].items() if k not in ("model", "quant")}
    assert row == {
        "context": "1,024",
        "KV cache": "224",
        "compute, all on GPU": "81.0",
        "compute, experts on CPU": "245",
        "rest": "700",
        "error, %": "0.0 (0.0)",
        "without": "that placement",
    }
    assert "No " not in table.note, "that there is one context is seen"
    assert laws.vram_table(h100).rows[0]["rest"] == "710 [706, 714]"
    assert "On the loopback device (" in laws.vram_table(demo).note
    assert "load mode" not in table.rows[0], "it is the same in all rows, and in the note"


def test_several_contexts_tell_what_a_longer_one_takes(points):
    longer = study.Study(points.path, points.plan, points.contents)
    runs = points.runs.copy()
    whole = runs["load_mode"] == "none"
    runs.loc[whole, ["placement", "context_tokens"]] = ["cpu-moe,context=2048", 2048]
    runs.loc[whole, ["vram_cache_bytes", "vram_bytes"]] += 224 << 20
    longer.__dict__["runs"] = runs
    assert [r["per 1,024 more"] for r in laws.vram_table(longer).rows] == ["224"] * 3


@pytest.mark.parametrize(("ram", "bus"), laws.EXAMPLES.values())
def test_an_estimate_scales_what_it_says_and_says_what_it_is(points, ram, bus):
    table = laws.estimates(points, "prompt-512", ram, bus)
    assert [(r["quant"], r["placement"]) for r in table.rows] == [
        (q, "cpu-moe, none") for q in ("Q2_K", "Q4_K_M", "Q8_0")
    ]
    for row, gib in zip(table.rows, (5, 8, 14), strict=True):
        experts = gib * 2**30
        token_s = 0.003 + 80e9 / ram * (28 * 0.0002 + experts * 6 // 64 / 80e9)
        assert float(row["tokens/s, estimated"]) == pytest.approx(1 / token_s, rel=0.01)
        assert float(row["TTFT in s, estimated"]) == pytest.approx(0.0366 + experts / bus, rel=0.01)
    assert table.note.startswith(
        f"**Estimates, not measurements**: prompt-512 on a machine whose RAM gives {ram / 1e9:g} GB/s to all CPUs "
        f"together and whose bus gives {bus / 1e9:g} GB/s, by laws fitted on a GPU."
    )
    assert "The GPU's own time is that of a GPU and is not scaled" in table.note
    assert table.note.endswith(
        "On their own machine the laws were off by up to 0.0 % for a token and up to 0.0 % for TTFT."
    )
    assert "repeats" not in laws.ttft_table(points, "prompt-512").note, "its text is not known"
    none = points.runs[(points.runs.load_mode == "none") | (points.runs.placement == "baseline")]
    assert table.sources == frames.sources(none)


def test_what_cannot_be_estimated_is_not(h100, demo, points):
    short = laws.estimates(h100, "plan-short", *DDR5)
    assert len(short.rows) == 6
    assert "TTFT in s, estimated" not in short.rows[0]
    assert (
        "No TTFT for phi-3.5-moe (Q4_K_M, Q2_K, Q8_0), deepseek-moe-16b (Q4_K_M, Q2_K, Q8_0), load mode none: "
        in short.note
    )
    assert laws.estimates(demo, "long-512", *DDR4).rows == []
    mapped = swept(quants=("Q4_K_M",), layers=(0, 28), load_modes=("mmap",), rounds=2)
    table = laws.estimates(mapped, "prompt-512", *DDR4)
    assert table.why_empty == "no run of cpu-moe at load mode none on a GPU gives a law to go by."
    loopback = swept(quants=("Q4_K_M",), layers=(0, 28), rounds=2, kind="loopback")
    assert laws.estimates(loopback, "prompt-512", *DDR4).why_empty == table.why_empty
    blind = study.Study(points.path, points.plan, points.contents)
    blind.__dict__["runs"] = points.runs.assign(ram_bytes_per_s=float("nan"))
    assert {r["tokens/s, estimated"] for r in laws.estimates(blind, "prompt-512", *DDR4).rows} == {"n/a"}


def test_without_a_whole_round_each_says_so(demo):
    empty = study.Study(demo.path, demo.plan, demo.contents)
    empty.__dict__["statuses"] = {k: dataclasses.replace(s, rounds=()) for k, s in demo.statuses.items()}
    for table in tables(empty, "long-512"):
        assert table.rows == []
        assert table.markdown().endswith("no round is complete.*")


def test_tables_are_markdown_with_provenance(h100):
    for table in tables(h100, "long-512"):
        text = table.markdown()
        assert text.count("\n") < 16
        assert f"{len(table.sources)} sources" in text
        assert table.provenance()["kind"] == "table"
        assert len(table.rows) <= 12


def test_what_has_a_law_of_its_own_is_not_said_to_have_none():
    """Of Q4_K_M two placements alone were run, whose scatter leaves the GPU no time; Q2_K has its law."""
    table = laws.ttft_table(study.Study.read(REPO / "outputs/local-12gib"), "mixed-512")
    assert [row["quant"] for row in table.rows] == ["Q2_K"]
    assert f"No law for phi-3.5-moe (Q4_K_M), load mode mmap: {speed.NO_TIME}." in table.note
