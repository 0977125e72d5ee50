"""Laws: exact where they are true, intervals that hold, residuals that tell where they are not, and what the committed
records give."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REPO

from moelib.audit import record
from moelib.audit.bounds import PACKETS
from moelib.base.stats import Estimate
from moelib.laws import fit, speed
from moelib.laws.law import errors
from moelib.laws.speed import NO_LONGER, NO_TIME, NOT_TOLD, ONE_QUANT
from moelib.laws.vram import ONE_CONTEXT, UNSEEN, vram
from moelib.study import frames
from moelib.study.study import Study

MIB = 1 << 20
QUANTS = {"Q2_K": 20 * MIB, "Q4_K_M": 35 * MIB, "Q8_0": 55 * MIB}
"""Quant -> bytes that a token reads of each layer's experts."""
EXPERTS = 8  # of a layer, for each that a token reads
LAYERS, CONTEXT, RAM = 24, 1024, 80e9
GPU_S, COST_S, SPEED = 3e-3, 0.2e-3, 90e9
PROMPT_S, BUS = 50e-3, 54e9
SOME = (0, 8, 16, 24)


def token_s(layers, nbytes):
    return GPU_S + COST_S * layers + nbytes / SPEED


def placement_of(layers):
    return {0: "baseline", LAYERS: "cpu-moe"}.get(layers, f"n-cpu-moe={layers}")


def frame_of(quants=QUANTS, layers=SOME, rounds=3, token=token_s, noise=0.0, dice=None, **change):
    """Runs of one machine as a frame has them: what a round shares, and a run has of its own, makes what the CPU does
    longer or shorter by `noise`."""
    dice, rows = dice or np.random.default_rng(1), []
    for n in range(1, rounds + 1):
        shared = dice.normal(0, noise)
        for quant, k in product(quants, layers):
            read = k * quants[quant]
            slower = np.exp(shared + dice.normal(0, noise))
            sent = EXPERTS * read
            row = {"study": "s", "model": "a-model", "quant": quant, "placement": placement_of(k), "load_mode": "none"}
            row |= {"round": n, "machine": "one", "status": "valid", "digest": "f" * 64}
            row |= {"weights": "twin", "scale": "full", "context": CONTEXT, "device": "cuda", "gpu": "a GPU"}
            row["host_shared"] = False
            row |= {"engine": "b1", "cpu_threads": 16.0, "ram_bytes_per_s": RAM, "context_tokens": float(CONTEXT)}
            row |= {"moved_layers": float(k), "moved_bytes": float(sent), "ram_read_bytes": float(read)}
            row["tokens_per_s/w"] = 1 / (GPU_S + (token(k, read) - GPU_S) * slower)
            row["ttft_warm_s/w"] = PROMPT_S + sent * PACKETS / BUS * slower
            row["bus_received_bytes/w"], row["prompt_tokens/w"] = sent * PACKETS, 512.0
            weights = (1000 - 10 * k) * MIB
            row |= {"vram_weights_bytes": weights, "vram_cache_bytes": 128 * MIB, "vram_compute_bytes": 80 * MIB}
            row["vram_bytes"] = float(weights + 208 * MIB + 700 * MIB)
            rows.append(row | change | {"run_id": f"{change.get('machine', 'one')}-{quant}-{k}-{n}"})
    return pd.DataFrame(rows)


def shared_of(found):
    (law,) = (one for one in found if "cost" in one.formula)
    return law


def own_of(found, quant="Q4_K_M"):
    (law,) = (one for one in found if one.domain.quants == (quant,) and "cost" not in one.formula)
    return law


def parameter(law, name):
    (one,) = (p for p in law.parameters if p.name.startswith(name))
    return one


def off(law, held_out):
    return {(r.quant, r.placement): r.off for r in law.residuals if r.held_out == held_out}


# least squares


def test_a_fit_finds_what_is_linear_and_refuses_what_is_not_told():
    rows = np.array([[1.0, 0, 0], [1, 2, 0], [1, 5, 0]])
    told = fit.solve(rows, rows @ [3.0, 0.5, 0])
    assert told[:2] == pytest.approx([3, 0.5])
    assert np.isnan(told[2])
    assert fit.predict(np.array([[1.0, 4, 0]]), told) == pytest.approx(5)
    assert fit.predict(np.array([[1.0, 4, 1]]), told) is None
    alike = np.array([[1.0, 0, 0], [1, 2, 2.05], [1, 5, 5]])
    for few in (rows[1:2], rows[:0], alike):
        with pytest.raises(fit.Untold):
            fit.solve(few, few @ [3.0, 0.5, 0.1])


