"""Bytes that nobody checked: foreign files named by their cause, hostile headers refused soon and in little memory."""

import os
import resource
import struct
import time
from collections import Counter

import ggufs
import pytest
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from moelib.gguf import gguf_reader
from moelib.gguf.gguf_file import COUNTS, GGUFError, HeaderCut, from_bytes, read_header

FOREIGN = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "Git LFS pointer", "git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html><head>" * 9, "a web page", "browser"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page", "browser"),
    "json": (b'{"error":"Repository not found"}' * 3, "JSON", "GGUF itself"),
    "safetensors": (struct.pack("<Q", 60) + b'{"a":{"dtype":"BF16"}}' + b" " * 60, "safetensors", "fetch MODEL --from"),
    "zip": (b"PK\x03\x04" + bytes(64), "a zip archive", "unpack"),
    "pickle": (b"\x80\x02}q\x00(X" + bytes(64), "a Python pickle", "fetch MODEL --from"),
    "gzip": (b"\x1f\x8b\x08" + bytes(64), "a compressed file", "unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(64), "a compressed file", "unpack it"),
    "tar": (b"model.gguf".ljust(257, b"\0") + b"ustar\0" + bytes(64), "a tar archive", "unpack it"),
    "hdf5": (b"\x89HDF\r\n" + bytes(64), "HDF5", "safetensors"),
    "ggjt": (b"tjgg" + struct.pack("<I", 3) + bytes(64), "GGJT", "take a GGUF"),
    "v1": (b"GGUF" + struct.pack("<III", 1, 1, 1) + bytes(64), "version 1", "newer conversion"),
    "v9": (b"GGUF" + struct.pack("<I", 9) + bytes(64), "version 9", "update moelib"),
    "big": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(64), "it is a big-endian", "gguf-convert-endian"),
    "fugg": (b"FUGG" + struct.pack(">I", 3) + bytes(64), "it is a big-endian", "gguf-convert-endian"),
    "zeros": (bytes(4096), "begins with zeros", "fetch it again"),
    "noise": (b"\x07\x55\x13" * 50, r"not a GGUF file: it starts with b'\\x07U", "give a GGUF file"),
    "empty": (b"", "it is empty", "fetch it again"),
    "magic": (b"GGUF\3", "truncated", "fetch or write"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_named_by_its_cause_with_the_next_step(tmp_path, name):
    data, cause, step = FOREIGN[name]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(GGUFError, match=rf"^m\.gguf: .*{cause}.*; .*{step}"):
        read_header(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("number", "cause"),
    [(42, r"take another quant .* newer `gguf`"), (138, "a fork such as ik_llama.cpp"), (1 << 20, "corrupt")],
)
def test_an_unknown_tensor_type_is_refused_with_what_helps(number, cause):
    data = bytearray(ggufs.build(*ggufs.moe()))
    at = data.find(b"blk.0.ffn_up_exps.weight") + len("blk.0.ffn_up_exps.weight") + 4 + 3 * 8
    data[at : at + 4] = struct.pack("<I", number)
    with pytest.raises(GGUFError, match=cause):
        from_bytes(bytes(data), "m.gguf", len(data))


def header_of(*pairs: bytes, tensors=b"", n_tensors=0, n_keys=None) -> bytes:
    n_keys = len(pairs) if n_keys is None else n_keys
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + b"".join(pairs) + tensors


def array(name: str, kind: int, n: int, raw: bytes) -> bytes:
    return ggufs.text(name) + struct.pack("<IIQ", 9, kind, n) + raw


def tensor(name: str, *shape: int) -> bytes:
    return ggufs.text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 0)


