"""The simulation of many hosts: known answers, and what must hold of any fleet."""

import sys

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import fleet
from fleet import GB, HOUR, Assumed, Kind, simulate

NEVER = Assumed(store_gb_per_s=1e6, link_gb_per_s=1e6, lost_after_h=1e9, start_s=10.0)
SMALL = Kind("m", 2 * GB, GB, 30.0, (20.0, 20.0, 20.0))


def cells(n, kind=SMALL, quants=3):
    return [(f"m{i // quants}", kind) for i in range(n)]


def test_one_host_takes_the_sum():
    done = simulate(cells(6), 1, NEVER, 1)
    assert done.hours * HOUR == pytest.approx(6 * (10 + 30 + 3 * 20), abs=0.1)
    assert (done.lost_h, done.moved_bytes) == (0, 2 * 2 * GB)
    assert done.worked_h == pytest.approx(done.hours, rel=1e-4)


def test_two_hosts_share_a_store_and_a_link_alone_does_not_go_faster():
    slow = Assumed(store_gb_per_s=0.1, link_gb_per_s=0.1, lost_after_h=1e9, start_s=0.0)
    alone = simulate(cells(1), 1, slow, 1)
    both = simulate(cells(6), 2, slow, 1)
    assert alone.waited_h * HOUR == pytest.approx(20)
    assert both.waited_h * HOUR == pytest.approx(2 * 40), "two at once have half each"
    wide = Assumed(store_gb_per_s=100, link_gb_per_s=0.1, lost_after_h=1e9, start_s=0.0)
    assert simulate(cells(6), 2, wide, 1).waited_h * HOUR == pytest.approx(2 * 20)


def test_a_round_that_is_made_again_takes_its_time():
    usual, again = (simulate(cells(300), 1, NEVER, 1, share).worked_h for share in (0.0, 0.5))
    rounds = 300 * 60 / HOUR
    assert again - usual == pytest.approx(rounds, rel=0.15), "each round twice in the mean"


@pytest.mark.parametrize("hosts", [1, 3, 40])
@pytest.mark.parametrize("local", [True, False])
def test_every_cell_ends_once_whatever_is_lost(hosts, local):
    often = Assumed(lost_after_h=0.05, back_after_h=0.01)
    done = simulate(cells(60), hosts, often, 3, 0.1, local=local)
    least = 60 * (3 * 20) / HOUR
    assert done.worked_h >= least
    assert done.lost_h > 0
    assert done.worked_h + done.waited_h + done.lost_h <= done.host_h * (1 + 1e-9)


def test_what_is_kept_is_not_lost():
    often = Assumed(lost_after_h=0.1, back_after_h=0.01)
    kept, anew = (simulate(cells(300), 20, often, 5, resume=r) for r in (True, False))
    assert kept.lost_h < anew.lost_h
    assert kept.hours < anew.hours


def test_more_hosts_are_not_slower_where_the_store_has_no_limit():
    hours = [simulate(cells(300), n, NEVER, 1).hours for n in (1, 2, 5, 20, 100)]
    assert hours == sorted(hours, reverse=True)


def test_local_hosts_move_each_model_about_once():
    local, anywhere = (simulate(cells(300), 10, NEVER, 1, local=of) for of in (True, False))
    assert 200 * GB <= local.moved_bytes <= 230 * GB
    assert anywhere.moved_bytes > 1.5 * local.moved_bytes


def test_a_small_disk_fetches_again():
    tiny = Assumed(disk_gb=2.0, lost_after_h=1e9)
    assert simulate(cells(30), 1, tiny, 1, local=False).moved_bytes > simulate(cells(30), 1, NEVER, 1).moved_bytes


def test_the_same_seed_is_the_same_fleet():
    a, b, other = (simulate(cells(60), 5, Assumed(lost_after_h=0.5), seed, 0.1) for seed in (1, 1, 2))
    assert a == b != other


def test_the_committed_page_is_what_the_simulation_says():
    assert "\n".join(fleet.page()) + "\n" == (REPO / "docs/FLEET.md").read_text(encoding="utf-8")
