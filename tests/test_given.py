"""Files that somebody else made, measured as they are with the real engine."""

import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import ggufs
import pytest
from factory import SHARED

import moelib
from moelib.base import files
from moelib.campaign import campaign, given
from moelib.catalogue import params, pins
from moelib.evidence import appendix
from moelib.gguf.gguf_header import TWIN_NAME
from moelib.models import hub as client
from moelib.models import models, quantize, sources, weights
from moelib.models.quantize import QuantizeError

SHORT = {"workloads": ["smoke"], "context": 256, "device": "loopback"}
KINDS = {"qwen3moe": ("Q4_K", "Q6_K"), "gpt-oss": ("MXFP4", "Q8_0")}


@pytest.fixture
def own(home, tmp_path, monkeypatch):
    """A home with a models/ of its own; what the test gives lies in another folder."""
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "m"))
    (tmp_path / "theirs").mkdir()
    return tmp_path


def downloaded(own, arch, name):
    """A file as somebody else would have published it: nothing in it says that its weights are random."""
    path = own / "theirs" / name
    quantize.twin("x", ggufs.typed(arch, *KINDS[arch]), out=own / "made" / "x.gguf")
    raw, other = (own / "made/x.gguf").read_bytes(), "A" * len(TWIN_NAME)
    path.write_bytes(raw.replace(TWIN_NAME.encode(), other.encode()))
    return path


def looks(folder: Path):
    return {p.name: files.state(p) for p in folder.iterdir()}


@pytest.mark.parametrize(("arch", "label"), [("qwen3moe", "Q4_K"), ("gpt-oss", "MXFP4")])
def test_a_file_that_is_already_quantised_is_measured_as_it_is(own, engine, monkeypatch, arch, label):
    path = downloaded(own, arch, f"some-{label}.gguf")
    before = looks(path.parent)
    runs = [moelib.run(path, placement, **SHORT) for placement in ("baseline", "cpu-moe", "n-cpu-moe=2")]
    assert {r.status for r in runs} <= {"valid", "degraded"}, [r.reasons for r in runs]
    assert {reason for r in runs for reason in r.reasons} <= SHARED
    assert looks(path.parent) == before
    manifest, header = runs[0].sheet, moelib.header(path)
    assert (manifest.model, manifest.quant, manifest.weights) == ("some", label, "real")
    assert (manifest.origin, manifest.file_name) == (f"local file {path.name}", path.name)
    assert manifest.sha256 == files.sha256(path) == runs[1].observation.file_sha256
    assert manifest.tensor_types == header.type_counts
    assert (manifest.engine_version, manifest.quantize_s, manifest.source_sha256) == (None, None, None)
    assert f"not by moelib: local file {path.name}" in appendix.manifest_table(manifest).text()
    frame = moelib.frame(runs)
    assert frame["moved_bytes"].tolist() == [header.moved_bytes(p) for p in ("baseline", "cpu-moe", "n-cpu-moe=2")]
    # its hash is known, until it changes
    with monkeypatch.context() as patch:
        patch.setattr(weights, "digest", lambda _: pytest.fail("hashed again"))
        assert given.measurable(path, engine).manifest["sha256"] == manifest.sha256
    with path.open("r+b") as f:
        f.seek(-10, 2)
        f.write(b"other")
    assert given.measurable(path, engine).manifest["sha256"] == files.sha256(path) != manifest.sha256


def test_a_split_model_is_one_file_of_several(own, engine):
    whole = downloaded(own, "qwen3moe", "whole.gguf")
    argv = [engine.folder / "llama-gguf-split", "--split-max-tensors", "20", whole, own / "theirs" / "parts"]
    subprocess.run(argv, check=True, capture_output=True)
    whole.unlink()
    before = looks(own / "theirs")
    assert len(before) == 3
    runs = [moelib.run(own / "theirs" / name, "cpu-moe", **SHORT) for name in sorted(before)[:2]]
    assert {r.status for r in runs} <= {"valid", "degraded"}, [r.reasons for r in runs]
    assert {reason for r in runs for reason in r.reasons} <= SHARED
    manifest = runs[0].sheet
    assert manifest == runs[1].sheet
    assert manifest.model == "parts"
    assert manifest.sha256 == files.digest({p.name: files.sha256(p) for p in (own / "theirs").iterdir()})
    assert manifest.file_bytes == sum(state["bytes"] for state in before.values())
    assert looks(own / "theirs") == before


