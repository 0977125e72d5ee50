"""Which quant, which placement: the tables that the document and the cards share, against the records."""

import json
import re
from itertools import cycle
from pathlib import Path
from statistics import fmean

import pytest
from conftest import REPO
from factory import MANIFEST, record_of, with_observed

from moelib.base import stats
from moelib.catalogue import params
from moelib.catalogue.facts import ImatrixFacts
from moelib.evidence import appendix
from moelib.gguf import gguf_file, twin
from moelib.gguf.gguf_header import Header, Tensor
from moelib.models import quantize
from moelib.planner.describe import describe
from moelib.publish import cards
from moelib.report import advice, results
from moelib.report.advice import GB
from moelib.study import study

FULL = REPO / "outputs/h100-twins"
MODEL = "deepseek-moe-16b"


@pytest.fixture(scope="module")
def full():
    return study.Study.read(FULL)


@pytest.fixture(scope="module")
def demo():
    return study.Study.read(REPO / "tests/fixtures/twins")


def taken(study):
    """(quant, flags) -> the most VRAM, the experts' layers and their bytes on the CPU, by the files of the records."""
    found = {}
    for run_id in (r.run_id for r in study.used if r.spec.model == MODEL):
        record = json.loads((FULL / "records" / f"{run_id}.json").read_text(encoding="utf-8"))
        spec, observed = record["spec"], record["observed"]
        flags = {"baseline/mmap": "", "cpu-moe/mmap": " --cpu-moe", "cpu-moe/none": " --cpu-moe --load-mode none"}
        key = spec["quant"], flags[f"{spec['placement']}/{spec['load_mode']}"]
        memory, moved = observed["memory"], observed["placement"]
        vram = max(memory["value_bytes"], memory["growth_bytes"], found.get(key, (0,))[0])
        found[key] = vram, moved["moved_blocks"], moved["moved_bytes"]
    return found


def test_what_to_run_is_what_the_records_say(full):
    """Of each card and RAM; with load mode none, as copying the experts is advised."""
    known = taken(full)
    rows = advice.of_model(full, MODEL).rows
    advised = {key: v for key, v in known.items() if key[1] != " --cpu-moe"}
    assert len(known) == 9
    for row in rows:
        quant, flags = re.match(r"\w+", row["file"])[0], row["flags"].strip("`")
        vram, layers, _ = advised[quant, f" {flags}" if flags else ""]
        low, high = (re.findall(r"\d+", row["card"]) * 2)[:2]
        high = "80" if "from" in row["card"] else high
        assert vram <= int(low) * GB
        assert row["VRAM"] == stats.number(vram, 2**-30)
        assert row["layers"] == (str(layers) if layers else "")
        if row["for"] != "speed":
            fits = [q for (q, _), (nbytes, *_) in advised.items() if nbytes <= int(high) * GB]
            best = max(fits, key=["Q2_K", "Q4_K_M", "Q8_0"].index)
            assert quant == best or row["RAM"] == "16", "Q8_0's experts need more than 16 GB"
    for aim in ("speed", "bits"):
        cards = {gb for row in rows if row["for"] in (aim, "both") for gb in covered(row["card"])}
        assert cards == set(advice.CARDS_GB)


def test_what_is_fastest_and_has_most_bits_is_said_once(full):
    (said,) = {row["for"] for row in advice.of_model(full.part(MODEL, ("Q2_K",)), MODEL).rows}
    assert said == "both"
    every = [tuple(v for k, v in row.items() if k != "for") for row in advice.of_model(full, MODEL).rows]
    assert len(every) == len(set(every))


def covered(cards):
    """The sizes that a row is about."""
    low, *more = map(int, re.findall(r"\d+", cards))
    high = more[0] if more else max(advice.CARDS_GB) if "from" in cards else low
    return [gb for gb in advice.CARDS_GB if low <= gb <= high]


def test_each_measured_answer_has_its_whole_command(full):
    lines = advice.commands(full, MODEL).text.splitlines()
    assert (lines[0], lines[-1]) == ("```bash", "```")
    known = taken(full)
    said = re.findall(
        r"^# (\w+), (.*): (.*) of VRAM(?:, (.*) of experts in RAM)?, .* tokens/s$", "\n".join(lines), re.M
    )
    commands = [line for line in lines if line.startswith("llama-server")]
    assert len(said) == len(commands) == len(set(commands)) == 6
    for (quant, place, vram, away), line in zip(said, commands, strict=True):
        start = f"llama-server -m {MODEL}-{quant}.gguf -ngl 99 -c 1024 -np 1 -fa on"
        assert line.startswith(start)
        most, layers, nbytes = known[quant, line.removeprefix(start)]
        assert (vram, away) == (stats.size(most), stats.size(nbytes) if layers else "")
        assert place == ("experts on the CPU" if layers else "all on the GPU")
    rows = advice.of_model(full, MODEL).rows
    assert {line.split(" -fa on")[1].strip() for line in commands} == {row["flags"].strip("`") for row in rows}
    of_one = advice.commands(full.part(MODEL, ("Q2_K",)), MODEL, "Q2_K").text
    assert [line.split(" -fa on")[1] for line in of_one.splitlines() if line.startswith("llama")] == [
        "",
        " --cpu-moe --load-mode none",
    ]
    assert "Q8_0" not in of_one


