"""Real weights: pinned, fetched from a Hub on loopback, verified, adopted; and a study of them."""

import itertools
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from hashlib import sha256
from types import SimpleNamespace

import published
import pytest
import yaml
from conftest import SMOKE
from hub import HOWS, Hub, official_client
from huggingface_hub import constants

from moelib.audit import record
from moelib.base import files, neutral
from moelib.campaign import campaign
from moelib.catalogue import params, pins
from moelib.gguf import gguf_file, twin
from moelib.machine import process
from moelib.models import hub, quantize, sources
from moelib.models.hub import HubError
from moelib.models.sources import SourceError
from moelib.report import document

REPO = "alice/toy-GGUF"


@pytest.fixture
def toy(home, tmp_path, monkeypatch):
    """A model `toy` in the catalogue whose full size is deepseek's nano, and the bytes of its F16 file."""
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "m"))
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    geometry = published.catalogued(home, "Toy", "al", "al/t")
    published.twin_as_a_model(tmp_path / "toy.gguf", geometry)
    return (tmp_path / "toy.gguf").read_bytes()


@pytest.fixture
def pinned(toy, lfs_hub):
    lfs_hub.put(REPO, {"README.md": b"# toy\n", "toy-F16.gguf": toy, "toy-Q8_0.gguf": b"GGUF" * 9000})
    sources.pin("toy", REPO, endpoint=lfs_hub.url)
    return toy


def test_nothing_pinned_says_how_to_pin(toy):
    with pytest.raises(SourceError, match=r"moelib fetch toy --pin OWNER/NAME.*publisher al.*--from"):
        sources.fetch("toy")
    for name in ("phi-3.5-moe", "deepseek-moe-16b"):
        assert params.model(name).upstream.publisher in {"MaziyarPanahi", "unsloth"}
        with pytest.raises(SourceError, match="is pinned"):
            sources.fetch(name)


def test_an_excluded_model_is_not_fetched():
    for use in (sources.fetch, lambda m: sources.pin(m, REPO), lambda m: sources.obtain(m, "real", "full")):
        with pytest.raises(params.ParamsError, match="MXFP4 by design"):
            use("gpt-oss-20b")


def test_what_is_fetched_is_there_once_and_whole(pinned, lfs_hub):
    source = sources.fetch("toy", lfs_hub.url)
    assert source.path.read_bytes() == pinned
    assert (source.weights, source.scale, source.sha256) == ("real", "full", sha256(pinned).hexdigest())
    assert source.origin == f"{REPO}@{pins.of('toy').revision}"
    requests = len(lfs_hub.requests)
    assert sources.fetch("toy", lfs_hub.url) == source == sources.obtain("toy", "real", "full")
    assert len(lfs_hub.requests) == requests
    source.path.unlink()
    assert sources.obtain("toy", "real", "full", needed=False) == source
    assert sources.fetch("toy", lfs_hub.url).path.read_bytes() == pinned


def test_a_changed_file_is_fetched_again(pinned, lfs_hub, monkeypatch):
    source = sources.fetch("toy", lfs_hub.url)
    with source.path.open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\xff" if pinned[-1] != 255 else b"\x00")
    monkeypatch.setattr(hub, "api", lambda endpoint=None, api=hub.api: api(endpoint or lfs_hub.url))
    assert sources.whole(source) == source
    assert source.path.read_bytes() == pinned


STORAGE = r"^GET /storage"
FETCH = "import sys; from moelib.models import sources; sources.fetch('toy', sys.argv[1])"


def beginning():
    """Path of the download that was begun."""
    (want,) = pins.of("toy").files.values()
    return sources._begun(sources.folder("toy") / "toy-F16.gguf", want)


def test_a_killed_download_goes_on_where_it_was(pinned, lfs_hub):
    lfs_hub.fail("short", match=STORAGE)
    lfs_hub.fail("timeout", match=STORAGE, times=None)
    env = os.environ | {"HF_HUB_DISABLE_XET": "1"}
    with subprocess.Popen([sys.executable, "-c", FETCH, lfs_hub.url], env=env) as child:
        deadline = time.monotonic() + 60
        while sources._arrived(beginning()) < len(pinned) // 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        child.kill()
    arrived = sources._arrived(beginning())
    assert len(pinned) // 3 <= arrived < len(pinned)
    lfs_hub._faults.clear()
    lfs_hub.let_go()
    before = len(lfs_hub.requests)
    assert sources.fetch("toy", lfs_hub.url).path.read_bytes() == pinned
    assert sum(r.sent for r in lfs_hub.requests[before:]) == len(pinned) - arrived
    assert not beginning().exists()


