"""Which experts a text uses: counted by the real llama-imatrix, followed token by token, and what a cache would hit."""

import gzip
from dataclasses import replace
from itertools import pairwise

import gguf
import ggufs
import numpy as np
import pytest
import texts
from hypothesis import given
from hypothesis import strategies as st
from routes import found_of, made, of_rows, sample, shape_of, spec_of
from test_quality import harmed

from moelib.audit.record import RecordError
from moelib.base import files
from moelib.catalogue.facts import DeviceFacts, HostFacts
from moelib.catalogue.placement import Placement
from moelib.engine.client import RunError
from moelib.engine.engine import Engine, Help
from moelib.gguf import gguf_file, imatrix
from moelib.gguf.gguf_reader import GGUFError
from moelib.machine import host
from moelib.measure import device
from moelib.models import models, quantize
from moelib.routing import balance, cache, checks, passes, routed, trace
from moelib.routing.desk import Desk
from moelib.routing.passes import Experts, How
from moelib.routing.trace import NONE, Trace

# ---- balance


def test_balance_of_known_counts():
    assert balance.of_layer([5, 5, 5, 5]) == balance.Balance(1.0, 1.0, 0, 4)
    assert balance.of_layer([8, 0, 0, 0]) == balance.Balance(0.0, 4.0, 3, 4)
    # shares 1/2, 1/4, 1/4: entropy 1.5 bits of log2(3)
    assert balance.evenness([2, 1, 1]) == pytest.approx(1.5 / np.log2(3))
    assert balance.busiest([2, 1, 1]) == pytest.approx(1.5)
    both = balance.overall(((5, 5, 5, 5), (8, 0, 0, 0)))
    assert both == balance.Balance(0.5, 2.5, 3, 8)
    for wrong in ([], [0, 0], [3]):
        with pytest.raises(ValueError, match="evenness"):
            balance.evenness(wrong)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=64).filter(any))
def test_balance_is_within_its_bounds_and_knows_no_names(counts):
    b = balance.of_layer(counts)
    assert -1e-12 <= b.evenness <= 1 + 1e-12
    assert 1 - 1e-12 <= b.busiest <= len(counts)
    again = balance.of_layer(sorted(counts))
    assert (again.evenness, again.busiest, again.dead) == pytest.approx((b.evenness, b.busiest, b.dead))
    more = balance.of_layer([c * 7 for c in counts])
    assert more.evenness == pytest.approx(b.evenness)


def test_the_bias_of_few_tokens_is_as_said():
    """Even chance over E experts in n draws: evenness is about (E - 1) / (2 n log E) below 1."""
    chance, n, e = np.random.default_rng(1), 400, 16
    seen = np.mean([balance.evenness(chance.multinomial(n, [1 / e] * e).tolist()) for _ in range(400)])
    assert 1 - seen == pytest.approx((e - 1) / (2 * n * np.log(e)), rel=0.1)


# ---- traces


def prefixes_of(t):
    """What the engine would count over the first 1, 2, ... tokens."""
    return [
        tuple(
            tuple(np.bincount(rows[:n].ravel(), minlength=e).tolist()) for rows, e in zip(t.experts, t.of, strict=True)
        )
        for n in range(1, t.tokens + 1)
    ]


@st.composite
def made_up(draw, most_tokens=30):
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 8))
    used, tokens = draw(st.integers(1, experts)), draw(st.integers(1, most_tokens))
    chance = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    rows = [[np.sort(chance.permutation(experts)[:used]) for _ in range(tokens)] for _ in range(layers)]
    return of_rows(*rows, experts=experts)


@given(made_up())
def test_a_trace_is_told_from_counts_and_read_as_it_was_written(t):
    told = trace.told(prefixes_of(t), shape_of(t))
    assert all((a == b).all() for a, b in zip(told.experts, t.experts, strict=True))
    assert told.unsettled == 0
    assert told.selections == prefixes_of(t)[-1]
    text = trace.written(told, shape_of(t).layers)
    again = trace.read(text, shape_of(t), t.tokens)
    assert all((a == b).all() for a, b in zip(again.experts, t.experts, strict=True))