CAPS = {
    "strings without an end": (
        header_of(*(array(key, 8, 2_500_000, bytes(20_000_000)) for key in "ab")),
        "arrays of 5000000 strings",
    ),
    "many kept items": (
        header_of(*(array(f"k{i}", 4, 1024, bytes(4096)) for i in range(4000))),
        "metadata fills more than 16.0 MiB",
    ),
    "a long string": (header_of(ggufs.text("k") + struct.pack("<IQ", 8, 1 << 40)), "a string of 'k' of 1099511627776"),
    "a long key": (header_of(struct.pack("<Q", 1 << 16) + bytes(1 << 17)), "a key of 65536 bytes"),
    "a long name": (header_of(tensors=tensor("x" * 64, 32) + bytes(64), n_tensors=1), "a tensor's name of 64 bytes"),
    "a name twice": (header_of(tensors=2 * tensor("x", 32), n_tensors=2), "tensor 'x' is listed twice"),
    "a key twice": (header_of(*2 * [ggufs.text("k") + struct.pack("<IB", 7, 1)]), "key 'k' twice"),
    "five dimensions": (header_of(tensors=tensor("x", *[1] * 5), n_tensors=1), "'x' has 5 dimensions"),
    "a vast shape": (header_of(tensors=tensor("x", 1 << 62, 1 << 62), n_tensors=1), "'x' has shape"),
    "an empty shape": (header_of(tensors=tensor("x", 32, 0), n_tensors=1), "'x' has shape"),
    "many tensors": (header_of(bytes(64), n_tensors=1 << 17), "131072 tensors"),
    "many keys": (header_of(bytes(64), n_keys=1 << 17), "131072 keys"),
    "arrays in arrays": (header_of(array("x", 9, 1, bytes(64))), "'x' is an array of arrays"),
    "a short array": (header_of(array("x", 4, 1 << 61, bytes(64))), "truncated"),
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


def test_long_strings_and_vocabularies_are_passed_over_in_little_memory(tmp_path):
    facts, tensors = ggufs.moe()
    facts |= {"x": "a" * (2 << 20), "y": "b" * 1000, "tokens": [f"t{i}" for i in range(300_000)]}
    (tmp_path / "m.gguf").write_bytes(ggufs.build(facts, tensors))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metadata = read_header(tmp_path / "m.gguf").metadata
    assert (metadata["x"], metadata["y"], metadata["tokens"]) == ("<2097152 bytes>", "b" * 1000, "<300000 items>")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10


def test_a_file_that_shrinks_while_it_is_read_ends_in_an_error(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(ggufs.build(ggufs.moe()[0] | {"x": ["a" * 1000] * 900}, ggufs.moe()[1]))
    scalar = gguf_reader._Cursor.scalar

    def shrinking(cursor, fmt):
        if cursor.at > 200:
            os.truncate(path, 200)
        return scalar(cursor, fmt)

    monkeypatch.setattr(gguf_reader._Cursor, "scalar", shrinking)
    with pytest.raises(HeaderCut, match="ends within its header"):
        read_header(path)


GENERAL = ("general.architecture", "general.type", "general.alignment", "general.name", "split.count", "split.no")
NAMES = ("blk.0.ffn_up_exps.weight", "blk.999999999999999999999.ffn_up_exps.weight", "blk.1.ffn_gate.0.weight")
NAMES += ("blk.0.ffn_up_chexps.weight", "token_embd_norm.weight", "blk.0.x.lora_a", "", "x" * 64)
PLACEMENTS = ("baseline", "cpu-moe", "n-cpu-moe=1", "n-cpu-moe=2", "n-cpu-moe=99")
LENGTHS = (0, 1, 7, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
ODD = st.one_of(
    st.sampled_from((0, 1, 2, 3, 4, 32, -1, 1 << 31, 1 << 40, True, False, 0.5, float("nan"), "4", "", b"\xff\xfe")),
    st.sampled_from(("clip", "adapter", ["a"], ["a"] * 1025, [0] * 1025)),
    st.lists(st.integers(0, 4), max_size=5),
)
RAW = st.one_of(
    st.binary(max_size=64),
    st.sampled_from(LENGTHS).map(lambda n: struct.pack("<Q", n)),
    st.sampled_from((*range(14), *GGMLQuantizationType, 1 << 31)).map(lambda n: struct.pack("<I", n)),
)


@st.composite
def files(draw):
    """A well-formed file with odd values in it, then up to three changes of its bytes."""
    arch = draw(st.sampled_from(("qwen3moe", "glm4moe", "clip")))
    layers, dense, nextn = draw(st.integers(1, 3)), draw(st.integers(0, 1)), draw(st.integers(0, 1))
    metadata, tensors = ggufs.moe(arch, layers, dense, nextn, draw(st.sampled_from((1, 4))))
    keys = [*(f"{arch}.{key}" for key in COUNTS), *GENERAL]
    metadata |= draw(st.dictionaries(st.sampled_from(keys), ODD, max_size=2))
    for key in draw(st.sets(st.sampled_from(sorted(metadata)), max_size=1)):
        del metadata[key]
    shapes = st.lists(st.sampled_from((1, 4, 32)), min_size=1, max_size=4).map(tuple)
    tensors |= draw(st.dictionaries(st.sampled_from(NAMES), shapes, max_size=1))
    data = bytearray(ggufs.build(metadata, tensors, draw(st.sampled_from(("F16", "F32")))))
    for at in draw(st.lists(st.integers(0, 1499), max_size=3)):
        raw = draw(RAW)
        removed = draw(st.sampled_from((len(raw), 0, 5, len(data))))
        data[at : at + removed] = raw
    return bytes(data)


def test_hostile_headers_end_in_an_error_or_a_header():
    """Any other exception would be the defect; a header that can be read answers every question about itself."""
    outcomes = Counter()

    @settings(max_examples=2000, deadline=2000, database=None)
    @given(files())
    def read(data):
        try:
            header = from_bytes(data, "m.gguf", len(data))
        except GGUFError:
            outcomes["refused"] += 1
            return
        outcomes["read"] += 1
        assert repr(header)
        assert header.kind != "model" or (header.bits_per_weight > 0 and header.fault(PLACEMENTS) != "")
        for p in PLACEMENTS:
            assert 0 <= header.moved_bytes(p) <= header.tensor_bytes
            assert 0 <= header.device_bytes(p) <= header.tensor_bytes
        try:
            assert all(min(header.read_bytes(p)) >= 0 for p in PLACEMENTS)
        except GGUFError:
            outcomes["without shares"] += 1

    read()
    assert min(outcomes["read"], outcomes["refused"]) > 200
