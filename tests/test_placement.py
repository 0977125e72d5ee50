"""A placement's text, flags and sense: one text for each, and each text one placement."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelib.catalogue.placement import KV_TYPES, LOAD_MODES, Placement, PlacementError

PLACEMENTS = st.builds(
    Placement,
    cpu_layers=st.one_of(st.just(0), st.just(math.inf), st.integers(1, 9999)),
    load_mode=st.sampled_from(LOAD_MODES),
    ubatch=st.none() | st.integers(1, 1 << 16),
    op_offload=st.booleans(),
    kv=st.none() | st.sampled_from(KV_TYPES),
    threads=st.none() | st.integers(1, 1 << 16),
    context=st.none() | st.integers(1, 1 << 24),
    cold=st.booleans(),
)


@given(PLACEMENTS)
def test_a_text_names_one_placement_and_a_placement_has_one_text(p):
    assert Placement.parse(str(p), p.load_mode) == p
    assert not {"/", " "} & set(str(p))  # it stands in file names


@given(PLACEMENTS, st.integers(0, 99))
def test_flags_say_which_layers_stay_on_the_cpu(p, layer):
    flags = p.flags()
    kept = "--cpu-moe" in flags or layer < int(flags.get("--n-cpu-moe") or 0)
    assert p.moves(layer) == kept
    assert p.is_baseline == (not {"--cpu-moe", "--n-cpu-moe"} & flags.keys())
    assert p.is_whole == ("--cpu-moe" in flags)


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("baseline", {}),
        ("cpu-moe", {"--cpu-moe": None}),
        ("n-cpu-moe=12", {"--n-cpu-moe": "12"}),
        ("cpu-moe,ubatch=64,op-offload=off", {"--cpu-moe": None, "-ub": "64", "--no-op-offload": None}),
        ("baseline,kv=q8_0,threads=8", {"-ctk": "q8_0", "-ctv": "q8_0"}),
        ("cpu-moe,ubatch=64,cache=cold", {"--cpu-moe": None, "-ub": "64"}),  # the engine is told nothing of it
    ],
)
def test_flags_of_llama_server(text, flags):
    p = Placement.parse(text)
    assert p.flags() == flags
    assert p.label == f"{text}, mmap"
    assert p.threads == (8 if "threads" in text else None)


def test_the_load_modes_flags_are_those_of_the_build():
    none, mapped = Placement.parse("cpu-moe", "none"), Placement.parse("cpu-moe")
    assert none.load_flags({"--load-mode"}) == {"--load-mode": "none"}
    assert mapped.load_flags({"--load-mode"}) == {"--load-mode": "mmap"}
    assert none.load_flags({"--no-mmap"}) == {"--no-mmap": None}
    assert mapped.load_flags({"--no-mmap"}) == {}
    locked = Placement.parse("cpu-moe", "mlock")
    assert locked.load_flags({"--load-mode"}) == {"--load-mode": "mlock"}
    assert locked.load_flags({"--no-mmap", "--mlock"}) == {"--no-mmap": None, "--mlock": None}  # alone, it maps too


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no placement"),
        ("cpu", "examples: baseline, cpu-moe"),
        ("n-cpu-moe", "N from 1"),
        ("n-cpu-moe=0", "N from 1"),
        ("n-cpu-moe=10000", "N from 1 to 9999"),
        ("n-cpu-moe=01", "write it as n-cpu-moe=1"),
        ("n-cpu-moe=²", "is no placement"),
        ("cpu-moe,ubath=64", "did you mean 'ubatch'?"),
        ("cpu-moe,colour=red", "there are ubatch, op-offload, kv, threads, context, cache"),
        ("cpu-moe,ubatch=0", "ubatch is a number from 1"),
        ("cpu-moe,ubatch=64,ubatch=64", "gives ubatch twice"),
        ("cpu-moe,context=4k", "context is a number from 1"),
        ("cpu-moe,context=99999999", "context is a number from 1"),
        ("cpu-moe,context=512,threads=8", "write it as cpu-moe,threads=8,context=512"),
        ("cpu-moe,op-offload=on", "on by default"),
        ("cpu-moe,cache=warm", "cache=cold drops the file from the cache"),
        ("cpu-moe,cache", "cache=cold drops the file from the cache"),
        ("cpu-moe,cache=cold,threads=8", "write it as cpu-moe,threads=8,cache=cold"),
        ("cpu-moe,kv=q3", "kv is one of f32"),
        ("cpu-moe,threads=8,kv=f16", "write it as cpu-moe,kv=f16,threads=8"),
    ],
)
def test_a_text_that_is_no_placement_is_refused_with_one_that_is(text, message):
    with pytest.raises(PlacementError, match=re.escape(message)):
        Placement.parse(text)


def test_load_modes_are_three():
    with pytest.raises(PlacementError, match="take one of mmap, none, mlock"):
        Placement.parse("cpu-moe", "dio")


def test_placements_sort_from_most_on_the_gpu_to_least():
    texts = ["cpu-moe", "n-cpu-moe=12", "baseline,cache=cold", "baseline", "n-cpu-moe=4", "cpu-moe,ubatch=64"]
    order = [str(p) for p in sorted(map(Placement.parse, texts), key=lambda p: p.order)]
    assert order == ["baseline", "baseline,cache=cold", "n-cpu-moe=4", "n-cpu-moe=12", "cpu-moe", "cpu-moe,ubatch=64"]


@pytest.mark.parametrize(
    ("text", "layers", "experts", "fault"),
    [
        ("baseline", 4, [], None),
        ("cpu-moe", 4, [1, 2, 3], None),
        ("n-cpu-moe=2", 4, [1, 2, 3], None),
        ("n-cpu-moe=4,ubatch=64", 4, [1, 2, 3], None),
        ("cpu-moe", 4, [], "the model is dense"),
        ("n-cpu-moe=2", 4, [], "the model is dense"),
        ("n-cpu-moe=1", 4, [1, 3], "moves nothing: layer 0 is dense; take n-cpu-moe=2 to 4"),
        ("n-cpu-moe=3", 9, range(3, 9), "layers 0 to 2 are dense; take n-cpu-moe=4 to 9"),
        ("n-cpu-moe=1", 2, [1], "moves nothing: layer 0 is dense; take cpu-moe"),
        ("n-cpu-moe=5", 4, [0, 1, 2, 3], "goes beyond the model's 4 layers; take n-cpu-moe=1 to 4"),
    ],
)
def test_a_placement_that_makes_no_sense_for_a_model(text, layers, experts, fault):
    actual = Placement.parse(text).fault(layers, experts)
    assert (actual is None) if fault is None else (fault in actual)


def test_a_context_beyond_the_models_is_refused_with_its_own():
    long = Placement.parse("cpu-moe,context=8192")
    assert "goes beyond the 4096 tokens of the model's training; take context=4096" in long.fault(4, [1], 4096)
    assert long.fault(4, [1], 8192) is None
    assert long.fault(4, [1]) is None  # of a header that does not say it
