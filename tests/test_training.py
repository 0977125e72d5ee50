"""The small trained models: texts, tokenizer, export, llama.cpp's results, the checks, and training where torch is."""

import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import bigram
import card
import check
import export
import fetch
import measure
import moe_reference as reference
import numpy as np
import pieces
import prepare
import pytest
import recipes
import yaml
from conftest import REPO
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from moelib.gguf import gguf_file, twin

CORPORA = yaml.safe_load((REPO / "params/corpora.yaml").read_text(encoding="utf-8"))
TEXT = "The rain is on the nearest stone; nine or ten others rest in it, as it is. It's a sonnet, in part.\n\n"


# texts


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_is_the_file_that_its_entry_says(name):
    entry, path = CORPORA[name], REPO / "params" / CORPORA[name]["file"]
    assert (path.stat().st_size, pieces.sha256(path)) == (entry["bytes"], entry["sha256"])
    assert 100_000 < entry["bytes"] < 400_000
    assert path.read_text(encoding="utf-8").count("\n\n") > 10
    assert entry["calibration"] is (name == "calibration")
    keys = {"title", "file", "bytes", "sha256", "language", "licence", "source", "calibration", "training"}
    assert entry.keys() == keys


def test_sources_are_packages_with_a_licence_and_no_address():
    for name, source in fetch.sources().items():
        assert source.keys() == {"title", "use", "package", "licence", "sha256"}
        assert source["package"].keys() == {"manager", "name", "version"}
        assert re.fullmatch("[0-9a-f]{64}", source["sha256"]), name
        assert "public domain" in source["licence"]
    assert fetch.sources().keys() == fetch.READERS.keys()
    for path in (REPO / "training").glob("*.*"):
        assert path.suffix == ".png" or not re.search(r"https?://", path.read_text(encoding="utf-8")), path.name


def serialised(lines):
    """A character vector as R saves it: XDR, version 3."""
    out = b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8" + struct.pack(">ii", 16, len(lines))
    for line in lines:
        out += struct.pack(">ii", 0x40009, len(line.encode())) + line.encode()
    return out


def test_chapters_are_read_from_rs_database(tmp_path):
    novel = ["EMMA", "", "VOLUME I", "", "CHAPTER I", "", "She was", "handsome.", "", "And £1.", "CHAPTER II", "Then."]
    packed = zlib.compress(serialised(novel))
    path = tmp_path / "lib/janeaustenr/data/Rdata.rdb"
    path.parent.mkdir(parents=True)
    path.write_bytes(2 * (struct.pack(">i", len(novel)) + packed))
    chapters = [["Emma 1", "CHAPTER I\n\nShe was handsome.\n\nAnd £1."], ["Emma 2", "CHAPTER II Then."]]
    assert fetch.austen(tmp_path) == 2 * chapters


@pytest.mark.parametrize("data", [b"A\n", b"X\n" + struct.pack(">iiii", 2, 0, 0, 13)])
def test_another_object_of_r_is_refused(data):
    with pytest.raises(ValueError, match="serialised|vector"):
        fetch.r_strings(data)


def test_a_chapter_of_a_sword_module_loses_its_tags_and_notes(tmp_path):
    book = (
        '<div osisID="Gen"/><title>Genesis</title><chapter n="1" osisID="Gen.1" sID="Gen.1"/><div sID="g1" type="x-p"/>'
        '<w lemma="a">In</w> <w>the</w> <w>day</w>,<note>a note</note> he said, “<w>Go</w>.” <div eID="g1" type="x-p"/>'
        '<div sID="g2" type="x-p"/><w>And</w> <w>he</w> <w>went</w> &amp; came.<chapter eID="Gen.1"/>'
    )
    packed = zlib.compress(book.encode())
    (tmp_path / "ot.bzz").write_bytes(packed)
    (tmp_path / "ot.bzs").write_bytes(struct.pack("<6I", 0, 0, 0, 0, len(packed), len(book)))
    assert fetch.genesis(tmp_path) == [["Genesis 1", "In the day, he said, “Go.”\n\nAnd he went & came."]]


