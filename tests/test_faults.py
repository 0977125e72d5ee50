"""The short form of the fault campaign: every fault once, and 5 kills. `make faults` is the long one, with 50."""

import os

import pytest
from faults import FAULTS, Campaign

pytestmark = pytest.mark.engine

SEED = int(os.environ.get("MOELIB_TEST_SEED", "20261123"))


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    return Campaign(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", FAULTS)
def test_it_is_survived(campaign, name):
    """The right reason, in time, nothing lost, nothing left behind, and the study completes without the fault."""
    campaign.inject(FAULTS[name], SEED)


KINDS = """does not start, port taken, hangs at load, out of memory, dies mid-stream, stalls, stream cut, stream split,
short output, cache hit, flag ignored, CPU instead of the GPU, NaN, disk full, truncated, bit-flipped,
foreign process, two studies on one GPU, kill -9, Ctrl-C, SIGTERM, floods its log, without end,
library exchanged, cold file"""


@pytest.mark.parametrize("kind", " ".join(KINDS.split()).split(", "))
def test_every_kind_of_fault_is_in_the_campaign(kind):
    assert any(kind in name for name in FAULTS)
