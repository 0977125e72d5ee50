"""What a model's files mean: kinds, experts and their bytes, splits, and what is wrong with a file."""

import os
import shutil
import struct

import ggufs
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moelib.catalogue import params
from moelib.gguf import gguf_file, twin
from moelib.gguf.gguf_file import GGUFError, HeaderCut, from_bytes, read_header

GOOD = ggufs.build(*ggufs.moe())


@pytest.fixture(scope="module", params=["phi-3.5-moe", "deepseek-moe-16b"])
def nano(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    geometry = params.model(request.param).at_scale("nano")
    twin.write(path, geometry)
    return path, geometry


def header_of(metadata, tensors, kind="F16"):
    data = ggufs.build(metadata, tensors, kind)
    return from_bytes(data, "m.gguf", len(data))


def write(path, metadata=None, tensors=None):
    facts, shapes = ggufs.moe()
    path.write_bytes(ggufs.build(facts | (metadata or {}), shapes if tensors is None else tensors))
    return path


def test_it_reads_what_ggufs_own_reader_reads(nano):
    path, geometry = nano
    own, packages = read_header(path), GGUFReader(path)
    assert own.metadata["general.architecture"] == geometry.architecture
    assert own.metadata[f"{geometry.architecture}.expert_count"] == geometry.expert_count
    assert {t.name: (t.shape, t.type, t.nbytes, t.offset) for t in own.tensors} == {
        t.name: (tuple(int(n) for n in t.shape), t.tensor_type.name, int(t.n_bytes), int(t.data_offset))
        for t in packages.tensors
    }


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
    assert header.is_twin
    # dense first blocks count among the N and move nothing
    assert header.moved_bytes("n-cpu-moe=1") == (1 - g.leading_dense_block_count) * 3 * one
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
    """ggml's blocks: block_q2_K has 84 bytes, block_q4_K 144, block_q8_0 34, block_q4_0 18."""
    assert gguf_file.tensor_bytes(shape, kind) == nbytes


def test_a_row_that_does_not_divide_into_blocks_is_refused():
    with pytest.raises(GGUFError, match="does not divide"):
        gguf_file.tensor_bytes((352,), "Q4_K")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.9999))
def test_every_truncation_is_seen(nano, tmp_path, share):
    # the last tensor may be followed by padding, which is not data
    end = max(t.offset + t.nbytes for t in read_header(nano[0]).tensors)
    path = tmp_path / "cut.gguf"
    path.write_bytes(nano[0].read_bytes()[: int(end * share)])
    with pytest.raises(GGUFError):
        read_header(path)