def test_what_moelib_made_keeps_its_manifest_and_is_refused_if_it_changed(own, engine):
    made = moelib.twin("deepseek-moe-16b", "Q8_0", scale="nano")
    manifest = models.noted(made)
    assert given.measurable(made, engine).manifest == manifest
    # without its note it is a file like any other, and says itself that it is a twin
    copy = shutil.copy(made, own / "theirs" / "mine-Q8_0.gguf")
    found = given.measurable(Path(copy), engine).manifest
    assert (found["weights"], found["sha256"], found["model"]) == ("twin", manifest["sha256"], "mine")
    with made.open("ab") as f:
        f.write(b"more")
    with pytest.raises(QuantizeError, match=r"is not the file of the manifest beside it: delete .*\.gguf\.json"):
        moelib.run(made, **SHORT)


def test_a_folder_that_may_not_be_written_is_left_alone(own, engine):
    path = downloaded(own, "qwen3moe", "some.gguf")
    path.chmod(0o400)
    path.parent.chmod(0o500)
    try:
        assert given.measurable(path, engine).manifest["origin"] == "local file some.gguf"
    finally:
        path.parent.chmod(0o700)


def test_a_file_in_the_hubs_cache_has_its_address(own, engine):
    path = downloaded(own, "qwen3moe", "blob")
    cached = own / "hub/models--acme--some-MoE-GGUF/snapshots" / ("a" * 40) / "Q4/some-Q4_K.gguf"
    cached.parent.mkdir(parents=True)
    os.symlink(path, cached)
    manifest = given.measurable(cached, engine).manifest
    assert manifest["origin"] == f"hf:acme/some-MoE-GGUF/Q4/some-Q4_K.gguf@{'a' * 40}"
    assert manifest["file_name"] == "some-Q4_K.gguf"


def test_what_cannot_be_measured_is_refused_in_a_sentence(own, engine):
    where = own / "theirs"
    (where / "n.gguf").write_bytes(ggufs.build(*ggufs.moe("nonsense"), kind="Q8_0"))
    dense = quantize.twin("dense", ggufs.typed("qwen3", "Q4_0", "Q4_0"), out=where / "dense.gguf").path
    for name, placement, message in [
        (where / "n.gguf", "baseline", r"cannot load n\.gguf: unknown model architecture: 'nonsense'"),
        (dense, "cpu-moe", r"dense\.gguf: .*cpu-moe"),
        (where / "none.gguf", "baseline", r"none\.gguf cannot be read: No such file"),
        ("hf:acme/moe/x.gguf", "baseline", "is on the Hub, .*download it"),
    ]:
        with pytest.raises(params.UserError, match=message):
            moelib.run(name, placement, **SHORT)


def entry(own, path, name="theirs", **change):
    """A catalogue with a model that is a file, and a study of it."""
    with (own / "params/models.yaml").open("a", encoding="utf-8") as f:
        f.write(f"\n{name}:\n  title: Their file\n  file: {path}\n")
    text = (own / "params/studies/smoke.yaml").read_text(encoding="utf-8")
    text = text.replace("[deepseek-moe-16b]", f"[{name}]").replace("scale: nano\n", "").replace("Q8_0", "as-is")
    text = text.replace("weights: twin", "weights: real")
    for old, new in change.values():
        text = text.replace(old, new)
    (own / "params/studies/theirs.yaml").write_text(text, encoding="utf-8")
    params._yaml.cache_clear()


@pytest.mark.parametrize("quant", ["as-is", "MXFP4"])
def test_a_study_measures_a_model_that_is_a_file(own, engine, quant):
    path = downloaded(own, "gpt-oss", "gpt-oss-MXFP4.gguf")
    before = looks(path.parent)
    entry(own, "theirs/gpt-oss-MXFP4.gguf", quant=("as-is", quant))
    study, (cell,) = campaign.select("theirs")
    done = list(campaign.measure(study, [cell]))
    assert {r.status for r in done} <= {"valid", "degraded"}, [r.reasons for r in done]
    assert {(r.spec.model, r.spec.quant, r.spec.weights) for r in done} == {("theirs", quant, "real")}
    study = study.again()
    assert study.problems == []
    (manifest,) = study.manifests
    assert (manifest.model, manifest.quant, manifest.file_name) == ("theirs", quant, path.name)
    assert looks(path.parent) == before


def test_a_study_of_a_file_that_is_not_what_it_says_is_refused_before_anything_starts(own, engine):
    path = downloaded(own, "gpt-oss", "gpt-oss-MXFP4.gguf")
    for i, (change, message) in enumerate([
        (("as-is", "Q4_K_M"), r"is MXFP4, not Q4_K_M: write `quants: \[as-is\]`"),
        (("weights: real", "weights: twin"), "says that its weights are real: write `weights: real`"),
        (("placement: cpu-moe", "placement: n-cpu-moe=9"), "n-cpu-moe=9 goes beyond"),
        (("as-is", "as-is, Q8_0"), r"model\d is a file, which is measured as it is"),
    ]):  # fmt: skip
        entry(own, path, f"model{i}", change=change)
        with pytest.raises(params.UserError, match=message):
            campaign.run_cells(*campaign.select("theirs"))
    assert not (own / "outputs/theirs").exists()


