"""A record against the log that its run left: whatever one of them says otherwise is seen, by the check whose it is."""

import gzip
from dataclasses import replace

import pytest
from conftest import FIXTURES
from factory import MIB, block, keep, log_of, observation, record_of, request, spec, with_facts, with_observed

from moelib.audit import audit, record, witness
from moelib.audit.invariants import INVARIANTS
from moelib.engine import logs
from moelib.engine.buffers import Buffer
from moelib.study import gather


def flagged(folder, r, log=None):
    """Checks that fail of `r`, kept beside `log`."""
    kept = keep(folder, r, log)
    return {c.id for c in audit.log(witness.call(folder, kept)) if not c.passed}


@pytest.mark.parametrize("placement", ["baseline", "cpu-moe"])
def test_a_record_and_its_log_agree(tmp_path, placement):
    checks = audit.log(witness.call(tmp_path, keep(tmp_path, record_of(placement=placement))))
    assert {c.id for c in checks} == {i.id for i in INVARIANTS.values() if i.scope == "log"}
    assert all(c.passed for c in checks)


def observed_with(**change):
    return with_observed(record_of(), **change)


def with_manifest(**change):
    return with_facts(record_of(), "sheet", **change)


def first_request(**change):
    return observed_with(requests=(request(0, **change), request(1)))


def report(**change):
    return observed_with(report=replace(observation().report, **change))


def placed(**change):
    return observed_with(placement=replace(observation().placement, **change))


