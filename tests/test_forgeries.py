"""A short form of the forging campaign, `make forgeries`: what it counts, and that little of it is accepted."""

import copy

import pytest
from forgeries import FAMILIES, STUDIES, Court, campaign, moved, published

from moelib.study import frames


@pytest.fixture(scope="module", params=list(STUDIES))
def court(request, tmp_path_factory):
    return Court(STUDIES[request.param], tmp_path_factory.mktemp("court") / "scratch")


def test_honest_records_are_accepted_and_move_nothing(court):
    for cell, runs in court.runs.items():
        assert court.accepts(cell, copy.deepcopy(runs), {})
        assert moved(published(runs), published(copy.deepcopy(runs))) == []


def test_what_is_published_here_is_what_the_tables_are_made_of(court):
    columns = {
        "device memory": "vram_bytes",
        "load": "load_s",
        "host RSS": "host_rss_peak_bytes",
        "rest": "vram_rest_bytes",
        "monitors": "monitor_cpu_share",
    }
    for name, column in columns.items():
        for row in frames.summaries(court.honest.runs, column):
            here = published(court.runs[f"{row.model}/{row.quant}"])[f"{'/'.join(row.side)} {name}"]
            assert row.value.value == pytest.approx(here)


def test_one_of_every_family_and_little_is_accepted(court):
    """Two of a family are few to count by: the campaign's figure is that of `make forgeries`."""
    rows = campaign(court, 2 * len(FAMILIES), seed=3)
    assert all(forged == 2 for forged, _, _ in rows.values())
    changed, accepted = (sum(row[i] for row in rows.values()) for i in (1, 2))
    assert changed > len(FAMILIES)
    assert accepted <= changed / (10 if court.folder.name == "h100-twins" else 5)
    never = ("memory", "token times", "half", "copied", "attempts", "judgement", "logs", "command", "buffers", "header")
    never += ("another runner",)
    assert not [name for name, row in rows.items() if row[2] and name.startswith(never) and "all accounts" not in name]


def test_a_number_that_moves_by_a_twentieth_counts():
    assert moved({"a": 100.0}, {"a": 105.0}) == []
    assert moved({"a": 100.0}, {"a": 105.1}) == ["a"]
    assert moved({"a": 100.0}, {"a": None}) == ["a"]
    assert moved({"a": 0.0}, {"a": 0.1}) == ["a"]
