"""Previews: slices chosen by the header and the machine, and measured with the real engine on the loopback device."""

import re
import subprocess
import sys
from pathlib import Path

import ggufs
import pytest
import shapes
import yaml
from click.testing import CliRunner

import moelib
from moelib import cli
from moelib.base import files
from moelib.base.schema import UserError
from moelib.campaign import bench
from moelib.catalogue import params
from moelib.catalogue.placement import Placement
from moelib.forecast import preview, slices
from moelib.forecast.predict import Layers
from moelib.forecast.slices import Model, PreviewError
from moelib.gguf import outline
from moelib.machine import host
from moelib.models import models, quantize

REPO = Path(__file__).parents[1]
GIB = 1 << 30
LONG = {"block_count": 12, "vocab_size": 512}


def model_of(name):
    return Model(name, outline.from_bytes([shapes.head(name)], f"{name}.gguf"))


def small(layers, dense=0, **more):
    raw = ggufs.build(*ggufs.moe(layers=layers, dense=dense, **more))
    return Model("m", outline.from_bytes([(raw, len(raw))], "m.gguf"))


@pytest.mark.parametrize(
    ("name", "period", "lengths"),
    [
        ("qwen3-30b-a3b", 1, (2, 10)),
        ("gpt-oss-20b", 1, (2, 10)),
        ("glm-4.5-air", 1, (3, 11)),
        ("lfm2-8b-a1b", 1, (4, 12)),
    ],
)
def test_slices_of_published_models(name, period, lengths):
    model = model_of(name)
    assert (model.period, model.lengths(None)) == (period, lengths)
    assert model.regular == (name != "lfm2-8b-a1b")  # convolutions and attention, in no regular order


def test_a_model_that_is_told_by_its_number_of_layers_has_no_slices(home, engine, tmp_path):
    with pytest.raises(PreviewError, match=r"does not load slices of deepseek-v2-lite: [^;]+; `moelib twin`") as err:
        slices.measure(model_of("deepseek-v2-lite"), (3, 9), [Placement(0)], 2, "loopback")
    assert "\n" not in str(err.value)
    assert left_behind() == []


def test_the_first_dense_layers_are_in_both_slices_and_are_not_counted():
    model = small(30, dense=3)
    near, far = model.lengths(None)
    assert (near, far) == (5, 13)
    assert model.counted(model.slice(far), "baseline") == Layers(10, 0)
    assert model.counted(model.slice(far), "cpu-moe") == Layers(0, 10)
    assert model.counted(model.header, "n-cpu-moe=10") == Layers(20, 7)


def test_layers_whose_kinds_alternate_are_taken_by_whole_periods():
    metadata, tensors = ggufs.moe(layers=24)
    for i in range(24):
        if i % 4 == 3:
            tensors[f"blk.{i}.attn_k.weight"] = (32, 4)
    raw = ggufs.build(metadata, tensors)
    model = Model("m", outline.from_bytes([(raw, len(raw))], "m.gguf"))
    assert (model.period, model.lengths(None)) == (4, (4, 12))


