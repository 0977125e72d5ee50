"""The short part of the campaign of many machines; `make cluster` does all of it."""

import cluster
import many_machines
import pytest
from cluster import Cluster
from many_machines import EVENTS

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(cluster.missing() is not None, reason=cluster.missing() or ""),
]
SHORT = (
    "two cells at once on two nodes, one folder",
    "two controllers ask for the same cell",
    "folders of their own, merged in any order",
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as c:
        yield c


@pytest.mark.parametrize("name", SHORT)
def test_it_is_survived(slurm, name, tmp_path, models_folder):
    many_machines.inject(slurm, name, tmp_path / "scene", models_folder)


def test_the_campaign_has_every_kind_of_event():
    kinds = ("two cells at once", "two controllers", "killed", "SIGTERM", "clock", "plan changed", "merged")
    assert all(any(kind in name for name in EVENTS) for kind in kinds)
