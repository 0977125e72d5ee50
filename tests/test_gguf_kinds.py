"""What people have under the name of a GGUF: told by its cause; and hostile headers, within their caps."""

import os
import resource
import shutil
import struct
import time

import fuzz_headers
import ggufs
import pytest

from moelib import gguf_file, gguf_reader, params, twin
from moelib.gguf_file import GGUFError, HeaderCut, from_bytes, read_header
from moelib.placement import Placement

GOOD = ggufs.build(*ggufs.moe())


def write(path, metadata=None, tensors=None, **kind):
    facts, shapes = ggufs.moe()
    path.write_bytes(ggufs.build(facts | (metadata or {}), shapes if tensors is None else tensors, **kind))
    return path


FOREIGN = {
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12345\n",
        "Git LFS pointer",
        "git lfs pull",
    ),
    "html": (b"\n<!DOCTYPE html><html><head>" * 9, "a web page", "browser"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page", "browser"),
    "json": (b'{"error":"Repository not found"}' * 3, "JSON", "GGUF itself"),
    "safetensors": (struct.pack("<Q", 60) + b'{"a":{"dtype":"BF16"}}' + b" " * 60, "safetensors", "fetch MODEL --from"),
    "zip": (b"PK\x03\x04" + bytes(64), "a zip archive", "unpack"),
    "pickle": (b"\x80\x02}q\x00(X" + bytes(64), "a Python pickle", "fetch MODEL --from"),
    "gzip": (b"\x1f\x8b\x08" + bytes(64), "compressed with gzip", "unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(64), "compressed with zstd", "unpack it"),
    "tar": (b"model.gguf".ljust(257, b"\0") + b"ustar\0" + bytes(64), "a tar archive", "unpack it"),
    "hdf5": (b"\x89HDF\r\n" + bytes(64), "HDF5", "safetensors"),
    "ggjt": (b"tjgg" + struct.pack("<I", 3) + bytes(64), "GGJT", "take a GGUF"),
    "v1": (b"GGUF" + struct.pack("<III", 1, 1, 1) + bytes(64), "version 1", "newer conversion"),
    "v9": (b"GGUF" + struct.pack("<I", 9) + bytes(64), "version 9", "update moelib"),
    "big": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(64), "big-endian", "gguf-convert-endian"),
    "fugg": (b"FUGG" + struct.pack(">I", 3) + bytes(64), "big-endian", "gguf-convert-endian"),
    "zeros": (bytes(4096), "begins with zeros", "fetch it again"),
    "noise": (b"\x07\x55\x13" * 50, r"starts with b'\\x07U", "give a GGUF file"),
    "empty": (b"", "it is empty", "fetch it again"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_told_by_its_cause_with_the_next_step(tmp_path, name):
    data, cause, step = FOREIGN[name]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(GGUFError, match=rf"^m\.gguf: .*{cause}.*; .*{step}"):
        read_header(tmp_path / "m.gguf")


def test_what_is_no_file_is_said(tmp_path):
    (tmp_path / "m.gguf").mkdir()
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    for name, cause in {
        "m": "a folder; name the GGUF",
        "pipe": "a pipe",
        "loop": "cannot be read",
        "no": "No such",
    }.items():
        with pytest.raises(GGUFError, match=rf"^{name}\.gguf.*{cause}"):
            read_header(tmp_path / f"{name}.gguf")


def test_a_cut_file_says_how_much_is_missing(tmp_path):
    (tmp_path / "m.gguf").write_bytes(GOOD[:-1000])
    with pytest.raises(GGUFError, match="1000 bytes are missing; fetch"):
        read_header(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(GOOD[:400])
    with pytest.raises(HeaderCut, match="ends within its header, at 400 bytes"):
        read_header(tmp_path / "m.gguf")
    for name, data in {"m.gguf.part1of2": GOOD[:-1000], "m.gguf.part2of2": GOOD[-1000:]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(GGUFError, match=r"slice \d of 2 .*join the slices of m.gguf with cat"):
            read_header(tmp_path / name)


KINDS = {
    "adapter": {"general.type": "adapter", "adapter.type": "lora"},
    "imatrix": {"general.type": "imatrix"},
    "projector": {"general.architecture": "clip"},
    "draft": {"general.architecture": "eagle3"},
    "control vector": {"general.architecture": "controlvector"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_model_is_named_and_can_be_asked_for(tmp_path, kind):
    path = write(tmp_path / "m.gguf", KINDS[kind])
    with pytest.raises(GGUFError, match=r"^m\.gguf is (a|an|no) .*; give"):
        read_header(path)
    assert read_header(path, any_kind=True).kind == kind
    assert read_header(write(path)).kind == "model"


def test_kinds_are_told_by_tensors_too(tmp_path):
    path = tmp_path / "m.gguf"
    facts = ggufs.moe()[0]
    for kind, names in {
        "adapter": ("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"),
        "imatrix": ("blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts"),
        "control vector": ("direction.1", "direction.2"),
        "vocabulary": (),
    }.items():
        path.write_bytes(ggufs.build(facts, dict.fromkeys(names, (32, 2))))
        assert read_header(path, any_kind=True).kind == kind
    path.write_bytes(ggufs.build({"a": 1}, {"x": (32,)}))
    with pytest.raises(GGUFError, match="no general.architecture"):
        read_header(path)
    # the block that predicts a further token, sold as a file of its own
    facts, tensors = ggufs.moe("glm4moe", layers=2, nextn=1)
    path.write_bytes(ggufs.build(facts, {n: s for n, s in tensors.items() if not n.startswith(("blk.0", "blk.1"))}))
    assert read_header(path, any_kind=True).kind == "draft"


def test_quantised_files_and_twins_are_told_by_their_headers(tmp_path):
    path = write(tmp_path / "m-f16.gguf", kind="Q8_0")
    assert read_header(path).is_quantised
    assert not read_header(write(path)).is_quantised
    assert not read_header(path).is_twin
    twin.write(path, params.model("phi-3.5-moe").at_scale("nano"))
    assert read_header(path).is_twin


def test_a_file_elsewhere_is_known_by_its_first_bytes():
    for known in (100, 300):
        with pytest.raises(HeaderCut, match=r"^far\.gguf: truncated"):
            from_bytes(GOOD[:known], "far.gguf", len(GOOD))
    there = from_bytes(GOOD[:4096], "far.gguf", len(GOOD))
    assert (there.kind, there.file_bytes, len(there.moved("cpu-moe"))) == ("model", len(GOOD), 9)
    assert from_bytes(ggufs.build({"general.architecture": "clip"}, {"v.a": (32,)}), "p", 10**6).kind == "projector"
    with pytest.raises(GGUFError, match="are missing"):
        from_bytes(GOOD[:4096], "far.gguf", len(GOOD) - 100)


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (42, "does not know; if it is a new type, a newer `gguf`"),
        (138, "97 on are ik_llama.cpp's"),
        (31, "Q4_0_4_4.*removed; take another quant"),
        (1 << 20, "corrupt"),
    ],
)
def test_a_type_that_is_not_known_is_not_fetched_again(number, cause):
    data = bytearray(GOOD)
    at = data.find(b"blk.0.ffn_up_exps.weight") + len("blk.0.ffn_up_exps.weight") + 4 + 3 * 8
    data[at : at + 4] = struct.pack("<I", number)
    with pytest.raises(GGUFError, match=cause):
        from_bytes(bytes(data), "m.gguf", len(data))


WRONG = [
    ({"general.architecture": 3}, "general.architecture is 3"),
    ({"general.architecture": ["a"]}, r"general.architecture is \['a'\]"),
    *[({f"qwen3moe.{k}": v}, f"{k} is ") for k in gguf_file.COUNTS for v in ("8", 0.5, True, -1)],
    ({"qwen3moe.block_count": [3]}, "block_count is"),
    ({"qwen3moe.block_count": 0}, "block_count is 0"),
    ({"qwen3moe.nextn_predict_layers": 3}, "nextn_predict_layers is 3, but block_count is 3"),
    ({"qwen3moe.expert_count": ["a"]}, "expert_count is"),
    ({"qwen3moe.expert_count": [4] * 2000}, "expert_count is"),
    ({"split.count": "2"}, "split.count is '2'"),
    ({"split.count": 2}, "header says one of 2 files, its name one of 1; rename it"),
    ({"general.alignment": 0}, "alignment 0"),
    ({"general.alignment": True}, "alignment True"),
    ({"general.alignment": 48}, "alignment 48"),
    ({"x": [["a"]]}, "'x' is an array of arrays"),
]


@pytest.mark.parametrize(("facts", "cause"), WRONG, ids=lambda v: str(v)[:60])
def test_metadata_of_a_wrong_type_is_refused_in_a_sentence(tmp_path, facts, cause):
    with pytest.raises(GGUFError, match=cause):
        read_header(write(tmp_path / "m.gguf", facts))


def test_experts_may_differ_from_layer_to_layer(tmp_path):
    arrays = {"qwen3moe.expert_used_count": [1, 2, 4], "qwen3moe.expert_count": [4, 4, 4]}
    header = read_header(write(tmp_path / "m.gguf", arrays))
    one = 32 * 8 * 4 * 2
    assert header.read_bytes("cpu-moe")[1] == 3 * one * (1 + 2 + 4) // 4
    assert header.read_bytes("n-cpu-moe=2")[1] == 3 * one * (1 + 2) // 4
    assert header.fault(["cpu-moe"]) is None


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"expert_used_count": 9}, "expert_used_count is 9"),
        ({"expert_used_count": 0}, "expert_used_count is 0"),
        ({"expert_used_count": None}, "expert_used_count is None"),
        ({"expert_used_count": [2]}, "expert_used_count is None, blk.1"),
        ({"expert_count": 8}, "expert_count is 8, blk.0.ffn_gate_exps.weight has 4"),
        ({"expert_count": None}, "expert_count is None"),
        ({"block_count": None}, "no block_count"),
    ],
)
def test_a_model_that_cannot_be_run_has_a_fault(change, cause):
    data = ggufs.build(*ggufs.moe(**change))
    header = from_bytes(data, "m.gguf", len(data))
    assert cause in header.fault(["cpu-moe"])
    if "used" in cause:
        with pytest.raises(GGUFError, match="expert_used_count"):
            header.read_bytes("cpu-moe")


