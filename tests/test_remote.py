"""Headers of files on the Hub: little is read, all parts of a split model, and each wrong address gets a sentence."""

import json
import re
from dataclasses import replace

import ggufs
import pytest
from click.testing import CliRunner
from test_gguf_file import split

import moelib
from moelib import cli
from moelib.base.schema import UserError
from moelib.gguf import gguf_file, outline
from moelib.models import hub as client
from moelib.models import remote

REPO = "alice/toy-GGUF"
LARGE = {"blk.0.attn_k.weight": (1024, 4096)}  # 8 MiB of F16, so that a file is longer than what is read first


def large(**facts):
    metadata, tensors = ggufs.moe(**facts)
    return ggufs.build(metadata, tensors | LARGE)


@pytest.fixture
def hub(lfs_hub, monkeypatch):
    """A Hub on loopback that is asked where no other is named."""
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    api = client.api
    monkeypatch.setattr(client, "api", lambda endpoint=None: api(endpoint or lfs_hub.url))
    return lfs_hub


def sent(hub):
    """Bytes of files that the Hub sent."""
    return sum(r.sent for r in hub.requests if r.path.startswith("/storage"))


def refused(address):
    with pytest.raises(UserError) as caught:
        remote.header(address)
    return str(caught.value)


def test_of_a_large_file_only_the_beginning_is_read(hub, tmp_path):
    (tmp_path / "m.gguf").write_bytes(large())
    commit = hub.put(REPO, {"m.gguf": large(), "README.md": b"#"})
    far = remote.header(f"hf:{REPO}/m.gguf")
    here = gguf_file.read_header(tmp_path / "m.gguf")
    assert (far.header.metadata, far.header.tensors) == (here.metadata, here.tensors)
    assert (far.header.file_bytes, far.header.path.name) == (here.file_bytes, "m.gguf")
    assert (far.repository, far.commit) == (REPO, commit)
    assert far.received_bytes == sent(hub) == 1 << 20
    assert str(far) == f"read 1.00 MiB of 8.02 MiB: the header alone, from {REPO} at {commit[:12]}"
    assert moelib.header(f"hf:{REPO}/m.gguf").tensors == here.tensors
    assert remote.outline(f"hf:{REPO}/m.gguf") == outline.read(tmp_path / "m.gguf")


def test_a_split_model_is_read_whole_from_the_name_of_any_of_its_files(hub, tmp_path):
    paths = split(tmp_path)
    hub.put(REPO, {f"Q8/{p.name}": p.read_bytes() for p in paths} | {"other.gguf": large()})
    here = gguf_file.read_header(paths[0])
    for path in paths:
        far = remote.header(f"hf:{REPO}/Q8/{path.name}").header
        assert (far.metadata, far.file_bytes) == (here.metadata, here.file_bytes)
        assert [t.name for t in far.tensors] == [t.name for t in here.tensors]
        assert remote.outline(f"hf:{REPO}/Q8/{path.name}") == replace(outline.read(path), name=far.path.name)


def test_of_the_further_files_of_a_split_model_less_is_read(hub):
    metadata, tensors = ggufs.moe()
    numbers = {"split.count": 2, "split.tensors.count": len(tensors) + 1}
    parts = [ggufs.build(metadata | numbers | {"split.no": 0}, tensors), ggufs.build(numbers | {"split.no": 1}, LARGE)]
    hub.put(REPO, {f"m-0000{i + 1}-of-00002.gguf": p for i, p in enumerate(parts)})
    assert remote.header(f"hf:{REPO}/m-00002-of-00002.gguf").received_bytes == len(parts[0]) + (1 << 16)


