"""Outlines of headers: what is kept to the byte, what is cut, and what a twin says of itself."""

import struct
from dataclasses import replace

import ggufs
import pytest

from moelib.catalogue import params
from moelib.gguf import gguf_file, outline, twin
from moelib.gguf.gguf_file import GGUFError, HeaderCut
from moelib.gguf.gguf_header import TWIN_NAME


def of(metadata, tensors, name="m.gguf", **how):
    raw = ggufs.build(metadata, tensors, **how)
    return outline.from_bytes([(raw, len(raw))], name)


@pytest.mark.parametrize("arch", ["qwen3", "qwen3moe", "gpt-oss", "lfm2moe"])
def test_a_header_is_written_again_as_it_was(tmp_path, arch):
    raw = ggufs.build(*ggufs.loadable(arch))
    (tmp_path / "m.gguf").write_bytes(raw)
    read, header = outline.read(tmp_path / "m.gguf"), gguf_file.read_header(tmp_path / "m.gguf")
    assert raw.startswith(read.to_bytes())
    assert read.file_bytes == len(raw)
    assert read == outline.from_bytes([(raw[: len(read.to_bytes())], len(raw))], "m.gguf")
    assert (read.header.metadata, read.header.tensors) == (header.metadata, header.tensors)


def test_the_files_of_a_split_model_are_one(tmp_path):
    metadata, tensors = ggufs.moe(layers=4)
    names, parts = list(tensors), []
    for i, half in enumerate((names[:9], names[9:])):
        about = metadata if i == 0 else {"general.architecture": "qwen3moe"}
        counts = {"split.no": i, "split.count": 2, "split.tensors.count": len(names)}
        parts.append(ggufs.build(about | counts, {k: tensors[k] for k in half}))
        (tmp_path / f"m-0000{i + 1}-of-00002.gguf").write_bytes(parts[-1])
    whole = outline.read(tmp_path / "m-00002-of-00002.gguf")
    assert [(t.name, t.shape) for t in whole.tensors] == list(tensors.items())
    assert [t.name for t in whole.tensors[:9]] == names[:9]
    assert whole.header.metadata == metadata
    assert replace(outline.from_bytes([(p, len(p)) for p in parts], "x"), name=whole.name) == whole
    with pytest.raises(GGUFError, match="is one of 2 files of a model, 1 are given; give all"):
        outline.from_bytes([(parts[0], len(parts[0]))], "m-00001-of-00002.gguf")


@pytest.mark.parametrize("name", ["phi-3.5-moe", "deepseek-moe-16b"])
def test_a_geometrys_outline_is_the_header_of_its_twin(tmp_path, name):
    entry = params.model(name)
    twin.write(tmp_path / "m.gguf", entry.at_scale("nano"), title=entry.title)
    assert outline.of_geometry(entry.at_scale("nano"), entry.title, "m.gguf") == outline.read(tmp_path / "m.gguf")


def test_a_twin_never_passes_for_the_original():
    metadata, tensors = ggufs.loadable("qwen3moe")
    metadata |= {"general.license": "mit", "general.basename": "x", "general.file_type": 15, "general.alignment": 64}
    made = of(metadata, tensors).as_twin()
    said = {k: v for k, v in made.header.metadata.items() if k.startswith("general.")}
    assert said == {
        "general.architecture": "qwen3moe",
        "general.name": TWIN_NAME,
        "general.description": "random weights in the shape of Phi-3 original; text and quality are meaningless",
        "general.file_type": 15,
        "general.alignment": 64,
    }
    assert made.header.is_twin
    assert made.as_twin() == made
    assert all(t.offset % 64 == 0 for t in made.header.tensors)
    same = [k for k in made.keys if k.startswith(("qwen3moe.", "tokenizer."))]
    assert {k: made.keys[k] for k in same} == {k: of(metadata, tensors).keys[k] for k in same}


