"""`moelib measure`: one file of an architecture that the catalogue lacks, from its header to the answer."""

import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import ggufs
import psutil
import pytest

from moelib.campaign import bench, sweep
from moelib.gguf import gguf_file
from moelib.measure import device
from moelib.models import quantize
from moelib.planner import budget, memory
from moelib.study.plan import StudyError
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
        return sweep.measure(file, vram, context=256, rounds=1, device_kind="loopback", say=said.append)

    made = measured()
    assert said[0].startswith(f"{file.name} fits ")
    assert [a.placement for a in made.study.parameters.arms] == [
        "baseline",
        "n-cpu-moe=2",
        "n-cpu-moe=3",
        "n-cpu-moe=4",
        "cpu-moe",
    ]
    assert made.study.tally["usable"] == made.study.tally["planned"] == 5, made.study.problems
    text = made.path.read_text(encoding="utf-8")
    title, _, answer, *_ = text.splitlines()
    assert title.startswith(f"# {file.name} on ")
    # on loopback the context of the device is a guess: what it took decides
    took = {n.placement: made.took(n) for n in made.plan.needs if made.took(n) is not None}
    one = made.answer.placement
    assert str(one) in [a.placement for a in made.study.parameters.arms]
    assert took[one] <= vram
    assert all(b > vram for p, b in took.items() if p.order < one.order)
    assert re.match(rf"\*\*It fits\*\* with `{one}`: \d+ MiB of VRAM were taken, \d+ MiB were", answer)
    offload = f" --n-cpu-moe {one.cpu_layers:.0f}" if 0 < one.cpu_layers < 5 else ""
    assert f"llama-server -m {file} -ngl 999 -c 256 -np 1 -fa on --fit off{offload}" in text
    assert "no speed here is one of a GPU" in text
    fewer = "All of it is on the GPU" if one.is_baseline else r"one layer fewer on the CPU: it took \d+ MiB, more than"
    assert re.search(fewer, text)
    assert ("Planned was `n-cpu-moe=3`" in text) == (str(one) != "n-cpu-moe=3")
    assert len(re.findall(r"^\| (?:baseline|n-cpu-moe=\d|cpu-moe) ", text, re.M)) == 5
    assert {r.run_id for r in (*made.trials.values(), *made.study.used)} == set(
        re.findall(r"^- `(\S+)` (?:valid|degraded)", text, re.M)
    )

    monkeypatch.setattr(bench.Bench, "perform", lambda *_: pytest.fail("a run that is done is done again"))
    assert measured().path.read_text(encoding="utf-8") == text
    assert Study.read(made.study.path).done == made.study.done


@pytest.fixture
def compared(file, monkeypatch):
    """(what the rounds compare, what was tried) on a card of `room` bytes; took: placement -> bytes, None: no room."""

    def ask(vram, room, took=(), ram=None):
        outcomes, plan = dict(took), budget.plan(gguf_file.read_header(file), vram, ram, context=256, cuda=False)

        def one(_, placement, *rest):
            nbytes = outcomes[placement]
            seen = SimpleNamespace(memory=SimpleNamespace(value_bytes=nbytes))
            what = {"placement": placement}
            return SimpleNamespace(
                done=nbytes is not None,
                status="",
                reasons=() if nbytes else (sweep.NO_ROOM,),
                observation=seen,
                attempt=1,
                spec=SimpleNamespace(**what),
            )

        monkeypatch.setattr(sweep.bench, "one", one)
        where = SimpleNamespace(kind="cuda", usable_bytes=room)
        trials = sweep.Trials(plan, file, ((sweep.SHORT,), 2, 256), where, file.parent / "none", lambda _: None)
        return [str(n.placement) for n in sweep._compared(plan, trials)], sorted(trials.done)

    return ask


@pytest.mark.engine
def test_what_the_card_cannot_hold_is_no_part_of_a_round(file, compared, monkeypatch):
    """Far from the card's size and the budget the plan is believed; close to them, a run tells."""
    monkeypatch.setattr(sweep, "CLOSE", 0.005)
    three, two = (budget_of(file, f"n-cpu-moe={n}") for n in (3, 2))
    everything = ["baseline", "n-cpu-moe=2", "n-cpu-moe=3", "n-cpu-moe=4", "cpu-moe"]
    far = int(three * 1.02)  # between what N = 3 and N = 2 take
    assert compared(far, None) == (everything, [])
    assert compared(far, 80 << 30) == (everything, [])
    assert compared(80 << 30, 80 << 30) == (["baseline", "n-cpu-moe=1", "cpu-moe"], [])
    # close to the budget on a larger card
    assert compared(three, 80 << 30, {"n-cpu-moe=3": three}) == (everything, ["n-cpu-moe=3"])
    assert compared(three, 80 << 30, {"n-cpu-moe=3": three + 1})[0] == ["baseline", *everything[2:]]
    # a card of the budget's size, which holds the planned number, and does not
    assert compared(three, three, {"n-cpu-moe=3": three}) == (everything[2:], ["n-cpu-moe=3"])
    assert compared(three, three, {"n-cpu-moe=3": None}) == (everything[3:], ["n-cpu-moe=3"])
    # a card that holds a little more than the budget
    tried = ["n-cpu-moe=2", "n-cpu-moe=3"]
    assert compared(three, two, {"n-cpu-moe=3": three, "n-cpu-moe=2": None}) == (everything[2:], tried)
    assert compared(three, two, {"n-cpu-moe=3": three, "n-cpu-moe=2": two}) == (everything[1:], tried)
    least = budget_of(file, "cpu-moe")
    assert compared(least, least, {"cpu-moe": least}) == (["cpu-moe"], ["cpu-moe"])
    with pytest.raises(StudyError, match=r"even with all experts on the CPU, though.*--context 128"):
        compared(least, least, {"cpu-moe": None})


