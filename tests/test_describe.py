"""What `moelib header` tells of a file, for small ones of each kind of model."""

import json
import re
import time

import ggufs
import pytest
from click.testing import CliRunner

import moelib
from moelib import cli
from moelib.gguf import gguf_file
from moelib.planner.describe import describe

ATTENTION = {"attention.head_count": 4, "attention.head_count_kv": 2, "context_length": 4096}
ATTENTION |= {"attention.key_length": 16, "attention.value_length": 8, "embedding_length": 64}


def header_of(metadata, tensors, kind="F16"):
    data = ggufs.build(metadata, tensors, kind)
    return gguf_file.from_bytes(data, "m.gguf", len(data))


def moe(arch="qwen3moe", **change):
    return ggufs.moe(arch, **ATTENTION | change)


def mla():
    """DeepSeek-V2: latent attention, of which one vector a token is cached; a dense first layer, shared experts."""
    latent = {"attention.head_count_kv": 1, "attention.key_length_mla": 96, "attention.value_length_mla": 64}
    facts, tensors = moe("deepseek2", dense=1, expert_shared_count=2, **latent)
    tensors |= {f"blk.{i}.attn_kv_a_mqa.weight": (32, 16) for i in range(3)}
    return facts, tensors | {f"blk.{i}.ffn_up_shexp.weight": (32, 16) for i in (1, 2)}


def windowed():
    """gpt-oss: every other layer sees the last 128 tokens alone; biases of experts."""
    facts, tensors = moe("gpt-oss", layers=4, **{"attention.sliding_window": 128})
    return facts, tensors | {f"blk.{i}.ffn_up_exps.bias": (8, 4) for i in range(4)}


def nextn():
    """GLM-4: a further layer that is not loaded."""
    return moe("glm4moe", dense=1, nextn=1)


def merged():
    """Gate and up of each expert in one tensor."""
    facts, tensors = moe("qwen35moe")
    split = {n: s for n, s in tensors.items() if "_gate_exps" not in n and "_up_exps" not in n}
    return facts, split | {f"blk.{i}.ffn_gate_up_exps.weight": (32, 16, 4) for i in range(3)}


def hybrid():
    """LFM2: layers of short convolutions, which keep a state, between those of attention."""
    facts, tensors = moe("lfm2moe", **{"attention.head_count_kv": [0, 2, 0], "shortconv.l_cache": 3})
    for i in (0, 2):
        del tensors[f"blk.{i}.attn_q.weight"]
        tensors[f"blk.{i}.shortconv.in_proj.weight"] = (32, 96)
    return facts, tensors


def uneven():
    """Experts that differ from layer to layer."""
    facts, tensors = moe(expert_count=[4, 8, 8], expert_used_count=[1, 2, 4])
    return facts, {n: (*s[:2], 8) if "exps" in n and "blk.0" not in n else s for n, s in tensors.items()}


def interleaved():
    """Llama 4: every other layer has experts."""
    facts, tensors = moe("llama4", layers=6)
    return facts, {n: s for n, s in tensors.items() if not re.match(r"blk\.[024]\.ffn", n)}


MODELS = {f.__name__: f for f in (moe, mla, windowed, nextn, merged, hybrid, uneven, interleaved)}


@pytest.mark.parametrize("which", MODELS)
def test_bytes_add_up_and_each_n_moves_what_the_header_says(which):
    header = header_of(*MODELS[which]())
    told = describe(header)
    assert told.is_moe
    assert told.fault is None
    assert told.expert.nbytes + told.rest.nbytes + told.not_loaded.nbytes == told.whole.nbytes == header.tensor_bytes
    assert told.whole.bits_per_weight == header.bits_per_weight
    assert told.expert.nbytes == header.moved_bytes("cpu-moe") == told.steps[-1].moved_bytes
    moved = {n: header.moved_bytes(f"n-cpu-moe={n}") for n in range(1, header.layers + 1)}
    expected = {n: nbytes for n, nbytes in moved.items() if nbytes > moved.get(n - 1, 0)}
    assert {s.n: s.moved_bytes for s in told.steps} == expected
    assert {s.n: s.nbytes for s in told.steps} == {n: nbytes - moved.get(n - 1, 0) for n, nbytes in expected.items()}
    assert {s.n: s.device_bytes for s in told.steps} == {n: header.device_bytes(f"n-cpu-moe={n}") for n in expected}
    assert json.loads(json.dumps(told.facts(), allow_nan=False))["steps"][-1]["moved_bytes"] == told.expert.nbytes
    for answer in (told.text().splitlines()[0], told._repr_html_(), repr(told)):
        assert told.answer in answer