def test_experts_in_tensors_of_their_own_are_a_fault():
    facts, tensors = ggufs.moe()
    lone = {n: s for n, s in tensors.items() if "exps" not in n} | {"blk.0.ffn_gate.0.weight": (32, 8)}
    data = ggufs.build(facts, lone)
    assert "convert the model again" in from_bytes(data, "m.gguf", len(data)).fault()


@pytest.mark.parametrize(
    ("placement", "layers", "experts", "cause"),
    [
        ("baseline", 4, (), None),
        ("cpu-moe", 4, (), "the model is dense"),
        ("n-cpu-moe=2", 4, (), "the model is dense"),
        ("cpu-moe", 4, range(1, 4), None),
        ("n-cpu-moe=1", 4, range(1, 4), "moves nothing: layer 0 is dense; take n-cpu-moe=2 to 4"),
        ("n-cpu-moe=3", 9, range(3, 9), "layers 0 to 2 are dense; take n-cpu-moe=4 to 9"),
        ("n-cpu-moe=1", 2, range(1, 2), "layer 0 is dense; take cpu-moe"),
        ("n-cpu-moe=4", 4, range(1, 4), None),
        ("n-cpu-moe=5", 4, range(4), "goes beyond the model's 4 layers"),
        ("n-cpu-moe=1", 4, (1, 3), "take n-cpu-moe=2 to 4"),
    ],
)
def test_a_placement_that_makes_no_sense_is_known(placement, layers, experts, cause):
    why = Placement.parse(placement).fault(layers, experts)
    assert why is None if cause is None else cause in why