def test_errors_count_by_their_share():
    """A run of 100 s that is 10 s off moves a mean no more than one of 1 s that is 0.1 s off."""
    (told,) = fit.solve(np.array([[1.0], [100]]), np.array([0.9, 110]))
    assert told == pytest.approx((1 / 0.9 + 1 / 1.1) / (1 / 0.9**2 + 1 / 1.1**2))


def test_without_a_second_round_there_is_no_interval():
    rows = np.array([[1.0, 0], [1, 2], [1, 5]])
    for e in fit.estimates(rows, rows @ [3.0, 0.5], [("m", 1)] * 3):
        assert (e.low, e.high, e.n) == (None, None, 3)
    assert fit.spread(rows[:2], rows[:2] @ [3.0, 0.5], np.array([3, 0.5])) is None


def test_a_machine_of_one_round_leaves_nothing_with_an_interval():
    """What the machines share would be known less well for it, and nobody can tell by how much."""
    rows = np.array([[1.0]] * 5)
    at = [("m", 1), ("m", 2), ("m", 3)]
    (alone,) = fit.estimates(rows[:3], np.array([1.0, 1.1, 1.2]), at)
    assert alone.low < 1.1 < alone.high
    (joined,) = fit.estimates(rows, np.array([1.0, 1.1, 1.2, 1.5, 1.5]), [*at, ("other", 1), ("other", 1)])
    assert (joined.low, joined.high) == (None, None)


def test_what_no_round_of_its_own_repeats_has_no_interval_and_leaves_the_others_theirs():
    rows = np.array([[1.0, 0], [1, 0], [0, 1.0]])
    first, second = fit.estimates(rows, np.array([1.0, 1.1, 5]), [("m", 1), ("m", 2), ("m", 2)])
    assert first.low < first.value < first.high
    assert (second.low, second.high) == (None, None)


TERMS = np.array([[q == own for own in QUANTS] + [k, k * QUANTS[q]] for q, k in product(QUANTS, (0, LAYERS))], float)
TRUTH = np.array([GPU_S, GPU_S, GPU_S, COST_S, 1 / SPEED])


def held(tries=300, rounds=5, round_noise=0.04, quant_noise=0.0, with_cells=False):
    """How often the 95 % interval of each term holds the truth. All that the CPU does drifts from round to round; each
    quant may be off a law that they share."""
    dice, within = np.random.default_rng(7), np.zeros(len(TRUTH))
    rows, at = np.tile(TERMS, (rounds, 1)), [("m", n) for n in range(rounds) for _ in TERMS]
    cells = [(own > 0) & (rows[:, 3] > 0) for own in rows.T[:3]] if with_cells else []
    for _ in range(tries):
        off = np.repeat(dice.normal(0, round_noise, rounds), len(TERMS)) + dice.normal(0, round_noise, len(rows))
        off += rows[:, :3] @ dice.normal(0, quant_noise, 3)
        seconds = GPU_S * np.exp(dice.normal(0, 0.01, len(rows))) + rows[:, 3:] @ TRUTH[3:] * np.exp(off)
        told = fit.estimates(rows, seconds, at, cells)
        within += [e.low <= true <= e.high for e, true in zip(told, TRUTH, strict=True)]
    return within / tries


@pytest.mark.parametrize("rounds", [3, 5])
def test_intervals_hold_the_truth_19_times_of_20_though_rounds_drift(rounds):
    assert held(rounds=rounds) == pytest.approx(0.95, abs=0.035)


def test_what_quants_share_is_known_no_better_than_they_agree():
    """Repetition alone does not show that a law fits no quant quite."""
    assert (held(quant_noise=0.05)[3:] < 0.8).all()
    assert held(quant_noise=0.05, with_cells=True)[3:] == pytest.approx(0.95, abs=0.035)


# a token