def test_a_cpus_cache_asks_for_longer_slices():
    model = small(40)
    layer = model.header.moved_bytes("cpu-moe") // 40
    assert model.lengths(layer * 5 // 2) == (10, 18)
    assert model.lengths(layer * 19) == (2, 10)  # no slice is so long: what it does not tell is not predicted
    assert not model.beyond(2, layer * 19)
    assert model.lengths(layer * 1000) == (2, 10)  # the whole stays in the cache, as the slices do


@pytest.mark.parametrize("layers", [1, 3])
def test_a_model_of_few_layers_is_to_be_measured_itself(layers):
    with pytest.raises(PreviewError, match=r"has 1 layers|has 3 layers|`moelib twin` writes all of it") as err:
        small(layers).lengths(None)
    assert "moelib.run" in str(err.value)
    assert "\n" not in str(err.value)


def test_slices_are_as_long_as_the_machine_holds(home, monkeypatch):
    monkeypatch.setattr(host, "cache_bytes", lambda: None)
    model = model_of("mixtral-8x7b")
    monkeypatch.setattr(slices.psutil, "virtual_memory", lambda: type("M", (), {"available": 200 * GIB}))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda p: type("D", (), {"free": 500 * GIB}))
    monkeypatch.setattr(slices.device, "card_bytes", lambda: 80 * GIB)
    settings = Placement(0)
    assert slices.choose(model, settings, "cuda")[0] == (2, 10)
    monkeypatch.setattr(slices.device, "card_bytes", lambda: 5 * GIB)
    lengths, placements = slices.choose(model, settings, "cuda")
    assert (lengths[0], len(placements)) == (2, 2)
    assert lengths[1] < 10
    monkeypatch.setattr(slices.device, "card_bytes", lambda: int(2.5 * GIB))  # the experts alone do not fit
    assert [str(p) for p in slices.choose(model, settings, "cuda")[1]] == ["cpu-moe"]
    monkeypatch.setattr(files.shutil, "disk_usage", lambda p: type("D", (), {"free": GIB}))
    with pytest.raises(PreviewError, match=r"slices of 2 and 3 layers need [\d.]+ GiB of disk, 1.00 GiB are free"):
        slices.choose(model, settings, "cuda")


def test_one_round_gives_no_interval():
    with pytest.raises(PreviewError, match="take --rounds 2 or more"):
        preview.preview("m.gguf", rounds=1)


@pytest.fixture
def long(home):
    """A home whose catalogue has a model of 12 small layers, to be quick: its numbers mean nothing."""
    geometry = params.model("deepseek-moe-16b").at_scale("nano").model_dump() | LONG
    entry = {"long": {"title": "Long", "upstream": {"publisher": "a", "original": "a/t"}, "geometry": geometry}}
    path = home / "params/models.yaml"
    path.write_text(path.read_text(encoding="utf-8") + yaml.safe_dump(entry), encoding="utf-8")
    params._yaml.cache_clear()
    return "long"


def left_behind():
    return list(models.folder().glob(f"{slices.TEMPORARY}*"))