def test_a_cut_file_says_how_much_is_missing(tmp_path):
    for n in (1, 1000):
        (tmp_path / "m.gguf").write_bytes(GOOD[:-n])
        with pytest.raises(GGUFError, match=f" {n} bytes are missing; fetch"):
            read_header(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(GOOD[:400])
    with pytest.raises(HeaderCut, match="ends within its header, at 400 bytes"):
        read_header(tmp_path / "m.gguf")
    for name, data in {"m.gguf.part1of2": GOOD[:-1000], "m.gguf.part2of2": GOOD[-1000:]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(GGUFError, match=r"slice \d of 2 .*join the slices of m.gguf with cat"):
            read_header(tmp_path / name)


def test_a_path_that_is_no_file_is_named_with_its_cause(tmp_path):
    (tmp_path / "m.gguf").mkdir()
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    causes = {"m": "a folder; name the GGUF", "pipe": "a pipe", "loop": "cannot be read", "no": "No such"}
    for name, cause in causes.items():
        with pytest.raises(GGUFError, match=rf"^{name}\.gguf.*{cause}"):
            read_header(tmp_path / f"{name}.gguf")


@pytest.mark.parametrize("shift", [-32, 8])
def test_a_tensor_that_overlaps_or_is_not_aligned_is_refused(shift):
    name, data = b"blk.2.ffn_down_exps.weight", bytearray(GOOD)
    at = data.find(name) + len(name) + 4 + 3 * 8 + 4
    data[at : at + 8] = struct.pack("<Q", struct.unpack_from("<Q", data, at)[0] + shift)
    with pytest.raises(GGUFError, match="overlaps or is not aligned"):
        from_bytes(bytes(data), "m.gguf", len(data))


FACTS, TENSORS = ggufs.moe("glm4moe", layers=2, nextn=1)
NEXTN = {name: shape for name, shape in TENSORS.items() if not name.startswith(("blk.0", "blk.1"))}
KINDS = [
    ("model", {}, None),
    ("adapter", {"general.type": "adapter"}, None),
    ("adapter", {"adapter.type": "lora"}, None),
    ("adapter", {}, ("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b")),
    ("imatrix", {"general.type": "imatrix"}, None),
    ("imatrix", {}, ("blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts")),
    ("projector", {"general.architecture": "clip"}, None),
    ("draft", {"general.architecture": "eagle3"}, None),
    ("draft", FACTS, NEXTN),  # the layer that predicts a further token, published as a file of its own
    ("control vector", {"general.architecture": "controlvector"}, None),
    ("control vector", {}, ("direction.1", "direction.2")),
    ("vocabulary", {}, ()),
    ("unknown", {"general.architecture": ""}, None),
]


@pytest.mark.parametrize(("kind", "metadata", "names"), KINDS)
def test_a_file_that_is_no_model_is_named(tmp_path, kind, metadata, names):
    path = write(tmp_path / "m.gguf", metadata, None if names is None else dict.fromkeys(names, (32, 2)))
    assert from_bytes(path.read_bytes(), path.name, path.stat().st_size).kind == kind
    if kind != "model":
        with pytest.raises(GGUFError, match=r"^m\.gguf is (a|an|no|not a) .*; give"):
            read_header(path)


def test_a_quantised_file_is_known_by_its_header():
    assert header_of(*ggufs.moe(), kind="Q8_0").is_quantised
    assert not header_of(*ggufs.moe()).is_quantised
    assert not header_of(*ggufs.moe()).is_twin


def test_a_file_on_the_hub_is_known_by_its_first_bytes():
    for known in (100, 300):
        with pytest.raises(HeaderCut, match=r"^far\.gguf: truncated"):
            from_bytes(GOOD[:known], "far.gguf", len(GOOD))
    far = from_bytes(GOOD[:4096], "far.gguf", len(GOOD))
    assert (far.kind, far.file_bytes, len(far.moved("cpu-moe"))) == ("model", len(GOOD), 9)
    assert from_bytes(ggufs.build({"general.architecture": "clip"}, {"v.a": (32,)}), "p", 10**6).kind == "projector"
    with pytest.raises(GGUFError, match="are missing"):
        from_bytes(GOOD[:4096], "far.gguf", len(GOOD) - 100)


WRONG = [
    ({"general.architecture": 3}, "general.architecture is 3"),
    ({"general.architecture": ["a"]}, r"general.architecture is \['a'\]"),
    *[({f"qwen3moe.{k}": v}, f"{k} is ") for k in gguf_file.COUNTS for v in ("8", 0.5, True, -1)],
    ({"qwen3moe.block_count": [3]}, "block_count is"),
    ({"qwen3moe.block_count": 0}, "block_count is 0"),
    ({"qwen3moe.nextn_predict_layers": 3}, "block_count is 3 and nextn_predict_layers 3, so that no layer is left"),
    ({"qwen3moe.expert_count": ["a"]}, "expert_count is"),
    ({"qwen3moe.expert_count": [4] * 2000}, "expert_count is"),
    ({"split.count": "2"}, "split.count is '2'"),
    ({"split.count": 2}, "header says one of 2 files, its name one of 1; rename it"),
    ({"general.alignment": 0}, "alignment 0"),
    ({"general.alignment": True}, "alignment True"),
    ({"general.alignment": 48}, "alignment 48"),
]


@pytest.mark.parametrize(("facts", "cause"), WRONG, ids=lambda v: str(v)[:60])
def test_metadata_of_a_wrong_type_is_refused_in_a_sentence(tmp_path, facts, cause):
    with pytest.raises(GGUFError, match=cause):
        read_header(write(tmp_path / "m.gguf", facts))


def test_experts_may_differ_from_layer_to_layer():
    model = header_of(*ggufs.moe(expert_used_count=[1, 2, 4], expert_count=[4, 4, 4]))
    one = 32 * 8 * 4 * 2
    assert model.read_bytes("cpu-moe")[1] == 3 * one * (1 + 2 + 4) // 4
    assert model.read_bytes("n-cpu-moe=2")[1] == 3 * one * (1 + 2) // 4
    assert sum(model.read_bytes("baseline")) == sum(model.read_bytes("cpu-moe"))
    assert model.fault(["cpu-moe"]) is None


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"expert_used_count": 9}, "expert_used_count is 9"),
        ({"expert_used_count": 0}, "expert_used_count is 0"),
        ({"expert_used_count": None}, "expert_used_count is None"),
        ({"expert_used_count": [2]}, "expert_used_count is None, blk.1"),
        ({"expert_count": 8}, "expert_count is 8, blk.0.ffn_gate_exps.weight has 4"),
        ({"expert_count": None}, "expert_count is None"),
    ],
)
def test_a_model_whose_experts_cannot_be_counted_has_a_fault(change, cause):
    model = header_of(*ggufs.moe(**change))
    assert model.fault(["cpu-moe"]).startswith(f"corrupt: {cause}")
    with pytest.raises(GGUFError, match=rf"^m\.gguf: corrupt: {cause}"):
        model.read_bytes("cpu-moe")


