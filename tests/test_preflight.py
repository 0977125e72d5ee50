"""What a study needs, told before anything starts; and studies whose placements are planned for the card here."""

import json
from pathlib import Path

import published
import pytest
import yaml
from click.testing import CliRunner

from moelib import cli
from moelib.base import files
from moelib.campaign import campaign, preflight
from moelib.catalogue import params
from moelib.gguf import twin
from moelib.measure import device
from moelib.models import quantize, sources
from moelib.planner import memory, named
from moelib.report import document, findings
from moelib.study.plan import StudyError
from moelib.study.study import Study

MIB = 1 << 20
FITTING = {
    "title": "Fitting",
    "models": ["phi-3.5-moe"],
    "weights": "twin",
    "twins": "direct",
    "scale": "tiny",
    "quants": ["Q2_K", "Q8_0"],
    "placements": "fitting",
    "workloads": ["smoke"],
    "requests": 2,
    "rounds": 2,
    "context": 256,
    "device": "loopback",
    "seed": 7,
}


@pytest.fixture
def own(home, tmp_path, monkeypatch):
    """A home with a models/ of its own: what is there already is part of the question."""
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "m"))
    return tmp_path


def described(home, **change):
    """`params/studies/mine.yaml`; None leaves a key out."""
    data = {k: v for k, v in (FITTING | change).items() if v is not None}
    (home / "params/studies/mine.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    params._yaml.cache_clear()


def no_gpu():
    raise device.NoDriver("no GPU")


def vram_of(quant, placement):
    (header,) = named.headers("phi-3.5-moe", [quant], "tiny")
    return memory.need(header, placement, 256, memory.LOOPBACK_BYTES, cuda=False).vram_bytes


@pytest.fixture
def room(own, engine):
    """VRAM that holds Q2_K whole, and Q8_0 with two layers' experts on the CPU."""
    nbytes = vram_of("Q8_0", "n-cpu-moe=2")
    assert vram_of("Q2_K", "baseline") < nbytes < vram_of("Q8_0", "n-cpu-moe=1")
    return nbytes


def placements(study):
    return {c.name: sorted({s.label for s in c.specs}) for c in study.cells}


@pytest.mark.engine
def test_a_study_is_planned_for_the_card_run_in_its_order_and_reported(own, room):
    described(own, vram=f"{room / MIB + 0.01:.3f}MiB")
    with pytest.raises(StudyError, match=r"mine has no plan yet.*`moelib study plan mine`.*`moelib study run mine`"):
        Study.named("mine")
    shown = CliRunner().invoke(cli.main, ["study", "plan", "mine"])
    assert shown.exit_code == 0, shown.output
    assert not (own / "outputs/mine").exists()
    assert "n-cpu-moe=2, mmap" in shown.output
    assert "download: nothing" in shown.output

    done = CliRunner().invoke(cli.main, ["study", "run", "mine"])
    assert done.exit_code == 0, done.output
    assert shown.output.partition("disk:")[0] in done.output
    study = Study.named("mine")
    assert placements(study) == {
        "phi-3.5-moe/Q2_K": ["baseline/mmap", "cpu-moe/mmap"],
        "phi-3.5-moe/Q8_0": ["cpu-moe/mmap", "n-cpu-moe=2/mmap"],
    }
    assert [c.quant for c in study.cells] == ["Q2_K", "Q8_0"]
    assert [c.quant for c in study.cells] == [r.spec.quant for r in study.used][::4]
    assert study.problems == []
    assert {m.origin.partition(",")[0] for m in study.manifests} == {"geometry twin written by moelib"}
    assert not list((own / "m").glob("**/*F16*")), "a direct twin needs no F16 file"

    text = (own / "outputs/mine" / document.DOCUMENT).read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| phi-3.5-moe | Q") and " MiB" in line]
    told = [r for r in rows if r[3].strip() == "n-cpu-moe=2, mmap"]
    assert "### Planned and measured" in text
    assert [r[4].strip() for r in told] == [f"{room / MIB:.2f} MiB"]
    provenance = json.loads((own / "outputs/mine/provenance.json").read_bytes())
    rows = provenance["tables"]["planned"]["rows"]
    assert len(rows) == 4
    assert all(any(name == "plan.json" or name.startswith("set ") for name in row["from"]) for row in rows)
    assert "the fitting placement" in text


@pytest.mark.engine
def test_what_was_planned_stays_planned(own, room, monkeypatch):
    described(own, vram=f"{room / MIB + 0.01:.3f}MiB")
    study = preflight.of("mine")
    study.begin()
    monkeypatch.setattr(preflight, "fitted", lambda *_: pytest.fail("planned again"))
    assert placements(preflight.of("mine")) == placements(Study.named("mine")) == placements(study)
    described(own, vram="900MiB")
    with pytest.raises(StudyError, match="is the plan of a study with other parameters"):
        preflight.of("mine")
    described(own, vram=f"{room / MIB + 0.01:.3f}MiB")
    other = (
        (own / "params/workloads.yaml").read_text(encoding="utf-8").replace("generate_tokens: 8", "generate_tokens: 9")
    )
    (own / "params/workloads.yaml").write_text(other, encoding="utf-8")
    params._yaml.cache_clear()
    with pytest.raises(StudyError, match="is the plan of a study with other parameters"):
        Study.named("mine")


@pytest.mark.engine
def test_each_model_is_held_to_its_own_placements(own, engine):
    """Those of one may make no sense for another: DeepSeek-MoE's first layer is dense."""
    vram = f"{vram_of('Q8_0', 'n-cpu-moe=1') / MIB + 0.01:.3f}MiB"
    described(own, models=["phi-3.5-moe", "deepseek-moe-16b"], quants=["Q8_0"], vram=vram)
    study = preflight.of("mine")
    assert placements(study)["phi-3.5-moe/Q8_0"] == ["cpu-moe/mmap", "n-cpu-moe=1/mmap"]
    assert "n-cpu-moe=1/mmap" not in placements(study)["deepseek-moe-16b/Q8_0"]
    campaign.refuse_senseless(study, study.cells)


@pytest.mark.engine
def test_a_file_of_the_catalogue_is_planned_as_it_is(own, engine):
    file = quantize.twin(*quantize.outline_of("phi-3.5-moe", "tiny"), "Q8_0", scale="tiny", out=own / "their.gguf").path
    with (own / "params/models.yaml").open("a", encoding="utf-8") as f:
        f.write(f"\ntheirs:\n  title: Theirs\n  file: {file}\n")
    described(own, models=["theirs"], quants=["as-is"], twins=None, scale=None, vram="45MiB")
    study = preflight.of("mine")
    (labels,) = placements(study).values()
    assert "cpu-moe/mmap" in labels
    assert len(labels) == 2
    needs = preflight.preflight(study)
    assert (needs.download_bytes, needs.disk_bytes) == (0, 0)
    assert [row.file_bytes for row in needs.rows] == [file.stat().st_size]
    campaign.refuse_senseless(study, study.cells)


@pytest.mark.engine
def test_what_does_not_fit_is_said_with_what_does(own, room, monkeypatch):
    described(own)
    with pytest.raises(StudyError, match=r"nothing says how much VRAM there is.*write what it is for.*vram: 12GiB"):
        preflight.of("mine")
    described(own, device="cuda")
    monkeypatch.setattr(device, "Cuda", no_gpu)
    with pytest.raises(device.DeviceError, match=r"no GPU; or plan for another machine's card: `moelib study plan"):
        preflight.of("mine")
    # the card that somebody thinks of buying
    told = CliRunner().invoke(cli.main, ["study", "plan", "mine", "--vram", "1GiB"])
    assert told.exit_code == 0, told.output
    assert "of 1.00 GiB (of a card elsewhere), planned for 993 MiB" in told.output
    assert "baseline, mmap" in told.output
    # in a machine of which nothing is known: what is here does not count
    small = type("M", (), {"total": 100 * MIB, "available": 100 * MIB})
    with monkeypatch.context() as patch:
        patch.setattr(preflight.psutil, "virtual_memory", lambda: small)
        again = CliRunner().invoke(cli.main, ["study", "plan", "mine", "--vram", "1GiB"])
    assert again.exit_code == 0, again.output
    assert "too much RAM" not in again.output
    described(own, vram="4MiB")
    with pytest.raises(
        StudyError, match=r"mine, phi-3\.5-moe/Q2_K: .*; or leave that quant out of params/studies/mine"
    ):
        preflight.of("mine")
    least = vram_of("Q8_0", "cpu-moe")
    described(own, vram=f"{least / MIB + 0.1:.3f}MiB", quants=["Q8_0"])
    assert placements(preflight.of("mine")) == {"phi-3.5-moe/Q8_0": ["cpu-moe/mmap", "cpu-moe/none"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"placements": None}, "name at least two, or write `placements: fitting`"),
        ({"placements": [{"placement": "baseline"}, {"placement": "cpu-moe"}], "vram": "4GiB"}, "vram is what"),
        ({"vram": "12"}, "is no size of memory"),
        ({"weights": "real", "scale": "full"}, "twins: direct is for"),
        ({"placements": "fiting"}, "placements"),
    ],
)
def test_a_study_that_says_two_things_is_refused(own, change, message):
    described(own, **change)
    with pytest.raises(params.ParamsError, match=message):
        params.study("mine")


