"""Quantising with the real llama-quantize."""

import json
import sys
from dataclasses import replace

import ggufs
import pytest
from click.testing import CliRunner

from moelib import cli
from moelib.base import files
from moelib.campaign import campaign
from moelib.catalogue.params import ParamsError
from moelib.engine import quants
from moelib.figures import layout
from moelib.gguf import gguf_file
from moelib.machine import process
from moelib.models import models, quantize
from moelib.models.quantize import QuantizeError
from moelib.study import plan

pytestmark = pytest.mark.engine


@pytest.fixture
def source(home):
    return models.make_twin("deepseek-moe-16b", "tiny")


@pytest.fixture
def own_source(home, tmp_path, monkeypatch):
    """A source in a folder of this test's own, to be damaged."""
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "m"))
    return models.make_twin("deepseek-moe-16b", "nano")


FALLBACK = {"Q4_K_M": {"Q5_0", "Q8_0"}, "Q2_K": {"Q4_0"}, "Q8_0": set()}  # in b11434; older builds: IQ4_NL


@pytest.mark.parametrize("quant", FALLBACK)
def test_the_manifest_holds_what_is_really_in_the_file(source, engine, tmp_path, quant):
    quantised = quantize.make(source, quant, engine, tmp_path)
    manifest, header = quantised.manifest, gguf_file.read_header(quantised.path)
    assert manifest["sha256"] == files.sha256(quantised.path)
    assert manifest["file_bytes"] == quantised.path.stat().st_size == header.file_bytes
    assert manifest["tensor_types"] == header.type_counts
    assert manifest["predicted_bytes"] == pytest.approx(header.file_bytes, rel=0.01)
    assert manifest["expert_bytes"] == sum(t.nbytes for t in header.tensors if t.is_expert)
    fallbacks = manifest["fallbacks"]
    assert {f["type"] for f in fallbacks} == FALLBACK[quant]
    if fallbacks:  # a width of 352 or 1376 columns, as the real model's 1408 and 10944
        assert {f["columns"] for f in fallbacks} == {352, 704, 1376}
        assert {f["tensor"] for f in fallbacks} >= {f"blk.{i}.ffn_down_exps.weight" for i in (1, 2, 3)}


def test_phi_has_no_fallback_and_keeps_its_biases(home, engine, tmp_path):
    quantised = quantize.make(models.make_twin("phi-3.5-moe", "tiny"), "Q2_K", engine, tmp_path)
    assert quantised.manifest["fallbacks"] == []
    assert {t.type for t in quantised.header.tensors if t.name.endswith(".bias")} == {"F32"}


def test_a_file_is_made_once_and_again_only_if_it_changed(own_source, engine, tmp_path, monkeypatch):
    first = quantize.make(own_source, "Q8_0", engine, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "_make", lambda *_: pytest.fail("made again"))
        assert quantize.make(own_source, "Q8_0", engine, tmp_path).manifest == first.manifest
    for times_changed in (True, False):
        with first.path.open("r+b") as f:
            f.seek(-100, 2)
            f.write(b"flipped bits")
        if not times_changed:  # as on a disk that forgets
            note = json.loads(models.note(first.path).read_bytes())
            files.write_json(models.note(first.path), note | {"file": files.state(first.path)})
        again = quantize.make(own_source, "Q8_0", engine, tmp_path)
        assert files.sha256(again.path) == again.manifest["sha256"] == first.manifest["sha256"]


def test_a_quantised_source_is_refused_with_the_reason(own_source, engine, tmp_path):
    quantised = quantize.make(own_source, "Q8_0", engine, tmp_path)
    with pytest.raises(QuantizeError, match="already quantised .Q8_0."):
        quantize.make(replace(own_source, path=quantised.path), "Q2_K", engine, tmp_path)
    # one tensor is enough: gpt-oss has its experts in MXFP4
    first, *others = own_source.header.tensors
    with pytest.raises(QuantizeError, match="already quantised .MXFP4."):
        quantize.refuse_quantised(replace(own_source.header, tensors=(replace(first, type="MXFP4"), *others)))


def test_an_unknown_quant_is_refused_before_anything_runs(source, engine, tmp_path):
    for name, message in [
        ("q3_k_m", "unknown quant 'q3_k_m'; did you mean 'Q3_K_M'.; .* makes .*Q4_K_M, .*Q8_0"),
        ("nothing", "unknown quant 'nothing'; .* makes .*IQ4_XS"),
        ("F16", "F16 is not quantised, and what is measured are quants: "),
    ]:
        with pytest.raises(ParamsError, match=message):
            quantize.make(source, name, engine, tmp_path)


def test_what_llama_quantize_offers_is_known_by_its_numbers(engine):
    known = quants.offered(engine)
    assert {"Q4_K_M": 15, "Q2_K": 10, "Q8_0": 7, "IQ4_XS": 30, "F16": 1}.items() <= known.items()
    assert len(known) > 30