def test_another_text_than_the_known_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TEXTS", tmp_path)
    monkeypatch.setattr(fetch, "unpack", lambda package, folder: None)
    monkeypatch.setitem(fetch.READERS, "austen", lambda folder: [["Emma 1", "Another text."]])
    source = fetch.sources()["austen"]
    with pytest.raises(fetch.SourceError, match=r"r-cran-janeaustenr .*version 1\.0\.0"):
        fetch.fetch("austen", source)
    assert not (tmp_path / "austen.json").exists()
    right = {**source, "sha256": pieces.sha256(tmp_path / "austen.other")}
    assert fetch.fetch("austen", right) == tmp_path / "austen.json"
    monkeypatch.setattr(fetch, "unpack", None)  # what is there is not fetched again
    assert fetch.fetch("austen", right).exists()


def test_parts_share_no_document_and_are_of_every_work(monkeypatch):
    texts = {
        "austen": [[f"{novel} {i}", f"{novel} {i}"] for novel in ("Emma", "Persuasion") for i in range(9)],
        "moby-dick": [[f"Moby Dick, chapter_{i}", f"Moby {i}"] for i in range(9)],
        "addresses": [[t, t] for t in (*prepare.VALID_ADDRESSES, *prepare.HELD_OUT_ADDRESSES, "2000_someone")],
    }
    monkeypatch.setattr(fetch, "documents", texts.__getitem__)
    parts = prepare.split()
    assert Counter(t for p in parts.values() for t in p) == Counter(x for d in texts.values() for _, x in d)
    assert parts["heldout"] == [
        *("Emma 8", "Persuasion 8", "Moby 6", "Moby 7", "Moby 8"),
        *prepare.HELD_OUT_ADDRESSES,
    ]
    assert len(parts["valid"]) == len(parts["heldout"])


def test_what_is_copied_is_counted_in_words():
    words = [str(i) for i in range(30)]
    train = [" ".join(words[:20])]
    assert prepare.copied(train, train) == 1
    assert prepare.copied([" ".join(words[15:])], train) == 0
    assert prepare.copied([" ".join(words)], train) == pytest.approx((20 - 11) / (30 - 11))
    assert prepare.copied(["too short"], train) == 0


# the baseline


def test_the_bigram_model_by_hand():
    """Of 0 1 0 1 0 2 with 3 tokens: pairs 01 twice, 10 twice, 02 once; discount 1 / (1 + 2 x 2)."""
    made = bigram.fit(np.array([0, 1, 0, 1, 0, 2]), 3)
    assert made.discount == pytest.approx(1 / 5)
    assert made.continuation == pytest.approx([2 / 6, 2 / 6, 2 / 6])
    found = np.exp(made.log_probs(np.array([0, 0, 2, 1]), np.array([1, 0, 1, 2])))
    # c(01) = 2 of 3, two kinds after 0; 00 was not seen; nothing was seen after 2; only 0 after 1
    assert found == pytest.approx([(2 - 0.2) / 3 + 0.2 * 2 / 3 / 3, 0.2 * 2 / 3 / 3, 1 / 3, 0.2 / 2 / 3])


@given(st.lists(st.integers(0, 6), min_size=2, max_size=200))
def test_probabilities_of_the_bigram_model_add_up_to_one(ids):
    made = bigram.fit(np.array(ids), 7)
    for first in range(7):
        p = np.exp(made.log_probs(np.full(7, first), np.arange(7)))
        assert p.min() > 0
        assert p.sum() == pytest.approx(1)


def test_a_bigram_model_of_nothing_is_refused():
    with pytest.raises(ValueError, match="two tokens"):
        bigram.fit(np.array([3]), 7)


# weights and files


def test_pieces_are_small_and_come_back_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    given_weights = {f"blk.{i}.attn_q.weight": np.full((20, 30), i / 3) for i in range(5)}
    given_weights |= {"output.bias": np.arange(7) / 3, "blk.0.ffn_gate_inp.weight": np.full((4, 4), 1 / 3)}
    hashes = pieces.save(tmp_path, given_weights)
    assert len(hashes) == 3
    assert all((tmp_path / name).stat().st_size < 4000 for name in hashes)
    back = pieces.load(tmp_path, hashes)
    assert back.keys() == given_weights.keys()
    for name, values in back.items():
        assert values.dtype == (np.float16 if "attn" in name else np.float32)
        assert values == pytest.approx(given_weights[name], rel=1e-3)
    assert pieces.save(tmp_path, given_weights) == hashes  # the same bytes