def test_a_choice_that_moved_is_not_told():
    """Token 1 chose 0 and 1; with token 2 behind it, it chose 0 and 3: what token 2 chose cannot be told."""
    prefixes = [((1, 1, 0, 0),), ((2, 0, 1, 1),), ((3, 0, 2, 1),)]
    t = trace.told(prefixes, Experts((0,), (2,), (4,)))
    assert t.experts[0].tolist() == [[0, 1], [NONE, NONE], [0, 2]]
    assert t.unsettled == 1
    assert t.selections == ((2, 1, 1, 0),)
    again = trace.read(trace.written(t, (0,)), Experts((0,), (2,), (4,)), 3)
    assert again.experts[0].tolist() == t.experts[0].tolist()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("token,", "tokens,"),
        ("0,4,0 1", "0,4,1 0"),
        ("0,4,0 1", "0,4,1 1"),
        ("0,4,0 1", "0,4,0"),
        ("0,4,0 1", "0,4,0 9"),
        ("0,4,0 1", "0,4,-1 1"),
        ("0,4,0 1", "1,4,0 1"),
        ("0,4,0 1", "0,5,0 1"),
        ("0,4,0 1\n", ""),
        ("0 1", "x y"),
    ],
)
def test_a_trace_that_was_changed_is_refused(old, new):
    text = trace.written(of_rows([[0, 1], [1, 2]], experts=4), (4,))
    assert old in text
    with pytest.raises(ValueError, match="row|has other columns|invalid literal"):
        trace.read(text.replace(old, new, 1), Experts((4,), (2,), (4,)), 2)


# ---- caches


def test_hits_counted_by_hand():
    """Tokens use A, B, A, C, A, B: with room for one nothing hits; for two A hits twice; for three A twice, B once."""
    rows = np.array([[0], [1], [0], [2], [0], [1]], np.int32)
    assert cache.lru(rows, 4).tolist() == [0, 2, 3, 3]
    assert cache.static(rows, 4).tolist() == [3, 5, 6, 6]
    assert cache.cold(of_rows(rows, experts=4)) == 3 / 6
    # two at once: {0,1}, {0,2}, {1,2}, {0,1}; with room for 2: token 2 hits 0, token 3 hits 2, token 4 hits 1
    rows = np.array([[0, 1], [0, 2], [1, 2], [0, 1]], np.int32)
    assert cache.lru(rows, 3)[1:].tolist() == [3, 5]


def slow_lru(rows, k):
    """The same, told step by step."""
    held, hits = [], 0  # the most recent first
    for row in rows.tolist():
        hits += sum(e in held for e in row)
        held = (sorted(row) + [e for e in held if e not in row])[:k]
    return hits


@given(made_up())
def test_all_sizes_at_once_are_as_each_step_by_step(t):
    for rows, n in zip(t.experts, t.of, strict=True):
        hits = cache.lru(rows, n)
        for k in range(rows.shape[1], n + 1):
            assert hits[k - 1] == slow_lru(rows, k)


@given(made_up())
def test_a_larger_cache_hits_no_less_and_one_of_all_misses_only_firsts(t):
    c = cache.curve(t)
    assert c.k == tuple(range(t.experts[0].shape[1], t.of[0] + 1))
    for shares in (c.lru, c.shuffled, c.static):
        assert all(a <= b + 1e-12 for a, b in pairwise(shares))
        assert -1e-12 <= shares[0] <= shares[-1] <= 1 + 1e-12
    assert c.lru[-1] == pytest.approx(1 - cache.cold(t))
    assert c.shuffled[-1] == pytest.approx(c.lru[-1])
    assert c.static[-1] == pytest.approx(1)
    assert cache.curve(t) == c  # the draws are seeded


def test_order_is_what_the_shuffled_tokens_lack():
    """The same experts in long spells and in turns: popularity is the same, LRU hits nearly all, and nothing."""
    spells = of_rows([[e] for e in range(4) for _ in range(25)], experts=4)
    turns = of_rows([[e] for _ in range(25) for e in range(4)], experts=4)
    a, b = cache.curve(spells), cache.curve(turns)
    assert a.lru[0] == 96 / 100
    assert b.lru[:3] == (0, 0, 0)
    assert a.static == b.static
    assert a.shuffled[0] == pytest.approx(0.25, abs=0.05)
    assert b.shuffled[0] == pytest.approx(0.25, abs=0.05)


