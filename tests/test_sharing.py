"""The price of sharing a host, of two studies of it: known answers, and when there is none."""

import sys
from types import SimpleNamespace

import factory
import pandas as pd
import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import sharing

from moelib.base import stats


def run(quant="Q4_K_M", at="10:00:00", lasted=10.0, host="a" * 16, shared=True):
    r = factory.with_facts(factory.record_of(quant=quant), "host", host_id=host, shared=shared)
    return factory.with_observed(r, wall_s=lasted).model_copy(update={"started_utc": f"2026-11-28T{at}+00:00"})


def test_half_the_speed_is_a_half_with_an_interval():
    e = stats.apart([10.0, 11.0, 9.0], [5.0, 5.5, 4.5])
    assert e.value == pytest.approx(0.5)
    assert 0.3 < e.low < 0.5 < e.high < 0.7
    assert e.n == 3


def test_one_run_or_none_that_varies_gives_no_interval():
    assert stats.apart([10.0], [5.0]).low is None
    assert stats.apart([10.0, 10.0], [5.0, 5.0]).low is None


def test_how_long_both_were_measured():
    """Of 10:00:00 to 10:00:40, the second cell has 10:00:10 to 10:00:30."""
    of = [run(at="10:00:00"), run(at="10:00:30"), run("Q2_K", "10:00:10"), run("Q2_K", "10:00:20")]
    assert sharing.lasted(of) == 40
    assert sharing.overlap(of) == pytest.approx(0.5)
    assert sharing.overlap([run(at="10:00:00"), run("Q2_K", "10:01:00")]) == 0


def test_studies_of_two_hosts_or_of_runs_that_were_not_as_said_give_no_answer():
    def of(name, *records):
        return SimpleNamespace(name=name, used=list(records))

    alone, together = of("alone", run(shared=False)), of("together", run())
    sharing.require_one_host(alone, together)
    with pytest.raises(sharing.SharingError, match="2 hosts: measure both on one"):
        sharing.require_one_host(of("alone", run(shared=False, host="b" * 16)), together)
    with pytest.raises(sharing.SharingError, match="alone has runs that shared the host"):
        sharing.require_one_host(of("alone", run()), together)
    with pytest.raises(sharing.SharingError, match="together has runs that had the host alone"):
        sharing.require_one_host(alone, of("together", run(shared=False)))


def frame(*rates, placement="cpu-moe"):
    of = {"quant": "Q4_K_M", "placement": placement, "load_s": 1.0}
    of |= {f"ttft_warm_s/{sharing.WORKLOAD}": 0.1, f"tokens_per_s/{sharing.WORKLOAD}": rates}
    return pd.DataFrame(of)


@pytest.mark.parametrize(
    ("together", "said"),
    [
        ((5.0, 5.1, 4.9), "0.500 [0.478, 0.523] (Q4_K_M): slower at 1 of 1 quants, beyond doubt at 95 %"),
        ((10.0, 10.2, 9.9), "slower at 0 of 1 quants"),
        ((5.0,), "0.500 (n = 1) (Q4_K_M): one round, so without an interval"),
    ],
)
def test_a_placement_is_slower_where_its_interval_says_so(together, said):
    lone = frame(10.0, 10.2, 9.8, placement="cpu-moe,threads=16")
    of = list(sharing.rows(lone, frame(*together), {"cpu-moe": "cpu-moe,threads=16"}))
    assert [r.measure for r in of] == list(sharing.MEASURES)
    assert {r.placement for r in of} == {"cpu-moe; alone cpu-moe,threads=16"}
    (sentence,) = sharing.verdicts(of)
    assert said in sentence


def test_the_page_follows_from_committed_records_alone(tmp_path):
    told = "\n".join(sharing.page())
    assert f"{told}\n" == (REPO / "docs/SHARING.md").read_text(encoding="utf-8")
    nothing = list(sharing.page(tmp_path))
    assert len([line for line in nothing if line.startswith("Not measured: it takes")]) == len(sharing.PAIRS)