def test_a_damaged_piece_is_refused(tmp_path):
    hashes = pieces.save(tmp_path, {"output.weight": np.ones((8, 8))})
    (tmp_path / "weights-00.npz").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"weights-00\.npz is missing, or not the file"):
        pieces.load(tmp_path, hashes)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_weights_that_f16_cannot_hold_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"output\.weight has values that are not finite in float16"):
        pieces.save(tmp_path, {"output.weight": np.full((2, 2), value)})


@pytest.mark.parametrize("model", recipes.MODELS.values(), ids=lambda m: m.name)
def test_the_models_are_what_quality_needs(model):
    """Small files, and k-quants where the published models have them and fall back where they do."""
    shape, geometry = model.shape, export.geometry(model.shape)
    assert twin.nbytes(geometry) < 25_000_000
    assert shape.embedding_length % 256 == 0
    assert shape.expert_count != 8
    deepseek = shape.architecture == "deepseek"
    assert bool(shape.expert_feed_forward_length % 256) == deepseek
    assert shape.expert_feed_forward_length * max(1, shape.expert_shared_count) % 256 == 0
    assert shape.leading_dense_block_count == int(deepseek)
    assert "phi-3" not in model.title  # llama.cpp would use another tokenizer


@pytest.fixture(params=reference.TINY, scope="module")
def tiny(request, tmp_path_factory):
    """A tiny model of each architecture with random weights, exported."""
    folder = tmp_path_factory.mktemp(request.param)
    model = replace(recipes.MODELS["phi"], name="tiny", title="tiny", shape=reference.TINY[request.param])
    given_weights = reference.weights(model.shape, twin.tensors(export.geometry(model.shape)))
    hashes = pieces.save(folder, given_weights)
    made = reference.save_tokenizer(folder / "tokenizer.json", model.shape.vocab_size)
    file = folder / "tiny-F16.gguf"
    stored = pieces.load(folder, hashes)
    export.write(file, model, stored, folder / "tokenizer.json")
    return SimpleNamespace(folder=folder, model=model, weights=stored, tokenizer=made, file=file)


def test_the_file_has_a_twins_tensors_and_the_weights(tiny):
    header = gguf_file.read_header(tiny.file)
    plan = twin.tensors(export.geometry(tiny.model.shape))
    assert [(t.name, t.shape) for t in header.tensors] == [(t.name, t.shape) for t in plan]
    for t in GGUFReader(tiny.file).tensors:
        assert np.array_equal(t.data.reshape(tiny.weights[t.name].shape), tiny.weights[t.name])
        assert t.data.dtype == tiny.weights[t.name].dtype


