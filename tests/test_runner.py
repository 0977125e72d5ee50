"""Runners that tell less than llama-server, by the same door: what they do not tell degrades, and excuses nothing."""

from dataclasses import replace

import openai_stub
import pytest
from factory import (
    block,
    keep,
    log_of,
    measured,
    nano,
    observation,
    record_of,
    request,
    spec,
    with_facts,
    with_observed,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_stub import NAME, Attached, Stub

from moelib.audit import audit, record, witness
from moelib.audit.invariants import INVARIANTS
from moelib.catalogue import params
from moelib.catalogue.facts import LLAMA_SERVER, Manifest
from moelib.engine import logs
from moelib.engine.buffers import Report
from moelib.measure import device, run, runner
from moelib.study import gather

SMOKE_RUN = {"workloads": ("smoke",), "requests": 2, "context": 256, "device": "none"}
SHARED = {"watched-lightly", "clock-steady", "not-slowed"}  # of a machine that tests share
UNKNOWN = set(
    """counts-exact cache-not-hit times-ordered ttft-bounded clocks-agree layers-offloaded device-is-the-one
placement-on-device environment-clean build-optimised output-alive file-is-its-sheet host-quiet clean-end
host-memory-possible command-as-asked log-kept""".split()
)
"""What cannot be told of a run by an endpoint that counts tokens."""


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(runner.TELLS, NAME, openai_stub.TELLS)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    return nano(tmp_path_factory.mktemp("model"))


def execute(quantised, work, how=lambda t: t, **of_stub):
    with Stub(**of_stub) as server:
        return run.execute(spec(**SMOKE_RUN), quantised, Attached(server.port, how), device.NoDevice(), work)


def recorded(folder, quantised, outcome):
    """The record of a run of the stub, as `measure` writes it."""
    assert outcome.reason is None, outcome.message
    r = record_of(outcome.observation, **SMOKE_RUN)
    of_stub = {"sheet": Manifest(**quantised.manifest), "engine": Attached(0).facts(), "audit": ()}
    of_stub["raw"] = record.keep_logs(folder, r.run_id, outcome.logs, ())
    r = with_facts(r.model_copy(update=of_stub), "device", kind="none")
    checks = gather.audit_today(r, witness.call(folder, r))
    status, reasons = audit.verdict(checks)
    return record.write(folder, r.model_copy(update={"status": status, "reasons": reasons, "audit": checks}))


def of(r, passed):
    return {c.id: c.measured for c in r.audit if c.passed is passed}


def test_a_server_that_streams_well_is_degraded_by_what_it_does_not_tell(quantised, tmp_path):
    r = recorded(tmp_path, quantised, execute(quantised, tmp_path / "work"))
    assert r.status == "degraded"
    assert set(of(r, None)) == UNKNOWN
    assert set(of(r, False)) - SHARED == {"memory-undoubted"}  # without a device there is no VRAM
    assert set(r.reasons) == set(of(r, None)) | set(of(r, False))
    assert of(r, None)["clocks-agree"] == f"{NAME} does not report how long prompt and generation took by its own clock"
    assert of(r, None)["file-is-its-sheet"].startswith(f"{NAME} does not report which file it has loaded; what can")
    for q in r.observed.requests:
        assert 0 < q.ttft_s < q.total_s
        assert q.tps == pytest.approx(7 / (q.total_s - q.ttft_s))
    assert (r.observed.load_s, r.observed.exit_code, r.observed.argv) == (None, None, ())
    again = record.read(tmp_path / "records" / f"{r.run_id}.json")
    assert again == r
    assert gather.why_not(again, witness.call(tmp_path, again)) is None
    assert gather.gather(tmp_path).problems == {}


def test_without_usage_there_is_no_rate_and_the_first_token_is_still_timed(quantised, tmp_path, monkeypatch):
    outcome = execute(quantised, tmp_path / "work", usage=False)
    assert recorded(tmp_path / "told", quantised, outcome).status == "invalid", "its runner tells it, so it was lost"
    monkeypatch.setitem(runner.TELLS, NAME, frozenset())
    r = recorded(tmp_path, quantised, outcome)
    assert r.status == "degraded"
    assert set(of(r, None)) == UNKNOWN | {"below-memory-bound"}
    assert {(q.ttft_s is None, q.tps) for q in r.observed.requests} == {(False, None)}


def test_an_answer_in_one_piece_has_no_first_token():
    whole = request(token_s=(0.5,), token_n=(), tokens=())
    assert (whole.total_s, whole.ttft_s, whole.tps) == (0.5, None, None)


@pytest.mark.parametrize(
    ("defect", "fails"), [("ends", {"stream-finished"}), ("more", {"counts-exact"})], ids=["no end", "too many"]
)
def test_a_stream_with_a_defect_is_invalid(quantised, tmp_path, defect, fails):
    r = recorded(tmp_path, quantised, execute(quantised, tmp_path / "work", defect=defect))
    assert r.status == "invalid"
    assert fails <= set(of(r, False)) - SHARED <= fails | {"memory-undoubted"}


def test_a_clock_that_runs_backwards_is_invalid(quantised, tmp_path):
    r = recorded(tmp_path, quantised, execute(quantised, tmp_path / "work", how=lambda t: max(0.0, 1.0 - t)))
    assert r.status == "invalid"
    assert "times-ordered" in of(r, False)


@pytest.mark.parametrize(
    ("defect", "reason", "words"),
    [
        ("cut", "connection-lost", "peer closed"),
        ("late", "request-failed", "an event came after the end of the stream"),
        ("error", "request-failed", "no slot is free"),
    ],
)
def test_a_stream_that_breaks_is_a_failed_run(quantised, tmp_path, defect, reason, words):
    outcome = execute(quantised, tmp_path / "work", defect=defect)
    assert (outcome.observation, outcome.reason) == (None, reason)
    assert words in outcome.message


# records made by hand, as such a runner would leave them
DELETED = {
    "timings": {"engine_prompt_s": None, "engine_predicted_s": None},
    "usage": {"prompt_n": None, "predicted_n": None},
    "cache": {"cache_n": None},
    "tokens": {"token_n": ()},
    "ids": {"tokens": ()},
}
EMPTY = {
    "report": Report((), None, None, ()),
    "top_logprobs": (),
    "argv": (),
    "env": (),
    "load_s": None,
    "exit_code": None,
}


def without(r, of_requests=tuple(DELETED), emptied=tuple(EMPTY), name=LLAMA_SERVER):
    """The record without what its engine told, as one of the runner `name`."""
    o, gone = r.observed, {k: v for q in of_requests for k, v in DELETED[q].items()}
    o = replace(o, requests=tuple(replace(q, **gone) for q in o.requests), **{k: EMPTY[k] for k in emptied})
    return with_facts(r.model_copy(update={"observed": o}), "engine", runner=name)


def status(r, log=None):
    """Verdict of a run and, if it is there, of its log."""
    checks = audit.run(audit.measured(r))
    return audit.verdict(checks + (audit.log(witness.Witnessed(r, logs.parse(log), ())) if log else ()))[0]


def test_what_a_block_a_cell_and_a_study_rest_on_is_not_told_either():
    runs = [without(r, name=NAME) for r in block()]
    passed = {c.id: c.passed for c in audit.block(runs)}
    assert passed == {
        "block-complete": True,
        "block-alike": True,
        "block-placement": None,
        "block-ttft-measured": True,
    }
    workloads = {"plan-short": params.Workload(name="plan-short", title="t", text="x", generate_tokens=5)}
    cell = {c.id: c.passed for c in audit.cell(audit.Cell(runs, workloads, {}))}
    assert {k for k, passed in cell.items() if passed is None} == {
        "memory-steady",
        "workloads-as-planned",
        "placements-keep-the-engines-time",
    }
    assert not {k for k, passed in cell.items() if passed is False}
    whole = {c.id: c.passed for c in audit.study(audit.Matrix([r.key for r in runs], runs, runs))}
    assert {k for k, passed in whole.items() if passed is not True} == {"libraries-one-size"}


def test_answers_in_one_piece_show_no_first_token_to_a_block():
    def in_one_piece(r):
        requests = tuple(replace(q, token_s=q.token_s[-1:]) for q in r.observed.requests)
        return with_observed(r, requests=requests)

    for name, passed in ((NAME, None), (LLAMA_SERVER, False)):
        runs = [in_one_piece(without(r, name=name)) for r in block()]
        assert {c.id: c.passed for c in audit.block(runs)}["block-ttft-measured"] is passed


def test_a_block_of_two_runners_is_none():
    base, moe = block()
    other = with_facts(moe, "engine", runner=NAME)
    assert "block-alike" in {c.id for c in audit.block([base, other]) if c.failed}


def test_llama_server_has_to_tell_everything():
    assert runner.untold(LLAMA_SERVER) == frozenset()
    assert "runner" not in record_of().engine.model_fields_set, "a record that names none is of llama-server"
    assert status(record_of()) == "valid"
    assert status(without(record_of())) == "invalid"


def test_a_runner_that_nobody_knows_has_to_tell_everything():
    assert status(without(record_of(), name="openai-stab")) == "invalid"


def test_what_a_runner_does_not_tell_is_judged_where_it_is_there_all_the_same():
    """A record of llama-server under another runner's name gains nothing for what it still holds."""
    late = record_of(observed=observation(requests=(request(0, engine_prompt_s=0.03), request(1))))
    assert status(without(late, (), (), NAME)) == "invalid"
    half = with_observed(late, requests=(late.observed.requests[0], request(1, engine_prompt_s=None)))
    assert status(without(half, (), (), NAME)) == "invalid"


def test_a_log_of_llama_server_is_called_under_any_name(tmp_path):
    r = keep(tmp_path, record_of())
    renamed = with_facts(r, "engine", runner=NAME)
    assert [c.id for c in audit.log(witness.call(tmp_path, renamed))] == [
        i.id for i in INVARIANTS.values() if i.scope == "log"
    ]


def test_no_record_excuses_a_failure_by_saying_that_it_cannot_be_told():
    broken = record_of(observed=observation(requests=(request(0, cache_n=3), request(1))))
    checks = tuple(replace(c, passed=None) if c.failed else c for c in broken.audit)
    verdict, reasons = audit.verdict(checks)
    assert (verdict, reasons) == ("degraded", ("cache-not-hit",))
    claimed = broken.model_copy(update={"status": verdict, "reasons": reasons, "audit": checks})
    assert gather.why_not(claimed) == "degraded, but its audit says invalid: cache-not-hit: plan-short[0]: cache_n 3"


def test_the_verdict_on_a_check_that_is_not_known_is_invalid_whatever_it_says():
    for passed, verdict in ((True, "valid"), (None, "invalid"), (False, "invalid")):
        assert audit.verdict([record.Check("no-such-check", passed, "")])[0] == verdict
    assert audit.verdict([record.Check("cache-not-hit", None, "")]) == ("degraded", ("cache-not-hit",))


WRONG = {
    "nothing": {},
    "a cached prompt": {"cache_n": 3},
    "too few tokens": {"predicted_n": 4},
    "a late first token": {"engine_prompt_s": 0.03},
    "another clock": {"engine_predicted_s": 0.4},
    "two tokens first": {"token_n": (2, 3, 4, 5, 5)},
    "too many ids": {"tokens": tuple(range(9))},
}
RANK = ("valid", "degraded", "invalid")


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(sorted(WRONG)),
    st.booleans(),
    st.sets(st.sampled_from(sorted(DELETED))),
    st.sets(st.sampled_from(sorted(EMPTY))),
    st.booleans(),
)
def test_taking_a_value_out_of_a_record_of_llama_server_never_improves_its_verdict(
    defect, killed, of_requests, emptied, called
):
    o = observation(requests=(request(0, **WRONG[defect]), request(1)), **({"exit_code": -9} if killed else {}))
    r = record_of(observed=o)
    log = log_of(record_of()).encode() if called else None
    assert RANK.index(status(without(r, of_requests, emptied), log)) >= RANK.index(status(r, log))


def test_whatever_is_taken_out_of_a_block_it_is_no_better():
    base, moe = block()
    for emptied in EMPTY:
        assert {c.id for c in audit.block([base, without(moe, (), (emptied,))]) if c.passed is None} == set()
    silent = [without(r, (), ("report",)) for r in (base, moe)]
    assert {c.id for c in audit.block(silent) if c.failed} == {"block-placement"}
    assert measured(base.spec, base.observed).runner == LLAMA_SERVER