HALVED = tuple(
    Buffer(b.name, b.kind, b.size_bytes // 2 if b.kind == "KV" else b.size_bytes) for b in observation().report.buffers
)
SHIFTED = tuple(t + 0.03 for t in request(0).token_s)

FORGED = {
    "log-tells-the-load": [
        report(buffers=HALVED),
        report(offloaded_layers=4),
        report(total_layers=6),
        report(graph_splits=(3,)),
        report(built="11435 (b11435) with GNU for Linux"),
    ],
    "log-tells-the-file": [
        with_manifest(parameters=66_000_000, bits_per_weight=5.0),
        with_manifest(parameters=54_000_000, bits_per_weight=6.1),
        with_manifest(bits_per_weight=5.6),
        with_manifest(file_bytes=44 * MIB),
        with_manifest(file_bytes=39 * MIB),
        with_manifest(tensor_types={"F32": 12, "Q5_K": 39}),
    ],
    "log-tells-the-settings": [
        observed_with(threads=2),
        record_of(context=2048),
        record_of(load_mode="none"),
        record_of(placement="cpu-moe,ubatch=64"),
        record_of(placement="cpu-moe,kv=q8_0"),
        record_of(placement="cpu-moe,threads=2"),
    ],
    "log-tells-the-reads": [
        placed(device_read_bytes=2 * observation().placement.device_read_bytes),
        placed(host_read_bytes=1),
    ],
    "log-tells-the-requests": [
        first_request(engine_prompt_s=0.01802),
        first_request(engine_predicted_s=0.0402),
        first_request(prompt_n=9),
        first_request(predicted_n=4),
        first_request(engine_prompt_s=None),
    ],
    "log-tells-the-times": [
        observed_with(load_s=2.2),
        observed_with(load_s=0.049),
        observed_with(load_s=None),
        first_request(started_s=0.06),
        first_request(token_s=SHIFTED),
        observed_with(host=replace(observation().host, elapsed_s=0.9)),
    ],
}


@pytest.mark.parametrize(("check", "r"), [(check, r) for check, records in FORGED.items() for r in records])
def test_what_was_changed_in_the_record_alone_is_seen(tmp_path, check, r):
    honest = record_of(placement=r.spec.placement.partition(",")[0])
    assert check in flagged(tmp_path, r, log_of(honest))


def test_every_check_has_a_forgery():
    kept_apart = {"log-kept", "log-tells-the-memory"}
    assert set(FORGED) | kept_apart == {i.id for i in INVARIANTS.values() if i.scope == "log"}


def test_a_log_that_is_gone_changed_or_empty_is_missed(tmp_path):
    kept = keep(tmp_path, record_of())
    (path,) = (tmp_path / "raw").iterdir()
    good = path.read_bytes()
    for harm in (
        path.unlink,
        lambda: path.write_bytes(b"\0" * len(good)),
        lambda: path.write_bytes(good[:-1]),
        lambda: path.write_bytes(gzip.compress(b"another log")),
        lambda: path.write_bytes(b""),
    ):
        harm()
        (check,) = audit.log(witness.call(tmp_path, kept))
        assert (check.id, check.passed) == ("log-kept", False)
        assert path.name in check.measured
        assert "log-kept" in gather.why_not(kept, witness.call(tmp_path, kept))
        path.write_bytes(good)
    assert gather.why_not(kept, witness.call(tmp_path, kept)) is None


def test_a_record_that_names_no_log_has_no_witness(tmp_path):
    (check,) = audit.log(witness.call(tmp_path, record_of()))
    assert (check.passed, check.measured) == (False, "the record names no log of llama-server")
    # a run that failed may have left none
    assert [c.passed for c in audit.log(witness.call(tmp_path, record_of(status="failed")))] == [True]


def test_a_log_that_was_emptied_with_a_digest_that_fits_says_nothing(tmp_path):
    assert flagged(tmp_path, record_of(), "0" * 1000) >= {"log-tells-the-load", "log-tells-the-requests"}


def test_a_flood_is_no_log(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "MAX_BYTES", 1000)
    assert flagged(tmp_path, record_of()) == {"log-kept"}


def test_the_device_had_as_much_in_use_for_the_engine_as_for_the_driver(tmp_path):
    def used(mib):
        total = f"81079 = {81079 - mib} + (1 = 1 + 0 + 0) + 0"
        line = f"0.00.400.000 I common_memory_breakdown_print: |   - CUDA0 (H100 80GB HBM3) | {total} |"
        return log_of(record_of()) + line + "\n"

    o = observation()
    during = tuple(replace(x, device_bytes=2000 * MIB) for x in o.memory.trace.during)
    r = observed_with(memory=replace(o.memory, trace=replace(o.memory.trace, during=during)))
    for n, (mib, right) in enumerate(((2000, True), (2064, True), (1936, True), (2065, False), (1000, False))):
        assert (flagged(tmp_path / str(n), r, used(mib)) == set()) == right
    assert flagged(tmp_path / "loopback", record_of(), used(2000)) == set()  # no driver told


def test_a_study_whose_logs_are_gone_has_no_usable_run(tmp_path):
    for r in block():
        keep(tmp_path, r)
    evidence = gather.gather(tmp_path)
    assert (evidence.problems, len(evidence.starts)) == ({}, 2)
    for path in (tmp_path / "raw").iterdir():
        path.unlink()
    evidence = gather.gather(tmp_path)
    assert set(evidence.problems) == {r.run_id for r in evidence.records}
    assert all("log-kept" in why for why in evidence.problems.values())


def test_light_records_are_audited_before_they_are_made_light(tmp_path):
    for r in block():
        keep(tmp_path, r)
    assert gather.gather(tmp_path, light=True).problems == gather.gather(tmp_path).problems == {}


@pytest.mark.parametrize(
    ("build", "threads", "task", "ended_s", "built"),
    [
        ("b11434", 2, (8, 0.04219, 5, 0.12697), 2.708618, "11434 (b11434) with GNU 12.2.0 for Linux x86_64"),
        ("b11669", 1, (8, 0.00844, 100, 0.26443), 0.378591, "11669 (Debian) with GNU 16.2.0 for Linux x86_64"),
    ],
)
def test_a_log_of_a_present_build_is_read(build, threads, task, ended_s, built):
    log = logs.parse((FIXTURES / f"llama-server-log-{build}.txt").read_bytes())
    assert (log.experts, log.context, log.threads, log.load_mode) == ((64, 6), 1024, threads, "mmap")
    first = log.tasks[0]
    assert (first.prompt_n, first.prompt_s, first.predicted_n, first.predicted_s) == task
    assert first.ended_s == pytest.approx(ended_s)
    assert log.report.built == built
    assert log.ready_s is not None
    assert sum(log.type_counts.values()) > 40


def test_a_log_of_an_old_build_has_no_times():
    log = logs.parse((FIXTURES / "llama-server-log-b6666.txt").read_bytes())
    assert (log.ready_s, log.device_used_bytes, log.experts) == (None, None, (64, 6))
    assert log.report.offloaded_layers == 5


def test_requests_of_a_log_come_with_their_times():
    log = logs.parse(log_of(record_of()).encode())
    assert [t.launched_s for t in log.tasks] == pytest.approx([0.0703, 0.2203], abs=1e-6)
    assert [t.ended_s for t in log.tasks] == pytest.approx([0.1303, 0.2813], abs=1e-6)
    assert log.ready_s == pytest.approx(0.05)
    assert record.spec_key(spec()) == record_of().key