@pytest.mark.parametrize(
    ("which", "kv", "fixed"),
    [
        ("moe", 3 * 2 * (16 + 8), 0),
        ("mla", 3 * 16, 0),
        ("windowed", 2 * 2 * (16 + 8), 2 * (768 * 2 * (16 + 8)) * 2),
        ("nextn", 3 * 2 * (16 + 8), 0),
        ("hybrid", 2 * (16 + 8), 2 * 64 * 2 * 4),
    ],
)
def test_the_cache_by_hand(which, kv, fixed):
    """Two bytes an element; a window of 128 tokens has room for a batch of 512 more, in steps of 256."""
    told = describe(header_of(*MODELS[which]()))
    assert (told.kv_bytes, told.kv_fixed_bytes, told.kv_unknown) == (kv * 2 * 1024, fixed, None)


def test_layers_and_experts_are_counted():
    told = {which: describe(header_of(*make())) for which, make in MODELS.items()}
    layers = {"moe": 3, "mla": 3, "windowed": 4, "nextn": 3, "merged": 3, "hybrid": 3, "uneven": 3, "interleaved": 6}
    assert {which: t.layers for which, t in told.items()} == layers
    dense = {which: t.dense_layers for which, t in told.items() if t.dense_layers}
    assert dense == {"mla": (0,), "nextn": (0,), "interleaved": (0, 2, 4)}
    assert {(t.experts, t.experts_used) for which, t in told.items() if which != "uneven"} == {(4, 2)}
    assert (told["uneven"].experts, told["uneven"].experts_used, told["uneven"].experts_differ) == (8, 4, True)
    assert (told["mla"].experts_shared, told["mla"].shared_bytes) == (2, 2 * 32 * 16 * 2)
    assert [s.n for s in told["interleaved"].steps] == [2, 4, 6]


