"""Plans, standing, resume; whole studies through papermill and the real engine on the loopback device."""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from conftest import REPO, SMOKE, furnish
from factory import (
    WORKLOADS,
    block,
    evidence,
    keep,
    observation,
    record_of,
    spec,
    study_of,
    with_facts,
    with_observed,
    with_spec,
)

from moelib import cli, cli_study
from moelib.audit import audit, record
from moelib.base import files
from moelib.campaign import campaign, notebooks
from moelib.catalogue import params
from moelib.evidence import appendix as evidences
from moelib.locks import claim, lease
from moelib.machine import host
from moelib.report import document
from moelib.report import results as report
from moelib.study import gather, plan, study
from moelib.study.plan import StudyError
from moelib.study.status import Status
from moelib.study.study import Study
from moelib.terminal import INVALID, MISSING, TAKEN

MOELIB = [sys.executable, "-m", "moelib.cli"]


def test_a_plan_is_seeded_complete_and_random(home):
    demo = params.study("demo-twins")
    cells = plan.of(demo).cells
    assert plan.of(demo).cells == cells
    assert plan.of(demo.model_copy(update={"seed": 2})).cells != cells
    assert {c.name for c in cells} == {f"{m}/{q}" for m in demo.models for q in demo.quants}
    assert sum(len(c.specs) for c in cells) == 60
    assert len({record.spec_key(s) for c in cells for s in c.specs}) == 60
    firsts = {b[0].placement for c in cells for b in c.blocks}
    assert firsts >= {"baseline", "cpu-moe"}
    for c in cells:
        between = {"n-cpu-moe=2", "n-cpu-moe=3"} if c.quant == "Q4_K_M" else {"n-cpu-moe=2"}
        for i, b in enumerate(c.blocks):
            assert {s.placement for s in b} == {"baseline", "cpu-moe"} | between
            assert len(b) == len({s.placement for s in b})
            assert {s.block for s in b} == {i}


def test_a_placement_may_be_of_some_files_and_of_the_first_rounds(home):
    demo = params.study("demo-twins")
    between = [
        params.PlacementMode(placement="n-cpu-moe=2", quants=["Q4_K_M"], rounds=2),
        params.PlacementMode(placement="n-cpu-moe=3", models=["phi-3.5-moe"]),
    ]
    ends = tuple(mode for mode in demo.arms if mode.placement in ("baseline", "cpu-moe"))
    study = demo.model_copy(update={"arms": (*ends, *between)})
    runs = {
        c.name: [sorted(s.placement for s in block if s.placement.startswith("n-")) for block in c.blocks]
        for c in plan.of(study).cells
    }
    both = ["n-cpu-moe=2", "n-cpu-moe=3"]
    assert runs == {
        "phi-3.5-moe/Q4_K_M": [both, both, ["n-cpu-moe=3"]],
        "phi-3.5-moe/Q2_K": [["n-cpu-moe=3"]] * 3,
        "phi-3.5-moe/Q8_0": [["n-cpu-moe=3"]] * 3,
        "deepseek-moe-16b/Q4_K_M": [["n-cpu-moe=2"], ["n-cpu-moe=2"], []],
        "deepseek-moe-16b/Q2_K": [[]] * 3,
        "deepseek-moe-16b/Q8_0": [[]] * 3,
    }


def test_interleaved_the_quants_of_a_model_take_turns_in_seeded_order(home):
    demo = params.study("demo-twins")
    one_by_one = plan.of(demo.model_copy(update={"interleaved": False}))
    in_turns = plan.of(demo)
    cells = [c for c in one_by_one.cells if c.model == "phi-3.5-moe"]
    assert list(one_by_one.turns(cells)) == [(c, b) for c in cells for b in range(3)]
    order = list(in_turns.turns(cells))
    assert order == list(in_turns.turns(cells[::-1]))  # whatever the order in which they are given
    assert [b for _, b in order] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for b in range(3):
        assert {c.quant for c, n in order if n == b} == {"Q4_K_M", "Q2_K", "Q8_0"}
    assert len({tuple(c.quant for c, n in order if n == b) for b in range(3)}) > 1