def test_a_law_of_tokens_finds_its_terms():
    law = shared_of(speed.decode(frame_of(), "w"))
    assert law.reason is None
    assert parameter(law, "GPU time of a-model Q2_K").value.value == pytest.approx(GPU_S)
    assert parameter(law, "cost").value.value == pytest.approx(COST_S)
    assert parameter(law, "speed").value.value == pytest.approx(SPEED)
    assert law.spread == pytest.approx(0, abs=1e-9)
    assert law.n == len(law.sources) == 36
    assert law.at("a-model", "Q8_0", 12) == pytest.approx(token_s(12, 12 * QUANTS["Q8_0"]))
    assert law.at("a-model", "Q3_K", 12) is None
    for held_out, n in (("nothing", 12), ("placement", 6), ("ends", 6), ("cell", 9)):
        assert law.errors(held_out).n == n
        assert law.errors(held_out).largest == pytest.approx(0, abs=1e-9)
    assert law.errors("machine") is None


def test_a_quant_alone_tells_no_cost_per_layer_and_predicts_all_the_same():
    found = speed.decode(frame_of({"Q4_K_M": QUANTS["Q4_K_M"]}), "w")
    shared, own = shared_of(found), own_of(found)
    assert (shared.reason, shared.parameters, shared.at("a-model", "Q4_K_M", 8)) == (NOT_TOLD, (), None)
    cost = parameter(own, "cost")
    assert (cost.value, cost.reason) == (None, ONE_QUANT)
    together = 1 / (1 / SPEED + COST_S / QUANTS["Q4_K_M"])
    assert parameter(own, "speed").value.value == pytest.approx(together)
    assert own.at("a-model", "Q4_K_M", 12) == pytest.approx(token_s(12, 12 * QUANTS["Q4_K_M"]))


def test_quants_whose_layers_are_alike_do_not_tell_it_either():
    alike = {"Q4_K_M": QUANTS["Q4_K_M"], "Q4_K_S": int(0.95 * QUANTS["Q4_K_M"])}
    assert shared_of(speed.decode(frame_of(alike), "w")).reason == NOT_TOLD


def test_with_two_quants_neither_is_predicted_from_the_other():
    two = {q: QUANTS[q] for q in ("Q4_K_M", "Q8_0")}
    law = shared_of(speed.decode(frame_of(two), "w"))
    assert law.reason is None
    missing = [r for r in law.residuals if r.held_out == "cell"]
    assert len(missing) == 6
    assert {(r.predicted, r.off, r.reason) for r in missing} == {(None, None, NOT_TOLD)}
    assert law.errors("cell") is None


def test_one_placement_is_no_law_and_two_without_a_baseline_are_one():
    found = speed.decode(frame_of(layers=(24,)), "w")
    assert {law.reason for law in found} == {NOT_TOLD}
    law = own_of(speed.decode(frame_of(layers=(16, 24)), "w"))
    assert law.cells[0].gpu_s == pytest.approx(GPU_S)
    assert speed.decode(frame_of(layers=(0,)), "w") == []


def test_a_law_that_is_broken_has_large_residuals():
    bent = frame_of(token=lambda k, read: GPU_S + read / SPEED * k / 10)
    law = own_of(speed.decode(bent, "w"))
    assert law.errors("ends").median > 0.3
    assert min(off(law, "ends").values()) > 0.2, "a line lies above what bends up"
    assert law.errors("placement").largest > 0.2
    true = own_of(speed.decode(frame_of(noise=0.02), "w"))
    assert true.errors("placement").largest < 0.1


def test_what_was_held_out_has_no_part_in_its_prediction():
    """One placement is three times as slow: the law bends to it, and the fit without it does not."""
    odd = frame_of(token=lambda k, read: token_s(k, read) * (3 if k == 8 else 1))
    law = own_of(speed.decode(odd, "w"))
    assert off(law, "placement")["Q4_K_M", "n-cpu-moe=8"] == pytest.approx(-2 / 3)
    assert off(law, "ends")["Q4_K_M", "n-cpu-moe=8"] == pytest.approx(-2 / 3)
    assert -0.66 < off(law, "nothing")["Q4_K_M", "n-cpu-moe=8"] < -0.1
    odd_quant = frame_of(token=lambda k, read: token_s(k, read) * (2 if read == k * QUANTS["Q8_0"] and k else 1))
    assert off(shared_of(speed.decode(odd_quant, "w")), "cell")["Q8_0", "cpu-moe"] == pytest.approx(-0.5)