@pytest.mark.engine
def test_the_disk_that_a_study_takes_is_counted_until_it_is_written(own, engine, monkeypatch):
    fixed = [{"placement": "baseline"}, {"placement": "cpu-moe"}]
    described(own, twins=None, placements=fixed)
    needs = preflight.preflight(preflight.of("mine"))
    f16 = twin.nbytes(params.model("phi-3.5-moe").at_scale("tiny"))
    assert (needs.download_bytes, needs.unpinned) == (0, ())
    assert needs.disk_bytes == f16 + sum(row.file_bytes for row in needs.rows)
    (first, _) = campaign.select("mine", "phi-3.5-moe/Q2_K")[1][0].blocks
    assert [row.cell for row in preflight.preflight(*campaign.select("mine", "phi-3.5-moe/Q2_K")).rows] == [
        f"{first[0].model}/{first[0].quant}"
    ]
    made = campaign.quantize.from_source("phi-3.5-moe", "Q2_K", "tiny", "twin")
    then = preflight.preflight(preflight.of("mine"))
    assert then.disk_bytes == next(row.file_bytes for row in needs.rows if row.cell.endswith("Q8_0"))
    assert made.header.file_bytes == next(row.file_bytes for row in needs.rows if row.cell.endswith("Q2_K"))

    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("D", (), {"free": MIB}))
    with pytest.raises(files.FileError, match=r"study mine needs 0\.\d+ GiB in m/, 0\.00 GiB are free"):
        then.require()
    refused = CliRunner().invoke(cli.main, ["study", "run", "mine"])
    assert refused.exit_code != 0
    assert "study mine needs" in refused.output
    assert not (own / "outputs/mine/records").exists()


