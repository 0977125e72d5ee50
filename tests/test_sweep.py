"""`moelib measure`: one file of an architecture that the catalogue lacks, from its header to the answer."""

import re
from types import SimpleNamespace

import ggufs
import pytest

from moelib.campaign import bench, sweep
from moelib.gguf import gguf_file
from moelib.models import quantize
from moelib.planner import budget, memory
from moelib.study.study import Study


@pytest.fixture
def file(home, engine):
    """A small Qwen3-MoE at Q4_K_M, as a file that somebody gives."""
    return quantize.twin("some-qwen", ggufs.typed("qwen3moe", "F16", "F16", layers=5), "Q4_K_M").path


def budget_of(file, placement):
    return memory.need(gguf_file.read_header(file), placement, 256, memory.LOOPBACK_BYTES, cuda=False).vram_bytes


@pytest.mark.engine
def test_a_file_is_planned_measured_and_answered(file, monkeypatch):
    said = []
    vram = budget_of(file, "n-cpu-moe=3")

    def measured():
        return sweep.measure(file, vram, context=256, rounds=2, device_kind="loopback", say=said.append)

    made = measured()
    assert said[0].startswith(f"{file.name} fits ")
    assert [a.placement for a in made.study.parameters.arms] == [
        "baseline",
        "n-cpu-moe=2",
        "n-cpu-moe=3",
        "n-cpu-moe=4",
        "cpu-moe",
    ]
    assert made.study.tally["usable"] == made.study.tally["planned"] == 10, made.study.problems
    text = made.path.read_text(encoding="utf-8")
    title, _, answer, *_ = text.splitlines()
    assert title.startswith(f"# {file.name} on ")
    assert re.match(
        r"\*\*It (fits|does not fit)\*\* with `n-cpu-moe=3`: \d+ MiB of VRAM were taken, \d+ MiB were", answer
    )
    assert f"llama-server -m {file} -ngl 999 -c 256 -np 1 -fa on --fit off --n-cpu-moe 3" in text
    assert "no speed here is one of a GPU" in text
    assert re.search(r"`n-cpu-moe=2` took \d+ MiB, (more than the budget|and would fit too)", text)
    assert len(re.findall(r"^\| (?:baseline|n-cpu-moe=\d|cpu-moe) ", text, re.M)) == 5
    assert {r.run_id for r in made.study.used} == set(re.findall(r"^- `(\S+)` (?:valid|degraded)", text, re.M))

    monkeypatch.setattr(bench.Bench, "perform", lambda *_: pytest.fail("a run that is done is done again"))
    assert measured().path.read_text(encoding="utf-8") == text
    assert Study.read(made.study.path).done == made.study.done


def asked(file, vram, total):
    plan = budget.plan(gguf_file.read_header(file), vram, context=256, cuda=False)
    where = SimpleNamespace(kind="cuda", identity=lambda: {"total_bytes": total})
    compared, before = sweep._placements(plan, where)
    return [str(n.placement) for n in compared], before and str(before.placement)


@pytest.mark.engine
def test_what_the_card_cannot_hold_is_no_part_of_a_round(file):
    """On a card of the budget's size there is no baseline, and one layer fewer is tried alone."""
    vram = budget_of(file, "n-cpu-moe=3")
    everything = ["baseline", "n-cpu-moe=2", "n-cpu-moe=3", "n-cpu-moe=4", "cpu-moe"]
    assert asked(file, vram, None) == (everything, None)
    assert asked(file, vram, 80 << 30) == (everything, None)
    assert asked(file, vram, vram) == (everything[2:], "n-cpu-moe=2")
    assert asked(file, vram, budget_of(file, "n-cpu-moe=2")) == (everything[1:], None)
    assert asked(file, 80 << 30, 80 << 30) == (["baseline", "n-cpu-moe=1", "cpu-moe"], None)


@pytest.mark.engine
def test_one_layer_fewer_that_the_card_cannot_hold_is_proven_by_a_run_of_its_own(file, monkeypatch):
    """In a context that holds the short workload alone: a longer one would fail, whatever the card holds."""
    apart = sweep._placements

    def without_room(plan, where):
        (compared, _), at = apart(plan, where), plan.needs.index(plan.chosen)
        return [n for n in compared if n.vram_bytes <= plan.chosen.vram_bytes], plan.needs[at - 1]

    monkeypatch.setattr(sweep, "_placements", without_room)
    vram = budget_of(file, "n-cpu-moe=3")
    made = sweep.measure(file, vram, context=256, rounds=1, device_kind="loopback", say=lambda _: None)
    assert made.proof.spec.placement == "n-cpu-moe=2"
    assert made.proof.spec.workloads == made.study.parameters.workloads == (sweep.SHORT,)
    assert made.proof.observed is not None, made.proof.message
    text = made.path.read_text(encoding="utf-8")
    assert re.search(r"`n-cpu-moe=2` took \d+ MiB, (more than the budget|and would fit too)", text)


def test_a_dense_model_is_refused_before_anything_is_run(home, engine, tmp_path):
    path = tmp_path / "dense.gguf"
    path.write_bytes(ggufs.build(*ggufs.loadable("qwen3")))
    with pytest.raises(budget.PlanError, match="is a dense model"):
        sweep.measure(path, 8 << 30, device_kind="loopback", say=lambda _: None)
    with pytest.raises(budget.PlanError, match="take a smaller quant or model$|it fits with"):
        path.write_bytes(ggufs.build(*ggufs.loadable("olmoe")))
        sweep.measure(path, 1 << 20, device_kind="loopback", say=lambda _: None)