def test_the_plan_is_written_first_and_another_one_is_refused(home):
    folder = Study.named("smoke")
    assert not folder.path.exists()  # opening is reading
    folder.begin()
    plan = json.loads((folder.path / "plan.json").read_text(encoding="utf-8"))
    assert len(plan["cells"]) == 1
    Study.named("smoke")
    path = home / "params/studies/smoke.yaml"
    path.write_text(SMOKE.replace("rounds: 2", "rounds: 3"), encoding="utf-8")
    params._yaml.cache_clear()
    with pytest.raises(StudyError, match="another name"):
        Study.named("smoke")


@pytest.mark.parametrize("name", ["h100-twins", "demo"])
def test_a_cell_that_is_whole_is_read_without_engine_or_device_and_nothing_is_written(name, monkeypatch):
    """A committed study, of a GPU too, on a machine that has neither."""
    if name == "demo":
        monkeypatch.setenv("MOELIB_OUTPUTS", str(REPO / "docs/example"))
    monkeypatch.setattr(campaign.engine, "find", lambda *_: pytest.fail("an engine was asked for"))
    monkeypatch.setattr(campaign.device, "choose", lambda *_: pytest.fail("a device was asked for"))
    monkeypatch.setattr(files, "write_bytes", lambda path, _: pytest.fail(f"{path} was written"))
    folder = Study.named(name)
    before = tree(folder.path)
    records = list(campaign.measure(folder, folder.cells[:1]))
    assert [r.spec for r in records] == folder.cells[0].specs
    assert all(r.done for r in records)
    assert tree(folder.path) == before


def rewrite(folder, change):
    """Put a changed record in the place of each."""
    for path in list((folder / "records").glob("*.json")):
        r = record.read(path)
        path.unlink()
        record.write(folder, change(r))


def test_the_plan_of_a_study_of_an_older_schema_is_the_same_plan(home):
    folder = Study.named("smoke")
    folder.begin()
    path = folder.path / "plan.json"
    data = json.loads(path.read_text(encoding="utf-8")) | {"schema_version": 2}
    del data["digest"]
    path.write_text(json.dumps({**data, "digest": files.digest(data)}), encoding="utf-8")
    assert Study.named("smoke").cells == folder.cells


def test_an_unknown_cell_names_the_known_ones(home):
    with pytest.raises(params.ParamsError, match="deepseek-moe-16b/Q8_0"):
        Study.named("smoke").cell("phi-3.5-moe", "Q8_0")
    with pytest.raises(params.ParamsError, match="did you mean .deepseek-moe-16b/Q8_0"):
        Study.named("smoke").cell("deepseek-moe-16b", "Q8")


@pytest.fixture
def refused(home, monkeypatch):
    """A study whose baselines were refused by memory rules that are no longer: their readings are good."""
    monkeypatch.setattr(campaign.host, "facts", lambda: {"commit": "c" * 40, "dirty": False})
    as_made = (("nano", "tiny"), ("Q8_0", "Q4_K_M"), ("[smoke]", "[plan-short]"), ("256", "1024"))
    path = home / "params/studies/smoke.yaml"
    path.write_text(functools.reduce(lambda text, change: text.replace(*change), as_made, SMOKE), encoding="utf-8")
    workloads = home / "params/workloads.yaml"
    workloads.write_text(
        workloads.read_text(encoding="utf-8").replace("generate_tokens: 100", "generate_tokens: 5", 1), encoding="utf-8"
    )
    params._yaml.cache_clear()
    folder = Study.named("smoke")
    folder.begin()
    specs = [s for b in folder.cells[0].blocks for s in b]
    for s in specs:
        observed = observation(s.placement)
        if s.placement == "baseline":
            old = {"status": "invalid", "value_bytes": None, "reasons": ("accounts-disagree",)}
            observed = dataclasses.replace(observed, memory=dataclasses.replace(observed.memory, **old))
        keep(folder.path, record_of(observed, **dataclasses.asdict(s)))
    return folder