def test_a_time_per_byte_that_may_be_0_is_no_speed():
    """Whatever the bytes, a layer takes as long: a law all the same, of layers."""
    found = speed.decode(frame_of(noise=0.05, token=lambda k, read: GPU_S + 3e-4 * k), "w")
    law = shared_of(found)
    told = parameter(law, "speed")
    assert (told.value, law.reason) == (None, None)
    assert told.reason.endswith(NO_LONGER)
    assert law.at("a-model", "Q8_0", 12) == pytest.approx(GPU_S + 3e-4 * 12, rel=0.15)
    less = own_of(speed.decode(frame_of(token=lambda k, read: GPU_S - 1e-5 * k), "w"))
    assert (less.reason, less.at("a-model", "Q4_K_M", 4)) == (NO_LONGER, None)
    assert less.errors("nothing").n == 4
    exact = speed._speed("x", Estimate(-1.0, -2.0, -0.5, 9))
    assert (exact.value, exact.reason) == (None, NO_LONGER)


def test_a_law_that_leaves_the_gpu_less_than_no_time_is_none():
    """Without a run that is all on the GPU, scatter of two placements gives any time of the GPU."""
    steep = frame_of(layers=(18, 24), token=lambda k, read: 1e-3 * (k - 17))
    assert own_of(speed.decode(steep, "w")).reason == NO_TIME
    told = own_of(speed.decode(frame_of(layers=(18, 24)), "w"))
    assert (told.reason, told.cells[0].gpu_s) == (None, pytest.approx(GPU_S))


def test_a_law_with_as_many_terms_as_placements_has_no_error():
    """Any runs would fit it."""
    own = own_of(speed.decode(frame_of(layers=(0, 24), noise=0.05), "w"))
    assert (own.residuals, own.errors("nothing")) == ((), None)
    assert own.at("a-model", "Q4_K_M", 24) is not None
    more = own_of(speed.decode(frame_of(layers=(0, 12, 24), noise=0.05), "w"))
    assert more.errors("nothing").n == 3


def test_runs_of_other_settings_machines_and_load_modes_are_other_laws():
    plain = frame_of()
    odd = frame_of(token=lambda k, read: 9.0, placement="cpu-moe,threads=4")
    mapped = frame_of(token=lambda k, read: 2 * token_s(k, read), layers=(24,), load_mode="mmap")
    found = speed.decode(pd.concat([plain, odd, mapped]), "w")
    none, mmap = (law for law in found if "cost" in law.formula)
    assert (none.domain.load_mode, mmap.domain.load_mode) == ("none", "mmap")
    assert none.parameters == shared_of(speed.decode(plain, "w")).parameters
    assert mmap.n == 9 + 9, "with the runs that have nothing to load to the CPU"
    both = speed.decode(pd.concat([plain, frame_of(machine="two")]), "w")
    assert [law.domain.machines for law in both if "cost" in law.formula] == [("one",), ("two",)]


# another machine


@pytest.fixture
def two_machines():
    """The other has half the speed of RAM, and takes twice as long for all that the CPU does."""
    slow = frame_of(
        token=lambda k, read: GPU_S + 2 * (token_s(k, read) - GPU_S),
        machine="two",
        ram_bytes_per_s=RAM / 2,
        gpu="another",
    )
    return pd.concat([frame_of(), slow])


def test_a_law_goes_to_another_machine_by_the_speed_of_its_ram(two_machines):
    found = [law for law in speed.decode(two_machines, "w") if "cost" not in law.formula]
    residuals = [r for law in found for r in law.residuals]
    assert {(r.machine, r.quant) for r in residuals if r.held_out == "machine"} == set(product(("one", "two"), QUANTS))
    assert errors(residuals, "machine").n == 2 * 3 * 3
    assert errors(residuals, "machine").largest == pytest.approx(0, abs=1e-9)
    unscaled = errors(
        [r for law in speed.decode(two_machines.assign(ram_bytes_per_s=RAM), "w") for r in law.residuals], "machine"
    )
    assert unscaled.median > 0.3
    blind = speed.decode(two_machines.assign(ram_bytes_per_s=np.nan), "w")
    assert {r.reason for law in blind for r in law.residuals if r.held_out == "machine"} == {
        "it takes the RAM's speed of both machines, and runs without experts on the CPU"
    }
    sliced = two_machines.assign(scale=np.where(two_machines.machine == "one", "full", "full-first-3"))
    assert not [r for law in speed.decode(sliced, "w") for r in law.residuals if r.held_out == "machine"]