def test_weights_of_another_shape_are_refused(tiny, tmp_path):
    for change in ({"output_norm.weight": np.ones(3)}, {"more": np.ones(2)}):
        with pytest.raises(export.ExportError, match="the weights are not those of tiny"):
            export.write(tmp_path / "x.gguf", tiny.model, tiny.weights | change, tiny.folder / "tokenizer.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"normalizer": {"type": "NFC"}}, {"model": {"type": "Unigram"}}])
def test_another_kind_of_tokenizer_is_refused(tiny, tmp_path, change):
    (path := tmp_path / "tokenizer.json").write_text(json.dumps(tiny.tokenizer | change), encoding="utf-8")
    with pytest.raises(export.ExportError, match="no byte-level BPE"):
        export.write(tmp_path / "x.gguf", tiny.model, tiny.weights, path)


def test_a_tokenizer_of_another_size_is_refused(tiny, tmp_path):
    reference.save_tokenizer(tmp_path / "tokenizer.json", 300)
    with pytest.raises(export.ExportError, match="300 tokens, tiny 320"):
        export.write(tmp_path / "x.gguf", tiny.model, tiny.weights, tmp_path / "tokenizer.json")


def test_a_run_that_is_not_done_is_not_exported(tmp_path):
    model = recipes.MODELS["phi"]
    with pytest.raises(export.ExportError, match="train first"):
        export.run_facts(tmp_path, model)
    facts = {"settings": {"shape": recipes.MODELS["deepseek"].facts()["shape"], "data": {"tokenizer_sha256": "0"}}}
    pieces.write_json(tmp_path / "run.json", facts)
    with pytest.raises(export.ExportError, match="another shape"):
        export.run_facts(tmp_path, model)
    with pytest.raises(export.ExportError, match="not the run's tokenizer"):
        export.tokenizer_of(facts, tmp_path)


# llama.cpp


def test_llama_cpp_makes_the_same_ids(tiny, engine, tmp_path):
    (path := tmp_path / "text").write_text(TEXT, encoding="utf-8")
    ids = measure.token_ids(tiny.file, path)
    assert ids == reference.encode(tiny.tokenizer, TEXT)
    assert len(ids) < len(TEXT)


@pytest.fixture
def base(tiny, engine, tmp_path, monkeypatch):
    """llama.cpp's log-probabilities of two windows of 64 tokens."""
    monkeypatch.setattr(measure, "WINDOW", 64)
    (tmp_path / "text").write_text(TEXT * 3, encoding="utf-8")
    return measure.logits(tiny.file, tmp_path / "text", tmp_path / "base", 2)


def test_llama_cpp_computes_what_the_reference_does(tiny, base):
    """Router, its normalisation, both kinds of RoPE, grouped queries, biases, shared experts, the dense layer."""
    assert base.tokens.shape == (2, 64)
    for tokens, theirs in zip(base.tokens, base.windows(), strict=True):
        ids = np.array([recipes.BEGIN, *tokens[1:]])
        ours = reference.log_probs(tiny.model.shape, tiny.weights, ids)[base.first : -1]
        assert check.nmse(theirs, np.maximum(ours, theirs.min(-1, keepdims=True))) < 1e-3
        assert np.exp(theirs).sum(-1) == pytest.approx(np.ones(len(theirs)), abs=2e-3)
        # another order of heads, or of experts, is another model: the limit tells them apart
        swapped = {n: v[::-1] if n.endswith("ffn_gate_inp.weight") else v for n, v in tiny.weights.items()}
        assert check.nmse(theirs, reference.log_probs(tiny.model.shape, swapped, ids)[base.first : -1]) > 1e-2


def test_a_file_that_was_cut_is_refused(base, tmp_path):
    whole = base.path.read_bytes()
    for content, why in ((whole[:-2], "not whole"), (b"_logits_", "no log-prob"), (b"x" * len(whole), "no log-prob")):
        (tmp_path / "cut").write_bytes(content)
        with pytest.raises(measure.MeasureError, match=why):
            measure.read(tmp_path / "cut")


def test_a_tool_that_fails_says_why(engine, tmp_path):
    with pytest.raises(measure.MeasureError, match="llama-tokenize ended with"):
        measure.token_ids(tmp_path / "none.gguf", tmp_path / "none")
    with pytest.raises(measure.MeasureError, match="has no llama-nothing"):
        measure.tool("llama-nothing")


def written(path, logits, tokens):
    """A file as llama-perplexity writes it, of log-probabilities (windows, rows, vocabulary)."""
    _, _, vocab = logits.shape
    out = b"_logits_" + struct.pack("<3i", tokens.shape[1], vocab, len(tokens)) + tokens.astype(np.int32).tobytes()
    for row in logits.reshape(-1, vocab):
        scale = np.float32((row.max() - row.min()) / 65535)
        codes = np.round((row - row.min()) / scale).astype(np.uint16)
        out += struct.pack("<2f", scale, row.min()) + codes.tobytes() + bytes(2 * (vocab % 2))
    path.write_bytes(out)
    return measure.read(path)


def test_divergence_of_known_distributions(tmp_path):
    p, q = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.5, 0.25])
    tokens = np.array([[0, 1, 2, 0], [0, 0, 1, 2]])
    base = written(tmp_path / "p", np.array([[p], [p]]), tokens)
    other = written(tmp_path / "q", np.array([[q], [p]]), tokens)
    found = measure.compare(base, other)
    assert found.kld == pytest.approx([0.25 * np.log(2), 0], abs=1e-4)
    assert found.nats == pytest.approx([-np.log(0.25), -np.log(0.25)], abs=1e-4)
    assert list(found.same_top) == [0, 1]
    with pytest.raises(measure.MeasureError, match="different tokens"):
        measure.compare(base, written(tmp_path / "r", np.array([[q], [p]]), tokens[::-1]))