def test_a_model_that_cannot_be_run_has_a_fault():
    assert "no block_count" in header_of(*ggufs.moe(block_count=None)).fault()
    facts, tensors = ggufs.moe()
    lone = {n: s for n, s in tensors.items() if "exps" not in n} | {"blk.0.ffn_gate.0.weight": (32, 8)}
    assert "convert the model again" in header_of(facts, lone).fault()
    chunks = {n.replace("_exps", "_chexps"): (32, 8, 2) if "exps" in n else s for n, s in tensors.items()}
    assert header_of(facts, chunks).fault(["cpu-moe"]) is None


def test_a_layer_that_predicts_a_further_token_is_no_placements():
    model = header_of(*ggufs.moe("glm4moe", layers=3, dense=1, nextn=1))
    assert {t.block for t in model.moved("cpu-moe")} == {1, 2}
    extra = sum(t.nbytes for t in model.tensors if t.block == 3)
    embedding = 32 * 8 * 2
    assert model.device_bytes("baseline") == model.tensor_bytes - extra - embedding
    assert model.fault(["n-cpu-moe=3"]) is None
    assert "beyond the model's 3 layers" in model.fault(["baseline", "n-cpu-moe=4"])
    # what an engine reports goes before: one that loads the layer, and one that leaves out less of it
    assert {t.block for t in model.as_loaded(()).moved("cpu-moe")} == {1, 2, 3}
    less = model.as_loaded(["blk.3.attn_q.weight", "no.such"])
    assert less.device_bytes("baseline") == model.tensor_bytes - embedding - 32 * 4 * 2
    assert model.as_loaded(None) == model


def test_look_up_tables_stay_on_the_cpu():
    facts, tensors = ggufs.moe()
    plain = header_of(facts, tensors).device_bytes("baseline")
    tables = tensors | {"per_layer_token_embd.weight": (32, 64), "token_embd_norm.weight": (32,)}
    # LFM2 has its output norm under that name
    lfm = {n: s for n, s in tensors.items() if n != "output_norm.weight"} | {"token_embd_norm.weight": (32,)}
    tied = {n: s for n, s in tensors.items() if n != "output.weight"}
    for same in (tables, lfm, tied):
        assert header_of(facts, same).device_bytes("baseline") == plain


@pytest.mark.parametrize("name", ["m-00000-of-00001", "m-00003-of-00002", "m-00001-of-00000", "m-00001-of-99999"])
def test_impossible_names_of_splits_are_refused_without_a_path_for_each(tmp_path, name):
    with pytest.raises(GGUFError, match="which is impossible; rename"):
        read_header(write(tmp_path / f"{name}.gguf"))


def split(folder, count=2, no=(0, 1), announced=None, same=()):
    """A model in two files, whose headers give these numbers; `same`: tensors that both files hold."""
    facts, tensors = ggufs.moe()
    names, paths = list(tensors), []
    for i in range(2):
        numbers = {"split.count": count, "split.no": no[i], "split.tensors.count": announced or len(names)}
        part = {n: tensors[n] for n in dict.fromkeys([*names[i::2], *same])}
        paths.append(folder / f"s-{i + 1:05}-of-00002.gguf")
        paths[-1].write_bytes(ggufs.build((facts if i == 0 else {}) | numbers, part))
    return paths


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"no": (0, 0)}, "its header says file 1 of the model"),
        ({"count": 3}, "header says one of 3 files, its name one of 2"),
        ({"announced": 99}, "hold 15 of 99 tensors"),
        ({"same": ["output.weight"], "announced": 16}, "two of its files hold the same tensor"),
    ],
)
def test_files_that_are_not_one_model_are_refused(tmp_path, change, cause):
    with pytest.raises(GGUFError, match=cause):
        read_header(split(tmp_path, **change)[0])


def test_a_split_model_is_read_whole_or_not_at_all(tmp_path):
    first, second = split(tmp_path)
    whole = read_header(second)
    assert (whole.path, len(whole.tensors)) == (first, len(ggufs.moe()[1]))
    assert whole.file_bytes == first.stat().st_size + second.stat().st_size
    shutil.move(first, tmp_path / "renamed.gguf")
    with pytest.raises(GGUFError, match="header says one of 2 files, its name one of 1; rename it"):
        read_header(tmp_path / "renamed.gguf")
    with pytest.raises(GGUFError, match="s-00001-of-00002.gguf cannot be found"):
        read_header(second)
    first.mkdir()
    with pytest.raises(GGUFError, match="s-00001-of-00002.gguf: it is a folder"):
        read_header(second)
