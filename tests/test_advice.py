"""Which quant, which placement: the rule, and the tables that the document and the cards share."""

import json
import re
from itertools import cycle
from pathlib import Path

import pytest
from conftest import REPO
from factory import MANIFEST, record_of, with_observed
from hypothesis import given
from hypothesis import strategies as st

from moelib.base import stats
from moelib.catalogue import params
from moelib.catalogue.facts import ImatrixFacts
from moelib.gguf import gguf_file, twin
from moelib.gguf.gguf_header import Header, Tensor
from moelib.models import quantize
from moelib.planner.describe import describe
from moelib.publish import cards
from moelib.report import advice, appendix
from moelib.report.advice import GB, Choice
from moelib.study import study

FULL = REPO / "outputs/h100-twins"
MODEL = "deepseek-moe-16b"
GIB = 1 << 30


def choice(quant, vram_bytes, bits, rate, flags="", spread=None):
    """A choice; `spread`: half of the interval of its tokens/s."""
    bounds = (rate - spread, rate + spread, 5) if spread is not None else (None, None, 1)
    return Choice(
        quant=quant,
        file_name=f"m-{quant}.gguf",
        place="experts on the CPU" if flags else "all on the GPU",
        flags=flags,
        context=1024,
        vram_bytes=vram_bytes,
        cpu_layers=27 if flags else 0,
        cpu_bytes=GIB if flags else 0,
        bits_per_weight=bits,
        rate=stats.Estimate(rate, *bounds),
        sources={quant: "a digest"},
    )


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
    whole, part = choice("Q8_0", 8 * GB, 8.5, 300), choice("Q8_0", 2 * GB, 8.5, 30, "--cpu-moe")
    assert advice.fitting([whole, part], 8 * GB) == [whole, part]
    assert advice.fitting([whole, part], 8 * GB - 1) == [part]
    assert advice.finest([part, whole]) is whole
    assert advice.fitting([], GB) == []
    assert advice.answers([]) == []


def test_files_whose_speed_the_data_do_not_tell_apart_are_both_named():
    two, four, eight = (
        choice("Q2_K", GB, 3.3, 325, spread=5),
        choice("Q4_K_M", GB, 5.3, 322, spread=3),
        choice("Q8_0", GB, 8.5, 290, spread=4),
    )
    assert advice.answers([two, four, eight]) == [
        advice.Answer("most tokens/s", four, ("Q2_K",)),
        advice.Answer("most bits per weight", eight),
    ]
    assert advice.answers([two, four]) == [advice.Answer("both", four, ("Q2_K",))]
    slower = choice("Q4_K_M", GB, 5.3, 316, spread=3.9)
    assert advice.answers([two, slower])[0] == advice.Answer("most tokens/s", two)
    once = choice("Q4_K_M", GB, 5.3, 322)  # without an interval nothing is said of a tie
    assert advice.answers([two, once])[0] == advice.Answer("most tokens/s", two)
    tied = choice("Q2_K", GB, 3.3, 322, "--n-cpu-moe 2", spread=4)
    assert advice.answers([two, tied]) == [advice.Answer("both", two)], "another placement of a file is no other file"