def test_sizes_that_fit_no_two_layers_have_no_curve():
    two = Trace((np.array([[0]], np.int32), np.array([[0]], np.int32)), (4, 8))
    with pytest.raises(ValueError, match="layers differ"):
        cache.curve(two)
    with pytest.raises(ValueError, match="no token"):
        cache.curve(of_rows([[NONE, NONE]], experts=4))


def test_the_smallest_cache_of_a_share():
    c = cache.Curve((6, 7, 8, 9, 16), *((0.0,) * 5,) * 3)
    assert [c.k[c.at(s)] for s in (0.1, 0.25, 0.5, 0.75, 1)] == [6, 6, 8, 16, 16]


# ---- what llama-imatrix says


def write_matrix(path, counts, kind=np.float32, **more):
    w = gguf.GGUFWriter(path, "x")
    w.add_type("imatrix")
    for name, values in {**counts, **more}.items():
        w.add_tensor(f"{name}.in_sum2", np.zeros((len(values), 8), np.float32))
        w.add_tensor(f"{name}.counts", np.array(values, kind).reshape(-1, 1))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def test_counts_are_read_whole_or_refused(tmp_path):
    path = tmp_path / "i.gguf"
    write_matrix(path, {"blk.0.ffn_up_exps.weight": [3, 0, 1], "blk.0.attn_q.weight": [2]})
    assert imatrix.counts(path) == {"blk.0.ffn_up_exps.weight": (3, 0, 1), "blk.0.attn_q.weight": (2,)}
    for wrong in ([0.5, 1, 1], [-1, 1, 1], [float("nan"), 1, 1], [1 << 24, 1, 1]):
        write_matrix(path, {"a": wrong})
        with pytest.raises(GGUFError, match="no whole numbers"):
            imatrix.counts(path)
    write_matrix(path, {"a": [1]}, kind=np.float16)
    with pytest.raises(GGUFError, match="are F16, not F32"):
        imatrix.counts(path)
    path.write_bytes(ggufs.build(*ggufs.moe()))
    with pytest.raises(GGUFError, match="no importance matrix with counts"):
        imatrix.counts(path)
    with pytest.raises(GGUFError, match="cannot be read"):
        imatrix.counts(tmp_path / "none.gguf")


@pytest.fixture
def scripted(tmp_path):
    """A model of 3 layers with 2 of 4 experts, and a tool that leaves a matrix, says something and ends with a code."""
    model, script = tmp_path / "m.gguf", tmp_path / "llama-imatrix"
    model.write_bytes(ggufs.build(*ggufs.moe(dense=1)))
    header = gguf_file.read_header(model)
    flags = "-fa\n--flash-attn\n--fit\n--load-mode\n--cpu-moe\n-ub\n"
    llama = Engine(tmp_path, "test", {"llama-imatrix": script}, 11434, "v", Help(flags))
    how = How(tmp_path / "t.txt", Placement.parse("baseline"), device.Session([]), 1, tmp_path)

    def run(counts=None, says="", code=0, context=4, chunks=2, header=header, **more):
        prepared = tmp_path / "prepared.gguf"
        prepared.unlink(missing_ok=True)
        if counts is not None:
            write_matrix(prepared, counts, **more)
        copy = 'while [ "$1" != -o ]; do shift; done; cp "$(dirname "$0")/prepared.gguf" "$2"\n'
        script.write_text(f"#!/bin/sh\necho '{says}'\n{copy if counts else ''}exit {code}\n", encoding="utf-8")
        script.chmod(0o755)
        return passes.count(llama, header, how, context, chunks)

    return run


def layer_counts(counts, layers=(1, 2), kinds=("gate", "up", "down")):
    return {f"blk.{n}.ffn_{k}_exps.weight": counts for n in layers for k in kinds}


