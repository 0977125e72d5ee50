"""Each check has a record that violates it alone and is flagged by it alone."""

from dataclasses import replace

import pytest
from factory import BASE, EXPERTS, MIB, block, made, observation, request, spec

from moelib import audit
from moelib.engine import Buffer, Report


def broken(arm="baseline", **change):
    return arm, replace(observation(arm), **change)


def one_request(**change):
    return broken(requests=(request(0, **change), request(1)))


def memory(placement="baseline", **change):
    return broken(placement, memory=replace(observation(placement).memory, **change))


def device_weights(placement, nbytes):
    seen = observation(placement)
    buffers = tuple(
        replace(b, size_bytes=nbytes) if b.on_device and b.kind == "model" else b for b in seen.report.buffers
    )
    return placement, replace(seen, report=replace(seen.report, buffers=buffers))


VIOLATIONS = {
    "requests-complete": broken(requests=(request(0),)),
    "counts-exact": one_request(prompt_n=7),
    "stream-finished": one_request(finished=False),
    "cache-not-hit": one_request(cache_n=3),
    "times-ordered": one_request(token_s=(0.02, 0.03, 0.025, 0.04, 0.05)),
    "layers-offloaded": broken(report=replace(observation().report, offloaded_layers=4)),
    "placement-moves": broken("cpu-moe", placement=replace(observation("cpu-moe").placement, moved_bytes=0)),
    "placement-on-device": device_weights("cpu-moe", BASE),  # the flag did nothing
    "memory-known": memory(value_bytes=None, status="invalid", reasons=("no-samples",)),
    "memory-undoubted": memory(status="degraded", reasons=("sampled-peak",)),
    "clean-end": broken(exit_code=-9, exit_killed=True),
}


def failed(placement, seen):
    checks = audit.run(spec(placement=placement), seen)
    return audit.verdict(checks)


@pytest.mark.parametrize("placement", ["baseline", "cpu-moe"])
def test_an_unbroken_run_is_valid(placement):
    assert failed(placement, observation(placement)) == ("valid", ())


def test_every_check_has_its_violation():
    assert set(VIOLATIONS) == set(audit.RUN_CHECKS)


@pytest.mark.parametrize("check", VIOLATIONS)
def test_a_violation_is_flagged_by_its_check_alone(check):
    status, reasons = failed(*VIOLATIONS[check])
    alone = {check, "memory-undoubted"} if check == "memory-known" else {check}  # what is unknown is also doubted
    assert set(reasons) == alone
    assert status == ("degraded" if check in audit.DEGRADES else "invalid")


@pytest.mark.parametrize(
    "change",
    [
        {"predicted_n": 4},
        {"prompt_n": None},
        {"predicted_n": None},
        {"tokens": (1, 2, 3, 4, 5, 6)},
        {"token_n": (1, 2, 3, 4, 6)},
    ],
)
def test_counts_have_many_ways_to_be_wrong(change):
    assert failed(*one_request(**change)) == ("invalid", ("counts-exact",))


def test_an_incomplete_character_at_the_end_is_not_an_error():
    held = {"token_s": (0.02, 0.04), "token_n": (1, 3), "tokens": (7, 8)}
    assert failed(*one_request(**held)) == ("valid", ())


@pytest.mark.parametrize("token_s", [(), (0.0, 0.01, 0.02, 0.03, 0.04)])
def test_no_first_token_is_no_time(token_s):
    n = tuple(range(1, len(token_s) + 1))
    assert "times-ordered" in failed(*one_request(token_s=token_s, token_n=n))[1]


def test_nothing_is_not_valid():
    assert audit.verdict(()) == ("invalid", ("nothing-checked",))
    empty = observation(requests=())
    wrong = set(failed("baseline", empty)[1])
    assert {"requests-complete", "counts-exact", "stream-finished", "cache-not-hit", "times-ordered"} == wrong
    silent = observation(report=Report((), None, None, ()))
    assert {"layers-offloaded", "placement-on-device"} == set(failed("baseline", silent)[1])


def test_a_device_that_is_not_there_can_offload_nothing():
    gone = replace(observation().memory, value_bytes=None, status="degraded", reasons=("no-device",))
    assert failed("baseline", observation(memory=gone)) == ("degraded", ("memory-undoubted",))
    status, reasons = failed("cpu-moe", observation("cpu-moe", memory=gone))
    assert (status, "placement-moves" in reasons) == ("invalid", True)


def test_placement_tolerance_is_a_mebibyte_and_a_thousandth():
    assert audit.agrees(BASE + MIB, BASE)
    assert audit.agrees(1000 * MIB + 2 * MIB, 1000 * MIB)
    assert not audit.agrees(1000 * MIB + 2 * MIB + 1, 1000 * MIB)
    assert not audit.agrees(MIB + 1, 0)


def flagged(runs):
    return {c.id for c in audit.block(runs) if not c.passed}


def test_a_whole_block_passes_every_block_check():
    checks = audit.block(block())
    assert {c.id for c in checks} == set(audit.BLOCK_CHECKS)
    assert all(c.passed for c in checks)


def with_report(record, **change):
    return record.model_copy(
        update={"observed": replace(record.observed, report=replace(record.observed.report, **change))}
    )


def test_block_checks_flag_what_only_a_comparison_shows():
    base, moe = block()
    assert flagged([]) == {"block-complete"}
    assert flagged([moe]) == {"block-complete"}
    assert flagged([base]) == {"block-complete"}
    assert flagged([base, base]) == {"block-complete"}
    assert flagged([base, made(load_mode="none", order=1)]) == {"block-complete"}
    assert flagged([base, made(status="failed", placement="cpu-moe", order=1)]) == {"block-complete"}
    assert flagged([base, with_report(moe, graph_splits=(2,))]) == {"block-placement"}
    assert flagged([base, with_report(moe, graph_splits=())]) == {"block-placement"}
    for part, change in {
        "sheet": {"sha256": "c" * 64},
        "engine": {"server_sha256": "c" * 64},
        "device": {"kind": "loopback", "name": "another", "uuid": None},
    }.items():
        other = moe.model_copy(update={part: {**getattr(moe, part), **change}})
        assert flagged([base, other]) == {"block-alike"}, part
    other = moe.model_copy(update={"observed": replace(moe.observed, threads=2)})
    assert flagged([base, other]) == {"block-alike"}


def test_a_flag_that_did_nothing_fails_the_block():
    base, moe = block()
    ignored = tuple(
        Buffer(b.name, b.kind, b.size_bytes + EXPERTS) if b.on_device and b.kind == "model" else b
        for b in moe.observed.report.buffers
    )
    assert flagged([base, with_report(moe, buffers=ignored, graph_splits=(2,))]) == {"block-placement"}