@pytest.mark.parametrize("accepts_ranges", [True, False])
def test_a_connection_that_breaks_goes_on_within_the_call(pinned, lfs_hub, accepts_ranges):
    lfs_hub.accepts_ranges = accepts_ranges
    lfs_hub.fail("short", match=STORAGE, times=3)
    assert sources.fetch("toy", lfs_hub.url).path.read_bytes() == pinned
    served = [r for r in lfs_hub.requests if r.fault or r.path.startswith("/storage")][1:]  # the first is the pin's
    assert len(served) == 4
    if accepts_ranges:
        assert sum(r.sent for r in served) == len(pinned)


def test_a_connection_that_always_breaks_at_once_is_given_up(pinned, lfs_hub):
    fault = lfs_hub.fail("reset", match=STORAGE, times=None)
    with pytest.raises(HubError, match="disconnected"):
        sources.fetch("toy", lfs_hub.url)
    assert fault.struck == hub.BREAKS + 1


def test_more_than_there_is_to_come_is_no_beginning(pinned, lfs_hub):
    beginning().parent.mkdir(parents=True)
    beginning().write_bytes(bytes(len(pinned) + 1))
    assert sources.fetch("toy", lfs_hub.url).path.read_bytes() == pinned


@pytest.mark.parametrize("wrong", ["beginning", "storage"])
def test_wrong_bytes_are_refused_and_not_kept(pinned, lfs_hub, wrong):
    if wrong == "beginning":
        beginning().parent.mkdir(parents=True)
        beginning().write_bytes(bytes(1000))
    else:
        lfs_hub.fail("corrupt", match=STORAGE)
    with pytest.raises(SourceError, match=r"SHA-256 \w+\.\.\., but .* is pinned; it was deleted. Run again"):
        sources.fetch("toy", lfs_hub.url)
    assert not beginning().exists()
    assert not list(sources.folder("toy").glob("*.gguf"))
    assert sources.fetch("toy", lfs_hub.url).path.read_bytes() == pinned


@pytest.mark.parametrize(
    ("how", "step"),
    [
        ("401", "hf auth login"),
        ("403", "HF_TOKEN|may not"),
        ("404", "check the names"),
        ("429", "slow down"),
        ("500", "later"),
        ("503", "later"),
        ("reset", "check the network"),
    ],
)
def test_a_refusal_names_the_next_step(pinned, lfs_hub, how, step):
    lfs_hub.fail(how, times=None)
    with pytest.raises(HubError, match=step) as caught:
        sources.fetch("toy", lfs_hub.url)
    assert str(caught.value).startswith("fetching toy-F16.gguf of alice/toy-GGUF: ")
    assert "hf_read" not in str(caught.value)
    assert not list(sources.folder("toy").glob("*.gguf"))


@pytest.mark.parametrize("how", HOWS)
def test_whatever_fails_no_wrong_file_is_kept_and_the_next_try_succeeds(toy, tmp_path, how, monkeypatch):
    monkeypatch.setenv("MOELIB_PATIENCE", "0.005")  # 60 s of silence: 0.3 s
    with Hub(tmp_path / "clean", silence_s=3) as server, official_client(server):
        commit = server.put(REPO, {"toy-F16.gguf": toy})
        sources.pin("toy", REPO, endpoint=server.url)
        sources.fetch("toy", server.url)
        lines = [r.line for r in server.requests]
    place, safe = sources.folder("toy"), 0
    for nth, times in itertools.product(range(1, len(lines) + 1), (1, None)):
        shutil.rmtree(place)
        with Hub(tmp_path / f"{nth}-{times}", silence_s=3) as server, official_client(server):
            assert server.put(REPO, {"toy-F16.gguf": toy}) == commit
            fault = server.fail(how, nth=nth, times=times)
            with suppress(params.UserError):
                sources.pin("toy", REPO, endpoint=server.url)
                sources.fetch("toy", server.url)
            kept = [p.read_bytes() for p in place.glob("*.gguf")]
            assert kept in ([], [toy])
            server._faults.clear()
            server.let_go()
            with suppress(SourceError):  # bytes of a first part that were wrong are found, and thrown away
                sources.fetch("toy", server.url)
            assert sources.fetch("toy", server.url).path.read_bytes() == toy
            safe += bool(fault.struck)
    assert safe > len(lines)


