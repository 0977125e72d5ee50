"""Quantising with the real llama-quantize."""

import shutil
from dataclasses import replace

import pytest

from moelib import files, gguf_file, models, process, quantize
from moelib.params import ParamsError
from moelib.quantize import QuantizeError

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
def test_the_sheet_says_what_is_really_in_the_file(source, engine, tmp_path, quant):
    made = quantize.make(source, quant, engine, tmp_path)
    sheet, header = made.sheet, gguf_file.read_header(made.path)
    assert sheet["sha256"] == files.sha256(made.path)
    assert sheet["file_bytes"] == made.path.stat().st_size == header.file_bytes
    assert sheet["tensor_types"] == header.type_counts
    assert sheet["predicted_bytes"] == pytest.approx(header.file_bytes, rel=0.01)
    assert sheet["expert_bytes"] == sum(t.nbytes for t in header.tensors if t.is_expert)
    fell = sheet["fallbacks"]
    assert {f["type"] for f in fell} == FALLBACK[quant]
    if fell:  # a width of 352 or 1376 columns, as the real model's 1408 and 10944
        assert {f["columns"] for f in fell} == {352, 704, 1376}
        assert {f["tensor"] for f in fell} >= {f"blk.{i}.ffn_down_exps.weight" for i in (1, 2, 3)}


def test_phi_has_no_fallback_and_keeps_its_biases(home, engine, tmp_path):
    made = quantize.make(models.make_twin("phi-3.5-moe", "tiny"), "Q2_K", engine, tmp_path)
    assert made.sheet["fallbacks"] == []
    assert {t.type for t in made.header.tensors if t.name.endswith(".bias")} == {"F32"}


def test_a_finished_file_is_not_made_again(source, engine, tmp_path, monkeypatch):
    first = quantize.make(source, "Q8_0", engine, tmp_path)
    monkeypatch.setattr(quantize, "_make", lambda *_: pytest.fail("made again"))
    assert quantize.make(source, "Q8_0", engine, tmp_path).sheet == first.sheet


def test_a_file_that_changed_is_made_again(own_source, engine, tmp_path):
    first = quantize.make(own_source, "Q8_0", engine, tmp_path)
    with first.path.open("r+b") as f:
        f.seek(-100, 2)
        f.write(b"flipped bits")
    again = quantize.make(own_source, "Q8_0", engine, tmp_path)
    assert files.sha256(again.path) == again.sheet["sha256"] == first.sheet["sha256"]


def test_a_quantised_source_is_refused_with_the_reason(own_source, engine, tmp_path):
    made = quantize.make(own_source, "Q8_0", engine, tmp_path)
    with pytest.raises(QuantizeError, match="already quantised .Q8_0."):
        quantize.make(replace(own_source, path=made.path), "Q2_K", engine, tmp_path)


def test_mxfp4_is_refused_as_gpt_oss_is(own_source):
    tensor = replace(own_source.header.tensors[5], type="MXFP4")
    header = replace(own_source.header, tensors=(*own_source.header.tensors[:5], tensor))
    with pytest.raises(QuantizeError, match="already quantised .MXFP4."):
        quantize.refuse_quantised(header)


def test_an_unknown_quant_is_refused_before_anything_runs(source, engine, tmp_path):
    with pytest.raises(ParamsError, match="Q4_K_M, Q2_K, Q8_0"):
        quantize.make(source, "Q3_K", engine, tmp_path)


def test_a_disk_that_is_too_small_is_said_before_the_engine_writes(own_source, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(files.FileError, match="quantising to .* GiB are free"):
        quantize.make(own_source, "Q8_0", engine, tmp_path)
    assert not list(own_source.path.parent.glob("*Q8_0*gguf*"))


def test_an_engine_that_fails_leaves_no_file_and_its_last_words(own_source, engine, tmp_path):
    tools = shutil.copytree(engine.folder, tmp_path / "tools", symlinks=True)
    tool = tools / "llama-quantize"
    tool.unlink()
    tool.write_text("#!/bin/sh\n[ $1 = --dry-run ] || { head -c 100000 /dev/zero > $2; echo no luck; exit 1; }\n")
    tool.chmod(0o755)
    broken = replace(engine, tools={**engine.tools, "llama-quantize": tool})
    with pytest.raises(QuantizeError, match="ended with 1 .*\n.*no luck"):
        quantize.make(own_source, "Q8_0", broken, tmp_path)
    assert not list(own_source.path.parent.glob("*Q8_0*gguf*"))


def test_an_engine_that_writes_rubbish_and_says_all_is_well_is_not_believed(own_source, engine, tmp_path):
    tool = tmp_path / "llama-quantize"
    tool.write_text("#!/bin/sh\n[ $1 = --dry-run ] || head -c 100000 /dev/zero > $2\n")
    tool.chmod(0o755)
    broken = replace(engine, tools={**engine.tools, "llama-quantize": tool})
    with pytest.raises(gguf_file.GGUFError, match="not a GGUF file"):
        quantize.make(own_source, "Q8_0", broken, tmp_path)
    tool.write_text('#!/bin/sh\n[ $1 = --dry-run ] || cp "$1" "$2"\n')
    with pytest.raises(QuantizeError, match="not quantised"):
        quantize.make(own_source, "Q8_0", broken, tmp_path)
    assert not list(own_source.path.parent.glob("*Q8_0*gguf*"))


def test_a_damaged_source_never_reaches_the_engine(own_source, engine, tmp_path, monkeypatch):
    with own_source.path.open("r+b") as f:
        f.truncate(own_source.header.file_bytes // 2)
    monkeypatch.setattr(process, "Child", lambda *_: pytest.fail("the engine was started"))
    with pytest.raises(gguf_file.GGUFError, match="truncated"):
        gguf_file.read_header(own_source.path)
    # asked for through the catalogue, it is made anew instead
    assert models.make_twin("deepseek-moe-16b", "nano").sha256 == own_source.sha256


def test_a_source_that_was_deleted_is_not_needed_for_quants_that_are_there(own_source, engine, tmp_path, monkeypatch):
    made = quantize.make(own_source, "Q8_0", engine, tmp_path)
    own_source.path.unlink()
    known = models.make_twin("deepseek-moe-16b", "nano", needed=False)
    assert (known, known.path.exists()) == (own_source, False)
    assert quantize.make(known, "Q8_0", engine, tmp_path).sheet == made.sheet
    assert not known.path.exists()
    # for another quant it is made again, the same
    other = quantize.make(known, "Q4_K_M", engine, tmp_path)
    assert known.path.exists()
    assert other.sheet["source_sha256"] == own_source.sha256


def test_a_source_that_was_never_made_is_made_even_where_it_is_not_needed(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "m"))
    assert models.make_twin("deepseek-moe-16b", "nano", needed=False).path.exists()