def test_it_is_told_in_words():
    kinds = {"blk.1.ffn_up_exps.weight": "Q8_0", "output_norm.weight": "F32"}
    told = describe(header_of(*mla(), kind=lambda name, shape: kinds.get(name, "F16")))
    assert told.answer == (
        "m.gguf, 0.02 MiB: a mixture-of-experts model (deepseek2, 3 layers), of which 0.01 MiB (56.4 %) can be "
        "offloaded; with --cpu-moe, 0.01 MiB of weights stay on the GPU"
    )
    rows = dict(told.rows())
    assert rows["layers"] == "3, 1 of them without experts: 0"
    assert rows["context"] == "up to 4,096 tokens"
    assert rows["experts"] == "4 a layer, 2 used for each token, 2 shared (0.00 MiB, which stay on the GPU)"
    assert rows["expert bytes"].startswith("0.01 MiB, 14.75 bits per weight (F16 0.01 MiB, Q8_0 ")
    assert told.expert.types == {"F16": 5 * 32 * 8 * 4 * 2, "Q8_0": 32 * 8 * 4 * 34 // 32}
    assert "not loaded" in dict(describe(header_of(*nextn())).rows())
    assert dict(describe(header_of(*uneven())).rows())["experts"] == "up to 8 a layer, 4 used for each token"
    assert dict(describe(header_of(*interleaved())).rows())["layers"] == "6, 3 of them without experts: 0, 2, 4"


def test_a_dense_model_is_said_to_be_one_and_what_would_do():
    facts, tensors = moe("llama", expert_count=None, expert_used_count=None)
    told = describe(header_of(facts, {n: s for n, s in tensors.items() if "exps" not in n}))
    assert not told.is_moe
    assert told.steps == ()
    assert re.search(r"\(llama, 3 layers\): a dense model, .*; put whole layers on the CPU \(-ngl N\), or", told.answer)
    assert "--n-cpu-moe" not in told.text() + told._repr_html_()
    assert dict(told.rows())["layers"] == "3"


@pytest.mark.parametrize(
    ("change", "names", "says"),
    [
        ({"expert_used_count": 9}, str, "corrupt: expert_used_count is 9, blk.0"),
        ({"block_count": None}, str, "corrupt: it has no block_count"),
        ({}, lambda name: re.sub(r"_exps", ".0", name), r"each expert has its own tensor .*; convert the model again"),
    ],
)
def test_a_file_that_cannot_be_run_says_so_first(change, names, says):
    facts, tensors = moe(**change)
    told = describe(header_of(facts, {names(name): shape for name, shape in tensors.items()}))
    assert re.search(says, told.text().splitlines()[0])
    assert told._repr_html_()


def test_what_the_header_does_not_say_is_null_with_the_reason():
    told = describe(header_of(*moe("kimi-linear", context_length=None)))
    assert (told.kv_bytes, told.kv_fixed_bytes, told.context_length) == (None, None, None)
    assert told.kv_unknown == "kimi-linear has a cache of its own kind, whose size is not computed from the header"
    rows = dict(told.rows())
    assert rows["KV cache"] == f"not known: {told.kv_unknown}"
    assert rows["context"] == "not said"
    told = describe(header_of(*ggufs.moe()))
    assert "does not say how wide attention is" in told.kv_unknown
    told = describe(header_of(*moe(block_count=None)))
    assert (told.layers, told.kv_bytes) == (None, None)
    assert "how many layers" in told.kv_unknown
    facts, tensors = moe()
    told = describe(header_of(facts, tensors | {"blk.0.ffn_up_shexp.weight": (32, 8)}))
    assert told.experts_shared is None
    assert "and shared ones" in dict(told.rows())["experts"]


def test_strings_of_the_file_are_shown_and_do_nothing():
    facts, tensors = moe()
    told = describe(header_of(facts | {"general.name": "<script>\x1b[2J"}, tensors))
    assert "\x1b" not in told.text()
    assert "<script>" not in told._repr_html_()
    assert "&lt;script&gt;" in told._repr_html_()
    assert "\x1b" not in json.dumps(told.facts())


@pytest.fixture
def file(tmp_path):
    return ggufs.write_nextn(tmp_path / "small.gguf")


def test_the_command_answers_first(file, tmp_path):
    done = CliRunner().invoke(cli.main, ["header", str(file)])
    assert done.exit_code == 0
    assert done.stdout == describe(moelib.header(file)).text() + "\n"
    first = "small.gguf, 13.18 MiB: a mixture-of-experts model (glm4moe, 3 layers), of which 6.00 MiB (45.5 %) can be"
    assert done.stdout.startswith(first)
    assert json.loads(CliRunner().invoke(cli.main, ["header", str(file), "--json"]).stdout) == json.loads(
        json.dumps(describe(moelib.header(file)).facts())
    )
    wrong = CliRunner().invoke(cli.main, ["header", str(tmp_path / "nothing.gguf")])
    assert wrong.exit_code == 1
    assert re.match(r"moelib: nothing.gguf cannot be read: .*; check its path", wrong.stderr)


def test_jupyterlab_shows_a_header_as_its_description(file):
    from IPython.core.interactiveshell import InteractiveShell

    from moelib import lab

    shell = InteractiveShell()
    lab.install(shell)
    shown, _ = shell.display_formatter.format(moelib.header(file))
    assert "of which" in shown["text/html"]
    assert shown["text/plain"].startswith("<Header small.gguf: glm4moe, 3 layers")


def test_a_large_vocabulary_takes_no_time(tmp_path):
    """As large as they come; 0.4 s on an idle core."""
    facts, tensors = moe(layers=61)
    vocabulary = {"tokenizer.ggml.tokens": ["token"] * 262_144, "tokenizer.ggml.merges": ["to ken"] * 515_000}
    path = tmp_path / "large.gguf"
    path.write_bytes(ggufs.build(facts | vocabulary, tensors))
    started = time.process_time()
    told = describe(gguf_file.read_header(path))
    assert time.process_time() - started < 2
    assert len(told.steps) == 61
