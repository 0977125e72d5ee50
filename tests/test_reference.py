"""A study for a card that holds no baseline, through runs, audit and document."""

import re

import pytest
from conftest import SMOKE

from moelib.campaign import campaign
from moelib.catalogue import params
from moelib.report import document
from moelib.study.study import Study

TIGHT = SMOKE.replace("deepseek-moe-16b", "phi-3.5-moe").replace("placement: baseline", "placement: n-cpu-moe=1")


@pytest.mark.engine
def test_a_study_without_a_baseline_says_what_it_compares_with(home, engine):
    (home / "params/studies/tight.yaml").write_text(TIGHT, encoding="utf-8")
    params._yaml.cache_clear()
    study, cells = campaign.select("tight")
    campaign.run_cells(study, cells)
    measured = Study.named("tight")
    assert not [p for p in measured.problems if "busy" not in p and "quiet" not in p], measured.problems
    text = document.report("tight", progress=False).path.read_text(encoding="utf-8")
    assert "of the VRAM that n-cpu-moe=1 takes" in text
    assert re.search(r"\| +% of n-cpu-moe=1 +\|", text)
    assert re.search(r"\| +times n-cpu-moe=1 +\|", text)
    speed = text.split("## Speed")[1].split("## Laws")[0]
    assert "baseline" not in speed