def test_a_revision_may_be_named(hub):
    old = hub.put(REPO, {"a@b.gguf": large(layers=2)})
    hub.put(REPO, {"a@b.gguf": large(layers=4)})
    for at, layers in (("", 4), ("@main", 4), (f"@{old}", 2), ("@refs/heads/main", 4)):
        assert remote.header(f"hf:{REPO}/a@b.gguf{at}").header.layers == layers
    assert "there is no such revision" in refused(f"hf:{REPO}/a@b.gguf@nothing")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        (f"hf:{REPO}/toy-Q4_KM.gguf", r"toy-Q4_KM.gguf of .*; did you mean toy-Q4_K_M.gguf"),
        (f"hf:{REPO}/toy-Q8_0.gguf", "did you mean sub/toy-Q8_0.gguf"),
        (f"hf:{REPO}/q4_k_m", "did you mean toy-Q4_K_M.gguf"),
        (f"hf:{REPO}/README.md", "there are s-00001-of-00002.gguf, sub/toy-Q8_0.gguf, toy-Q4_K_M.gguf$"),
        (f"hf:{REPO}/s-00001-of-00002.gguf", "one of 2 files of a model, and there is no s-00002-of-00002.gguf"),
        ("hf:alice/nothing/x.gguf", "looking for alice/nothing: there is no such repository, or it is private"),
        ("hf:alice/safe/x.gguf", "alice/safe has no GGUF file"),
        ("hf:alice", "write hf:OWNER/REPO/PATH"),
        (f"hf:{REPO}@main/x.gguf", "write hf:OWNER/REPO/PATH, with @"),
        (f"https://huggingface.co/{REPO}/blob/main/x.gguf", "write hf:OWNER/REPO/PATH"),
        ("hf:alice/a b/x.gguf", "not a repository name of the Hub"),
        (f"hf:{REPO}/\x1b[2J.gguf", "there is no GGUF file"),
    ],
)
def test_a_wrong_address_is_a_sentence_with_the_nearest_right_one(hub, address, says):
    names = "toy-Q4_K_M.gguf", "sub/toy-Q8_0.gguf", "s-00001-of-00002.gguf", "README.md"
    hub.put(REPO, dict.fromkeys(names, b"GGUF\0"))
    hub.put("alice/safe", {"model.safetensors": b"\0"})
    message = refused(address)
    assert re.search(says, message), message
    assert not {"\n", "\x1b"} & set(message)
    assert sent(hub) == 0


def test_a_repository_alone_lists_its_models_with_their_sizes(hub, tmp_path):
    parts = {f"BF16/{p.name}": p.read_bytes() for p in split(tmp_path)}
    hub.put(REPO, {"m-Q8_0.gguf": large(), "README.md": b"#", **parts})
    for address in (f"hf:{REPO}", f"hf:{REPO}/", f"hf:{REPO}@main"):
        at = "@main" if "@" in address else ""
        head, *lines = refused(address).split("\n")
        assert head == f"{REPO} names no file; it has 2 to name:"
        assert lines == [
            f"  hf:{REPO}/BF16/s-00001-of-00002.gguf{at}  0.02 MiB  (2 files)",
            f"  hf:{REPO}/m-Q8_0.gguf{at}  8.02 MiB",
        ]
    hub.put(REPO, {f"m-{i}.gguf": b"GGUF\0" for i in range(50)})
    assert refused(f"hf:{REPO}").endswith("\n  12 more")


def test_what_is_no_model_is_said_to_be_what_it_is(hub):
    vision = ggufs.build({"general.architecture": "clip"}, {"v.a": (32,)})
    strange = bytearray(large())
    at = strange.index(b"output.weight") + len(b"output.weight") + 4 + 16
    strange[at : at + 4] = (151).to_bytes(4, "little")
    hub.put(REPO, {"v.gguf": vision, "t.gguf": bytes(strange), "page.gguf": b"<html>" + bytes(9000)})
    for name, says in (
        ("v", r"v\.gguf is a multimodal projector .*; give the model's own GGUF"),
        ("t", "has type 151, which this reader does not know: .*; take another quant"),
        ("page", "it is not a GGUF file: a web page"),
    ):
        assert re.search(says, refused(f"hf:{REPO}/{name}.gguf"))