def test_which_file_says_it_gpu_by_gpu(full, monkeypatch):
    away = "--cpu-moe --load-mode none"
    listed = [
        choice("Q8_0", 18 * GB, 8.5, 290, spread=3),
        choice("Q2_K", 7 * GB, 3.3, 320, spread=3),
        choice("Q8_0", 5 * GB, 8.5, 30, away),
        choice("Q2_K", 5 * GB - 1, 3.3, 40.04, away),
    ]
    monkeypatch.setattr(advice, "choices", lambda results, model: listed)
    table, ram = advice.which_file(full, MODEL), "1.00 GiB, 27 layers"
    first = ("most tokens/s", "**Q2_K**", f"`{away}`", ram, "4.66 GiB", "40.0 (n = 1)")
    second = ("most bits per weight", "**Q8_0**", f"`{away}`", ram, "4.66 GiB", "30.0 (n = 1)")
    whole = ("most tokens/s", "**Q2_K**", "none", "none", "6.52 GiB", "320 [317, 323]")
    assert [tuple(row.values()) for row in table.rows] == [
        ("4 GB", "both", "none fits", *["n/a"] * 4),
        ("6 GB", *first),
        ("6 GB", *second),
        ("8 to 16 GB", *whole),
        ("8 to 16 GB", *second),
        ("20 GB and more", *whole),
        ("20 GB and more", "most bits per weight", "**Q8_0**", "none", "none", "16.76 GiB", "290 [287, 293]"),
    ]
    assert table.sources == {"Q8_0": "a digest", "Q2_K": "a digest"}
    assert "Where two files are named" not in table.note

    lines = advice.commands(full, MODEL).text.splitlines()
    assert (lines[0], lines[-1]) == ("```bash", "```")
    assert lines[1:3] == [
        "# Q2_K, experts on the CPU: 4.66 GiB of VRAM, 1.00 GiB of experts in RAM, 40.0 tokens/s",
        f"llama-server -m m-Q2_K.gguf -ngl 99 -c 1024 -np 1 -fa on {away}",
    ]
    assert [line.split(" -m ")[1] for line in lines if not line.startswith(("#", "`"))] == [
        f"m-Q2_K.gguf -ngl 99 -c 1024 -np 1 -fa on {away}",
        f"m-Q8_0.gguf -ngl 99 -c 1024 -np 1 -fa on {away}",
        "m-Q2_K.gguf -ngl 99 -c 1024 -np 1 -fa on",
        "m-Q8_0.gguf -ngl 99 -c 1024 -np 1 -fa on",
    ]
    assert "Q8_0" not in advice.commands(full, MODEL, "Q2_K").text


def raw(table):
    """(quant, flags) -> the most VRAM, and the experts' layers on the CPU, by the files of the records of a table."""
    found = {}
    for run_id in (k for k in table.sources if not k.startswith("quants/")):
        record = json.loads((FULL / "records" / f"{run_id}.json").read_text(encoding="utf-8"))
        spec, observed = record["spec"], record["observed"]
        flags = {"baseline": "none", "cpu-moe": "`--cpu-moe --load-mode none`"}[spec["placement"]]
        assert spec["load_mode"] == ("mmap" if flags == "none" else "none"), "copying the experts is advised"
        memory, key = observed["memory"], (spec["quant"], flags)
        taken = max(memory["value_bytes"], memory["growth_bytes"])
        found[key] = max(taken, found.get(key, (0, 0))[0]), observed["placement"]["moved_blocks"]
    return found


def test_the_committed_advice_is_what_the_records_say(full):
    table = advice.which_file(full, MODEL)
    known, sizes = raw(table), []
    assert len(known) == 6
    for row in table.rows:
        gpus, quant = row["VRAM of the GPU"], re.match(r"\*\*(\w+)\*\*", row["take"])[1]
        low, high = (re.findall(r"\d+", gpus) * 2)[:2] if "more" not in gpus else (gpus[:2], "80")
        taken, layers = known[quant, row["flags"]]
        assert taken <= int(low) * 10**9
        assert row["VRAM needed"] == stats.size(taken)
        assert row["experts in RAM"].endswith(f", {layers} layers" if layers else "none")
        fits = [q for (q, _), (nbytes, _) in known.items() if nbytes <= int(high) * 10**9]
        if row["wanted"] == "most bits per weight":
            assert quant == max(fits, key=["Q2_K", "Q4_K_M", "Q8_0"].index)
            sizes += [gb for gb in advice.GPUS_GB if int(low) <= gb <= int(high)]
    assert sizes == list(advice.GPUS_GB)