def test_readings_that_are_good_by_later_rules_are_judged_again_beside_the_first_judgement(refused):
    before = {p.name: p.read_bytes() for p in (refused.path / "records").iterdir()}
    first = {r.key: r for r in record.read_all(refused.path)[0] if not r.done}
    assert {r.spec.placement for r in first.values()} == {"baseline"}
    assert all("memory-known" in r.reasons for r in first.values())
    again = campaign.reaudit(refused)
    assert {r.key for r in again} == first.keys()
    for r in again:
        old = first[r.key]
        assert r.judged == record.Reaudit(record=old.run_id, digest=old.digest, commit="c" * 40)
        assert (r.status, r.reasons) == ("valid", ())
        assert r.observed.memory.value_bytes is not None
        assert r.observed.memory.trace == old.observed.memory.trace
        assert r.observed.requests == old.observed.requests
        assert (r.attempt, r.host, r.started_utc, r.raw) == (2, old.host, old.started_utc, old.raw)
        assert gather.why_not(r) is None
    after = {p.name: p.read_bytes() for p in (refused.path / "records").iterdir()}
    assert before.items() <= after.items()
    assert len(after) == len(before) + len(again)
    assert campaign.reaudit(refused) == []


def test_the_first_good_attempt_is_the_one_that_is_judged_again(refused):
    (one, *_) = [r for r in record.read_all(refused.path)[0] if not r.done]
    later = one.model_copy(update={"attempt": 2, "run_id": record.run_id(one.spec, 2)})
    record.write(refused.path, later)
    again = {r.key: r for r in campaign.reaudit(refused)}
    assert again[one.key].judged.record == one.run_id
    assert again[one.key].attempt == 3


def test_what_is_wrong_for_another_reason_stays_so(refused):
    rewrite(refused.path, lambda r: with_observed(r, top_logprobs=()))
    assert campaign.reaudit(refused) == []


def test_rules_that_no_commit_has_judge_nothing(refused, monkeypatch):
    for facts in ({"commit": "c" * 40, "dirty": True}, {"commit": None, "dirty": None}):
        monkeypatch.setattr(campaign.host, "facts", lambda facts=facts: facts)
        with pytest.raises(StudyError, match="commit what you changed"):
            campaign.reaudit(refused)


def test_a_document_says_what_was_judged_again(refused):
    campaign.reaudit(refused)
    text = evidences.problems(study.Study.read(refused.path)).markdown()
    assert "2 runs were *re-audited*: earlier rules refused the readings in their first record" in text
    assert "cccccccccccc" in text


def test_the_record_that_stands_is_the_last_done_one_else_the_last():
    bad1, bad2 = (record_of(status="failed", attempt=n) for n in (1, 3))
    good = record_of(attempt=2)
    assert gather.standing([bad1, bad2]) == {bad1.key: bad2}
    assert gather.standing([bad2, good, bad1]) == {good.key: good}
    assert gather.standing([]) == {}


def test_status_lists_every_run_that_is_missing_or_wrong():
    cell = study.Cell("deepseek-moe-16b", "Q4_K_M", ((spec(), spec(placement="cpu-moe", order=1)),))
    base, moe = block()

    def status(*records):
        return study.Status.of(cell, evidence(records), WORKLOADS)

    whole = status(base, moe)
    assert whole.complete
    assert whole.rounds == ((base, moe),)
    assert status().problems == (
        "deepseek-moe-16b/Q4_K_M baseline, mmap, round 1: not run",
        "deepseek-moe-16b/Q4_K_M cpu-moe, mmap, round 1: not run",
    )
    bad = record_of(status="failed", placement="cpu-moe", order=1)
    assert status(base, bad).problems[0].endswith("round 1: failed (engine-ended)")
    with pytest.raises(StudyError, match="engine-ended"):
        campaign.require_complete([status(base, bad)])
    campaign.require_complete([whole])
    other = with_observed(with_facts(moe, "sheet", sha256="c" * 64), file_sha256="c" * 64)
    mixed = status(base, other)
    assert mixed.rounds == ()
    assert "block-alike" in mixed.problems[0]
    vouching = status(base, with_observed(moe, top_logprobs=()))
    assert vouching.problems[0].endswith("valid, but its audit says invalid: output-alive: no log-probabilities")