def test_offline_says_so(pinned, lfs_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set.*--from"):
        sources.fetch("toy", lfs_hub.url)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        sources.pin("toy", REPO, endpoint=lfs_hub.url)


def test_no_hub_at_all_is_a_network_to_check(pinned):
    with pytest.raises(HubError, match="cannot be reached"):
        sources.fetch("toy", "http://127.0.0.1:9")


def test_a_repository_that_may_not_be_read_is_named(toy, lfs_hub):
    lfs_hub.put("bob/secret", {"toy-F16.gguf": toy}, private=True)
    with pytest.raises(HubError, match=r"pinning bob/secret: there is no such repository, or it is private"):
        sources.pin("toy", "bob/secret", endpoint=lfs_hub.url)
    lfs_hub.put("bob/gated", {"toy-F16.gguf": toy})
    lfs_hub.repos["bob/gated"].gated = "auto"
    with pytest.raises(HubError, match=r"of bob/gated: its owner requires consent: give it on the repository's page"):
        sources.pin("toy", "bob/gated", endpoint=lfs_hub.url)


def test_room_is_looked_for_first(pinned, lfs_hub, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    before = len(lfs_hub.requests)
    with pytest.raises(files.FileError, match="fetching toy needs"):
        sources.fetch("toy", lfs_hub.url)
    assert len(lfs_hub.requests) == before


def test_a_file_too_large_for_plain_http_comes_by_xet(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST_HTTP_BYTES", 1000)
    with Hub(tmp_path / "hub", xet=True) as server, official_client(server):
        from huggingface_hub import HfApi

        api = HfApi(endpoint=server.url, token="hf_write")
        api.create_repo(REPO)
        api.upload_file(path_or_fileobj=toy, path_in_repo="toy-F16.gguf", repo_id=REPO)
        sources.pin("toy", REPO, endpoint=server.url)
        assert sources.fetch("toy", server.url).path.read_bytes() == toy
        assert [r for r in server.requests if "xet-read-token" in r.path]


def test_the_command_pins_fetches_and_says_what_is_excluded(toy, lfs_hub, tmp_path):
    def command(*args):
        env = os.environ | {"HF_ENDPOINT": lfs_hub.url, "HF_HUB_DISABLE_XET": "1"}
        argv = [sys.executable, "-m", "moelib.cli", "fetch", *args]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, encoding="utf-8")
        assert "hf_read" not in done.stdout + done.stderr
        return done

    commit = lfs_hub.put(REPO, {"toy-F16.gguf": toy})
    assert "moelib fetch toy --pin OWNER/NAME" in command("toy").stderr
    assert f"pinned {REPO}@{commit}: 1 files" in command("toy", "--pin", REPO).stdout
    done = command("toy")
    assert f"sha256 {sha256(toy).hexdigest()}  from {REPO}@{commit}" in done.stdout
    assert "from local file toy.gguf" in command("toy", "--from", str(tmp_path / "toy.gguf")).stdout
    done = command("gpt-oss-20b")
    assert done.returncode == 1
    assert "excluded: its experts are published in MXFP4 by design" in done.stderr


# what the user has


def test_a_local_file_is_linked_and_known_by_its_name_alone(toy, tmp_path):
    source = sources.adopt("toy", tmp_path / "toy.gguf")
    assert source.path.resolve() == (tmp_path / "toy.gguf").resolve()
    assert source.path.is_symlink()
    assert source.origin == "local file toy.gguf"
    assert source.sha256 == sha256(toy).hexdigest()
    assert sources.obtain("toy", "real", "full") == source


def test_another_model_is_refused(toy, home, tmp_path):
    twin.write(tmp_path / "phi.gguf", params.model("phi-3.5-moe").at_scale("nano"), title="Phi")
    with pytest.raises(SourceError, match=r"phi.gguf is not toy: architecture phimoe, not deepseek. Give"):
        sources.adopt("toy", tmp_path / "phi.gguf")
    assert sources._chosen("toy") is None


@pytest.fixture
def good(toy, tmp_path):
    """A source that was chosen, and what its folder holds: nothing that is refused later may change it."""
    source = sources.adopt("toy", tmp_path / "toy.gguf")
    return source, state_of(sources.folder("toy"))


def state_of(place):
    return {p.name: (p.resolve(), p.read_bytes()) for p in place.iterdir() if ".lock" not in p.name}


def toy_file(**how):
    return published.gguf(params.model("toy").at_scale("full"), **how)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"kind": "Q8_0"}, "it is quantised"),
        ({"general": {"description": "random weights in the shape of X"}}, "its weights are random"),
        ({"block_count": "2"}, "block_count is '2', not a count"),
        ({"keep": lambda name: "attn" not in name}, "it is not whole"),
        (None, "toy.gguf: "),
    ],
)
def test_what_is_not_the_model_replaces_nothing(good, tmp_path, how, why):
    """The reasons themselves are those of a pin: tests/test_pins.py."""
    source, before = good
    given = tmp_path / "other" / "toy.gguf"  # under the good one's own name
    given.parent.mkdir()
    given.write_bytes(toy_file(**how) if how else b"GGUF" + bytes(5000))
    with pytest.raises((SourceError, gguf_file.GGUFError), match=why) as caught:
        sources.adopt("toy", given)
    assert "\n" not in str(caught.value)
    assert state_of(sources.folder("toy")) == before
    assert sources.obtain("toy", "real", "full") == source