@pytest.mark.parametrize("quant", ["Q6_K", "IQ4_XS", "MXFP4_MOE"])
def test_any_quant_of_the_build_makes_a_file(home, engine, tmp_path, quant):
    made = quantize.make(models.make_twin("phi-3.5-moe", "nano"), quant, engine, tmp_path)
    assert made.manifest["quant"] == made.header.label == quant
    assert made.path.name == f"phi-3.5-moe-{quant}.gguf"
    assert quant.removesuffix("_MOE") in made.manifest["expert_types"]


def test_a_study_of_a_quant_beyond_the_three_runs_and_is_ordered_by_its_bits(home, engine):
    text = (home / "params/studies/smoke.yaml").read_text(encoding="utf-8")
    (home / "params/studies/more.yaml").write_text(text.replace("[Q8_0]", "[Q6_K, Q2_K]"), encoding="utf-8")
    study, cells = campaign.select("more")
    done = [r for cell in cells for r in campaign.measure(study, [cell])]
    assert {r.status for r in done} <= {"valid", "degraded"}, [r.reasons for r in done]
    assert {r.spec.quant for r in done} == {"Q2_K", "Q6_K"}
    assert layout.by_bits(study.again()) == ["Q2_K", "Q6_K"]


def test_a_study_of_an_unknown_quant_is_refused_before_anything_starts(home, engine):
    text = (home / "params/studies/smoke.yaml").read_text(encoding="utf-8")
    (home / "params/studies/odd.yaml").write_text(text.replace("[Q8_0]", "[Q8_0, Q4_KM]"), encoding="utf-8")
    result = CliRunner().invoke(cli.main, ["study", "run", "odd"])
    assert result.exit_code == 1
    assert "unknown quant 'Q4_KM'; did you mean 'Q4_K_M'?" in result.output
    assert not (home / "outputs/odd").exists()