@pytest.mark.engine
def test_a_card_and_a_ram_that_are_too_small_are_said(own, engine, monkeypatch):
    described(own, placements=[{"placement": "baseline"}, {"placement": "cpu-moe"}])
    needs = preflight.preflight(preflight.of("mine"))
    assert list(needs.doubts()) == []
    room = preflight.Room("small", vram_of("Q8_0", "cpu-moe") + 1, 400 * MIB, is_cuda=False)
    needs = preflight.preflight(preflight.of("mine"), room=room)
    doubts = list(needs.doubts())
    assert [d.partition(" needs")[0] for d in doubts if d.startswith("too much VRAM")] == [
        "too much VRAM: phi-3.5-moe/Q2_K at baseline, mmap",
        "too much VRAM: phi-3.5-moe/Q8_0 at baseline, mmap",
    ]
    assert any(d.startswith("too much RAM: phi-3.5-moe/Q8_0 at cpu-moe, mmap needs") for d in doubts)
    assert set(doubts) <= set(needs.lines())
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("D", (), {"free": MIB}))
    lacking = preflight.preflight(preflight.of("mine"), room=room)
    assert next(lacking.doubts()).startswith("too little disk: ")


@pytest.mark.engine
def test_a_download_is_foretold(own, engine, lfs_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    shape = published.catalogued(own)
    described(
        own,
        models=["toy"],
        weights="real",
        twins=None,
        scale=None,
        quants=["Q8_0"],
        placements=[{"placement": "baseline"}, {"placement": "cpu-moe"}],
    )
    needs = preflight.preflight(preflight.of("mine"))
    assert (needs.unpinned, needs.download_bytes) == (("toy",), twin.nbytes(shape))
    assert any("toy is not pinned yet" in line for line in needs.lines())
    raw = published.gguf(shape)
    lfs_hub.put("alice/toy-GGUF", {"toy-F16.gguf": raw})
    sources.pin("toy", "alice/toy-GGUF", endpoint=lfs_hub.url)
    pinned = preflight.preflight(preflight.of("mine"))
    assert (pinned.unpinned, pinned.download_bytes) == ((), len(raw))
    assert pinned.disk_bytes == len(raw) + pinned.rows[0].file_bytes
    sources.fetch("toy", lfs_hub.url)
    there = preflight.preflight(preflight.of("mine"))
    assert (there.download_bytes, there.disk_bytes) == (0, there.rows[0].file_bytes)


def test_a_study_that_was_not_planned_for_a_card_has_no_such_table():
    folder = Path(__file__).parents[1] / "tests/fixtures/twins"
    assert findings.planned(Study.read(folder)) == []


def test_a_study_whose_needs_cannot_be_foretold_is_run_all_the_same(own, monkeypatch):
    """Its runs measure what the predictions only foretell; what makes no sense is refused by either."""
    described(own, twins=None, placements=[{"placement": "baseline"}, {"placement": "n-cpu-moe=1"}])

    def killed(*_):
        raise quantize.QuantizeError("llama-quantize was killed")

    where = preflight.Room("a card", 1 << 30, 1 << 30, is_cuda=False)
    monkeypatch.setattr(preflight, "here", lambda _: where)
    monkeypatch.setattr(named, "headers", killed)
    ran = []
    monkeypatch.setattr(campaign, "run_cells", lambda study, cells, say: ran.extend(c.name for c in cells) or [])
    told = CliRunner().invoke(cli.main, ["study", "run", "mine"])
    assert "what it needs cannot be foretold: llama-quantize was killed" in told.output
    assert ran == ["phi-3.5-moe/Q2_K", "phi-3.5-moe/Q8_0"]


@pytest.mark.engine
def test_the_plan_of_a_study_refuses_a_placement_that_moves_nothing(own, engine):
    described(
        own,
        models=["deepseek-moe-16b"],
        twins=None,
        placements=[{"placement": "baseline"}, {"placement": "n-cpu-moe=1"}],
    )
    told = CliRunner().invoke(cli.main, ["study", "plan", "mine"])
    assert told.exit_code == 1
    assert "params/studies/mine.yaml: deepseek-moe-16b: n-cpu-moe=1 moves nothing: layer 0 is dense" in told.output
    assert not list((own / "m").glob("*"))