def test_a_file_that_changes_while_it_is_read_is_refused(good, tmp_path, monkeypatch):
    _source, before = good
    (tmp_path / "new.gguf").write_bytes(toy_file())

    def digest(path):
        with path.open("ab") as f:
            f.write(b"more")
        return "0" * 64

    monkeypatch.setattr(sources.weights, "digest", digest)
    with pytest.raises(SourceError, match="was changed while it was read"):
        sources.adopt("toy", tmp_path / "new.gguf")
    assert state_of(sources.folder("toy")) == before


def test_a_local_file_that_is_gone_or_changed_is_not_taken_for_the_source(good, tmp_path):
    source, _ = good
    content = (tmp_path / "toy.gguf").read_bytes()
    for harm in (lambda p: p.unlink(), lambda p: p.write_bytes(content[:-1] + b"x")):
        harm(tmp_path / "toy.gguf")
        for use in (lambda: sources.whole(source), lambda: sources.obtain("toy", "real", "full")):
            with pytest.raises(SourceError, match=r"are local file toy.gguf, which is missing or was changed: give it"):
                use()
        (tmp_path / "toy.gguf").write_bytes(content)
        sources.adopt("toy", tmp_path / "toy.gguf")
    assert sources.whole(source) == source


def test_another_file_in_the_place_of_the_chosen_one_is_not_the_source(good, tmp_path):
    source, _ = good
    (tmp_path / "other").mkdir()
    (tmp_path / "other/toy.gguf").write_bytes(toy_file())
    chosen = (sources.folder("toy") / "source.json").read_text(encoding="utf-8")
    sources.adopt("toy", tmp_path / "other/toy.gguf")
    (sources.folder("toy") / "source.json").write_text(chosen, encoding="utf-8")  # a kill before it was written
    with pytest.raises(SourceError, match="is missing or was changed"):
        sources.whole(source)


@pytest.mark.parametrize(
    "note",
    [
        "",
        "[]",
        '{"file": 5, "sha256": 6, "origin": 7}',
        "[" * 100_000,
        '{"file": "../x.gguf", "sha256": "0", "origin": "x"}',
    ],
)
def test_a_damaged_note_of_the_choice_is_no_choice(toy, note):
    sources.folder("toy").mkdir(parents=True)
    (sources.folder("toy") / "source.json").write_text(note, encoding="utf-8")
    assert sources._chosen("toy") is None


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a-00002-of-00001.gguf", "says file 2 of 1 of a split model, which is impossible"),
        ("a-00003-of-00400.gguf", "and 396 more cannot be found; fetch all files"),
        ("a.bin", "does not end in .gguf"),
        ("a-00001-of-00002.gguf", "00002-of-00002.gguf cannot be found"),
    ],
)
def test_odd_names_are_one_sentence(toy, tmp_path, name, why):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / name).write_bytes(toy)
    with pytest.raises((SourceError, gguf_file.GGUFError), match=why):
        sources.adopt("toy", tmp_path / "odd" / name)
    assert not (sources.folder("toy") / "source.json").exists()


def test_parts_that_count_differently_are_refused(toy, tmp_path):
    shape = params.model("toy").at_scale("full")
    two, three = published.split(shape, 2), published.split(shape, 3)
    for number, content in ((1, two[0]), (2, three[1]), (3, three[2])):
        (tmp_path / f"s-{number:05}-of-00003.gguf").write_bytes(content)
    with pytest.raises(gguf_file.GGUFError, match="header says one of 2 files, its name one of 3"):
        sources.adopt("toy", tmp_path / "s-00001-of-00003.gguf")
    (tmp_path / "s-00001-of-00003.gguf").write_bytes(three[0])
    assert sources.adopt("toy", tmp_path / "s-00002-of-00003.gguf").path.name == "s-00001-of-00003.gguf"