def test_errors_are_by_windows():
    assert measure.mean(np.array([1.0, 3.0])) == {"mean": 2.0, "standard_error": pytest.approx(1.0)}
    assert measure.mean(np.array([1.0]))["standard_error"] is None


# the check and its card


def said():
    """A check's result in which everything holds."""
    quants = {}
    for i, quant in enumerate(("F16", *check.QUANTS)):
        step = {"mean": 0.01 * bool(i), "standard_error": 0.001}
        quants[quant] = dict.fromkeys(("nats", "kld", "same_top", "nats_above_f16", "kld_above_quant_before"), step)
        quants[quant]["perplexity"] = 20.0 + i
    kinds = {f"ffn_{part}_exps.weight": {"Q2_K": 2, "Q4_0": 1} for part in ("gate", "up", "down")}
    text = {"windows": 3, "scored_tokens": 765, "quants": quants}
    model = recipes.MODELS["deepseek"]
    result = {
        **{"model": model.name, "title": model.title, "shape": model.facts()["shape"], "parameters": 11_500_000},
        "file": {"name": "x-F16.gguf", "bytes": 23_000_000, "sha256": "0" * 64},
        "run": {"best_step": 900, "best_valid_nats": 3.0, "steps_done": 1000, "seconds": 200.0, "device": "a GPU"},
        "corpora": {n: {k: e[k] for k in ("title", "bytes", "sha256", "licence")} for n, e in CORPORA.items()},
        "tokenizer": {n: {"equal": True, "tokens": 9, "bytes": 30} for n in CORPORA},
        "quality": {
            "files": {q: {"bytes": 9_000_000, "sha256": "0" * 64, "types": kinds} for q in quants},
            "corpora": dict.fromkeys(CORPORA, text),
        },
        "logits": {"nmse": 1e-5, "rows": 765, "same_top": 0.999, "largest_difference_nats": 0.1},
        "bigram": {"perplexity": 60.0, "nats": 4.1, "discount": 0.6},
        "load": [[1.0] * model.shape.expert_count] * 4,
        "least_load": 0.4,
        "text": {"It was": "a sentence\n\nor two."},
        **{"engine_build": 11434, "windows_limited_to": None, "limits": check.LIMITS},
    }
    data = {"train": {"tokens": 4_000_000, "bytes": 15_000_000}}
    result["run"] |= {"torch": "2.11", "recipe": model.facts()["recipe"], "data": data}
    return json.loads(json.dumps(result))  # nothing shared


def _step(result, value):
    result["quality"]["corpora"]["scripture"]["quants"]["Q4_K_M"]["kld_above_quant_before"] = value


VIOLATIONS = {
    "llama.cpp makes the tokenizer's ids": lambda r: r["tokenizer"]["scripture"].update(equal=False),
    "llama.cpp computes what torch does": lambda r: r["logits"].update(nmse=2e-3),
    "better than a bigram model by far": lambda r: r["bigram"].update(perplexity=39.0),
    "no dead expert": lambda r: r.update(least_load=0.01),
    "each quant damages more than the one before": lambda r: _step(r, {"mean": 0.01, "standard_error": 0.006}),
    "small enough to keep": lambda r: r["file"].update(bytes=25_000_001),
}


def test_what_holds_holds():
    verdicts = check.verdicts(said())
    assert verdicts.keys() == VIOLATIONS.keys()
    assert all(verdicts.values())


@pytest.mark.parametrize("name", VIOLATIONS)
def test_what_does_not_hold_is_said_and_nothing_else(name):
    VIOLATIONS[name](result := said())
    verdicts = check.verdicts(result)
    assert [n for n, holds in verdicts.items() if not holds] == [name]
    text = card.markdown(result | {"verdicts": verdicts}, "deepseek")
    assert "**Of what must hold, 1 of 6 do not**" in text
    assert f"| {name} | **no** |" in text