def test_counts_that_fit_are_taken(scripted):
    done = scripted(layer_counts([8, 4, 3, 1]), **{"blk.1.attn_q.weight": [8]})
    assert done.selections == ((8, 4, 3, 1), (8, 4, 3, 1))
    assert "/" not in " ".join(done.argv)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"says": "you need at least 8 tokens for a context of 4 tokens", "code": 1}, "text-too-short"),
        ({"counts": layer_counts([4, 2, 1, 1])}, "text-too-short"),  # one chunk of two
        ({"counts": layer_counts([8, 4, 3, 2])}, "counts-misfit"),
        ({"counts": layer_counts([8, 4, 3, 1]) | layer_counts([8, 4, 1, 3], (2,), ("up",))}, "counts-misfit"),
        ({"counts": layer_counts([8, 4, 4])}, "counts-misfit"),
        ({"counts": layer_counts([8, 4, 3, 1], (1,))}, "no-counts"),
        ({"counts": layer_counts([8, 4, 3, 1], (0, 1, 2))}, "no-counts"),
        ({}, "no-counts"),
        ({"says": "non-finite values detected in blk.1.ffn_up_exps.weight", "code": 1}, "not-a-number"),
        ({"says": "cudaMalloc failed: out of memory", "code": 1}, "out-of-memory"),
        ({"says": "failed to load model", "code": 1}, "engine-ended"),
    ],
)
def test_what_does_not_fit_is_a_reason_and_no_number(scripted, how, reason):
    with pytest.raises(RunError) as err:
        scripted(**how)
    assert err.value.reason == reason


def test_a_model_without_experts_has_none_to_follow(scripted, tmp_path):
    dense, mute = tmp_path / "d.gguf", tmp_path / "u.gguf"
    dense.write_bytes(ggufs.build(*ggufs.moe(dense=3)))
    mute.write_bytes(ggufs.build(*ggufs.moe(expert_used_count=None)))
    for path, why in ((dense, "has no experts"), (mute, "does not say how many")):
        with pytest.raises(RunError, match=why) as err:
            scripted(header=gguf_file.read_header(path), counts=layer_counts([8, 4, 3, 1]))
        assert err.value.reason == "no-experts"


# ---- records


def test_every_check_can_fail():
    spec = spec_of(context=16, chunks=2, tokens=100)
    t = sample(100)
    good = found_of(t, spec)

    def failed(found=good, t=t, spec=spec):
        return {c.id for c in checks.of(spec, found, t) if c.failed}

    assert failed() == set()
    first = good.counts[0]
    assert failed(replace(good, counts=((first[0] + 1, *first[1:]), *good.counts[1:]))) == {"all-counted"}
    swapped = ((first[0] + 30, first[1] - 30 + first[0], *first[2:]), *good.counts[1:])
    assert "all-counted" in failed(replace(good, counts=swapped))
    assert "all-counted" in failed(replace(good, counts=good.counts[:-1]))
    whole = [list(c) for c in good.whole]
    whole[0][0] += 1
    assert failed(replace(good, whole=tuple(map(tuple, whole)))) == {"whole-counted"}
    moved = [list(c) for c in good.whole]
    for c in moved:
        n = int(np.argmax(c))
        c[n], c[n - 1] = c[n] - 15, c[n - 1] + 15
    assert failed(replace(good, whole=tuple(map(tuple, moved)))) == {"two-accounts"}
    gone = [rows.copy() for rows in t.experts]
    gone[0][:7] = NONE
    assert failed(t=Trace(tuple(gone), t.of)) == {"trace-settled"}
    assert "trace-of-its-tokens" in failed(t=Trace(tuple(r[:-1] for r in t.experts), t.of))


def test_a_record_is_read_as_it_was_written_with_its_trace(tmp_path):
    spec, t = spec_of(context=16, chunks=2), sample()
    r = made(tmp_path, spec, t)
    path = tmp_path / routed.FOLDER / f"{r.run_id}.json"
    assert routed.read(path) == r
    assert (routed.trace(tmp_path, r).experts[0] == t.experts[0]).all()
    assert checks.again(tmp_path, r) == ()
    with pytest.raises(RecordError, match="never overwritten"):
        routed.write(tmp_path, r)
    text = path.read_text(encoding="utf-8")
    for old, new in (('"valid"', '"invalid"'), ('"tokens":12', '"tokens":13'), ("{", ""), ('"layers"', '"layer"')):
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(RecordError):
            routed.read(path)
    path.write_text(text, encoding="utf-8")
    path.rename(other := path.with_name("other.json"))
    with pytest.raises(RecordError, match="it is the record of"):
        routed.read(other)
    other.rename(path)
    evidence = next((path.parent / "raw").glob("*.csv.gz"))
    evidence.write_bytes(gzip.compress(gzip.decompress(evidence.read_bytes()).replace(b"0,0,", b"0,0,1", 1), mtime=0))
    with pytest.raises(RecordError, match="is not what it names"):
        routed.read(path)
    assert routed.read_all(tmp_path)[0] == []
    assert len(routed.read_all(tmp_path)[1]) == 1


