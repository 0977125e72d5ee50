"""Pins: chosen by headers, written by a machine into a file of their own, checked before and after."""

from dataclasses import replace
from functools import cache, partial
from hashlib import sha256

import published
import pytest
from hub_state import Entry

from moelib.catalogue import params, pins
from moelib.catalogue.pins import PinsError
from moelib.gguf import gguf_file
from moelib.models import candidates, remote, sources, weights
from moelib.models.candidates import ChoiceError

REPO = "alice/toy-GGUF"


@pytest.fixture
def shape(home, monkeypatch):
    """Shape of the model `toy`, the smallest that the catalogue can have of its kind."""
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    return published.catalogued(home)


@pytest.fixture
def make(shape):
    """Makes the bytes of a file of `toy`, each kind once."""
    return cache(partial(published.gguf, shape))


def draft(shape):
    return shape.model_copy(update={"block_count": 1, "leading_dense_block_count": 0})


def pinned(hub, files, repository=REPO, **how):
    """Names of the files that are pinned of a repository with `files`."""
    commit = hub.put(repository, files)
    pin = sources.pin("toy", repository, endpoint=hub.url, **how)
    assert pins.of("toy") == pin
    assert (pin.repository, pin.revision) == (repository, commit)
    digests = {n: (len(files[n]), sha256(files[n]).hexdigest()) for n in pin.files}
    assert {n: (f.bytes, f.sha256) for n, f in pin.files.items()} == digests
    return list(pin.files)


def numbered(name, parts):
    return {f"{name}-{i + 1:05}-of-{len(parts):05}.gguf": p for i, p in enumerate(parts)}


def test_each_layout_of_a_publisher_is_understood(shape, make, lfs_hub):
    """The listings of people who publish: what is pinned is the model unquantised, whatever the names say."""
    whole, bf16, f32 = make(), make(kind="BF16"), make(kind="F32")
    q8 = make(kind="Q8_0")
    parts = published.split(shape, 3, "BF16")
    small = published.gguf(draft(shape))
    vision = published.gguf(shape, arch="clip", general={"type": "mmproj"})
    layouts = [
        ({"m-F16.gguf": whole}, ["m-F16.gguf"]),
        (
            numbered("BF16/m-BF16", parts) | {"mmproj-F16.gguf": vision, "m-Q8_0.gguf": q8},
            [*numbered("BF16/m-BF16", parts)],
        ),
        (
            numbered("a-bf16/a-bf16", parts) | {"a-imatrix.gguf": b"GGUF" + bytes(9000)},
            [*numbered("a-bf16/a-bf16", parts)],
        ),
        ({"m-F16.gguf": whole, "m-draft-F16.gguf": small}, ["m-F16.gguf"]),
        ({"m-F16.gguf": whole, "mtp-m-F16.gguf": make(keep=lambda n: n.startswith("blk.1."))}, ["m-F16.gguf"]),
        ({"m-F32.gguf": f32}, ["m-F32.gguf"]),
        ({"My Model F16.gguf": whole}, ["My Model F16.gguf"]),
        (numbered("F16/m", parts), [*numbered("F16/m", parts)]),
        ({"m-float16.gguf": whole}, ["m-float16.gguf"]),
        ({"m-F16.gguf": whole, "m-BF16.gguf": bf16, "m-F32.gguf": f32}, ["m-F16.gguf"]),
        ({"m-BF16.gguf": bf16, "m-F32.gguf": f32}, ["m-BF16.gguf"]),
        ({"m.f16.q8.gguf": q8, "ggml-model.gguf": whole}, ["ggml-model.gguf"]),
        ({"m-F16.gguf": q8, "m-Q8_0.gguf": whole}, ["m-Q8_0.gguf"]),
    ]
    for number, (files, want) in enumerate(layouts):
        assert pinned(lfs_hub, files, f"alice/r{number}") == want, number


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"toy-Q4_K_M.gguf": bytes(36000)}, "toy-Q4_K_M.gguf: 36,000 bytes, but the unquantised model has about"),
        ({"README.md": b"# toy\n"}, "it holds no GGUF file.*pin another repository"),
        ({"toy-F16.gguf": bytes(3 << 20)}, "toy-F16.gguf: it is not a GGUF file: it begins with zeros"),
        ({"a-f16-00001-of-00002.gguf": bytes(36000)}, "its name says one of 2 files, but file 2 is missing"),
        ({"a-00002-of-00001.gguf": bytes(9)}, "its name says file 2 of 1"),
        ({"a-00000-of-00001.gguf": bytes(9)}, "its name says file 0 of 1"),
        ({"a-00001-of-99999.gguf": bytes(9)}, "its name says file 1 of 99999"),
        ({"toy.f16.gguf.part1of2": bytes(9000)}, "toy.f16.gguf.part1of2 are pieces of one file.*join them with `cat`"),
        ({"model-1.safetensors": bytes(9000)}, "it holds safetensors: run `hf download alice/toy-GGUF.*--from FOLDER"),
    ],
)
def test_what_cannot_be_pinned_is_explained(shape, lfs_hub, files, why):
    lfs_hub.put(REPO, files)
    with pytest.raises(ChoiceError, match=why):
        sources.pin("toy", REPO, endpoint=lfs_hub.url)
    assert pins.of("toy") is None