def test_a_block_that_predicts_a_further_token_is_not_the_placements():
    data = ggufs.build(*ggufs.moe("glm4moe", layers=3, dense=1, nextn=1))
    header = from_bytes(data, "m.gguf", len(data))
    assert {t.block for t in header.moved("cpu-moe")} == {1, 2}
    extra = sum(t.nbytes for t in header.tensors if t.block == 3)
    embedding = 32 * 8 * 2
    assert header.device_bytes("baseline") == header.tensor_bytes - extra - embedding
    assert header.fault(["n-cpu-moe=3"]) is None
    assert "beyond the model's 3 layers" in header.fault(["n-cpu-moe=4"])
    # what an engine says goes before: one that loads the block, and one that leaves out less of it
    assert {t.block for t in header.as_loaded(()).moved("cpu-moe")} == {1, 2, 3}
    less = header.as_loaded(["blk.3.attn_q.weight", "not.there"])
    assert less.device_bytes("baseline") == header.tensor_bytes - embedding - 32 * 4 * 2
    assert header.as_loaded(None) == header


def made(facts, tensors):
    data = ggufs.build(facts, tensors)
    return from_bytes(data, "m.gguf", len(data))


def test_look_up_tables_stay_on_the_cpu():
    facts, tensors = ggufs.moe()
    plain = made(facts, tensors).device_bytes("baseline")
    more = tensors | {"per_layer_token_embd.weight": (32, 64), "token_embd_norm.weight": (32,)}
    assert made(facts, more).device_bytes("baseline") == plain
    # LFM2 has its output norm under that name
    lfm = {n: s for n, s in tensors.items() if n != "output_norm.weight"} | {"token_embd_norm.weight": (32,)}
    assert made(facts, lfm).device_bytes("baseline") == plain
    tied = {n: s for n, s in tensors.items() if n != "output.weight"}
    assert made(facts, tied).device_bytes("baseline") == plain


