"""Twins of headers, filled with blocks of ggml's own quantiser, in the real engine."""

import ctypes
import math
import re
from collections import Counter
from dataclasses import replace

import ggufs
import numpy as np
import pytest
from click.testing import CliRunner
from factory import SHARED, spec
from gguf.constants import GGML_QUANT_SIZES

import moelib
from moelib import cli
from moelib.base import files
from moelib.catalogue.facts import Manifest
from moelib.catalogue.params import ParamsError
from moelib.engine.engine import EngineError
from moelib.gguf import fill, gguf_file, outline, twin
from moelib.gguf.gguf_file import GGUFError
from moelib.measure import device, run
from moelib.measure.llama_server import LlamaServer
from moelib.models import models, quantize
from moelib.models.quantize import QuantizeError

pytestmark = pytest.mark.engine
PRINTED = 2 * 0.005 * 2**20  # MiB with two decimals, and tensors padded to 32 bytes


@pytest.fixture
def blocks(engine):
    return fill.Blocks(engine.library("libggml-base"))


@pytest.fixture
def own(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "m"))
    return tmp_path


class Traits(ctypes.Structure):
    """ggml_type_traits, to its function that makes numbers of blocks."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        *((n, ctypes.c_int64) for n in ("block", "interleaved")),
        ("size", ctypes.c_size_t),
        ("quantised", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


def values(base, kind, raw):
    """The numbers in blocks of a type."""
    plain = {"F32": np.float32, "F64": np.float64, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64}
    if kind.name in plain:
        return np.frombuffer(raw, plain[kind.name])
    base.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    block, size = GGML_QUANT_SIZES[kind]
    data, out = np.frombuffer(raw, np.uint8).copy(), np.empty(len(raw) // size * block, np.float32)
    base.ggml_get_type_traits(int(kind)).contents.to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out


@pytest.mark.parametrize("kind", GGML_QUANT_SIZES, ids=lambda k: k.name)
def test_blocks_of_every_type_are_finite_and_of_the_scale_of_weights(blocks, kind):
    if kind.name in fill.INTERNAL:
        with pytest.raises(GGUFError, match=f"a type {kind.name} tensor cannot be made: .*; take another quant"):
            blocks.pool(kind.name)
        return
    block, size = GGML_QUANT_SIZES[kind]
    pool = blocks.pool(kind.name)
    assert len(pool) % size == 0
    found = values(blocks._base, kind, bytes(pool[: (1 << 18) // block * size]))
    assert np.isfinite(found).all()
    if kind.name in fill.WHOLE:
        assert not found.any()
        return
    assert found.std() == pytest.approx(twin.WEIGHT_RANGE / 3**0.5, rel=0.25)
    assert abs(found.mean()) < 0.001
    assert not values(blocks._base, kind, blocks.constant(kind.name, 0)).any()
    assert len(blocks.constant(kind.name, 0)) == fill.ROW // block * size
    again = fill.Blocks(blocks._library, 0)
    assert again.pool(kind.name) == pool


def test_a_type_that_the_build_does_not_know_is_refused_by_name(blocks, monkeypatch, tmp_path):
    monkeypatch.setitem(fill.GGML_QUANT_SIZES, 41, (128, 20))
    with pytest.raises(GGUFError, match="this build of llama.cpp does not know type Q1_0; use a newer one"):
        blocks.pool("Q1_0")
    (tmp_path / "libggml-base.so").write_bytes(b"nothing")
    with pytest.raises(GGUFError, match="is no ggml to make blocks with .*; use another build"):
        fill.Blocks(tmp_path / "libggml-base.so")


def test_the_engines_library_is_found_beside_its_tools_or_by_the_linker(engine, tmp_path):
    assert engine.library("libggml-base").name.startswith("libggml-base.")
    assert re.match(r"libc\.so", engine.library("libc").name)
    script = tmp_path / "llama-quantize"
    script.write_text("#!/bin/sh\n", encoding="utf-8")
    script.chmod(0o755)
    alone = replace(engine, folder=tmp_path, tools={"llama-quantize": script})
    with pytest.raises(EngineError, match="has no library libggml-base beside its tools; use another build"):
        alone.library("libggml-base")


def observed(engine, made, work, placement="baseline"):
    plan = spec(placement=placement, workloads=("smoke",), requests=1)
    outcome = run.execute(plan, made, LlamaServer(engine), device.Loopback(), work)
    assert outcome.reason is None, outcome.message
    return outcome.observation


ARCHS = {
    "qwen3moe": ("IQ2_XS", "Q5_K"),
    "qwen2moe": ("IQ3_XXS", "Q6_K"),
    "gpt-oss": ("MXFP4", "Q8_0"),
    "lfm2moe": ("IQ3_S", "Q4_K"),
    "olmoe": ("TQ2_0", "IQ4_XS"),
    "qwen3": ("Q4_0", "BF16"),  # dense
}


@pytest.mark.parametrize("arch", ARCHS)
def test_a_twin_of_any_header_loads_runs_and_gives_finite_logits(own, engine, arch):
    whole = ggufs.typed(arch, *ARCHS[arch])
    for layers in (None, 3):
        made = quantize.twin(arch, whole, layers=layers)
        seen = observed(engine, made, own / "work")
        assert all(p is not None and math.isfinite(p) for p in seen.top_logprobs)
        assert len(set(seen.top_logprobs)) > 1
        assert abs(seen.report.device_bytes("model") - made.header.device_bytes("baseline")) <= PRINTED
        assert made.header.layers == (layers or 4)
        assert Counter(t.type for t in made.header.tensors) == made.manifest["tensor_types"]
        assert made.header.is_twin


def test_a_block_that_predicts_more_tokens_is_kept_in_the_whole_and_left_out_of_a_slice(own, engine):
    made = quantize.twin(*quantize.outline_of(str(ggufs.write_nextn(own / "glm.gguf"))), "Q4_K_M")
    assert (made.header.layers, made.header.number("nextn_predict_layers")) == (3, 1)
    assert made.manifest["quant"] == "Q4_K_M"
    cut = quantize.twin(*quantize.outline_of(str(own / "glm.gguf")), "Q4_K_M", layers=2)
    assert (cut.header.layers, cut.header.number("nextn_predict_layers"), cut.manifest["scale"]) == (
        2,
        None,
        "full-first-2",
    )
    assert all(math.isfinite(p) for p in observed(engine, cut, own / "work", "cpu-moe").top_logprobs)


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q2_K", "Q8_0"])
@pytest.mark.parametrize("model", ["phi-3.5-moe", "deepseek-moe-16b"])
def test_a_catalogued_twin_is_the_real_routes_in_header_and_buffers(home, engine, tmp_path, model, quant):
    real = quantize.make(models.make_twin(model, "tiny"), quant, engine, tmp_path / "q")
    made = quantize.twin(*quantize.outline_of(model, "tiny"), quant, scale="tiny")
    assert made.path != real.path
    assert made.header.tensors == real.header.tensors
    first = min(t.offset for t in real.header.tensors)
    assert made.path.read_bytes()[:first] == real.path.read_bytes()[:first]
    same = ("file_bytes", "parameters", "tensor_types", "expert_types", "expert_bytes", "fallbacks", "engine_build")
    assert {k: made.manifest[k] for k in same} == {k: real.manifest[k] for k in same}
    if quant == "Q4_K_M":
        for placement in ("baseline", "cpu-moe"):
            seen = [observed(engine, one, tmp_path / "work", placement).report for one in (real, made)]
            real_buffers, made_buffers = ([(b.kind, b.place, b.size_bytes) for b in one.buffers] for one in seen)
            assert real_buffers == made_buffers
            assert {kind for kind, _, _ in made_buffers} >= {"model", "compute"}


def test_the_same_header_and_seed_give_the_same_bytes_once(own, engine, monkeypatch):
    whole = ggufs.typed("qwen3moe", "Q4_K", "Q6_K")
    first = quantize.twin("q", whole)
    other = quantize.twin("q", whole, seed=1, out=own / "other.gguf")
    again = quantize.twin("q", whole, out=own / "again.gguf")
    assert first.manifest["sha256"] == again.manifest["sha256"] == files.sha256(first.path)
    assert other.manifest["sha256"] != first.manifest["sha256"]
    assert first.manifest["engine_build"] == engine.build
    assert "seed 0, embeddings x 4096, from the header of qwen3moe.gguf" in first.manifest["origin"]
    Manifest(**first.manifest)
    monkeypatch.setattr(fill, "write", lambda *_: pytest.fail("made again"))
    assert quantize.twin("q", whole).manifest == first.manifest
    assert quantize.made(first.path).manifest == first.manifest


def test_the_output_is_silent_where_a_token_is_no_text(own, engine, blocks):
    made = quantize.twin("q", ggufs.typed("qwen3moe", "Q4_K", "Q6_K"))
    data = {t.name: made.path.read_bytes()[t.offset : t.offset + t.nbytes] for t in made.header.tensors}
    kind = next(k for k in GGML_QUANT_SIZES if k.name == "Q6_K")
    rows = values(blocks._base, kind, data["output.weight"]).reshape(512, -1)
    assert not rows[: twin.UNSPOKEN].any()
    assert rows[twin.UNSPOKEN :].any(axis=1).all()
    for name, raw in data.items():
        numbers = np.frombuffer(raw, np.float32)
        if "norm" in name:
            assert (numbers == 1).all()
        elif "gate_inp" in name:
            assert numbers.std() == pytest.approx(0.02, rel=0.1)


def test_what_cannot_be_made_is_refused_and_leaves_nothing(own, engine, monkeypatch):
    whole = ggufs.typed("qwen3moe", "Q4_K", "Q6_K")
    source = ggufs.write_nextn(own / "glm.gguf")
    for how, error, message in [
        ({"layers": 9}, GGUFError, r"the first 9 of the 4 layers of qwen3moe\.gguf cannot be taken; 1 to 4"),
        ({"layers": 0}, GGUFError, "cannot be taken; 1 to 4"),
        ({"quant": "Q4_K_M"}, QuantizeError, "already quantised .Q4_K, Q6_K."),
    ]:
        with pytest.raises(error, match=message):
            quantize.twin("q", whole, **how)
    with pytest.raises(ParamsError, match="makes no 'Q4_K_N'; did you mean 'Q4_K"):
        quantize.twin(*quantize.outline_of(str(source)), "Q4_K_N")
    raw = ggufs.build(*ggufs.moe("nonsense"))
    with pytest.raises(QuantizeError, match=r"cannot load n\.gguf: unknown model architecture: 'nonsense'"):
        quantize.twin("n", outline.from_bytes([(raw, len(raw))], "n.gguf"))
    missing = replace(whole, tensors=tuple(t for t in whole.tensors if "blk.1.attn_q." not in t.name))
    with pytest.raises(
        QuantizeError, match="with its first 2 layers alone, .*cannot load .*; another number of layers"
    ):
        quantize.twin("q", missing, layers=2)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(files.FileError, match="the twin q-F16-twin.gguf needs|free some space"):
        quantize.twin("q", whole)
    assert list((own / "m").rglob("*.gguf")) == []


def test_a_write_that_fails_leaves_nothing(own, engine, monkeypatch):
    monkeypatch.setattr(fill.Blocks, "pieces", lambda *_: (_ for _ in ()).throw(OSError("disk on fire")))
    with pytest.raises(OSError, match="fire"):
        quantize.twin("q", ggufs.typed("qwen3moe", "Q4_K", "Q6_K"))
    assert [p.name for p in (own / "m").rglob("*") if p.is_file() and "gguf" in p.name] == []


def test_the_command_makes_what_moelib_runs(own, engine):
    def call(*args):
        return CliRunner().invoke(cli.main, ["twin", *args])

    result = call("phi-3.5-moe", "--scale", "nano", "--quant", "Q4_K_M", "--layers", "1")
    assert result.exit_code == 0, result.output
    path = own / "m/phi-3.5-moe/twin-nano-first-1/phi-3.5-moe-Q4_K_M-twin.gguf"
    assert result.output.startswith(f"{path}  ")
    assert files.sha256(path) in result.output
    record = moelib.run(path, "cpu-moe", workloads=["smoke"], requests=1, context=256, device="loopback")
    assert record.status == "valid" or set(record.reasons) <= SHARED, record.reasons
    assert (record.sheet.weights, record.sheet.scale) == ("twin", "nano-first-1")
    (own / "Some-Model-Q4_K_M.gguf").write_bytes(path.read_bytes())
    assert call(str(own / "Some-Model-Q4_K_M.gguf")).exit_code == 0
    assert (own / "m/Some-Model/twin-full/Some-Model-Q4_K_M-twin.gguf").exists()
    for args, message in [
        (("nobody", "--quant", "Q8_0"), "unknown model 'nobody'"),
        (("nobody.gguf",), "nobody.gguf cannot be read: No such file"),
        (("gpt-oss-20b", "--quant", "Q8_0"), "gpt-oss-20b is excluded"),
    ]:
        result = call(*args)
        assert (result.exit_code, message in result.output) == (1, True), result.output


def test_memory_stays_below_a_gibibyte_whatever_the_size(engine, tmp_path, peak_rss):
    code = (
        "from pathlib import Path\n"
        "from moelib.gguf import fill, outline; from moelib.catalogue import params\n"
        "g = params.model('phi-3.5-moe').at_scale('full').model_copy(update={'block_count': 2})\n"
        "whole = outline.of_geometry(g, 'x')\n"
        "kind = lambda t: 'F32' if len(t.shape) == 1 else 'Q4_K' if 'up' in t.name else 'Q6_K'\n"
        "whole = whole.with_types({t.name: kind(t) for t in whole.tensors}); assert whole.file_bytes > 1 << 30\n"
        f"fill.write(Path({str(tmp_path / 'big.gguf')!r}), whole, Path({str(engine.library('libggml-base'))!r}))\n"
    )
    assert 0 < peak_rss(code) < 512 << 20
    assert gguf_file.read_header(tmp_path / "big.gguf").is_twin