NO_MODEL = {
    "quantised": ({"kind": "Q8_0"}, "it is quantised \\(19 tensors Q8_0\\)"),
    "projector": ({"arch": "clip", "general": {"type": "mmproj"}}, "it is a multimodal projector"),
    "shape": ({"block_count": 3}, "block_count 3, not 2"),
    "bool": ({"expert_count": "16"}, "expert_count is '16', not a count"),
    "importance": ({"arch": "none", "general": {"type": "imatrix"}}, "it is an importance matrix"),
    "type of file": ({"general": {"type": "dataset"}}, "of type 'dataset', not a model"),
    "head": (
        {"keep": lambda n: not n.startswith("blk.")},
        r"not whole: the expert tensors differ .* in 1 layer\(s\), the first of them layer 1",
    ),
    "no head": (
        {"keep": lambda n: "output" not in n and "token" not in n},
        r"not whole: it has \d+.\d% of the model's",
    ),
    "experts": ({"keep": lambda n: "exps" not in n}, r"the expert tensors differ from the model's in 1 layer\(s\)"),
    "twin": ({"general": {"name": "geometry twin"}}, "its weights are random: it is a geometry twin"),
    "odd name": ({"general": {"architecture": None}}, "general.architecture"),
}


@pytest.mark.parametrize("which", NO_MODEL)
def test_what_is_no_model_is_refused_by_its_header_and_pins_nothing(shape, lfs_hub, home, which, monkeypatch):
    how, why = NO_MODEL[which]
    monkeypatch.setattr(candidates.weights, "least_bytes", lambda model: 1)  # each is small, and judged all the same
    lfs_hub.put(REPO, {"toy-F16.gguf": published.gguf(shape, **how)})
    before = (home / "params/models.yaml").read_bytes()
    for named in (None, "toy-F16.gguf"):
        with pytest.raises(ChoiceError, match=why):
            sources.pin("toy", REPO, endpoint=lfs_hub.url, named=named)
    assert (home / "params/models.yaml").read_bytes() == before
    assert not pins.path().exists()


def test_a_number_of_another_type_is_no_dimension(shape, make):
    header = gguf_file.from_bytes(make(), "m.gguf", len(make()))
    assert weights.why_not("toy", header) == []
    key, width = f"{shape.architecture}.embedding_length", shape.embedding_length
    changed = replace(header, metadata=header.metadata | {key: float(width)})
    assert weights.why_not("toy", changed) == [f"embedding_length {float(width)}, not {width}"]


def test_a_file_may_be_named(make, shape, lfs_hub):
    files = {"a.gguf": make(), "b.gguf": make(filling=2), "c.gguf": make(kind="BF16"), "README.md": b"#"}
    files |= numbered("s/s", published.split(shape, 3))
    lfs_hub.put(REPO, files)
    with pytest.raises(ChoiceError, match=r"has toy unquantised 3 times, in .*a.gguf.*: name one with --file PATH"):
        sources.pin("toy", REPO, endpoint=lfs_hub.url)
    assert pinned(lfs_hub, files, named="b.gguf") == ["b.gguf"]
    assert pinned(lfs_hub, files, named="c.gguf") == ["c.gguf"]
    for named in numbered("s/s", "123"):
        assert pinned(lfs_hub, files, named=named) == list(numbered("s/s", "123"))
    for named in ("d.gguf", "README.md"):
        with pytest.raises(ChoiceError, match="no file of a whole model there; it has a.gguf, b.gguf, c.gguf, s/s-0"):
            sources.pin("toy", REPO, endpoint=lfs_hub.url, named=named)