@pytest.mark.parametrize("of", [shared_of, own_of])
def test_an_estimate_says_what_it_is(of):
    law = of(speed.decode(frame_of(), "w"))
    told = law.estimate("a-model", "Q4_K_M", 12, ram_bytes_per_s=RAM / 4)
    cpu_s = token_s(12, 12 * QUANTS["Q4_K_M"]) - GPU_S
    assert told.value == pytest.approx(GPU_S + 4 * cpu_s)
    assert str(told) == f"{told.value:.3g} s, {told.label}"
    assert told.label == (
        "estimated for RAM of 20 GB/s from a law fitted on a GPU (machine one; 16 CPU threads, RAM of 80 GB/s; load "
        "mode none, w), with the time of that GPU"
    )
    assert law.estimate("a-model", "Q3_K", 12, ram_bytes_per_s=RAM) is None
    for given in ({}, {"bus_bytes_per_s": 1e9}):
        with pytest.raises(ValueError, match="takes ram_bytes_per_s"):
            law.estimate("a-model", "Q4_K_M", 12, **given)
    blind = of(speed.decode(frame_of(ram_bytes_per_s=np.nan), "w"))
    assert "RAM of unknown speed" in str(blind.domain)
    with pytest.raises(ValueError, match="their own machine's"):
        blind.estimate("a-model", "Q4_K_M", 12, ram_bytes_per_s=RAM)


# a prompt


def test_a_law_of_prompts_finds_the_speed_of_the_bus():
    law, *own = speed.ttft(pd.concat([frame_of(), frame_of(machine="two")]), "w")
    assert law.formula == "GPU time + bytes counted on the bus / speed"
    assert [one.domain.quants for one in own] == [(q,) for q in QUANTS] * 2
    for one in (law, *own):
        assert parameter(one, "GPU time").value.value == pytest.approx(PROMPT_S) if one in own else True
        assert parameter(one, "speed").value.value == pytest.approx(BUS)
        assert one.errors("placement").largest == pytest.approx(0, abs=1e-9)
    assert len(law.cells) == 6
    assert law.errors("cell").largest == pytest.approx(0, abs=1e-9)
    sent = 12 * EXPERTS * QUANTS["Q8_0"]
    assert law.at("a-model", "Q8_0", 12) == pytest.approx(PROMPT_S + sent * PACKETS / BUS)
    told = law.estimate("a-model", "Q8_0", 12, bus_bytes_per_s=10e9)
    assert told.value == pytest.approx(PROMPT_S + sent / 10e9)
    assert told.label.startswith("estimated for a bus of 10 GB/s from a law fitted on a GPU (machines one, two;")
    with pytest.raises(ValueError, match="takes bus_bytes_per_s"):
        law.estimate("a-model", "Q8_0", 12, ram_bytes_per_s=RAM)


def test_where_the_bus_was_not_counted_the_headers_bytes_are_taken():
    frame = frame_of()
    frame.loc[3, "bus_received_bytes/w"] = np.nan
    for found in (speed.ttft(frame, "w")[0], speed.ttft(frame_of(), "w", counted=False)[0]):
        assert found.formula == "GPU time + expert bytes by the header / speed"
        assert parameter(found, "speed").value.value == pytest.approx(BUS / PACKETS)
        told = found.estimate("a-model", "Q8_0", 12, bus_bytes_per_s=10e9)
        assert told.value == pytest.approx(PROMPT_S + 12 * EXPERTS * QUANTS["Q8_0"] / 10e9)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "loopback"}, "without a GPU no experts are copied to one"),
        ({"prompt_tokens/w": 31.0}, "llama.cpp copies experts to the GPU for prompts from 32 tokens on; this has 31"),
    ],
)
def test_a_prompt_whose_experts_are_not_copied_has_no_law(change, reason):
    found = speed.ttft(frame_of(**change), "w")
    assert {(law.reason, law.parameters, law.residuals) for law in found} == {(reason, (), ())}
    assert found[0].at("a-model", "Q8_0", 3) is None
    assert found[0].sources


# VRAM