def test_a_divergence_that_is_not_a_number_is_no_order():
    _step(result := said(), {"mean": float("nan"), "standard_error": 0.0})
    assert not check.verdicts(result)["each quant damages more than the one before"]


def test_the_card_says_data_licences_and_figures():
    text = card.markdown(said() | {"verdicts": check.verdicts(said())}, "deepseek")
    assert "do not**" not in text
    for word in ("CC0-1.0", "r-cran-janeaustenr", "| Q2_K | 9.0 | 23.000 | 0.0100 ± 0.0010 |", "2 x Q2_K, 1 x Q4_0"):
        assert word in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(row.endswith(" |") for row in rows)


def test_the_curve_is_drawn_the_same_twice(tmp_path):
    lines = [{"step": s, "train_nats": 5 - s / 100, "valid_nats": 5.1 - s / 100} for s in (100, 200)]
    for name in ("a", "b"):
        card.curve(lines, 200, "a model", tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# training


def test_training_needs_torch_and_numpy_alone():
    """What a machine with a GPU must have."""
    wanted = set()
    for name in ("train", "model", "recipes", "pieces"):
        text = (REPO / f"training/{name}.py").read_text(encoding="utf-8")
        wanted |= set(re.findall(r"^(?:import|from) (\w+)", text, re.M))
    assert wanted - sys.stdlib_module_names == {"torch", "numpy", "model", "recipes", "pieces"}


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[training]'")


@pytest.fixture
def data(tmp_path):
    """Token ids with something to learn: each is followed by one of two."""
    random, ids = np.random.default_rng(0), [0]
    for _ in range(6000):
        ids.append(1 + (ids[-1] * 7 + int(random.integers(2))) % 319)
    folder = tmp_path / "data"
    folder.mkdir()
    meta = {"tokenizer_sha256": "0" * 64}
    for part, some in (("train", ids[:5000]), ("valid", ids[5000:])):
        np.save(folder / f"{part}.npy", np.array(some, np.uint16))
        meta[part] = {"tokens": len(some), "bytes": 1, "sha256": pieces.sha256(folder / f"{part}.npy")}
    pieces.write_json(folder / "meta.json", meta)
    return folder


def tiny_model(name="phimoe", **changes):
    recipe = recipes.Recipe(steps=12, batch=4, warmup_steps=2, valid_every=4, learning_rate=1e-2)
    return recipes.Model("tiny", "tiny", reference.TINY[name], replace(recipe, **changes))


@pytest.mark.parametrize("name", reference.TINY)
def test_torch_computes_what_the_reference_does(torch, name):
    from model import Transformer

    shape = reference.TINY[name]
    given_weights = reference.weights(shape, twin.tensors(export.geometry(shape)))
    net = Transformer(shape)
    net.load_state_dict({n: torch.from_numpy(np.asarray(w, np.float32)) for n, w in given_weights.items()})
    ids = np.arange(40) * 7 % shape.vocab_size
    ours, routed = net(torch.from_numpy(ids)[None])
    known = reference.log_probs(shape, given_weights, ids)
    assert check.nmse(ours[0].double().log_softmax(-1).detach().numpy(), known) < 1e-8
    assert all(float(r["load"].sum()) == pytest.approx(1) for r in routed)
    assert net.weights().keys() == given_weights.keys()
    block = net.blk[-1]
    x = torch.randn(50, shape.embedding_length)
    _, chosen, weights = block.route(x)
    assert torch.allclose(block.all_experts(x, chosen, weights), block.chosen_experts(x, chosen, weights), atol=1e-5)


@pytest.mark.parametrize("name", reference.TINY)
def test_a_gpus_way_works_in_bf16_and_gives_about_the_same(torch, name, monkeypatch):
    """All experts at once, and products in bf16, as far as a CPU can try it."""
    from model import Block, Transformer, loss

    ids = torch.arange(4 * 64).reshape(4, 64) * 7 % 320
    found = []
    for way in ("cpu", "gpu"):
        net = Transformer(reference.TINY[name])
        net.begin(1)
        if way == "gpu":
            monkeypatch.setattr(Block, "chosen_experts", Block.all_experts)
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "gpu"):
            logits, _ = net(ids)
        assert logits.dtype == torch.float32
        value = loss(logits, ids)
        value.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        found.append(float(value.detach()))
    assert found[0] == pytest.approx(found[1], rel=0.01)