@pytest.mark.engine
def test_a_budget_of_ram_is_kept_to_as_well(file, compared, monkeypatch):
    """More experts on the CPU than the budget of RAM allows are no way out."""
    monkeypatch.setattr(sweep, "CLOSE", 0.005)
    three = budget_of(file, "n-cpu-moe=3")
    ram = memory.need(gguf_file.read_header(file), "n-cpu-moe=3", 256, memory.LOOPBACK_BYTES, cuda=False).ram_bytes
    with pytest.raises(StudyError, match="does not fit here"):
        compared(three, 80 << 30, {"n-cpu-moe=3": three + 1}, ram)


@pytest.mark.engine
def test_a_trial_that_tells_nothing_is_tried_again(file, tmp_path, monkeypatch):
    vram = budget_of(file, "n-cpu-moe=3")
    plan = budget.plan(gguf_file.read_header(file), vram, context=256, cuda=False)
    where, asked = device.Loopback(), ((sweep.SHORT,), 2, 256)

    def fits():
        trials = sweep.Trials(plan, file, asked, where, tmp_path / "trials", lambda _: None)
        return trials.fits(plan.chosen), trials.done["n-cpu-moe=3"].attempt

    with monkeypatch.context() as patch:
        patch.setattr(bench.run, "execute", lambda *_: bench.run.Outcome(None, "engine-killed", "killed", ()))
        with pytest.raises(StudyError, match=r"whether n-cpu-moe=3 fits is failed \(engine-killed\): run the same"):
            fits()
    assert fits() == (True, 2)
    monkeypatch.setattr(bench, "one", lambda *_: pytest.fail("a trial that told is done again"))
    assert fits() == (True, 2)


@pytest.mark.engine
def test_a_device_that_really_lacks_the_memory_ends_the_search(home, engine, monkeypatch):
    """The kernel gives the device's process no more than two layers' experts on the CPU leave to it: what the engine
    asks for beyond that fails in its own allocator, as it does on a GPU."""
    file = quantize.twin(*quantize.outline_of("phi-3.5-moe", "tiny"), scale="tiny").path  # F16: 24 MiB a layer
    needs = {
        str(n.placement): n for n in budget.plan(gguf_file.read_header(file), 1 << 40, context=256, cuda=False).needs
    }
    room = needs["n-cpu-moe=2"]
    serving = device.Loopback._serving

    @contextmanager
    def limited(self, llama, work):
        with serving(self, llama, work) as (child, address):
            its = psutil.Process(child.pid)
            data = re.search(r"VmData:\s+(\d+) kB", Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8"))
            most = (int(data[1]) << 10) + room.buffers_bytes + (12 << 20)  # stacks, and what it computes with
            its.rlimit(psutil.RLIMIT_DATA, (most, most))
            yield child, address

    monkeypatch.setattr(device.Loopback, "_serving", limited)
    monkeypatch.setattr(device.Loopback, "usable_bytes", property(lambda _: room.vram_bytes))
    monkeypatch.setattr(sweep, "CLOSE", 0.35)
    made = sweep.measure(file, room.vram_bytes, context=256, rounds=1, device_kind="loopback", say=lambda _: None)
    assert {p: r.reasons for p, r in made.trials.items() if not r.done} == {"n-cpu-moe=1": (sweep.NO_ROOM,)}
    assert [a.placement for a in made.study.parameters.arms] == ["n-cpu-moe=2", "n-cpu-moe=3", "cpu-moe"]
    text = made.path.read_text(encoding="utf-8")
    assert text.splitlines()[2].startswith("**It fits** with `n-cpu-moe=2`")
    assert "- `n-cpu-moe=1`, one layer fewer on the CPU: it does not run here, out-of-memory" in text
    trial = made.trials["n-cpu-moe=1"]
    assert trial.spec.workloads == made.study.parameters.workloads == (sweep.SHORT,)
    assert f"- `{trial.run_id}` failed" in text
    # nothing is tried or run again
    monkeypatch.setattr(bench.Bench, "perform", lambda *_: pytest.fail("a run that is done is done again"))
    again = sweep.measure(file, room.vram_bytes, context=256, rounds=1, device_kind="loopback", say=lambda _: None)
    assert again.path.read_text(encoding="utf-8") == text


@pytest.mark.engine
def test_where_one_placement_alone_is_held_its_load_modes_are_compared(file, monkeypatch):
    monkeypatch.setattr(sweep, "_compared", lambda plan, trials: [plan.needs[-1]])
    made = sweep.measure(file, 1 << 30, context=256, rounds=1, device_kind="loopback", say=lambda _: None)
    assert [a.label for a in made.study.parameters.arms] == ["cpu-moe/mmap", "cpu-moe/none"]
    text = made.path.read_text(encoding="utf-8")
    assert len(re.findall(r"^\| cpu-moe(?:, none)? ", text, re.M)) == 2
    assert len(made.runs(made.plan.needs[-1])) == 1


def test_a_dense_model_is_refused_before_anything_is_run(home, engine, tmp_path):
    path = tmp_path / "dense.gguf"
    path.write_bytes(ggufs.build(*ggufs.loadable("qwen3")))
    with pytest.raises(budget.PlanError, match="is a dense model"):
        sweep.measure(path, 8 << 30, device_kind="loopback", say=lambda _: None)
    with pytest.raises(budget.PlanError, match="take a smaller quant or model$|it fits with"):
        path.write_bytes(ggufs.build(*ggufs.loadable("olmoe")))
        sweep.measure(path, 1 << 20, device_kind="loopback", say=lambda _: None)
