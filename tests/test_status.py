"""How many runs there are to use: the same words everywhere, and counts that add up."""

import pytest
from factory import block, observation, record_of, spec, study_of, with_facts, with_observed

from moelib.catalogue import params
from moelib.study.plan import Cell
from moelib.study.status import summary


@pytest.mark.parametrize(
    ("tally", "flags", "text"),
    [
        (
            {"valid": 57, "degraded": 33},
            {"host-quiet": 33},
            "90 of 90 runs usable: 57 valid, 33 degraded (host-quiet in 33)",
        ),
        ({"valid": 36}, {}, "36 of 36 runs usable: 36 valid, 0 degraded"),
        (
            {"valid": 2, "degraded": 1, "invalid": 4, "missing": 5},
            {"b": 1, "a": 1},
            "3 of 12 runs usable: 2 valid, 1 degraded (a in 1, b in 1); 4 invalid, 5 missing",
        ),
        ({"missing": 6}, {}, "0 of 6 runs usable; 6 missing"),
        ({"invalid": 1}, {}, "0 of 1 runs usable; 1 invalid"),
        ({}, {}, "0 of 0 runs usable"),
    ],
)
def test_known_words(tally, flags, text):
    assert summary({"valid": 0, "degraded": 0, "invalid": 0, "missing": 0} | tally, flags) == text


def results(*rounds):
    """A study of these rounds: (baseline, offload), where None was not run."""
    specs = tuple((spec(block=b), spec(block=b, placement="cpu-moe", order=1)) for b in range(len(rounds)))
    change = {"models": ("deepseek-moe-16b",), "quants": ("Q4_K_M",)}
    parameters = params.study("demo-twins").model_copy(update=change)
    return study_of(parameters, [Cell("deepseek-moe-16b", "Q4_K_M", specs)], [r for runs in rounds for r in runs if r])


def flagged(**change):
    return record_of(observation(change.get("placement", "baseline"), exit_code=9, exit_killed=True), **change)


def test_flags_are_those_of_the_runs_that_are_counted_as_usable():
    base, _ = block(block=1)
    noisy = flagged(placement="cpu-moe", order=1)
    study = results((record_of(), noisy), (base, None))
    assert study.flags == study.statuses["deepseek-moe-16b/Q4_K_M"].flags == {"clean-end": 1}
    assert study.summary().startswith("3 of 4 runs usable: 2 valid, 1 degraded (clean-end in 1); 1 missing")
    # alone in its block it is usable all the same; with one that does not fit it is not
    assert results((flagged(), None)).flags == {"clean-end": 1}
    other = with_observed(with_facts(noisy, "sheet", sha256="c" * 64), file_sha256="c" * 64)
    apart = results((flagged(), other))
    assert apart.tally["invalid"] == 2
    assert apart.flags == {}
    assert apart.summary() == "0 of 2 runs usable; 2 invalid"