def test_parts_that_are_in_another_order_than_their_names_are_refused(shape, lfs_hub):
    first, *others = published.split(shape, 3)
    lfs_hub.put(REPO, numbered("s", [first, *reversed(others)]))
    with pytest.raises(ChoiceError, match=r"its header says file \d of the model"):
        sources.pin("toy", REPO, endpoint=lfs_hub.url)


def test_little_is_read_of_many_files(make, lfs_hub):
    lfs_hub.put(REPO, {f"q{i}.gguf": make(kind="Q8_0") for i in range(5)} | {"m.gguf": make()})
    sources.pin("toy", REPO, endpoint=lfs_hub.url)
    assert 0 < sum(r.sent for r in lfs_hub.requests if r.path.startswith("/storage")) <= 6 << 20


def test_a_long_header_is_read_piece_by_piece(shape, lfs_hub, monkeypatch):
    monkeypatch.setattr(remote, "PREFIX_BYTES", 1000)
    monkeypatch.setattr(remote, "MAX_PREFIX_BYTES", 1 << 19)
    tokens = published.gguf(shape, general={"tokens": [f"token {i}" for i in range(9000)]})
    assert pinned(lfs_hub, {"m.gguf": tokens}) == ["m.gguf"]
    reads = [r for r in lfs_hub.requests if r.path.startswith("/storage")]
    assert len(reads) > 5
    assert sum(r.sent for r in reads) <= 1 << 19  # each byte once
    parts = published.split(shape, 3)
    assert pinned(lfs_hub, numbered("s", parts), named="s-00001-of-00003.gguf")
    before = len(lfs_hub.requests)
    monkeypatch.setattr(remote, "MAX_PREFIX_BYTES", 1 << 17)
    with pytest.raises(ChoiceError, match="m.gguf"):
        sources.pin("toy", REPO, endpoint=lfs_hub.url, named="m.gguf")
    assert sum(r.sent for r in lfs_hub.requests[before:] if r.path.startswith("/storage")) <= 1 << 17


def test_a_damaged_header_is_not_read_to_its_end(shape, lfs_hub, monkeypatch):
    monkeypatch.setattr(remote, "PREFIX_BYTES", 1 << 15)
    data = bytearray(published.gguf(shape))
    data[24:32] = b"\xff" * 8  # the length of the first key
    lfs_hub.put(REPO, {"m.gguf": bytes(data)})
    with pytest.raises(ChoiceError, match="corrupt"):
        sources.pin("toy", REPO, endpoint=lfs_hub.url)
    assert sum(r.sent for r in lfs_hub.requests if r.path.startswith("/storage")) == 1 << 15


def test_headers_have_a_limit_together(make, lfs_hub, monkeypatch):
    lfs_hub.put(REPO, {f"q{i}.gguf": make(kind="Q8_0") for i in range(3)})
    monkeypatch.setattr(candidates, "MAX_BYTES", 2 << 20)
    with pytest.raises(params.UserError, match="are longer than 2.00 MiB: name one file of it"):
        sources.pin("toy", REPO, endpoint=lfs_hub.url)
    monkeypatch.setattr(candidates, "MAX_LOOKED_AT", 2)
    with pytest.raises(ChoiceError, match="3 models that may be toy, too many to read"):
        sources.pin("toy", REPO, endpoint=lfs_hub.url)


def test_a_server_without_ranges_is_read_all_the_same(make, lfs_hub, monkeypatch):
    lfs_hub.accepts_ranges = False
    monkeypatch.setattr(remote, "PREFIX_BYTES", 1000)
    assert pinned(lfs_hub, {"m.gguf": make()}) == ["m.gguf"]