def test_what_was_measured_on_several_machines_is_said(home):
    model = "deepseek-moe-16b"

    def results(**uuids):
        """The machine of each block, by quant."""
        cells, runs = [], []
        for quant, cards in uuids.items():
            pairs = [
                (spec(quant=quant, block=b), spec(quant=quant, placement="cpu-moe", order=1, block=b)) for b in range(3)
            ]
            cells.append(study.Cell(model, quant, tuple(pairs)))
            for b, uuid in enumerate(cards):
                for r in block(block=b):
                    speed = 50e9 if uuid == "A" else 100e9
                    moved = with_facts(with_facts(r, "device", uuid=uuid), "host", cpu=uuid, ram_read_bytes_per_s=speed)
                    runs.append(with_spec(moved, quant=quant).model_copy(update={"run_id": f"{quant} {r.run_id}"}))
        demo = params.study("demo-twins").model_copy(update={"models": [model], "quants": list(uuids)})
        return study_of(demo, cells, runs)

    alone = results(Q4_K_M="AAA", Q2_K="AAA")
    text = "- Rounds measure variation from run to run on one machine, not from machine to machine."
    assert (evidences.machines(alone).text, evidences.apart(alone)) == (text, None)
    mixed = results(Q4_K_M="ABB")
    note = evidences.machines(mixed)
    assert f"{model}/Q4_K_M (1 + 2 rounds, RAM read at 50.0 to 100 GB/s) come from different machines" in note.text
    assert len(note.sources) == 6
    assert evidences.apart(mixed) is None
    several = results(Q4_K_M="AAA", Q2_K="BBB", Q8_0="AAA")
    groups = f"{model}/Q4_K_M, {model}/Q8_0, RAM read at 50.0 GB/s; {model}/Q2_K, RAM read at 100 GB/s."
    assert evidences.apart(several).startswith(f"Measured on one machine each: {groups}")
    assert groups in report.limits(several).text
    assert "one machine each" not in report.limits(alone).text
    assert evidences.machines(several).text == text
    cpus = several.records[0].host.cpus
    row = f"A, {cpus} usable ({model}/Q4_K_M, {model}/Q8_0); B, {cpus} usable ({model}/Q2_K)"
    assert row in evidences.environment_table(several).markdown()
    assert f"| A, {cpus} usable  " in evidences.environment_table(alone).markdown()


def test_a_record_with_the_right_status_for_other_reasons_does_not_stand():
    """A flag that was exchanged for another hides what is known against the run."""
    flagged = record_of(observation(exit_code=9, exit_killed=True))
    assert (flagged.status, flagged.reasons) == ("degraded", ("clean-end",))
    assert gather.why_not(flagged) is None
    other = flagged.model_copy(update={"reasons": ("host-quiet",)})
    assert "its own checks say degraded ('clean-end',)" in gather.why_not(other)
    assert "its own checks say degraded" in gather.why_not(flagged.model_copy(update={"reasons": ()}))


def test_without_a_device_nothing_is_made_or_measured(home, monkeypatch):
    """There is nothing to offload from: each such run would be measured, and then be invalid."""
    monkeypatch.setattr(campaign.engine, "find", lambda *_: None)
    monkeypatch.setattr(campaign.device, "choose", lambda *_: campaign.device.NoDevice())
    folder = Study.named("smoke")
    with pytest.raises(StudyError, match="study smoke has no device .*no offload .* could be valid: run `make engine`"):
        list(campaign.measure(folder, folder.cells[:1]))
    assert not folder.path.exists()


def tree(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, models_folder):
    """A home whose smoke study was run from the command line; copied by the tests that change it."""
    home = furnish(tmp_path_factory.mktemp("whole"))
    done = command(home, models_folder, "study", "run", "smoke")
    assert done.returncode == 0, done.stderr
    assert "4 of 4 runs usable" in done.stdout
    assert "MOE-TECHNICAL-VALIDATION.md" in done.stdout.splitlines()[-1]
    return home


def command(home, models_folder, *args, **env):
    env = {**os.environ, "MOELIB_HOME": str(home), "MOELIB_MODELS": str(models_folder), **env}
    return subprocess.run(
        [*MOELIB, *args], capture_output=True, text=True, env=env, timeout=300, cwd=home, encoding="utf-8"
    )


@pytest.fixture
def copy(whole, tmp_path, monkeypatch, models_folder):
    home = tmp_path / "home"
    shutil.copytree(whole, home)
    monkeypatch.setenv("MOELIB_HOME", str(home))
    monkeypatch.setenv("MOELIB_MODELS", str(models_folder))
    monkeypatch.delenv("MOELIB_OUTPUTS", raising=False)
    params._yaml.cache_clear()
    yield home
    params._yaml.cache_clear()