@pytest.mark.parametrize("name", ["m-00000-of-00001", "m-00003-of-00002", "m-00001-of-00000", "m-00001-of-99999"])
def test_odd_names_of_splits_are_refused_without_a_path_for_each(tmp_path, name):
    path = write(tmp_path / f"{name}.gguf")
    with pytest.raises(GGUFError, match="which is impossible; rename"):
        read_header(path)


def split(folder, count=2, no=(0, 1), told=None):
    facts, tensors = ggufs.moe()
    names, paths = list(tensors), []
    for i in range(2):
        of = {"split.count": count, "split.no": no[i], "split.tensors.count": len(names) if told is None else told}
        part = {n: tensors[n] for n in names[i::2]}
        paths.append(folder / f"s-{i + 1:05}-of-00002.gguf")
        paths[-1].write_bytes(ggufs.build((facts if i == 0 else {}) | of, part))
    return paths


def test_the_files_of_a_split_belong_together(tmp_path):
    assert len(read_header(split(tmp_path)[1]).tensors) == len(ggufs.moe()[1])
    for change, cause in (
        ({"no": (0, 0)}, "its header says file 1 of the model"),
        ({"count": 3}, "header says one of 3 files, its name one of 2"),
        ({"told": 99}, "hold 15 of 99 tensors"),
    ):
        with pytest.raises(GGUFError, match=cause):
            read_header(split(tmp_path, **change)[0])
    first, second = split(tmp_path)
    shutil.move(first, tmp_path / "renamed.gguf")
    with pytest.raises(GGUFError, match="header says one of 2 files, its name one of 1; rename it"):
        read_header(tmp_path / "renamed.gguf")
    with pytest.raises(GGUFError, match="s-00001-of-00002.gguf cannot be found"):
        read_header(second)
    first.mkdir()
    with pytest.raises(GGUFError, match="s-00001-of-00002.gguf: it is a folder"):
        read_header(second)