def test_speed_has_a_row_for_each_placement_of_each_quant_with_known_values(full):
    table = results.speed(full, MODEL, "long-512")
    quants = [q for q in full.parameters.quants if f"{MODEL}/{q}" in full.measured]
    sides = {"baseline, mmap": ("baseline", "mmap"), "cpu-moe, mmap": ("cpu-moe", "mmap")}
    sides |= {"cpu-moe, none": ("cpu-moe", "none")}
    assert [(row["quant"], row["placement"]) for row in table.rows] == [(q, side) for q in quants for side in sides]
    by_id = {r.run_id: r for r in full.records}
    assert "[95 % interval] of 5 rounds" in table.note
    base = {}
    for row, sources in zip(table.rows, table.row_sources, strict=True):
        runs = [by_id[k] for k in sources]
        assert {r.spec.quant for r in runs} == {row["quant"]}
        assert {(r.spec.placement, r.spec.load_mode) for r in runs} == {sides[row["placement"]]}
        assert len({r.spec.block for r in runs}) == 5
        of_runs = [[q for q in r.observed.requests if q.workload == "long-512"] for r in runs]
        rate = stats.geometric_mean([fmean(q.tps for q in of) for of in of_runs])
        first, warm = (stats.geometric_mean([fmean(q.ttft_s for q in of[part]) for of in of_runs]) for part in PARTS)
        assert row["tokens/s"] == stats.estimate(rate)
        assert (row["TTFT, first"], row["TTFT, warm"]) == (stats.number(first.value, 1e3), stats.estimate(warm, 1e3))
        base.setdefault(row["quant"], (rate.value, warm.value))
        if row["placement"] != "baseline, mmap":
            assert row["% of baseline"].startswith(stats.number(rate.value / base[row["quant"]][0], 100))
            assert row["times baseline"].startswith(stats.number(warm.value / base[row["quant"]][1]))


PARTS = (slice(0, 1), slice(1, None))
"""Of a run's requests: the first, and the warm ones."""


def test_without_a_gpu_none_is_advised_and_nothing_is_called_one(demo):
    (table,) = advice.what_to_run(demo)
    assert not table.rows
    assert "no GPU took part" in table.markdown()
    assert "all on the device" in advice.verdict(demo, MODEL).text
    assert "all on the device" in advice.commands(demo, MODEL).text
    assert "GPU" not in advice.commands(demo, MODEL).text
    assert "driver" not in results.limits(demo).text


def test_sentences_follow_from_the_comparisons(full):
    table = advice.verdict(full, MODEL)
    rows = [r for r in results.speed(full, MODEL, "long-512").rows if r["placement"] == "cpu-moe, mmap"]
    ratios = [float(r["% of baseline"].split()[0]) / 100 for r in rows]
    low, high = map(float, re.search(r"decoding was ([\d.]+) to ([\d.]+) times", table.text).groups())
    assert low == pytest.approx(1 / max(ratios), rel=0.01)
    assert high == pytest.approx(1 / min(ratios), rel=0.01)
    assert table.sources
    assert results.limits(full).text.count("quality were not measured") == 1


def test_a_model_of_which_nothing_is_measured_is_recommended_nothing(full):
    assert "nothing is recommended" in advice.verdict(full, "gpt-oss-20b").text
    assert not results.speed(full, "gpt-oss-20b", "long-512").rows
    assert not any("gpt-oss-20b" in one.name for one in advice.what_to_run(full))
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
    assert lines[1] == "- as-is: source: of unknown origin."


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
    assert (advice.place(run), advice.flags(run.spec.placed, run)) == (words, flags)


def test_one_layer_is_one_layer():
    run = record_of(placement="n-cpu-moe=2")
    moved = run.observed.placement.__class__(3, 1, 10, 10, 10, 10)
    assert advice.place(with_observed(run, placement=moved)) == "experts of 1 layer on the CPU"