@pytest.mark.parametrize("name", reference.TINY)
def test_a_run_learns_and_a_stop_changes_nothing(torch, data, tmp_path, name):
    import train

    whole = train.Run(tiny_model(name), data, tmp_path / "whole", "cpu")
    whole.out.mkdir()
    assert train.go(whole, None)
    facts = whole.finish()
    assert facts["best_valid_nats"] < np.log(320) - 0.1
    for _ in range(3):  # stopped after some steps, and begun anew by another process
        part = train.Run(tiny_model(name), data, tmp_path / "part", "cpu")
        part.out.mkdir(exist_ok=True)
        part.resume()
        goal = min(part.step + 5, 12)
        while part.step < goal:
            losses = part.one()
            if part.step % 4 == 0:
                part.note(losses)
        part.save()
    assert part.finish()["weights"] == facts["weights"]
    lines = [[line | {"seconds": 0} for line in card.log(run.log)] for run in (whole, part)]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [4, 8, 12]
    assert part.done()


def test_a_log_that_is_ahead_of_the_checkpoint_is_cut(torch, data, tmp_path):
    import train

    run = train.Run(tiny_model(), data, tmp_path / "run", "cpu")
    run.out.mkdir()
    run.note(run.one())
    run.save()
    run.note(run.one())
    with run.log.open("a", encoding="utf-8") as f:
        f.write('{"step": 3, "val')  # a kill while it was written
    again = train.Run(tiny_model(), data, tmp_path / "run", "cpu")
    again.resume()
    assert (again.step, [line["step"] for line in card.log(again.log)]) == (1, [1])


def test_a_run_with_other_settings_is_not_continued(torch, data, tmp_path):
    import train

    run = train.Run(tiny_model(), data, tmp_path / "run", "cpu")
    run.out.mkdir()
    run.save()
    other = train.Run(tiny_model(dropout=0.3), data, tmp_path / "run", "cpu")
    with pytest.raises(train.TrainError, match="other settings or data"):
        other.resume()
    np.save(data / "train.npy", np.arange(400, dtype=np.uint16) % 320)
    with pytest.raises(train.TrainError, match=r"train\.npy is not the one"):
        train.Run(tiny_model(), data, tmp_path / "run", "cpu")


def test_the_command_stops_goes_on_and_ends(torch, data, tmp_path):
    """As a person runs it: with no time, then to the end, then once more."""
    script = (
        "import sys, train, test_training\n"
        "train.MODELS['phi'] = test_training.tiny_model()\n"
        "train.main(['phi', '--device', 'cpu', *sys.argv[1:]])"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(str(REPO / p) for p in ("training", "tests", "."))}

    def run(*more):
        argv = [
            sys.executable,
            "-c",
            script,
            "--steps",
            "12",
            "--data",
            str(data),
            "--out",
            str(tmp_path / "out"),
            *more,
        ]
        return subprocess.run(argv, capture_output=True, encoding="utf-8", env=env, timeout=300)

    assert "the same command goes on" in run("--minutes", "0").stdout
    assert "files in" in run().stdout
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert "is done already" in run().stdout
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert {"run.json", "log.jsonl", "weights-00.npz"} <= before.keys()


def test_prepared_ids_are_the_tokenizers(tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[training]'")
    made = prepare.tokenizer([TEXT * 20, "Another text, with other words. " * 30], 320)
    made.save(str(path := tmp_path / "tokenizer.json"))
    tokens, types, merges = export.vocabulary(path)
    assert (len(tokens), types.count(3), len(merges)) == (320, 1, 320 - 257)
    assert prepare.load(path).encode(TEXT).ids == reference.encode(json.loads(path.read_text(encoding="utf-8")), TEXT)
    with pytest.raises(ValueError, match="too little text"):
        prepare.tokenizer(["a"], 320)
