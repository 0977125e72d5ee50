import contextlib
import struct

import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moelib import gguf_file, params, twin
from moelib.gguf_file import GGUFError, read_header


@pytest.fixture(scope="module", params=["phi-3.5-moe", "deepseek-moe-16b"])
def nano(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    geometry = params.model(request.param).at_scale("nano")
    twin.write(path, geometry)
    return path, geometry


def test_it_reads_what_ggufs_own_reader_reads(nano):
    path, geometry = nano
    header, theirs = read_header(path), GGUFReader(path)
    assert header.metadata["general.architecture"] == geometry.architecture
    assert {t.name: (t.shape, t.type, t.nbytes, t.offset) for t in header.tensors} == {
        t.name: (tuple(int(n) for n in t.shape), t.tensor_type.name, int(t.n_bytes), int(t.data_offset))
        for t in theirs.tensors
    }
    assert header.metadata[f"{geometry.architecture}.expert_count"] == geometry.expert_count


def test_known_values_by_hand(nano):
    path, g = nano
    header = read_header(path)
    expert_layers = g.block_count - g.leading_dense_block_count
    one = g.embedding_length * g.expert_feed_forward_length * g.expert_count * 2
    assert header.moved_bytes("cpu-moe") == expert_layers * 3 * one
    assert header.moved_bytes("baseline") == 0
    assert header.device_bytes("baseline") == header.tensor_bytes - g.embedding_length * g.vocab_size * 2
    assert header.device_bytes("cpu-moe") == header.device_bytes("baseline") - header.moved_bytes("cpu-moe")
    assert header.type_counts.keys() == {"F16", "F32"}
    assert header.expert_types == {"F16": 3 * expert_layers}


def test_n_cpu_moe_counts_dense_first_blocks_but_moves_nothing_there(nano):
    path, g = nano
    header = read_header(path)
    assert (header.moved_bytes("n-cpu-moe=1") == 0) == (g.leading_dense_block_count == 1)
    assert header.moved_bytes(f"n-cpu-moe={g.block_count}") == header.moved_bytes("cpu-moe")
    assert header.moved_bytes("n-cpu-moe=999") == header.moved_bytes("cpu-moe")


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("blk.3.ffn_up_exps.weight", True),
        ("blk.11.ffn_gate_up_exps.weight", True),
        ("blk.0.ffn_down_chexps.weight", True),
        ("blk.0.ffn_down_shexp.weight", False),
        ("blk.0.ffn_gate_inp.weight", False),
        ("blk.0.ffn_up.weight", False),
    ],
)
def test_which_tensors_are_experts(name, expert):
    assert gguf_file.Tensor(name, (1,), "F32", 4, 0).is_expert == expert


@pytest.mark.parametrize(
    ("shape", "kind", "nbytes"),
    [((256,), "Q2_K", 84), ((256, 2), "Q4_K", 288), ((32, 3), "Q8_0", 102), ((32,), "Q4_0", 18), ((3, 5), "F16", 30)],
)
def test_bytes_of_types(shape, kind, nbytes):
    # sizes of ggml's blocks: block_q2_K 84, block_q4_K 144, block_q8_0 34, block_q4_0 18 bytes
    assert gguf_file.tensor_bytes(shape, kind) == nbytes


def test_a_row_that_does_not_divide_is_refused():
    with pytest.raises(GGUFError, match="does not divide"):
        gguf_file.tensor_bytes((352,), "Q4_K")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "it is empty; fetch it again"),
        (b"GGUF" + bytes(10), "truncated"),
        (b"PK\x03\x04" + b"x" * 100, "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + b"\0" * 64, "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + b"\0" * 64, "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + b"\0" * 8, "without tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1) + b"\0" * 8, "corrupt"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1 << 62) + b"\0" * 8, "corrupt"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1000) + b"\0" * 8, "truncated"),
    ],
)
def test_foreign_and_broken_files_are_refused_with_the_reason(tmp_path, content, complaint):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(GGUFError, match=complaint) as caught:
        read_header(path)
    assert "x.gguf" in str(caught.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.9999))
def test_every_truncation_is_seen(nano, tmp_path, share):
    data = nano[0].read_bytes()
    # the last tensor may be followed by padding, which is not data
    end = max(t.offset + t.nbytes for t in read_header(nano[0]).tensors)
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(end * share)])
    with pytest.raises(GGUFError):
        read_header(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 20_000), value=st.integers(0, 255), run=st.integers(1, 9))
def test_hostile_headers_end_in_an_error_or_a_header(nano, tmp_path, at, value, run):
    data = bytearray(nano[0].read_bytes()[: 1 << 20])
    data[at : at + run] = bytes([value]) * run
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with contextlib.suppress(GGUFError):  # anything else would be the defect
        read_header(path)