def test_what_its_owner_gives_on_request_says_so(hub):
    hub.put("bob/toy-GGUF", {"m.gguf": large()})
    hub.repos["bob/toy-GGUF"].gated = "auto"
    assert re.search("its owner requires consent: give it .*hf auth login", refused("hf:bob/toy-GGUF/m.gguf"))
    assert sent(hub) == 0


def test_a_server_without_ranges_is_refused_and_the_file_is_not_downloaded(hub):
    hub.put(REPO, {"m.gguf": large(), "small.gguf": ggufs.build(*ggufs.moe())})
    hub.accepts_ranges = False
    message = refused(f"hf:{REPO}/m.gguf")
    assert message.startswith(f"reading the header of m.gguf of {REPO}: the server sends whole files")
    assert message.endswith("download the file, then name it by its local path")
    assert remote.header(f"hf:{REPO}/small.gguf").header.layers == 3  # read whole in any case


def test_what_is_read_has_a_limit(hub, monkeypatch):
    hub.put(REPO, {"m.gguf": large(names=["a" * 3000] * 900)})
    monkeypatch.setattr(remote, "MAX_BYTES", 3 << 20)
    assert f"the headers of {REPO} are longer than 3.00 MiB" in refused(f"hf:{REPO}/m.gguf")
    assert sent(hub) <= 3 << 20


def test_a_connection_that_breaks_is_continued(hub):
    hub.put(REPO, {"m.gguf": large()})
    hub.fail("reset", match="GET /storage")
    hub.fail("short", match="GET /storage")
    assert remote.header(f"hf:{REPO}/m.gguf").header.layers == 3
    hub.fail("503", match="/api/models", times=None)
    assert "server error: run the command again later" in refused(f"hf:{REPO}/m.gguf")


def test_a_file_without_a_size_is_refused(hub):
    hub.put(REPO, {"m.gguf": large()})
    hub.twist = lambda status, body, headers: (status, _without_sizes(body), headers)
    assert "m.gguf of alice/toy-GGUF has no size in the Hub's listing" in refused(f"hf:{REPO}/m.gguf")


def _without_sizes(body):
    return body | {"siblings": [{"rfilename": "m.gguf"}]} if isinstance(body, dict) and "siblings" in body else body


def test_the_command_answers_and_says_what_it_read(hub):
    hub.put(REPO, {"m.gguf": large()})
    done = CliRunner().invoke(cli.main, ["header", f"hf:{REPO}/m.gguf"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("m.gguf, 8.02 MiB: a mixture-of-experts model (qwen3moe, 3 layers)")
    assert done.stderr.startswith("read 1.00 MiB of 8.02 MiB: the header alone")
    assert json.loads(CliRunner().invoke(cli.main, ["header", "--json", f"hf:{REPO}/m.gguf"]).stdout)["layers"] == 3
    wrong = CliRunner().invoke(cli.main, ["header", f"hf:{REPO}/n.gguf"])
    assert wrong.exit_code == 1
    assert wrong.stderr == f"moelib: there is no GGUF file n.gguf of {REPO}; did you mean m.gguf?\n"


def test_a_plan_is_made_from_a_header_on_the_hub(hub, tmp_path):
    path = ggufs.write_nextn(tmp_path / "small.gguf")
    hub.put(REPO, {"small.gguf": path.read_bytes()})
    far, here = (
        CliRunner().invoke(cli.main, ["plan", f, "--vram", "4GiB"]) for f in (f"hf:{REPO}/small.gguf", str(path))
    )
    assert far.exit_code == 0, far.output
    assert far.stdout.splitlines()[0] == here.stdout.splitlines()[0]
    assert moelib.plan(f"hf:{REPO}/small.gguf", "4GiB").chosen == moelib.plan(path, "4GiB").chosen