def test_a_sealed_record_that_does_not_hold_is_not_shown(tmp_path):
    """Status, digest and trace agree, and the counts are not those of so many tokens."""
    spec, t = spec_of(context=16, chunks=2), sample()
    good = found_of(t, spec)
    r = made(tmp_path, spec, t, replace(good, counts=tuple(tuple(c + 1 for c in layer) for layer in good.counts)))
    assert routed.read_all(tmp_path)[0] == [r]
    assert r.done
    (why,) = checks.again(tmp_path, r)
    assert why.startswith("all-counted")
    (tmp_path / "other").mkdir()
    failed = made(tmp_path / "other", spec, t, status="failed", reasons=("text-too-short",), message="too short")
    assert checks.again(tmp_path / "other", failed) == ("too short",)


def test_what_stands_is_the_last_valid_attempt(tmp_path):
    r = made(tmp_path, spec_of(context=16, chunks=2), sample())
    later = r.model_copy(update={"attempt": 2, "status": "failed"})
    assert routed.standing([later, r]) == {r.key: r}
    assert routed.standing([later]) == {r.key: later}
    assert routed.next_attempt(tmp_path, r.spec) == 2
    (tmp_path / f"routing/{routed.run_id(r.spec, 7)}.json").write_text("damaged", encoding="utf-8")
    assert routed.next_attempt(tmp_path, r.spec) == 8
    assert routed.next_attempt(tmp_path, replace(r.spec, tokens=9)) == 1


# ---- the real engine


@pytest.fixture
def desk(engine, tmp_path):
    where = device.NoDevice()
    facts = HostFacts(**host.facts(), host_id=host.identity())
    (tmp_path / "work").mkdir()
    return Desk(tmp_path / "out", engine, where, DeviceFacts(**where.identity()), facts, tmp_path / "work")


@pytest.fixture
def words_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(texts.prose(), encoding="utf-8")
    return path


@pytest.mark.engine
@pytest.mark.parametrize("model", ["deepseek-moe-16b", "phi-3.5-moe"])
def test_every_token_is_told_and_both_accounts_agree(desk, home, words_file, model):
    file = quantize.unquantised(models.make_twin(model, "nano"))
    spec = spec_of(model=model)
    r = desk.follow(spec, 1, file, words_file)
    assert (r.status, r.message) == ("valid", None)
    t = routed.trace(desk.folder, r)
    assert t.unsettled == 0
    assert [len(rows) for rows in t.experts] == [12] * len(file.header.expert_layers)
    assert sum(map(sum, r.found.counts)) == 64 * 3 * sum(r.found.experts.used)
    assert checks.again(desk.folder, r) == ()
    assert routed.read_all(desk.folder) == ([r], [])
    logs = b"".join(gzip.decompress(p.read_bytes()) for p in (desk.folder / "routing/raw").glob("*.log.gz"))
    assert str(desk.work).encode() not in logs
    assert not list(desk.work.glob("*.gguf"))


@pytest.mark.engine
def test_a_trace_is_that_of_the_same_tokens_counted_together(desk, home, words_file):
    """One token at a time, told from differences; and all of them one at a time in a single pass."""
    header = quantize.unquantised(models.make_twin("phi-3.5-moe", "nano")).header
    how = How(words_file, Placement.parse("baseline,threads=1"), device.Session(["--device", "none"]), 1, desk.work)
    t, last = trace.follow(desk.llama, header, how, 9)
    once = passes.count(desk.llama, header, how, 9, ubatch=1)
    assert t.selections == last.selections == once.selections


@pytest.mark.engine
def test_layers_that_the_engine_does_not_run_are_not_followed(desk, words_file, tmp_path):
    path = ggufs.write_nextn(tmp_path / "glm.gguf")
    header = gguf_file.read_header(path)
    how = How(words_file, Placement.parse("baseline,threads=1"), device.Session(["--device", "none"]), 1, desk.work)
    assert Experts.in_file(header).layers == (1, 2)
    assert len(passes.count(desk.llama, header, how, 16).selections) == 2