@pytest.mark.parametrize(("dense", "count", "left"), [(2, 3, 2), (2, 1, 1), (0, 2, None)])
def test_a_slice_has_the_first_layers_and_says_so(dense, count, left):
    more = {"leading_dense_block_count": dense or None, "attention.head_count_kv": [2, 4, 2, 4, 8, 8]}
    more |= {"rope.dimension_sections": [1, 2, 3, 4], "attention.shared_kv_layers": 4}
    metadata, tensors = ggufs.moe("glm4moe", layers=5, dense=dense, nextn=1, **more)
    metadata["glm4moe.attention.sliding_window_pattern"] = [True, False, True, False, True]  # without the NextN layer
    cut = of(metadata, tensors).first_layers(count)
    facts = {k.removeprefix("glm4moe."): v for k, v in cut.header.metadata.items() if k.startswith("glm4moe.")}
    assert facts.pop("leading_dense_block_count", None) == left
    assert facts == {
        "block_count": count,
        "expert_count": 4,
        "expert_used_count": 2,
        "attention.head_count_kv": [2, 4, 2][:count],
        "rope.dimension_sections": [1, 2, 3, 4],
        "attention.shared_kv_layers": max(0, 4 - (5 - count)),
        "attention.sliding_window_pattern": [True, False, True][:count],
    }
    kept = [t for t in tensors if not t.startswith("blk.") or int(t.split(".")[1]) < count]
    assert [t.name for t in cut.header.tensors] == kept
    assert f"in the shape of m.gguf, first {count} of 5 layers; text" in cut.header.metadata["general.description"]
    assert f"layers, first 1 of {count} layers;" in cut.first_layers(1).header.metadata["general.description"]


@pytest.mark.parametrize("count", [-1, 0, 4, 1000])
def test_layers_that_the_model_does_not_have_are_refused_with_those_it_has(count):
    with pytest.raises(GGUFError, match=rf"the first {count} of the 3 layers of m\.gguf cannot be taken; 1 to 3"):
        of(*ggufs.moe()).first_layers(count)
    metadata, tensors = ggufs.moe()
    other = {k.replace("blk.", "dec.blk."): v for k, v in tensors.items()}
    with pytest.raises(GGUFError, match="has no layers to choose from"):
        of(metadata, other).first_layers(1)


def test_other_types_are_for_all_tensors_and_only_where_rows_divide():
    whole = of(*ggufs.moe())
    kinds = {t.name: "Q8_0" for t in whole.tensors} | {"output_norm.weight": "F32"}
    typed = whole.with_types(kinds, 7)
    assert typed.header.metadata["general.file_type"] == 7
    assert {t.name: t.type for t in typed.header.tensors} == kinds
    for change, cause in [
        ({"output.weight": "Q4_K"}, "a row of 32 does not divide into Q4_K blocks of 256"),
        ({"output.weight": "Q9_X"}, "output.weight cannot have type 'Q9_X'; take another quant"),
        ({"other.weight": "F16"}, r"the types given are not of the tensors of m\.gguf"),
    ]:
        with pytest.raises(GGUFError, match=cause):
            whole.with_types(kinds | change)


def test_a_header_that_is_cut_or_of_something_else_is_refused():
    raw = ggufs.build(*ggufs.loadable("qwen3moe"))
    whole = len(outline.from_bytes([(raw, len(raw))], "m.gguf").to_bytes())
    for end in (5, 100, whole // 2, whole - 40):
        with pytest.raises(HeaderCut, match=r"m\.gguf: truncated"):
            outline.from_bytes([(raw[:end], len(raw))], "m.gguf")
    adapter = ggufs.build({"general.architecture": "llama", "general.type": "adapter"}, {"a.weight": (32, 8)})
    with pytest.raises(GGUFError, match=r"m\.gguf is a LoRA adapter"):
        outline.from_bytes([(adapter, len(adapter))], "m.gguf")


def test_the_tokens_that_are_no_plain_text_stay_silent():
    metadata, tensors = ggufs.loadable("qwen3moe")
    silent = of(metadata, tensors).silent(520)
    assert silent == [True] * twin.UNSPOKEN + [False] * (512 - twin.UNSPOKEN) + [True] * 8  # 8 rows beyond the tokens
    metadata |= {"tokenizer.ggml.tokens": ["a", "Ġbig", "Ã", "<|end|>"], "tokenizer.ggml.token_type": [1, 1, 1, 3]}
    assert of(metadata, tensors).silent(4) == [False, False, True, True]
    del metadata["tokenizer.ggml.tokens"]
    assert of(metadata, tensors).silent(4) == [False] * 4


def test_an_alignment_of_its_own_is_kept_and_keys_of_any_length_too():
    metadata, tensors = ggufs.moe()
    plain = of(metadata | {"tokenizer.ggml.merges": [f"a {i}" for i in range(3000)]}, tensors)
    assert plain.keys["tokenizer.ggml.merges"].endswith(b"a 2999")
    made = replace(plain, keys=plain.keys | {"general.alignment": struct.pack("<II", 4, 256)})
    assert len(made.to_bytes()) % 256 == 0
    assert all(t.offset % 256 == 0 for t in made.header.tensors)
    assert made.header.file_bytes == made.file_bytes