def test_what_the_listing_says_is_checked_before_it_is_written(make, lfs_hub, home):
    lfs_hub.put(REPO, {"m.gguf": make()})
    repo = lfs_hub.repos[REPO]
    commit = repo.commits[repo.refs["refs/heads/main"]]
    (good,) = [e for n, e in commit.files.items() if n == "m.gguf"]
    for name, entry, why in (
        ("../m.gguf", good, "not a valid path in a repository"),
        ("a/.m.gguf", good, "not begin with a dot or a dash"),
        ("-m.gguf", good, "not begin with a dot or a dash"),
        ("a\nb.gguf", good, "not a valid path in a repository"),
        ("\x1b[2Jm.gguf", good, "not a valid path in a repository"),
        (f"{'m' * 300}.gguf", good, "at most 200 bytes"),
        ("m.GGUF", good, "must end in .gguf"),
        ("m.gguf", Entry(1 << 60, good.sha256), "less than or equal to"),
        ("m.gguf", Entry(-1, good.sha256), "greater than 0"),
        ("m.gguf", Entry(9000, "f" * 63), "sha256: String should match"),
    ):
        commit.files.clear()
        commit.files[name] = entry
        with pytest.raises(ChoiceError, match=why) as caught:
            sources.pin("toy", REPO, endpoint=lfs_hub.url)
        assert "\x1b" not in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not pins.path().exists()


@pytest.mark.parametrize("name", ["", "a", "a/b/c", "/b", "a b/c", "../x", "a--b/c", "a/b.git", "a/" + "b" * 97, "ä/b"])
def test_what_is_no_repository_is_not_asked_for(shape, lfs_hub, name):
    with pytest.raises(params.ParamsError, match=r"not a (repository name|namespace) of the Hub"):
        sources.pin("toy", name, endpoint=lfs_hub.url)
    assert lfs_hub.requests == []


PIN = params.Pin(repository="a/b", revision="0" * 40, files={"m 1.gguf": {"bytes": 5, "sha256": "a" * 64}})


def test_pins_are_kept_sorted_and_apart(home):
    pins.write("zoo", PIN)
    pins.write("abc", PIN)
    pins.write("zoo", PIN.model_copy(update={"revision": "1" * 40}))
    assert list(pins.read()) == ["abc", "zoo"]
    assert pins.read()["zoo"].revision == "1" * 40
    assert pins.read()["abc"] == PIN
    text = pins.path().read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "m 1.gguf" in text


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"- a\n",
        b"1: {}\n",
        b"toy: {repository: a/b}\n",
        b"toy: {repository: a/b, revision: main, files: {}}\n",
        b"[" * 5000,
    ],
)
def test_a_damaged_file_of_pins_is_one_sentence_and_is_left_alone(shape, lfs_hub, damage):
    pins.path().write_bytes(damage)
    params.model("toy")  # who runs twins never meets it
    for use in (lambda: pins.of("toy"), lambda: sources.fetch("toy"), lambda: pins.write("toy", PIN)):
        with pytest.raises(PinsError, match=r"pins.yaml is damaged \(.*delete it and pin each model again"):
            use()
    with pytest.raises(PinsError, match="is damaged"):
        sources.pin("toy", REPO, endpoint=lfs_hub.url)
    assert lfs_hub.requests == []
    assert pins.path().read_bytes() == damage


def test_what_would_not_be_read_again_is_not_written(home):
    pins.write("toy", PIN)
    before = pins.path().read_bytes()
    entry = params.SourceFile(bytes=5, sha256="a" * 64)
    for files in ({}, {"../m.gguf": entry}, {"a/m.gguf": entry, "b/m.gguf": entry}):
        bad = params.Pin.model_construct(repository="a/b", revision="0" * 40, files=files)
        with pytest.raises(PinsError, match="toy was not pinned and pins.yaml is unchanged"):
            pins.write("toy", bad)
    assert pins.path().read_bytes() == before


def test_a_folder_that_cannot_be_written_is_one_sentence(make, lfs_hub, home, monkeypatch):
    lfs_hub.put(REPO, {"m.gguf": make()})

    def refuse(path, data):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pins.files, "write_bytes", refuse)
    with pytest.raises(params.UserError, match=r"pins.yaml cannot be read or written \(Permission denied\)"):
        sources.pin("toy", REPO, endpoint=lfs_hub.url)