def test_a_law_of_vram_is_exact_and_says_what_it_did_not_see():
    long = frame_of(layers=(24,), placement="cpu-moe,context=4096", context_tokens=4096.0)
    long = long.assign(vram_cache_bytes=512 * MIB, vram_compute_bytes=83 * MIB, vram_bytes=long.vram_bytes + 387 * MIB)
    law = {one.domain.quants: one for one in vram(pd.concat([frame_of(), long]))}["Q4_K_M",]
    assert law.errors("nothing").largest == pytest.approx(0, abs=1e-9)
    assert parameter(law, "KV cache, per").value.value == pytest.approx(128 * MIB)
    assert parameter(law, "compute buffer, experts on the CPU, per").value.value == pytest.approx(MIB)
    alone = parameter(law, "compute buffer, all on the GPU, per")
    assert (alone.value, alone.reason) == (None, ONE_CONTEXT)
    assert parameter(law, "weights on the GPU, baseline").value.value == 1000 * MIB
    assert parameter(law, "rest").value.value == pytest.approx(700 * MIB)
    parts = law.parts(500 * MIB, True, 8192)
    assert (parts.weights, parts.cache, parts.compute) == pytest.approx((500 * MIB, 1024 * MIB, 87 * MIB))
    assert parts.total == pytest.approx((500 + 1024 + 87 + 700) * MIB)
    assert law.parts(500 * MIB, False, 8192) is None
    assert off(law, "placement")["Q4_K_M", "n-cpu-moe=8"] == pytest.approx(0, abs=1e-9)
    (unseen,) = (r for r in law.residuals if r.held_out == "placement" and r.placement == "baseline")
    assert (unseen.predicted, unseen.reason) == (None, UNSEEN)
    told = law.estimate(500 * MIB, True, 1024, rest_bytes=400 * MIB)
    assert told.value == pytest.approx((500 + 128 + 80 + 400) * MIB)
    assert told.label.startswith("estimated for a GPU that holds 400.00 MiB beside the engine's buffers from")
    assert law.estimate(500 * MIB, False, 4096, rest_bytes=1.0) is None


def test_one_context_tells_no_other_and_settings_are_left_out():
    small = frame_of(layers=(24,), placement="cpu-moe,ubatch=64", vram_compute_bytes=9 * MIB)
    law = vram(pd.concat([frame_of(), small]))[0]
    assert law.n == 12
    more = parameter(law, "KV cache, per")
    assert (more.value, more.reason) == (None, ONE_CONTEXT)
    assert law.parts(MIB, True, 2048) is None
    assert (parameter(law, "rest").value.low, law.spread) == (None, None)
    assert vram(frame_of(vram_bytes=np.nan)) == []


def test_a_rest_that_is_not_the_same_shows():
    odd = frame_of()
    odd.loc[odd.placement == "cpu-moe", "vram_bytes"] += 300 * MIB
    law = vram(odd)[0]
    assert law.errors("placement").largest > 0.15
    assert parameter(law, "rest").value.low < 775 * MIB < parameter(law, "rest").value.high


# what the committed records give


@pytest.fixture(scope="module")
def h100():
    return Study.read(REPO / "outputs/h100-twins").runs


@pytest.fixture(scope="module")
def h200():
    return Study.read(REPO / "outputs/h200-twins").runs


@pytest.fixture(scope="module")
def whole():
    """Four whole models in five placements each, load mode none, prompts of different tokens."""
    runs = frames.runs(r for r in record.read_all(Path(REPO / "outputs/preview"))[0] if r.done)
    return runs[runs.scale == "full"]


def all_of(found, **of):
    return [r for law in found for r in law.residuals]


def test_committed_tokens_of_unseen_placements_are_within_5_percent(whole):
    found = speed.decode(whole, "mixed-512")
    assert {law.reason for law in found if "cost" in law.formula} == {NOT_TOLD}, "one quant of each model"
    residuals = all_of(found)
    assert {(r.model, r.quant) for r in residuals} == {
        ("deepseek-moe-16b", "Q4_K_M"),
        ("gpt-oss-20b", "MXFP4_MOE"),
        ("phi-3.5-moe", "Q4_K_M"),
        ("qwen3-30b-a3b", "Q4_K_M"),
    }
    unseen, ends = errors(residuals, "placement"), errors(residuals, "ends")
    assert (unseen.n, ends.n) == (14, 14), (
        "gpt-oss-20b ran on two machines, once with all placements and once with most"
    )
    assert unseen.median < 0.04
    assert unseen.largest < 0.09, "gpt-oss-20b, a run of each placement"
    assert ends.median < 0.06
    assert ends.largest < 0.13