@pytest.mark.engine
def test_a_router_that_always_takes_the_same_is_seen(desk, home, words_file, tmp_path):
    """With a router of zeros all experts score alike, and the engine takes the same ones for each token."""
    file = quantize.unquantised(models.make_twin("phi-3.5-moe", "nano"))
    for layer in file.header.expert_layers:
        file = harmed(file, tmp_path / f"{layer}.gguf", f"blk.{layer}.ffn_gate_inp.weight", np.zeros_like)
    r = desk.follow(spec_of(model="phi-3.5-moe"), 1, file, words_file)
    assert r.status == "valid", r.message
    b = balance.overall(r.found.counts)
    assert b.dead == b.experts - 2 * 2
    assert b.busiest == 8
    assert cache.curve(routed.trace(desk.folder, r)).lru[0] == pytest.approx(1 - 1 / 12)


@pytest.mark.engine
@pytest.mark.parametrize(("words", "context"), [(3, 64), (400, 512)])
def test_a_text_that_is_too_short_gives_a_failed_record_and_no_number(desk, home, tmp_path, words, context):
    text = tmp_path / "short.txt"
    text.write_text(texts.prose(words * 18), encoding="utf-8")
    file = quantize.unquantised(models.make_twin("deepseek-moe-16b", "nano"))
    r = desk.follow(spec_of(context=context, chunks=500), 1, file, text)
    assert (r.status, r.reasons, r.found, r.audit) == ("failed", ("text-too-short",), None, ())
    assert routed.read_all(desk.folder)[0] == [r]
    assert [p.name.split(".")[-3] for p in (desk.folder / "routing/raw").iterdir()] == ["counts"]


@pytest.mark.engine
def test_weights_that_are_no_numbers_give_a_failed_record(desk, home, words_file, tmp_path):
    r = desk.follow(spec_of(), 1, without_numbers(tmp_path), words_file)
    assert (r.status, r.reasons, r.found) == ("failed", ("not-a-number",), None), r.message


@pytest.mark.engine
def test_a_reason_that_the_tool_took_with_it_is_asked_for_again(desk, home, words_file, tmp_path, monkeypatch):
    """llama.cpp's log is written by another thread, and its last lines are lost when the tool exits first."""
    r, answers = following_with_lost_logs(desk, without_numbers(tmp_path), words_file, monkeypatch, passes.TRIES - 1)
    assert (r.status, r.reasons, len(answers)) == ("failed", ("not-a-number",), passes.TRIES), r.message


@pytest.mark.engine
def test_a_tool_that_never_says_its_reason_is_asked_three_times(desk, home, words_file, tmp_path, monkeypatch):
    r, answers = following_with_lost_logs(desk, without_numbers(tmp_path), words_file, monkeypatch, 9)
    assert (r.status, r.reasons, len(answers)) == ("failed", ("engine-ended",), passes.TRIES), r.message


def without_numbers(folder):
    file = quantize.unquantised(models.make_twin("deepseek-moe-16b", "nano"))
    nan = np.frombuffer(np.float16("nan").tobytes(), np.uint8)
    tensor = next(t.name for t in file.header.tensors if "attn_q" in t.name)
    return harmed(file, folder / "nan.gguf", tensor, lambda b: np.tile(nan, len(b) // 2))


def following_with_lost_logs(desk, file, text, monkeypatch, lost):
    """The real tool, of whose first logs the line with the reason is cut."""
    answers, once = [], passes._once

    def cut(*args):
        code, log = once(*args)
        answers.append(code)
        return code, passes.NO_NUMBER.sub("", log) if len(answers) <= lost else log

    monkeypatch.setattr(passes, "_once", cut)
    return desk.follow(spec_of(), 1, file, text), answers


@pytest.mark.engine
def test_a_file_that_changes_meanwhile_is_not_believed(desk, home, words_file, monkeypatch):
    file = quantize.unquantised(models.make_twin("deepseek-moe-16b", "nano"))
    changed = replace(file, manifest=file.manifest | {"sha256": "1" * 64})
    r = desk.follow(spec_of(tokens=2), 1, changed, words_file)
    assert (r.status, r.reasons) == ("failed", ("file-changed",))
    monkeypatch.setattr(files, "free_bytes", lambda folder: 1 << 10)
    with pytest.raises(files.FileError, match="following the experts of"):
        desk.follow(spec_of(tokens=2), 2, file, words_file)