def test_a_disk_that_is_too_small_is_named_before_the_engine_writes(own_source, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(files.FileError, match="quantising to .* GiB are free"):
        quantize.make(own_source, "Q8_0", engine, tmp_path)
    assert not list(own_source.path.parent.glob("*Q8_0*gguf*"))


def tool_that(tmp_path, engine, script):
    """The engine with a llama-quantize of `script`, and no llama-fit-params."""
    tool = tmp_path / "llama-quantize"
    tool.write_text(script, encoding="utf-8")
    tool.chmod(0o755)
    return replace(engine, folder=tmp_path, tools={**engine.tools, "llama-quantize": tool})


NOT_DRY = "#!/bin/sh\n[ $1 = --dry-run ] || "
BROKEN = {
    "fails": (NOT_DRY + "{ head -c 100000 /dev/zero > $2; echo no luck; exit 1; }", "ended with 1 .*\n.*no luck"),
    "writes rubbish": (NOT_DRY + "head -c 100000 /dev/zero > $2", "not a GGUF file"),
    "does not quantise": (NOT_DRY + 'cp "$1" "$2"', "the Q8_0 file is not quantised"),
    "takes another model": (NOT_DRY + 'cp "$OTHER" "$2"', "does not hold the source's tensors"),
    "floods its log": (
        f"#!{sys.executable}\nwhile True: print('x' * 4000)",
        "llama-quantize wrote more than .* to its log; use another build",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_tool_that_is_broken_is_not_believed_and_leaves_no_file(own_source, engine, tmp_path, monkeypatch, name):
    script, message = BROKEN[name]
    other = tmp_path / "other.gguf"
    other.write_bytes(ggufs.build(*ggufs.moe(), kind="Q8_0"))
    monkeypatch.setattr(quantize, "LOG_BYTES", 1 << 20)
    broken = tool_that(tmp_path, engine, script.replace("$OTHER", str(other)) + "\n")
    with pytest.raises((QuantizeError, gguf_file.GGUFError), match=message):
        quantize.make(own_source, "Q8_0", broken, tmp_path / "work")
    assert not list(own_source.path.parent.glob("*Q8_0*gguf*"))


def test_a_damaged_source_never_reaches_the_engine(own_source, engine, tmp_path, monkeypatch):
    with own_source.path.open("r+b") as f:
        f.truncate(own_source.header.file_bytes // 2)
    monkeypatch.setattr(process, "Child", lambda *_: pytest.fail("the engine was started"))
    with pytest.raises(gguf_file.GGUFError, match="truncated"):
        gguf_file.read_header(own_source.path)
    # through the catalogue, it is made again instead
    assert models.make_twin("deepseek-moe-16b", "nano").sha256 == own_source.sha256


def test_a_source_that_was_deleted_is_not_needed_for_quants_that_exist(own_source, engine, tmp_path):
    first = quantize.make(own_source, "Q8_0", engine, tmp_path)
    own_source.path.unlink()
    known = models.make_twin("deepseek-moe-16b", "nano", needed=False)
    assert (known, known.path.exists()) == (own_source, False)
    assert quantize.make(known, "Q8_0", engine, tmp_path).manifest == first.manifest
    assert not known.path.exists()
    # for another quant it is made again, the same
    other = quantize.make(known, "Q4_K_M", engine, tmp_path)
    assert known.path.exists()
    assert other.manifest["source_sha256"] == own_source.sha256


def test_a_source_that_was_never_made_is_made_even_where_it_is_not_needed(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "m"))
    assert models.make_twin("deepseek-moe-16b", "nano", needed=False).path.exists()


def test_an_architecture_that_the_engine_does_not_know_is_refused_before_quantising(engine, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(ggufs.build(*ggufs.moe("nonsense")))
    source = models.Source("m", "real", "full", path, files.sha256(path), "test")
    with pytest.raises(QuantizeError, match=r"cannot load m\.gguf: unknown model architecture: 'nonsense'"):
        quantize.refuse_unloadable(engine, source.header, tmp_path)
    # a build without that tool refuses it in its dry run
    old = replace(engine, folder=tmp_path)
    quantize.refuse_unloadable(old, source.header, tmp_path)
    with pytest.raises(QuantizeError, match="cannot quantise m.gguf: unknown model architecture: 'nonsense'"):
        quantize.predict_bytes(old, source.header, "Q8_0", tmp_path)


def test_tensors_that_the_engine_misses_are_refused_before_quantising(engine, tmp_path):
    whole = ggufs.write_nextn(tmp_path / "glm.gguf")
    quantize.refuse_unloadable(engine, gguf_file.read_header(whole), tmp_path)
    # the same with another tensor's name
    whole.write_bytes(whole.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_Q.weight"))
    with pytest.raises(QuantizeError, match=r"cannot load glm\.gguf: .*; take another conversion"):
        quantize.refuse_unloadable(engine, gguf_file.read_header(whole), tmp_path)


def test_a_placement_that_the_header_refuses_is_refused(source):
    quantize.refuse_senseless(source.header, ["baseline", "cpu-moe", "n-cpu-moe=2"])
    with pytest.raises(QuantizeError, match="n-cpu-moe=1 moves nothing: layer 0 is dense"):
        quantize.refuse_senseless(source.header, ["baseline", "n-cpu-moe=1"])


DEEP = "[" * 200_000 + "]" * 200_000
NOTES = {
    "deep": DEEP,
    "deep facts": '{"digest": "x", "facts": ' + DEEP + "}",
    "list": "[1]",
    "facts are a list": '{"facts": [], "digest": "x", "file": 1}',
    "not UTF-8": b"\xff\xfe{}",
    "a number": "1e999",
    "digits": "9" * 5000,
    "empty": "",
}


@pytest.mark.parametrize("name", NOTES)
def test_a_damaged_note_is_no_note(own_source, name):
    raw = NOTES[name]
    models.note(own_source.path).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    assert not models.kept(own_source.path)
    assert models.make_twin("deepseek-moe-16b", "nano").sha256 == own_source.sha256
    assert models.kept(own_source.path)
    assert json.loads(models.note(own_source.path).read_bytes())["facts"]["sha256"] == own_source.sha256


def test_a_note_that_was_edited_is_no_note(own_source):
    note = models.note(own_source.path)
    note.write_bytes(note.read_bytes().replace(own_source.sha256.encode(), b"0" * 64))
    assert models.make_twin("deepseek-moe-16b", "nano").sha256 == own_source.sha256


def test_a_models_folder_that_takes_no_file_is_named_in_a_sentence(home, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for place in (tmp_path / "file", tmp_path / "file/below", "/proc/moelib"):
        monkeypatch.setenv("MOELIB_MODELS", str(place))
        with pytest.raises(files.FileError, match="cannot be read or written .*set MOELIB_MODELS"):
            models.make_twin("deepseek-moe-16b", "nano")


@pytest.mark.parametrize(
    ("n", "cause"), [(1, "moves nothing: layer 0 is dense"), (99, "goes beyond the model's 2 layers")]
)
def test_a_study_of_a_senseless_placement_is_refused_with_nothing_written(home, monkeypatch, tmp_path, n, cause):
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "m"))
    smoke = (home / "params/studies/smoke.yaml").read_text(encoding="utf-8")
    senseless = smoke.replace("placement: cpu-moe", f"placement: n-cpu-moe={n}")
    (home / "params/studies/try.yaml").write_text(senseless, encoding="utf-8")
    result = CliRunner().invoke(cli.main, ["study", "run", "try"])
    assert result.exit_code == 1
    assert f"params/studies/try.yaml: deepseek-moe-16b: n-cpu-moe={n} {cause}" in result.output
    assert not (tmp_path / "m").exists()
    assert not (home / "outputs/try").exists()
    with pytest.raises(plan.StudyError, match=cause):
        campaign.refuse_senseless(*campaign.select("try"))