def test_the_comparison_has_a_row_for_each_placement_of_each_quant_with_known_values(full):
    table = advice.comparison(full, MODEL)
    quants = [q for q in full.parameters.quants if f"{MODEL}/{q}" in full.measured]
    away = {"`--cpu-moe`": "mmap", "`--cpu-moe --load-mode none`": "none"}
    assert [(row["quant"], row["flags"]) for row in table.rows] == [(q, flags) for q in quants for flags in away]
    by_id = {r.run_id: r for r in full.records}
    for row, sources in zip(table.rows, table.row_sources, strict=True):
        runs = [by_id[k] for k in sources]
        assert {r.spec.quant for r in runs} == {row["quant"]}
        sides = [("baseline", "mmap"), ("cpu-moe", away[row["flags"]])]
        assert {(r.spec.placement, r.spec.load_mode) for r in runs} == {*sides}
        assert row["rounds"] == len({r.spec.block for r in runs})
        means = []
        for side in sides:
            placed = [r for r in runs if (r.spec.placement, r.spec.load_mode) == side]
            rates = [[q.tps for q in r.observed.requests if q.workload == "long-512"] for r in placed]
            means.append(stats.geometric_mean([sum(v) / len(v) for v in rates]).value)
        assert row["tokens/s"] == f"{stats.number(means[0])} → {stats.number(means[1])}"
        assert row["tokens/s, ratio"].startswith(stats.number(means[1] / means[0]))
        assert row["experts in RAM"] == f"{stats.size(placed[0].observed.placement.moved_bytes)}, 27 layers"


def test_without_a_gpu_none_is_advised_and_nothing_is_called_one(demo):
    table = advice.which_file(demo, MODEL)
    assert not table.rows
    assert "no GPU took part" in table.markdown()
    assert "no GPU took part" in advice.comparison(demo, MODEL).note
    assert "all on the device" in advice.verdict(demo, MODEL).text
    assert "fits" not in advice.limits(demo).text


def test_sentences_follow_from_the_comparisons(full):
    table = advice.verdict(full, MODEL)
    rows = [r for r in advice.comparison(full, MODEL).rows if r["flags"] == "`--cpu-moe`"]
    ratios = [float(r["tokens/s, ratio"].split()[0]) for r in rows]
    low, high = map(float, re.search(r"decoding was ([\d.]+) to ([\d.]+) times", table.text).groups())
    assert low == pytest.approx(1 / max(ratios), rel=0.01)
    assert high == pytest.approx(1 / min(ratios), rel=0.01)
    assert table.sources
    assert advice.limits(full).text.count("Quality was not measured") == 1


def test_a_model_of_which_nothing_is_measured_is_recommended_nothing(full):
    assert "nothing is recommended" in advice.verdict(full, "gpt-oss-20b").text
    assert not advice.comparison(full, "gpt-oss-20b").rows
    assert advice.choices(full, "gpt-oss-20b") == []
    assert "no run has VRAM" in advice.which_file(full, "gpt-oss-20b").markdown()
    assert "No command is advised" in advice.commands(full, "gpt-oss-20b").text


def header(tensors, kinds):
    """The header of a file with these tensors: the experts' types in turn, and Q6_K and F32 for the rest."""
    experts, found = cycle(kinds), []
    for name, shape in tensors:
        kind = next(experts) if "_exps" in name else "Q6_K" if len(shape) > 1 and not shape[0] % 256 else "F32"
        nbytes = gguf_file.tensor_bytes(shape, kind)
        found.append(Tensor(name, shape, kind, nbytes, 0))
    metadata = {"general.architecture": "deepseek", "deepseek.block_count": 28, "deepseek.expert_count": 64}
    return Header(Path("m.gguf"), sum(t.nbytes for t in found), metadata, tuple(found))


def manifest(of):
    return MANIFEST.model_copy(update=quantize.told(of, "Q4_K_M", "a" * 64))


@pytest.mark.parametrize("model", ["deepseek-moe-16b", "phi-3.5-moe"])
@pytest.mark.parametrize("kinds", [["Q8_0"], ["Q4_0", "Q5_0", "Q8_0"], ["Q4_0", "Q4_0", "F16", "Q5_1"]])
def test_bits_of_experts_and_rest_are_those_of_the_header(model, kinds):
    tensors = [(t.name, t.shape) for t in twin.tensors(params.model(model).at_scale("full"))]
    of = header(tensors, kinds)
    told, (experts, rest) = describe(of), appendix.bits(manifest(of))
    assert experts == f"{told.expert.bits_per_weight:.2f}"
    digits = len(rest.partition(".")[2])
    assert rest == f"{told.rest.bits_per_weight:.{digits}f}"
    assert digits >= 1