@pytest.mark.engine
def test_a_study_leaves_its_evidence(whole):
    out = whole / "outputs/smoke"
    records, damaged = record.read_all(out)
    assert not damaged
    assert len(records) == 4
    assert all(r.done for r in records)
    for r in records:
        assert {name: hashlib.sha256((out / "raw" / name).read_bytes()).hexdigest() for name in r.raw} == r.raw
        assert len(r.raw) == 2
    assert (out / "quants/deepseek-moe-16b-Q8_0.json").exists()
    assert notebooks.is_whole(out / "notebooks/deepseek-moe-16b-Q8_0.ipynb")
    assert list((out / "work").rglob("*.log")) == []
    assert str(whole) not in (out / document.DOCUMENT).read_text(encoding="utf-8")


@pytest.mark.engine
def test_a_second_run_repeats_nothing(copy, models_folder):
    out = copy / "outputs/smoke"
    before = {k: v for k, v in tree(out).items() if not k.startswith("notebooks/analysis")}
    done = command(copy, models_folder, "study", "run", "smoke")
    assert done.returncode == 0
    assert {k: v for k, v in tree(out).items() if not k.startswith("notebooks/analysis")} == before


@pytest.mark.engine
def test_a_failed_cell_leaves_the_rest_running_and_the_exit_code_says_so(home, models_folder):
    """One quant's tool fails; the other quant's runs are all there."""
    path = home / "params/studies/smoke.yaml"
    path.write_text(SMOKE.replace("[Q8_0]", "[Q2_K, Q8_0]").replace("rounds: 2", "rounds: 1"), encoding="utf-8")
    from moelib.engine import engine

    real = engine.find()
    tools = home / "tools"
    tools.mkdir()
    for name, tool in real.tools.items():
        script = f'exec {tool} "$@"'
        if name == "llama-quantize":
            script = f'case "$*" in *Q2_K*) echo broken on purpose; exit 1;; esac; {script}'
        (tools / tool.name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (tools / tool.name).chmod(0o755)
    own = home / "models"
    done = command(home, own, "study", "run", "smoke", MOELIB_LLAMA_CPP=str(tools))
    assert done.returncode == MISSING
    assert "2 of 4 runs usable" in done.stdout
    assert "Q2_K" in done.stderr
    assert "broken on purpose" in done.stderr
    out = home / "outputs/smoke"
    assert {r.spec.quant for r in record.read_all(out)[0]} == {"Q8_0"}
    text = (out / "MOE-TECHNICAL-VALIDATION.md").read_text(encoding="utf-8")
    assert text.count("Q2_K baseline, mmap, round 1: not run") == 1
    # the copy of the failed notebook is kept, and not believed
    assert not notebooks.is_whole(out / "notebooks/deepseek-moe-16b-Q2_K.ipynb")
    # mended, only what is missing is done
    before = tree(out / "records")
    quantize = tools / real.tools["llama-quantize"].name
    quantize.write_text(f'#!/bin/sh\nexec {real.tool("llama-quantize")} "$@"\n', encoding="utf-8")
    done = command(home, own, "study", "run", "smoke", MOELIB_LLAMA_CPP=str(tools))
    assert done.returncode == 0, done.stderr
    after = tree(out / "records")
    assert before.items() <= after.items()
    assert len(after) == 4


@pytest.mark.engine
def test_runs_of_another_engine_are_not_mixed_in(copy):
    folder = Study.named("smoke")
    cell = folder.cells[0]
    sorted((folder.path / "records").glob("*.json"))[0].unlink()
    rewrite(folder.path, lambda r: with_facts(r, "engine", server_sha256="0" * 64))
    with pytest.raises(StudyError, match="another engine"):
        list(campaign.measure(folder, [cell]))


@pytest.mark.engine
def test_a_block_that_another_gpu_began_is_done_on_this_one_alone(copy):
    """Runs of a block are compared with each other; a whole block of another GPU stands."""
    folder = Study.named("smoke")
    cell = folder.cells[0]
    (missing,) = (folder.path / "records").glob("*cpu-moe*_b0_*")
    missing.unlink()
    rewrite(folder.path, lambda r: with_facts(r, "device", uuid="GPU-of-another-day"))
    before = {r.run_id for r in record.read_all(folder.path)[0]}
    records = list(campaign.measure(folder, [cell]))
    assert [(r.spec.block, r.device.uuid) for r in records] == [(0, None)] * 2 + [(1, "GPU-of-another-day")] * 2
    assert folder.status_now(cell).complete
    after = {r.run_id for r in record.read_all(folder.path)[0]}
    assert before <= after
    assert len(after) == 5  # nothing was overwritten


@pytest.mark.engine
def test_whole_rounds_that_do_not_fit_together_are_all_done_again(copy, monkeypatch):
    """As the runs of a round are: nobody knows which of them is not what it says."""
    folder = Study.named("smoke")
    cell = folder.cells[0]
    fits = audit.cell

    def apart(runs):
        first = any(r.attempt == 1 for r in runs.runs)
        return (record.Check("no-two-alike", False, "two runs are one"),) if first else fits(runs)

    monkeypatch.setattr(audit, "cell", apart)
    status = folder.status_now(cell)
    assert (status.apart, status.usable, status.problems) == (
        True,
        0,
        (f"{cell.name}: no-two-alike: two runs are one",),
    )
    before = tree(folder.path / "records")
    records = list(campaign.measure(folder, [cell]))
    assert [(r.spec.block, r.attempt) for r in records] == [(0, 2)] * 2 + [(1, 2)] * 2
    assert before.items() <= tree(folder.path / "records").items()
    again = folder.status_now(cell)
    assert (again.apart, again.usable) == (False, 4), again.problems
    assert [r.attempt for r in campaign.measure(folder, [cell])] == [2] * 4, "nothing is left to do"


def test_what_is_done_of_a_block():
    def ran(uuid, *runs):
        return [r and with_facts(r, "device", uuid=uuid) for r in runs]

    def to_do(records, uuid):
        here = (uuid, None, "d" * 32, "Linux test")
        return campaign._to_do(records, [None if r and r.done else "not done" for r in records], here)

    base, moe = block()
    bad = record_of(status="failed", placement="cpu-moe", order=1)
    assert to_do(ran("A", base, moe), "A") == [False, False]
    assert to_do(ran("A", base, moe), "B") == [False, False]
    assert to_do(ran("A", base, None), "A") == [False, True]
    assert to_do(ran("A", base, bad), "A") == [False, True]
    assert to_do(ran("A", base, None), "B") == [True, True]
    assert to_do([*ran("A", base), *ran("B", moe)], "B") == [True, False]
    newer = with_facts(base, "host", system="Linux newer")
    assert to_do([*ran("A", newer), None], "A") == [True, True]
    # on one GPU, and still not to be compared
    other = with_observed(moe, threads=7)
    assert to_do(ran("A", base, other), "A") == [True, True]
    assert to_do([], "A") == []


def test_a_cell_can_be_chosen_alone(home):
    _, cells = campaign.select("demo-twins", "phi-3.5-moe/Q2_K")
    assert [c.name for c in cells] == ["phi-3.5-moe/Q2_K"]
    for all_of_it in ("phi-3.5-moe", "phi-3.5-moe/all"):
        _, cells = campaign.select("demo-twins", all_of_it)
        assert [c.name for c in cells] == [f"phi-3.5-moe/{q}" for q in ("Q4_K_M", "Q2_K", "Q8_0")]
    for unknown in ("phi", "phi-3.5-moe/Q2"):
        with pytest.raises(params.ParamsError):
            campaign.select("demo-twins", unknown)


def test_a_prompts_length_that_one_runs_server_does_not_tell_leaves_the_others():
    requests = observation().requests
    silent = record_of(
        dataclasses.replace(observation(), requests=[dataclasses.replace(q, prompt_n=None) for q in requests])
    )
    for runs, lengths in (([record_of(), silent], "8"), ([silent], "n/a")):
        table = evidences.workloads_table(SimpleNamespace(workloads=WORKLOADS, done=runs))
        assert table.rows[0]["prompt tokens"] == lengths


def test_runs_that_nobody_tried_are_counted_where_they_are_many():
    few = [f"m/Q2_K baseline, mmap, round {i}: not run" for i in range(4)]
    many = [f"m/Q8_0 baseline, mmap, round {i}: not run" for i in range(5)]
    failed = ["m/Q8_0 cpu-moe, mmap, round 1: invalid: counts-exact: x"]
    assert evidences._listed(few + many + failed) == ["m/Q8_0: 5 runs were not run", *few, *failed]


def lessened(home):
    """A study that was whole, without one of its runs."""
    next((home / "outputs/smoke/records").glob("*cpu-moe*")).unlink()
    return home / "outputs/smoke"


@pytest.mark.engine
def test_a_cell_that_another_process_has_is_taken_and_can_be_had_later(copy, models_folder):
    out = lessened(copy)
    args = ("study", "run", "smoke", "--cell", "deepseek-moe-16b/Q8_0")
    with lease.hold(out / "leases/deepseek-moe-16b-Q8_0", "the cell", host.identity()):
        done = command(copy, models_folder, *args, MOELIB_PATIENCE="0.01")
        assert done.returncode == TAKEN == 75
        said = f"deepseek-moe-16b/Q8_0 of study smoke is in use by process {os.getpid()}; wait for it to end"
        assert f"moelib: {said}, then run again" in done.stderr
    with claim.device(None, "device loopback", 0):  # this one only the notebook's kernel finds out
        done = command(copy, models_folder, *args, MOELIB_PATIENCE="0.01")
        assert done.returncode == TAKEN
        assert f"device loopback is in use by process {os.getpid()}" in done.stderr
    assert len(list((out / "records").glob("*.json"))) == 3
    done = command(copy, models_folder, *args)
    assert done.returncode == 0, done.stderr
    assert len(list((out / "records").glob("*.json"))) == 4


@pytest.mark.engine
def test_a_notebook_that_does_not_show_all_records_is_executed_again(copy, models_folder):
    out = lessened(copy)
    book = out / "notebooks/deepseek-moe-16b-Q8_0.ipynb"
    before = book.read_bytes()
    assert command(copy, models_folder, "study", "run", "smoke").returncode == 0
    digests = [r.digest for r in record.read_all(out)[0]]
    assert notebooks.is_whole(book, digests)
    book.write_bytes(before)
    assert notebooks.is_whole(book)
    assert not notebooks.is_whole(book, digests)
    assert command(copy, models_folder, "study", "run", "smoke", "--cell", "deepseek-moe-16b").returncode == 0
    assert notebooks.is_whole(book, digests)


@pytest.mark.parametrize(
    ("tallies", "failed", "problems", "code"),
    [
        ([{"valid": 2}, {"degraded": 2}], 0, [], 0),
        ([{"valid": 2}, {"valid": 1, "invalid": 1}], 0, ["x"], INVALID),
        ([{"valid": 1, "missing": 1}, {"invalid": 1}], 0, ["x"], MISSING),
        ([{"valid": 1, "invalid": 1}], 1, ["x"], MISSING),
        ([{"valid": 2}], 0, ["the notebook failed"], 1),
    ],
)
def test_the_exit_code_tells_what_became_of_runs(tallies, failed, problems, code):
    statuses = [Status((), (), Counter(t), failed=failed) for t in tallies]
    assert cli_study._code(statuses, problems) == code


def test_of_two_plans_the_first_one_stands(home):
    """Two hosts that share the folder begin at once, with other parameters."""
    first, _ = campaign.select("smoke")
    path = home / "params/studies/smoke.yaml"
    path.write_text(SMOKE.replace("seed: 1", "seed: 2"), encoding="utf-8")
    params._yaml.cache_clear()
    second, _ = campaign.select("smoke")
    first.begin()
    first.begin()
    with pytest.raises(StudyError, match="was written with other parameters by now"):
        second.begin()
    assert plan.read(first.path / "plan.json") == first.plan
    assert sorted(p.name for p in first.path.iterdir()) == ["plan.json"]


def test_cells_are_listed_as_one_process_measures_them(home):
    def listed(study, *args):
        return CliRunner().invoke(cli.main, ["study", "cells", study, *args])

    assert listed("smoke").output == "deepseek-moe-16b/Q8_0  4 runs\n"
    (cell,) = json.loads(listed("smoke", "--json").output)
    assert cell == {"cell": "deepseek-moe-16b/Q8_0", "model": "deepseek-moe-16b", "quants": ["Q8_0"], "runs": 4}
    taking_turns = json.loads(listed("demo", "--json").output)
    assert [c["cell"] for c in taking_turns] == [c["model"] for c in taking_turns]
    for c in taking_turns:
        names = {x.name for x in campaign.select("demo", c["cell"])[1]}
        assert {f"{c['model']}/{q}" for q in c["quants"]} == names
    assert not (home / "outputs").exists(), "listing writes nothing"