def test_a_preview_of_the_real_engine_and_what_it_says_where_it_does_not_know(long, engine, monkeypatch):
    seen = moelib.preview(long, "4GiB", quant="Q8_0", rounds=2, device="loopback", context=1024)
    assert left_behind() == []
    assert len(seen.records) == 8
    assert len({r.run_id for r in seen.records}) == 8
    assert {r.spec.load_mode for r in seen.records} == {"none"}
    assert {r.status for r in seen.records} <= {"valid", "degraded"}
    frame = seen.frame
    assert frame["placement"].tolist() == ["baseline", *(f"n-cpu-moe={n}" for n in range(2, 12)), "cpu-moe"]
    told = frame.dropna()
    assert (told["tokens_per_s_low"] < told["tokens_per_s"]).all()
    assert (told["ttft_s"] < told["ttft_s_high"]).all()
    assert seen.chosen.need.placement.is_baseline
    assert seen.command.endswith("--load-mode none")
    assert seen.evidence["layers"].value_counts().to_dict() == {3: 4, 11: 4}
    text = "\n".join(seen.lines())
    assert text.startswith("long-Q8_0.gguf on 4.00 GiB of VRAM: baseline, predicted ")
    assert "speeds are not those of a GPU" in text
    assert "8 of 8 audited runs of twins of the first 3 and 11 layers" in text
    assert "predicted" in repr(seen)
    assert "<pre>" in seen._repr_html_()

    model = Model(*preview.named.outline(long, "Q8_0"))
    kept = [r for r in seen.records if not r.spec.placed.is_baseline]
    part = preview.predicted(model, seen.plan, kept)
    assert part.frame["tokens_per_s"].notna().sum() <= 1
    assert "two slices do not fit this GPU" in " ".join(part.notes)
    poor = [r.model_copy(update={"host": r.host.model_copy(update={"ram_bytes": 1 << 20})}) for r in seen.records]
    assert preview.predicted(model, seen.plan, poor).frame["tokens_per_s"].isna().all()
    assert "would read the disk" in " ".join(preview.predicted(model, seen.plan, poor).notes)
    experts = model.slice(9).moved_bytes("cpu-moe")
    monkeypatch.setattr(host, "cache_bytes", lambda: experts // 2)  # the whole is not in it, three layers are
    cached = preview.predicted(model, seen.plan, seen.records)
    assert cached.frame.loc[1:, "tokens_per_s"].isna().all()
    assert "stays in this CPU's cache" in " ".join(cached.notes)
    loud = [r.model_copy(update={"status": "degraded", "reasons": ("host-quiet",)}) for r in seen.records]
    assert "; 8 of them are flagged: host-quiet." in "\n".join(preview.predicted(model, seen.plan, loud).lines())
    refused = [r.model_copy(update={"status": "invalid", "reasons": ("timeline",)}) for r in seen.records]
    with pytest.raises(PreviewError, match=r"8 runs are invalid \(timeline\); try again"):
        preview.predicted(model, seen.plan, refused)


def test_the_committed_residuals_are_those_of_their_records(engine):
    """docs/PREVIEW.md is what a preview says today of the committed slices' runs, and within the aims."""
    argv = [sys.executable, "benchmarks/preview_residuals.py", "show", "outputs/preview"]
    shown = subprocess.run(argv, cwd=REPO, capture_output=True, encoding="utf-8", check=True, timeout=300).stdout
    assert shown == (REPO / "docs/PREVIEW.md").read_text(encoding="utf-8")
    found = re.findall(r"^- (.*): ([\d.]+) % off in the median of (\d+) placements", shown, re.M)
    (token, decode, placements), (_, prompt, _), *_ = found
    assert (token, placements) == ("ms a token", "20")
    assert float(decode) <= 5
    assert float(prompt) <= 10


def test_an_interrupted_preview_and_a_slice_that_does_not_run_leave_nothing(long, engine, monkeypatch):
    real = bench.Bench.measure

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.Bench, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moelib.preview(long, "4GiB", quant="Q8_0", rounds=2, device="loopback")
    assert left_behind() == []

    def crashed(*given):
        return real(*given).model_copy(update={"observed": None, "reasons": ("engine-died",), "message": "boom"})

    monkeypatch.setattr(bench.Bench, "measure", crashed)
    with pytest.raises(PreviewError, match=r"do not run at [\w-]+ \(engine-died: boom\); `moelib twin`"):
        moelib.preview(long, "4GiB", quant="Q8_0", rounds=2, device="loopback")
    assert left_behind() == []

    def unloadable(*given, **more):
        raise quantize.QuantizeError("with its first 3 layers alone, the engine cannot load it")

    monkeypatch.setattr(quantize, "twin", unloadable)
    with pytest.raises(PreviewError, match="does not load slices of long: with its first 3"):
        moelib.preview(long, "4GiB", quant="Q8_0", rounds=2, device="loopback")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["deepseek-moe-16b", "--vram", "1MiB"], r"does not fit 1 MiB of VRAM"),
        (["deepseek-moe-16b", "--vram", "8GiB", "--scale", "tiny", "--device", "loopback"], "too few to be told"),
        (["deepseek-moe-16", "--vram", "8GiB"], "did you mean"),
        (["deepseek-moe-16b", "--vram", "8GiB", "--quant", "Q4_K_N"], "did you mean"),
        (["nowhere.gguf", "--vram", "8GiB"], "nowhere"),
    ],
)
def test_what_cannot_be_previewed_gets_a_sentence(home, engine, args, said):
    done = CliRunner().invoke(cli.main, ["preview", *args])
    assert isinstance(done.exception, UserError | SystemExit)
    assert re.search(said, done.output + str(done.exception))
    assert left_behind() == []