def test_bits_that_a_manifest_does_not_tell_are_not_told():
    sizes = [("blk.0.ffn_up_exps.weight", (512, 64, 8)), ("blk.0.ffn_down_exps.weight", (256, 32, 8))]
    unequal = manifest(header([*sizes, ("output.weight", (256, 512))], ["Q4_K", "Q8_0"]))
    assert appendix.bits(unequal) == ("n/a", "n/a")
    equal_types = manifest(header([*sizes, ("output.weight", (256, 512))], ["Q4_K"]))
    assert appendix.bits(equal_types)[0] == "4.50"
    assert appendix.bits(unequal.model_copy(update={"expert_types": {"NEW_9": 2}})) == ("n/a", "n/a")
    dense = unequal.model_copy(update={"expert_types": {}, "expert_bytes": 0})
    assert appendix.bits(dense) == ("n/a", f"{dense.bits_per_weight:.2f}")


def test_a_table_of_files_says_why_bits_are_not_told(full):
    table = appendix.files_table(full)
    assert "n/a" not in table.markdown()
    unknown = full.manifests[0].model_copy(update={"expert_types": {"NEW_9": 2}})
    parts = study.Study(full.path, full.plan, study.Contents(full.evidence, (unknown,), {}))
    why = "Bits per weight are n/a where the manifest, which counts tensors by type, does not tell weights."
    assert appendix.files_table(parts).note.endswith(f" {why}")
    assert cards._linked(appendix.files_table(parts), parts).note == why


def test_what_files_were_made_of_is_told_once_for_those_made_alike(full):
    text = appendix.made(full.part(MODEL, ("Q4_K_M", "Q2_K"))).text
    assert len(text.splitlines()) == 1
    first = full.manifests[0]
    assert f"(SHA-256 `{first.source_sha256}`), with llama.cpp, version: 0.6.0" in text
    assert text.endswith(", without an imatrix.")
    with_matrix = first.model_copy(update={"imatrix": ImatrixFacts(file_name="m.imatrix", sha256="c" * 64)})
    found = first.model_copy(update={"quant": "as-is", "engine_version": None, "source_sha256": None, "origin": None})
    parts = study.Study(full.path, full.plan, study.Contents(full.evidence, (with_matrix, found), {}))
    lines = appendix.made(parts).text.splitlines()
    assert lines[0].endswith(f"with the imatrix m.imatrix, SHA-256 `{'c' * 64}`.")
    assert lines[1] == "- as-is: from a source of unknown origin."


@pytest.mark.parametrize(
    ("placement", "load_mode", "words", "flags"),
    [
        ("baseline", "mmap", "all on the device", ""),
        ("baseline,ubatch=64", "mmap", "all on the device (ubatch=64)", "-ub 64"),
        ("cpu-moe", "mmap", "experts on the CPU", "--cpu-moe"),
        ("cpu-moe", "mlock", "experts on the CPU", "--cpu-moe --load-mode mlock"),
        ("n-cpu-moe=4", "none", "experts of 3 layers on the CPU", "--n-cpu-moe 4 --load-mode none"),
        ("cpu-moe,kv=q8_0", "mmap", "experts on the CPU (kv=q8_0)", "--cpu-moe -ctk q8_0 -ctv q8_0"),
        ("cpu-moe,threads=8", "mmap", "experts on the CPU (threads=8)", "--cpu-moe -t 8"),
    ],
)
def test_a_placement_in_words_and_in_flags(placement, load_mode, words, flags):
    run = record_of(placement=placement, load_mode=load_mode)
    assert (advice.place(run), advice.flags(run)) == (words, flags)


def test_one_layer_is_one_layer():
    run = record_of(placement="n-cpu-moe=2")
    moved = run.observed.placement.__class__(3, 1, 10, 10, 10, 10)
    assert advice.place(with_observed(run, placement=moved)) == "experts of 1 layer on the CPU"