def test_committed_prompts_at_none_are_within_5_percent(whole, h100):
    law, *own = speed.ttft(whole, "mixed-512")
    assert law.formula.startswith("GPU time + bytes counted on the bus")
    assert 53e9 < parameter(law, "speed").value.value < 57e9
    assert errors(all_of(own), "placement").median < 0.02
    assert errors(all_of(own), "placement").largest < 0.12, "DeepSeek's first 7 layers"
    assert law.errors("placement").median < 0.04
    assert law.errors("cell").median < 0.04
    told = speed.ttft(whole, "mixed-512", counted=False)
    assert errors(all_of(told[1:]), "placement").median < 0.02
    mapped, none = (one for one in speed.ttft(h100, "long-512") if len(one.cells) > 1)
    assert (mapped.domain.load_mode, none.domain.load_mode) == ("mmap", "none")
    assert 52e9 < parameter(none, "speed").value.value < 56e9
    assert none.errors("cell").median < 0.02
    assert none.errors("cell").largest < 0.05
    assert 8e9 < parameter(mapped, "speed").value.value < 10e9
    assert 0.05 < mapped.errors("cell").median < 0.08, "not within the aim"
    assert {one.reason for one in speed.ttft(h100, "plan-short")} == {
        "llama.cpp copies experts to the GPU for prompts from 32 tokens on; this has 8"
    }


def test_the_committed_counters_see_packets_beside_the_bytes(whole):
    between = whole[whole.placement.str.startswith("n-cpu-moe")]
    ratio = between["bus_received_bytes/mixed-512"] / between.moved_bytes
    assert ratio.between(PACKETS - 0.001, PACKETS + 0.007).all()


def test_a_headers_bytes_are_no_law_of_a_prompt_that_needs_few_experts(h100, h200):
    """The workload long-512 repeats a sentence: 60 % of DeepSeek's experts cross the bus, and all of Phi's."""
    for found in (speed.ttft(h100, "long-512", counted=False), speed.ttft(h200, "long-512")):
        (none,) = (law for law in found if len(law.cells) > 1 and law.domain.load_mode == "none")
        assert "by the header" in none.formula
        assert none.errors("cell").median > 0.15


def test_committed_quants_share_a_law_on_a_quiet_machine_and_not_on_another(h100, h200):
    (quiet,) = (
        law
        for law in speed.decode(h100, "long-512")
        if law.domain.load_mode == "none" and len(law.domain.quants) == 3 and not law.reason
    )
    assert quiet.domain.models == ("deepseek-moe-16b",)
    assert quiet.errors("cell").n == 3
    assert quiet.errors("cell").largest < 0.06
    assert 0.1e-3 < parameter(quiet, "cost").value.value < 0.3e-3
    assert 80e9 < parameter(quiet, "speed").value.value < 120e9
    (loud,) = (
        law
        for law in speed.decode(h200, "long-512")
        if law.domain.load_mode == "none" and len(law.domain.quants) == 3 and not law.reason
    )
    assert loud.errors("cell").median > 0.5, "its RAM read 54 to 68 GB/s while it was measured"
    assert parameter(loud, "speed").value is None


def test_committed_machines_differ_as_their_ram_does(h100, h200):
    """The speed of RAM tells more than half of how machines differ."""
    both = pd.concat([h100, h200])
    scaled = errors(all_of(speed.decode(both, "long-512")), "machine")
    alike = errors(all_of(speed.decode(both.assign(ram_bytes_per_s=1.0), "long-512")), "machine")
    assert scaled.n == alike.n == 28
    assert scaled.median < 0.12
    assert scaled.largest < 0.2
    assert alike.median > 0.25


def test_committed_vram_is_within_1_percent(whole, h100, h200):
    for runs, n in ((whole, 16), (h100, None), (h200, None)):
        residuals = all_of(vram(runs))
        assert errors(residuals, "nothing").largest < 0.007
        held = errors(residuals, "placement")
        assert (held and held.n) == n
        assert held is None or (held.median < 0.001 and held.largest < 0.008)


def test_a_laws_sources_are_its_records(whole):
    found = [
        one for one in speed.decode(whole, "mixed-512") if one.domain.models == ("gpt-oss-20b",) and not one.reason
    ]
    own = whole[whole.model == "gpt-oss-20b"]
    assert len(found) == 2, "one a machine"
    assert {k: v for law in found for k, v in law.sources.items()} == frames.sources(own)
    assert sorted(law.n for law in found) == [4, 6]
    assert len(own) == 10
    assert all(r.n in (1, 2) and r.measured > 0 for law in found for r in law.residuals)
    assert replace(found[0].residuals[0], predicted=None).off is None
