"""Comparisons by the real llama-perplexity on the loopback device, what stands in their way, and what they decide."""

import contextlib
from dataclasses import replace

import gguf
import numpy as np
import pytest
import texts

from moelib.audit.record import RecordError
from moelib.base import files
from moelib.campaign import assess, bench, campaign, given
from moelib.catalogue import corpora, params
from moelib.catalogue.facts import DeviceFacts, HostFacts
from moelib.machine import host
from moelib.measure import device
from moelib.models import models, quantize
from moelib.quality import checks, comparison, score, wanted
from moelib.quality.comparison import Side, Spec
from moelib.quality.desk import Desk

STUDY = """
title: Words
models: [deepseek-moe-16b]
weights: twin
scale: nano
quants: [Q8_0, Q2_K]
placements: [{placement: baseline}, {placement: cpu-moe}]
workloads: [smoke]
rounds: 2
context: 256
quality: {corpora: [words], context: 64, chunks: 6, placement_chunks: 3}
device: loopback
seed: 1
"""


def give_text(home, name="words", text=None):
    """Put a corpus into the home's catalogue."""
    path = home / "params/corpora" / f"{name}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text(texts.prose() if text is None else text, encoding="utf-8")
    entry = f"title: W\n  file: corpora/{name}.txt\n  sha256: {files.sha256(path)}\n  licence: MIT\n  source: here\n"
    with (home / "params/corpora.yaml").open("a", encoding="utf-8") as f:
        f.write(f"{name}:\n  {entry}  calibration: false\n")
    params._yaml.cache_clear()
    return path


@pytest.fixture
def words(home):
    give_text(home)
    (home / "params/studies/words.yaml").write_text(STUDY, encoding="utf-8")
    return home


def spec_of(base, other, chunks=3, **change):
    known = {"study": "s", "model": "deepseek-moe-16b", "weights": "twin", "scale": "nano", "corpus": "words"}
    known |= {"corpus_sha256": "0" * 64, "context": 64, "chunks": chunks, "device": "loopback"}
    return Spec(**known | change, base=side(base), other=side(other))


def side(text):
    quant, placement = text.split(" ")
    return Side(quant, placement, "mmap")


@pytest.fixture
def desk(engine, home, tmp_path):
    where = device.Loopback()
    facts = HostFacts(**host.facts(), host_id=host.identity())
    (tmp_path / "work").mkdir()
    return Desk(tmp_path / "out", engine, where, DeviceFacts(**where.identity()), facts, tmp_path / "work")


@pytest.fixture
def made(engine, home, tmp_path):
    """Quant -> file."""
    source = models.make_twin("deepseek-moe-16b", "nano")

    def make(quant):
        if quant == wanted.SOURCE:
            return quantize.unquantised(source)
        return quantize.make(source, quant, engine, tmp_path / "q")

    return make


def compare(desk, made, text, *specs):
    return list(desk.compare(specs[0].base, [(s, 1) for s in specs], made, text))


@pytest.mark.engine
def test_both_accounts_agree_and_quantising_costs_more_the_fewer_bits(desk, made, home):
    text = give_text(home)
    asked = [spec_of("F16 baseline", f"{q} baseline", chunks=6) for q in ("Q8_0", "Q4_K_M", "Q2_K")]
    found = compare(desk, made, text, *asked)
    # a twin's perplexity is that of chance, which the check of the base says
    assert {c.reasons for c in found} == {("base-knows-the-text",)}
    for c in found:
        said = {k.id: k for k in c.audit}
        assert said["two-accounts"].passed, said["two-accounts"].measured
        assert said["tokens-fit"].passed
        assert set(c.found.tool) == set(checks.own(c.found))
    nmse = [checks.nmse(c) for c in found]
    assert nmse == sorted(nmse)
    assert nmse[0] < 0.01 < nmse[-1]
    assert not list(desk.work.glob("*.logprobs"))