def test_a_models_folder_that_cannot_be_written_is_one_sentence(toy, tmp_path, monkeypatch, pinned, lfs_hub):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "file"))  # a folder's place is taken
    for use in (lambda: sources.adopt("toy", tmp_path / "toy.gguf"), lambda: sources.fetch("toy", lfs_hub.url)):
        with pytest.raises(files.FileError, match=r"cannot be read or written.*set MOELIB_MODELS"):
            use()


CONVERT = """
import argparse, shutil
p = argparse.ArgumentParser()
p.add_argument("model"); p.add_argument("--outfile"); p.add_argument("--outtype", choices=["f16"])
a = p.parse_args()
shutil.copy(a.model + "/weights.gguf", a.outfile)
"""


@pytest.fixture
def safetensors(toy, tmp_path, monkeypatch):
    """A model's folder as the Hub publishes it, and a script in the converter's place."""
    place = tmp_path / "toy-chat"
    place.mkdir()
    (place / "config.json").write_text("{}", encoding="utf-8")
    (place / "model-00001-of-00001.safetensors").write_bytes(b"weights")
    (place / "weights.gguf").write_bytes(toy)
    (tmp_path / "convert.py").write_text(CONVERT, encoding="utf-8")
    monkeypatch.setenv("MOELIB_CONVERTER", str(tmp_path / "convert.py"))
    return place


def test_safetensors_are_converted_once(safetensors, toy):
    source = sources.adopt("toy", safetensors)
    assert source.path.read_bytes() == toy
    assert source.origin == "al/t, converted by convert_hf_to_gguf.py from toy-chat"
    (safetensors / "weights.gguf").unlink()
    assert sources.adopt("toy", safetensors) == source


def test_safetensors_that_changed_are_converted_again(safetensors, toy):
    before = sources.adopt("toy", safetensors)
    (safetensors / "weights.gguf").write_bytes(toy_file())
    (safetensors / "model-00001-of-00001.safetensors").write_bytes(b"other weights")
    assert sources.adopt("toy", safetensors).sha256 != before.sha256
    for how in ({"kind": "Q8_0"}, {"block_count": 3}):  # what the converter writes is judged before it is kept
        existing = state_of(sources.folder("toy"))
        (safetensors / "weights.gguf").write_bytes(toy_file(**how))
        (safetensors / "config.json").write_text(str(how), encoding="utf-8")
        with pytest.raises(SourceError, match="the GGUF converted from toy-chat is not toy: "):
            sources.adopt("toy", safetensors)
        assert state_of(sources.folder("toy")) == existing


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("'unclosed", "MOELIB_CONVERTER is .*which is not a command"),
        ("/nowhere/python {}", "names /nowhere/python, which is not a program"),
        ("/nowhere/convert.py", "not found at /nowhere/convert.py.*MOELIB_CONVERTER"),
    ],
)
def test_a_wrong_converter_is_one_sentence(safetensors, monkeypatch, setting, why):
    monkeypatch.setenv("MOELIB_CONVERTER", setting)
    with pytest.raises(SourceError, match=why):
        sources.adopt("toy", safetensors)


def test_a_conversion_that_fails_says_why(safetensors):
    (safetensors / "weights.gguf").unlink()
    with pytest.raises(SourceError, match=r"ended with 1 on toy-chat; its log ends:[\s\S]*FileNotFoundError"):
        sources.adopt("toy", safetensors)
    assert not list(sources.folder("toy").glob("*.gguf"))
    (safetensors / "config.json").unlink()
    with pytest.raises(SourceError, match="lacks config.json"):
        sources.adopt("toy", safetensors)


# with the real llama.cpp


@pytest.fixture
def split(toy, tmp_path, engine):
    """The toy in three files, by llama.cpp's own tool, the first without tensors, as publishers do."""
    tool = engine.folder / "llama-gguf-split"
    options = ["--split", "--split-max-tensors", "15", "--no-tensor-first-split"]
    argv = [tool, *options, tmp_path / "toy.gguf", tmp_path / "s-F16"]
    subprocess.run(argv, check=True, capture_output=True, timeout=60, env=process.inherited())
    parts = sorted(tmp_path.glob("s-F16-*.gguf"))
    assert len(parts) > 2
    return parts


