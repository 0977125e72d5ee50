"""Importance matrices: of llama-imatrix itself, and what is none."""

import json
import subprocess

import ggufs
import pytest
from click.testing import CliRunner
from conftest import REPO

import moelib
from moelib import cli
from moelib.base import files
from moelib.catalogue.facts import Manifest
from moelib.evidence import appendix, table
from moelib.gguf import gguf_file, imatrix
from moelib.gguf.gguf_file import GGUFError
from moelib.models import models
from moelib.models.quantize import QuantizeError

MODEL = "deepseek-moe-16b"


def build(columns, **metadata):
    tensors = {}
    for name, n in columns.items():
        tensors |= {f"{name}.in_sum2": (n,), f"{name}.counts": (1,)}
    return ggufs.build({"general.type": "imatrix", "imatrix.chunk_count": 1, **metadata}, tensors, kind="F32")


def test_a_matrix_is_known_by_its_names_and_shapes(tmp_path):
    metadata, tensors = ggufs.moe()
    model, path = tmp_path / "m.gguf", tmp_path / "i.gguf"
    model.write_bytes(ggufs.build(metadata, tensors))
    header, right = gguf_file.read_header(model), {"blk.0.attn_q.weight": 32, "blk.0.ffn_up_exps.weight": 32 * 4}
    path.write_bytes(build(right))
    matrix = imatrix.read(path)
    assert matrix.columns == right
    assert matrix.facts == {"file_name": "i.gguf", "sha256": files.sha256(path)}
    matrix.refuse_other(header)
    for wrong in ({"blk.0.attn_q.weight": 64}, {"blk.9.attn_q.weight": 32}, right | {"blk.0.ffn_up_exps.weight": 64}):
        path.write_bytes(build(wrong))
        with pytest.raises(GGUFError, match=r"i\.gguf is an importance matrix of another model than m\.gguf .*blk"):
            imatrix.read(path).refuse_other(header)


def test_what_is_no_matrix_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "i.gguf"
    for raw, message in [
        (ggufs.build(*ggufs.moe()), "is no importance matrix, but of the kind model: make one with `llama-imatrix"),
        (b"old format", "is no importance matrix .*not a GGUF.*old format is converted"),
        (build({"a": 64})[:-100], "is no importance matrix .*truncated"),
    ]:
        path.write_bytes(raw)
        with pytest.raises(GGUFError, match=message):
            imatrix.read(path)
    with pytest.raises(GGUFError, match=r"none\.gguf cannot be read .No such file"):
        imatrix.read(tmp_path / "none.gguf")


def test_manifests_without_a_matrix_keep_their_bytes():
    """What is None as nothing was given is not written, and not counted in a digest."""
    for path in sorted((REPO / "tests/fixtures/twins/quants").glob("*.json")):
        raw = json.loads(path.read_bytes())
        manifest = Manifest.model_validate_json(path.read_bytes(), strict=True)
        assert manifest.imatrix is None
        assert manifest.model_dump(mode="json", exclude_unset=True) == raw
        assert table.cite_manifest(manifest) == {f"quants/{path.name}": files.digest(raw)}


@pytest.fixture
def own(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "m"))
    return tmp_path


def of_llama(engine, own, model):
    """What llama-imatrix makes of a twin. Every expert must be used, so the text is long."""
    source = models.make_twin(model, "nano")
    (own / "text.txt").write_text("Explain quantum computing in simple terms. " * 400, encoding="utf-8")
    argv = [engine.folder / "llama-imatrix", "-m", source.path, "-f", own / "text.txt", "-o", own / "i.gguf"]
    subprocess.run([*argv, "-c", "128", "--chunks", "8", "--no-ppl"], check=True, capture_output=True)
    return own / "i.gguf"


def test_a_quant_that_needs_a_matrix_is_made_with_one_alone(own, engine):
    with pytest.raises(QuantizeError, match=r"IQ2_XS of .* needs an importance matrix: .*`--imatrix FILE\.gguf`"):
        moelib.quantize(MODEL, "IQ2_XS", scale="nano")
    assert not (own / "m").exists()
    matrix = of_llama(engine, own, MODEL)
    made = moelib.quantize(MODEL, "IQ2_XS", scale="nano", imatrix=matrix)
    manifest, header = models.noted(made), moelib.header(made)
    assert made.name == f"{MODEL}-IQ2_XS-imatrix.gguf"
    assert manifest["imatrix"] == {"file_name": "i.gguf", "sha256": files.sha256(matrix)}
    assert header.metadata["quantize.imatrix.file"] == "i.gguf"
    assert "IQ2_XS" in manifest["expert_types"]
    assert files.sha256(matrix) in appendix.manifest_table(Manifest(**manifest)).text()
    run = moelib.run(made, "cpu-moe", workloads=["smoke"], context=256, device="loopback")
    assert run.status in ("valid", "degraded")
    assert run.sheet.imatrix.sha256 == files.sha256(matrix)


def test_a_file_made_with_a_matrix_is_another_than_that_without(own, engine):
    matrix = of_llama(engine, own, MODEL)
    plain = moelib.quantize(MODEL, "Q4_K_M", scale="nano")
    done = CliRunner().invoke(
        cli.main, ["quantize", MODEL, "Q4_K_M", "--scale", "nano", "--imatrix", str(matrix)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    other = moelib.quantize(MODEL, "Q4_K_M", scale="nano", imatrix=matrix)
    assert f"{other}\n" in done.output
    assert files.sha256(matrix) in done.output
    assert models.noted(other)["sha256"] != models.noted(plain)["sha256"]
    assert "imatrix" not in models.noted(plain)
    assert moelib.quantize(MODEL, "Q4_K_M", scale="nano") == plain


def test_a_matrix_of_another_model_is_refused_before_a_source_is_written(own, engine):
    matrix = of_llama(engine, own, MODEL)
    with pytest.raises(GGUFError, match="is an importance matrix of another model"):
        moelib.quantize("phi-3.5-moe", "IQ2_XS", scale="nano", imatrix=matrix)
    assert not (own / "m/phi-3.5-moe").exists()