@pytest.mark.engine
def test_a_placement_changes_nothing_but_rounding(desk, made, home):
    text = give_text(home)
    for quant in ("F16", "Q4_K_M"):
        asked = [spec_of(f"{quant} baseline", f"{quant} {p}") for p in ("baseline,ubatch=8", "cpu-moe")]
        floor, moved = compare(desk, made, text, *asked)
        assert (floor.spec.kind, moved.spec.kind) == ("floor", "placement")
        assert (floor.status, moved.status) == ("valid", "valid"), (floor.message, moved.message)
        (judged,) = checks.sameness([floor, moved])
        assert judged.verdict in ("identical", "rounding"), judged.line


def harmed(file, path, tensor, change):
    """A copy of a file in which one tensor's data is another."""
    data = bytearray(file.path.read_bytes())
    reader = gguf.GGUFReader(file.path)
    (found,) = [t for t in reader.tensors if t.name == tensor]
    start, n = found.data_offset, found.n_bytes
    data[start : start + n] = change(np.frombuffer(bytes(data[start : start + n]), np.uint8)).tobytes()
    path.write_bytes(data)
    sha256 = files.sha256(path)
    manifest = file.manifest | {"sha256": sha256}
    return replace(
        file, header=replace(file.header, path=path), manifest=manifest, content=files.Hashed(path, known=sha256)
    )


@pytest.mark.engine
@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q2_K"])
def test_an_offload_that_reads_the_wrong_experts_is_no_rounding(desk, made, home, tmp_path, quant):
    """Experts of the last layer in another order: what a wrong stride or index would do."""
    text, good = give_text(home), made(quant)
    tensor = [t.name for t in good.header.tensors if "down_exps" in t.name][-1]
    wrong = harmed(good, tmp_path / "wrong.gguf", tensor, lambda b: np.roll(b.reshape(16, -1), 1, axis=0))
    turns = iter([good, good, wrong])
    asked = [spec_of(f"{quant} baseline", f"{quant} {p}") for p in ("baseline,ubatch=8", "cpu-moe")]
    floor, moved = compare(desk, lambda _: next(turns), text, *asked)
    (judged,) = checks.sameness([floor, moved])
    assert judged.verdict == "differs", judged.line