@pytest.mark.engine
def test_a_split_model_is_one_model(split, tmp_path, engine, lfs_hub):
    lfs_hub.put(REPO, {f"F16/{p.name}": p.read_bytes() for p in split})
    pin = sources.pin("toy", REPO, endpoint=lfs_hub.url)
    assert [n.partition("/")[2] for n in pin.files] == [p.name for p in split]
    source = sources.fetch("toy", lfs_hub.url)
    whole = gguf_file.read_header(tmp_path / "toy.gguf")
    assert {(t.name, t.shape, t.type, t.nbytes) for t in source.header.tensors} == {
        (t.name, t.shape, t.type, t.nbytes) for t in whole.tensors
    }
    assert source.sha256 == files.digest({p.name: files.sha256(p) for p in split})
    quantised = quantize.make(source, "Q8_0", engine, tmp_path)
    one = quantize.make(sources.adopt("toy", tmp_path / "toy.gguf"), "Q8_0", engine, tmp_path)
    assert (quantised.manifest["weights"], quantised.manifest["origin"]) == ("real", f"{REPO}@{pin.revision}")
    assert quantised.manifest["tensor_types"] == one.manifest["tensor_types"]
    assert one.manifest["origin"] == "local file toy.gguf"
    split[1].unlink()
    (sources.folder("toy") / split[1].name).unlink()
    with pytest.raises(gguf_file.GGUFError, match=rf"{split[1].name} cannot be found"):
        gguf_file.read_header(sources.folder("toy") / split[0].name)


@pytest.mark.engine
def test_a_study_of_real_weights_says_whose(pinned, lfs_hub, home, monkeypatch):
    plan = SMOKE.replace("weights: twin\nscale: nano", "weights: real").replace("deepseek-moe-16b", "toy")
    (home / "params/studies/smoke.yaml").write_text(plan, encoding="utf-8")
    params._yaml.cache_clear()
    source = sources.fetch("toy", lfs_hub.url)
    folder, cells = campaign.select("smoke")
    assert campaign.run_cells(folder, cells) == []
    records = record.read_all(folder.path)[0]
    assert {r.sheet.weights for r in records} == {"real"}
    assert {r.sheet.origin for r in records} == {source.origin}
    text = document.report("smoke", progress=False).path.read_text(encoding="utf-8")
    assert "The weights are **real** (" in text
    assert neutral.markdown(source.origin) in text
    assert "geometry twins" not in text


def test_real_weights_have_no_scale(home):
    path = home / "params/studies/smoke.yaml"
    path.write_text(SMOKE.replace("weights: twin", "weights: real"), encoding="utf-8")
    params._yaml.cache_clear()
    with pytest.raises(params.ParamsError, match="real weights have only the scale full"):
        params.study("smoke")


@pytest.fixture
def held(home, tmp_path, monkeypatch):
    """A model `toy` whose weights lie in the repository."""
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "m"))
    geometry = params.model("deepseek-moe-16b").at_scale("nano")
    path = home / "held/toy-F16.gguf"
    path.parent.mkdir()
    published.twin_as_a_model(path, geometry)
    held = {"file": "held/toy-F16.gguf", "sha256": files.sha256(path), "origin": "trained here"}
    entry = {"toy": {"title": "Toy", "geometry": geometry.model_dump(), "held": held}}
    catalogue = home / "params/models.yaml"
    catalogue.write_text(catalogue.read_text(encoding="utf-8") + yaml.safe_dump(entry), encoding="utf-8")
    params._yaml.cache_clear()
    return path


def test_weights_that_the_repository_holds_need_no_download(held):
    source = sources.obtain("toy", "real", "full")
    assert source.path.resolve() == held.resolve()
    assert source.path.parent == sources.folder("toy")
    assert (source.weights, source.origin, source.sha256) == ("real", "trained here", files.sha256(held))
    assert sources.missing_bytes("toy") == 0
    assert sources.obtain("toy", "real", "full", needed=False) == source == sources.whole(source)
    with pytest.raises(SourceError, match="there is nothing to fetch"):
        sources.fetch("toy")


def test_held_weights_that_are_missing_or_changed_are_told(held):
    sources.obtain("toy", "real", "full")
    with held.open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x7f")
    with pytest.raises(SourceError, match="is not the file that params/models.yaml names"):
        sources.obtain("toy", "real", "full")
    held.unlink()
    with pytest.raises(SourceError, match="is missing: restore it"):
        sources.obtain("toy", "real", "full")