@pytest.fixture
def shelf(own, lfs_hub, monkeypatch):
    """A repository with a file that is already quantised, and a catalogue that names it."""
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    api = client.api
    monkeypatch.setattr(client, "api", lambda endpoint=None: api(endpoint or lfs_hub.url))
    path = downloaded(own, "gpt-oss", "gpt-oss-MXFP4.gguf")
    lfs_hub.first = lfs_hub.put("acme/oss-GGUF", {"all/gpt-oss-MXFP4.gguf": path.read_bytes(), "README.md": b"# oss"})
    path.unlink()
    return lfs_hub


def test_a_study_measures_a_file_of_a_repository(own, engine, shelf, monkeypatch):
    entry(own, "hf:acme/oss-GGUF/all/gpt-oss-MXFP4.gguf")
    # planned from its header alone
    plan = moelib.plan("theirs", "1GiB", context=256)
    assert (plan.header.label, str(plan.chosen.placement)) == ("MXFP4", "baseline")
    assert not models.folder().exists() or not list(models.folder().glob("**/*MXFP4.gguf"))
    study, (cell,) = campaign.select("theirs")
    done = list(campaign.measure(study, [cell]))
    assert {r.status for r in done} <= {"valid", "degraded"}, [r.reasons for r in done]
    (manifest,) = study.again().manifests
    assert manifest.origin == f"hf:acme/oss-GGUF/all/gpt-oss-MXFP4.gguf@{shelf.first}"
    assert pins.of("theirs").revision == shelf.first
    kept = sources.file_of("theirs")
    assert kept.parent == sources.folder("theirs")
    # nothing is asked again, also after the branch has moved; another address is another file
    shelf.put("acme/oss-GGUF", {"all/gpt-oss-MXFP4.gguf": b"GGUF" + bytes(9000)})
    asked = len(shelf.requests)
    assert sources.file_of("theirs") == kept
    assert sources.any_file_of("theirs") == str(kept)
    assert len(shelf.requests) == asked
    kept.unlink()
    assert sources.any_file_of("theirs") == manifest.origin
    assert sources.missing_bytes("theirs") == manifest.file_bytes
    before = sources.file_of("theirs").read_bytes()
    # the entry names another file, and its download is interrupted after it was pinned
    shelf.put("acme/oss-GGUF", {"all/other-MXFP4.gguf": before})
    models_yaml = own / "params/models.yaml"
    text = models_yaml.read_text(encoding="utf-8").replace("all/gpt-oss-MXFP4.gguf", "all/other-MXFP4.gguf")
    models_yaml.write_text(text, encoding="utf-8")
    params._yaml.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_download", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sources.file_of("theirs")
    assert pins.of("theirs").files.keys() == {"all/other-MXFP4.gguf"}
    assert sources.fetched("theirs") is None
    assert sources.missing_bytes("theirs") == len(before)
    assert sources.file_of("theirs").name == "other-MXFP4.gguf"


def test_a_file_of_a_repository_that_is_not_there_is_said_before_anything_starts(own, engine, shelf):
    for i, (address, message) in enumerate([
        ("hf:acme/oss-GGUF/all/gpt-oss-Q4.gguf", r"there is no GGUF file all/gpt-oss-Q4\.gguf of acme/oss-GGUF; "),
        ("hf:acme/oss-GGUF/README.md", r"there is no GGUF file README\.md"),
        ("hf:acme/other/x.gguf", r"acme/other"),
    ]):  # fmt: skip
        entry(own, address, f"model{i}")
        run, get = lambda: campaign.run_cells(*campaign.select("theirs")), partial(sources.fetch, f"model{i}")
        for use in (run, get):
            with pytest.raises(params.UserError, match=message):
                use()
    assert not (own / "outputs/theirs").exists()
    entry(own, "hf:acme/oss-GGUF/all/gpt-oss-MXFP4.gguf", "there")
    for use in (lambda: sources.pin("there", "acme/oss-GGUF"), lambda: sources.adopt("there", own / "x.gguf")):
        with pytest.raises(params.UserError, match=r"there is the file hf:.*: `moelib fetch there` downloads it"):
            use()
    entry(own, "hf:acme/oss-GGUF", "vague")
    with pytest.raises(params.UserError, match=r"names no file; it has 1 to name:\s+hf:acme/oss-GGUF/all/gpt-oss"):
        sources.fetch("vague")