@pytest.mark.engine
def test_weights_that_are_no_numbers_give_a_failed_record(desk, made, home, tmp_path):
    text, good = give_text(home), made("F16")
    nan = np.frombuffer(np.float16("nan").tobytes(), np.uint8)
    wrong = harmed(good, tmp_path / "nan.gguf", "output.weight", lambda b: np.tile(nan, len(b) // 2))
    turns = iter([good, wrong])
    (c,) = compare(desk, lambda _: next(turns), text, spec_of("F16 baseline", "F16 cpu-moe"))
    assert (c.status, c.reasons, c.found) == ("failed", ("not-a-number",), None), c.message


@pytest.mark.engine
@pytest.mark.parametrize(
    ("text", "chunks", "why"), [("A few words.", 3, "text-too-short"), (None, 500, "text-too-short")]
)
def test_a_text_that_is_too_short_gives_failed_records_and_no_number(desk, made, home, text, chunks, why):
    path = give_text(home, text=text)
    asked = [spec_of("Q8_0 baseline", f"Q8_0 {p}", chunks) for p in ("baseline,ubatch=8", "cpu-moe")]
    found = compare(desk, made, path, *asked)
    assert [(c.status, c.reasons, c.found) for c in found] == [("failed", (why,), None)] * 2
    assert not list(desk.work.glob("*.logprobs"))


@pytest.mark.engine
def test_a_disk_without_room_is_told_before_anything(desk, made, home, monkeypatch):
    text = give_text(home)
    monkeypatch.setattr(files, "free_bytes", lambda folder: 1 << 20)
    with pytest.raises(files.FileError, match="comparing deepseek-moe-16b over words"):
        compare(desk, made, text, spec_of("Q8_0 baseline", "Q8_0 cpu-moe"))
    assert not (desk.folder / comparison.FOLDER).exists()


@pytest.mark.engine
def test_a_study_compares_once_and_goes_on_where_it_was_stopped(words, monkeypatch):
    study, cells = campaign.select("words")
    asked = assess.planned(study, cells)
    assert {s.kind for s in asked} == {"floor", "placement"}
    assert len(assess.missing(study, cells)) == len(asked) == 9
    first = [next(assess.assess(study, cells))]
    assert len(assess.missing(study, cells)) == 8
    every = list(assess.assess(study, cells))
    assert [c.run_id for c in every[:1]] == [c.run_id for c in first]
    assert {c.status for c in every} == {"valid"}
    assert assess.missing(study, cells) == []
    monkeypatch.setenv("MOELIB_LLAMA_CPP", "/nowhere")
    assert [c.digest for c in assess.assess(study, cells)] == [c.digest for c in every]
    assert not list(study.path.rglob("*.logprobs"))
    read, damaged = comparison.read_all(study.path)
    assert (len(read), damaged) == (9, [])


@pytest.mark.engine
def test_two_processes_compare_nothing_twice(words, monkeypatch):
    """One has the cells for itself; what it did meanwhile is not done again by the other, which waited."""
    study, cells = campaign.select("words")
    with bench.alone(study, cells[:1]), monkeypatch.context() as m:
        m.setenv("MOELIB_PATIENCE", "0.01")
        with pytest.raises(files.InUse, match=f"{cells[0].name} of study words"):
            list(assess.assess(study, cells))
    assert comparison.read_all(study.path) == ([], [])
    real, others = assess.alone, []

    @contextlib.contextmanager
    def second(study, cells):
        monkeypatch.setattr(assess, "alone", real)
        others.extend(assess.assess(study, list(cells)))
        with real(study, cells) as leases:
            yield leases

    monkeypatch.setattr(assess, "alone", second)
    mine = list(assess.assess(study, cells))
    assert [c.digest for c in mine] == [c.digest for c in others]
    assert {c.attempt for c in comparison.read_all(study.path)[0]} == {1}


@pytest.mark.engine
def test_a_quant_with_a_matrix_of_the_studys_text(words, engine, tmp_path):
    for name, calibration in (("matter", "true"), ("other", "false")):
        give_text(words, name, texts.prose(12_000))
        catalogue = words / "params/corpora.yaml"
        text = catalogue.read_text(encoding="utf-8")
        catalogue.write_text(text[: text.rindex("calibration:")] + f"calibration: {calibration}\n", encoding="utf-8")
    asked = STUDY.replace("[Q8_0, Q2_K]", "[Q2_K, Q2_K-imatrix]")
    for name, corpus in (("good", "matter"), ("bad", "other")):
        text = f"{asked}imatrix: {corpus}\n"
        (words / f"params/studies/{name}.yaml").write_text(text, encoding="utf-8")
    (words / "params/studies/lone.yaml").write_text(asked, encoding="utf-8")
    params._yaml.cache_clear()
    with pytest.raises(params.ParamsError, match="go together"):
        params.study("lone")
    study, cells = campaign.select("good")
    files_by = {c.quant: given.of_cell(study, c, engine, tmp_path) for c in cells}
    plain, made = files_by["Q2_K"], files_by["Q2_K-imatrix"]
    assert (made.manifest["quant"], made.path.name) == ("Q2_K-imatrix", "deepseek-moe-16b-Q2_K-imatrix.gguf")
    assert made.manifest["imatrix"]["file_name"] == "deepseek-moe-16b-matter.imatrix.gguf"
    assert made.header.type_counts == plain.header.type_counts
    assert made.manifest["sha256"] != plain.manifest["sha256"]
    study, cells = campaign.select("bad")
    with pytest.raises(params.ParamsError, match="other is a text to measure on"):
        given.of_cell(study, next(c for c in cells if c.quant != "Q2_K"), engine, tmp_path)


def test_what_quantising_costs_is_asked_of_real_weights_alone(words):
    (words / "params/studies/real.yaml").write_text(
        STUDY.replace("weights: twin\nscale: nano", "weights: real"), encoding="utf-8"
    )
    params._yaml.cache_clear()
    kinds = {}
    for name in ("words", "real"):
        study, cells = campaign.select(name)
        kinds[name] = {(s.kind, s.base.quant, s.other.quant) for s in assess.planned(study, cells)}
    assert {k for k, *_ in kinds["words"]} == {"floor", "placement"}
    assert kinds["real"] - kinds["words"] == {("quality", "F16", "Q8_0"), ("quality", "F16", "Q2_K")}
    others = [
        s.other.placement for s in assess.planned(study, cells) if s.kind == "placement" and s.base.quant == "Q8_0"
    ]
    assert others[0] == "cpu-moe"  # whose experts a GPU copies
    assert others[-1] == "cpu-moe,op-offload=off"  # computed by the CPU
    assert "random" in wanted.TWIN


def test_a_corpus_is_the_text_of_its_hash(words):
    assert corpora.corpus("words").verified() == words / "params/corpora/words.txt"
    (words / "params/corpora/words.txt").write_text("Another text.", encoding="utf-8")
    with pytest.raises(params.ParamsError, match="is not corpus words"):
        corpora.corpus("words").verified()
    (words / "params/corpora/words.txt").unlink()
    with pytest.raises(params.ParamsError, match="cannot be read"):
        corpora.corpus("words").verified()
    with pytest.raises(params.ParamsError, match="unknown corpus 'wordz'; did you mean 'words'"):
        corpora.corpus("wordz")


@pytest.fixture
def one(desk, made, home):
    """A comparison that was written, and its folder."""
    (c,) = compare(desk, made, give_text(home), spec_of("Q2_K baseline", "Q2_K baseline,ubatch=8"))
    return desk.folder, c


@pytest.mark.engine
def test_a_comparison_is_read_as_it_was_written_with_its_tokens(one):
    folder, c = one
    path = folder / comparison.FOLDER / f"{c.run_id}.json"
    assert comparison.read(path) == c
    scores = comparison.tokens(folder, c)
    assert scores.kld.shape == (3, c.found.scored)
    assert np.allclose(scores.kld.mean(1), c.found.chunks.kld, rtol=1e-4, atol=1e-9)
    text = path.read_text(encoding="utf-8")
    for old, new in (('"valid"', '"invalid"'), (f'"chunks":{c.spec.chunks}', '"chunks":9'), ("{", "")):
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(RecordError):
            comparison.read(path)
    path.write_text(text, encoding="utf-8")
    evidence = next((path.parent / "raw").glob("*.csv.gz"))
    evidence.write_bytes(evidence.read_bytes()[:-9])
    with pytest.raises(RecordError, match="is not what it names"):
        comparison.read(path)
    assert comparison.read_all(folder)[0] == []
    with pytest.raises(RecordError, match="never overwritten"):
        comparison.write(folder, c)


def harmful(found, how):
    chunks = {name: getattr(found.chunks, name) for name in found.chunks.__dataclass_fields__}
    if how == "all-chunks":
        return replace(found, chunks=replace(found.chunks, **{k: v[:-1] for k, v in chunks.items()}))
    if how == "possible":
        return replace(found, chunks=replace(found.chunks, kld=(-0.1, *found.chunks.kld[1:])))
    if how == "base-knows-the-text":
        return replace(found, chunks=replace(found.chunks, base_nll=(9.0,) * len(found.chunks.kld)))
    return replace(found, tool=found.tool | {"kld": found.tool["kld"] * 1.1 + 1e-3})


def believable():
    """What a comparison of real weights could have found, with its tokens."""
    chance, shape = np.random.default_rng(3), (4, 31)
    base = chance.gamma(2, 1.0, shape)
    s = score.Scores(
        base, base + 0.01, np.full(shape, 0.02), chance.random(shape) < 0.9, np.ones(shape), np.full(shape, 50.0)
    )
    found = comparison.Found(
        tokens_sha256="0" * 64,
        vocabulary=2000,
        scored=31,
        chunks=score.Chunks.of(s),
        tails=score.tails(s),
        tool=None,
        argv=(),
        seconds=1.0,
    )
    return replace(found, tool=checks.own(found)), s


def test_every_check_can_fail():
    spec, (found, scores) = spec_of("F16 baseline", "Q8_0 baseline", chunks=4), believable()
    assert {c.id for c in checks.of(spec, found, ["F16", "F32"], scores) if not c.passed} == set()
    for how in ("all-chunks", "possible", "base-knows-the-text", "two-accounts"):
        failed = {c.id for c in checks.of(spec, harmful(found, how), ["F16", "F32"], None) if not c.passed}
        assert how in failed
    rounded = replace(found, chunks=replace(found.chunks, kld=(-1.5e-5, *found.chunks.kld[1:])))
    assert "possible" not in {c.id for c in checks.of(spec, rounded, ["F16", "F32"], None) if c.failed}
    assert "base-unquantised" in {c.id for c in checks.of(spec, found, ["F16", "Q8_0"], None) if not c.passed}
    assert "two-accounts" in {c.id for c in checks.of(spec, replace(found, tool=None), ["F16"], None) if not c.passed}
    other = replace(scores, kld=scores.kld * 1.01)
    assert {c.id for c in checks.of(spec, found, ["F16"], other) if not c.passed} == {"tokens-fit"}


@pytest.mark.parametrize(
    ("deep", "times", "holds"), [(0, 1.002, False), (1, 1.002, True), (1, 0.998, False), (1, 1.2, False)]
)
def test_tokens_cut_off_in_the_file_may_make_the_tools_perplexity_higher_and_no_more(deep, times, holds):
    spec, (found, scores) = spec_of("F16 baseline", "Q8_0 baseline", chunks=4), believable()
    nll = scores.nll.copy()
    nll[0, :deep] = checks.DEPTH + 1
    scores = replace(scores, nll=nll)
    found = replace(found, chunks=score.Chunks.of(scores), tool=None)
    told = checks.own(found) | {"perplexity": checks.own(found)["perplexity"] * times}
    audit = checks.of(spec, replace(found, tool=told), ["F16", "F32"], scores)
    assert ("two-accounts" not in {c.id for c in audit if not c.passed}) is holds


@pytest.mark.engine
def test_the_command_and_the_notebook_compare_too(words):
    from click.testing import CliRunner

    from moelib import cli

    said = CliRunner().invoke(cli.main, ["quality", "words", "--cell", "deepseek-moe-16b/Q8_0"])
    assert said.exit_code == 0, said.output
    assert "their weights are random" in said.output
    assert "6 of 6 comparisons are valid" in said.output
    study, cells = campaign.select("words")
    assert campaign.run_cells(study, cells) == []
    assert assess.missing(study, cells) == []
    executed = (study.path / "notebooks/deepseek-moe-16b-Q2_K.ipynb").read_text(encoding="utf-8")
    assert "Q2_K cpu-moe, mmap against Q2_K baseline, mmap: valid" in executed


def test_a_study_without_texts_says_what_to_do(home):
    from click.testing import CliRunner

    from moelib import cli

    said = CliRunner().invoke(cli.main, ["quality", "smoke"])
    assert said.exit_code != 0
    assert "names no texts to compare over" in said.output


@pytest.mark.engine
def test_a_comparison_whose_tokens_say_otherwise_does_not_stand(words):
    study, cells = campaign.select("words", "deepseek-moe-16b/Q8_0")
    first = next(assess.assess(study, cells))
    path = study.path / comparison.FOLDER / f"{first.run_id}.json"
    chunks = first.found.chunks
    forged = replace(first.found, chunks=replace(chunks, kld=tuple(k + 1e-3 for k in chunks.kld)))
    path.unlink()
    comparison.write(study.path, first.model_copy(update={"found": forged}))
    assert "tokens-fit" in checks.again(study.path, comparison.read(path))[0]
    (problem,) = [p for p in study.again().problems if first.run_id in p]
    assert "tokens-fit" in problem
    done = next(assess.assess(study, cells))
    assert (done.spec, done.attempt) == (first.spec, 2)
    path.write_text("{}", encoding="utf-8")  # damaged: its number is not taken again
    assert comparison.next_attempt(study.path, first.spec) == 3