def header_of(*pairs: bytes, tensors=b"", n_tensors=0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(pairs)) + b"".join(pairs) + tensors


def array(name: str, kind: int, n: int, raw: bytes) -> bytes:
    return ggufs.text(name) + struct.pack("<IIQ", 9, kind, n) + raw


LONG_TENSOR = ggufs.text("x" * 64) + struct.pack("<IQIQ", 1, 32, 0, 0)
CAPS = {
    "strings without an end": (header_of(array("a", 8, 6_000_000, bytes(48_000_000))), "arrays of 6000000 strings"),
    "many kept items": (
        header_of(*(array(f"k{i}", 4, 1024, bytes(4096)) for i in range(4000))),
        "metadata fills more than 16.0 MiB",
    ),
    "a long string": (header_of(ggufs.text("k") + struct.pack("<IQ", 8, 1 << 40)), "a string of 'k' of 1099511627776"),
    "a long key": (header_of(struct.pack("<Q", 1 << 16) + bytes(1 << 17)), "a key of 65536 bytes"),
    "a long name": (header_of(tensors=LONG_TENSOR + bytes(64), n_tensors=1), "a tensor's name of 64 bytes"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 17, 0) + bytes(64), "131072 tensors"),
    "many keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 17) + bytes(64), "131072 keys"),
}


@pytest.mark.parametrize("name", CAPS)
def test_a_hostile_header_takes_neither_long_nor_much(tmp_path, name):
    data, cause = CAPS[name]
    (tmp_path / "m.gguf").write_bytes(data)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(GGUFError, match=cause):
        read_header(tmp_path / "m.gguf")
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_header_that_has_no_end_is_given_up(tmp_path):
    """A sparse file whose arrays claim all of it."""
    with (tmp_path / "m.gguf").open("wb") as f:
        f.write(header_of(array("a", 0, 1 << 32, b""), ggufs.text("b")))
        f.truncate(1 << 33)
    with pytest.raises(GGUFError, match="header is longer than 256.0 MiB"):
        read_header(tmp_path / "m.gguf")


def test_a_large_vocabulary_is_walked_in_little_memory(tmp_path):
    tokens = b"".join(ggufs.text(f"t{i}") for i in range(300_000))
    facts, tensors = ggufs.moe()
    data = ggufs.build(facts, tensors)
    long = array("tokenizer.ggml.tokens", 8, 300_000, tokens)
    at, head = 24, bytearray(data)
    head[16:24] = struct.pack("<Q", len(facts) + 1)
    whole = bytes(head[:at]) + long + bytes(head[at:])
    (tmp_path / "m.gguf").write_bytes(whole + bytes(64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    header = read_header(tmp_path / "m.gguf")
    assert header.metadata["tokenizer.ggml.tokens"] == "<300000 items>"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10


def test_a_string_of_megabytes_is_passed_over(tmp_path):
    header = read_header(write(tmp_path / "m.gguf", {"x": "a" * (2 << 20), "y": "b" * 1000}))
    assert (header.metadata["x"], len(header.metadata["y"])) == ("<2097152 bytes>", 1000)


def test_a_file_that_shrinks_while_it_is_read_is_cut_and_kills_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", {"x": ["a" * 1000] * 900})  # more than Python buffers by itself
    monkeypatch.setattr(gguf_reader, "WINDOW_BYTES", 64)
    real = gguf_reader._Cursor.scalar

    def shrinking(self, fmt):
        if self.at > 200:
            os.truncate(path, 200)
        return real(self, fmt)

    monkeypatch.setattr(gguf_reader._Cursor, "scalar", shrinking)
    with pytest.raises(HeaderCut, match="ends within its header"):
        read_header(path)


def test_the_campaign_in_short(tmp_path):
    tally = fuzz_headers.campaign(4000, 7, tmp_path)
    assert tally.other == []
    assert min(tally.read, tally.refused.total()) > 400  # both ways out were taken
    assert tally.slowest_s < 2
