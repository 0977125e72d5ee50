"""The Snakemake workflow, for real: cells measured one by one, merged, documented; nothing of it done twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, SMOKE
from many_machines import SNAKEMAKE

from moelib.audit import record

MOELIB = Path(sys.executable).with_name("moelib")
HOW = {"capture_output": True, "encoding": "utf-8", "timeout": 240}

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not SNAKEMAKE.exists(), reason="no Snakemake: `make test` or `make workflow` sets it up"),
]


@pytest.fixture
def small(home, models_folder):
    """A study of two cells."""
    study = SMOKE.replace("[Q8_0]", "[Q2_K, Q8_0]").replace("rounds: 2", "rounds: 1")
    (home / "params/studies/smoke.yaml").write_text(study, encoding="utf-8")
    return home


def argv(study="smoke", *more, where="local"):
    profile = ("--profile", REPO / "workflow/profiles" / where)
    return [
        SNAKEMAKE,
        "-s",
        REPO / "workflow/Snakefile",
        *profile,
        *more,
        "--config",
        f"study={study}",
        f"moelib={MOELIB}",
    ]


def env(home, models_folder):
    # what a notebook's kernel or a scheduler's own jobs set is none of the workflow's
    return {**os.environ, "MOELIB_HOME": str(home), "MOELIB_MODELS": str(models_folder)} | {
        "MOELIB_OUTPUTS": str(home / "outputs"), "XDG_CACHE_HOME": str(home / "cache")
    }  # fmt: skip


def run(home, models_folder, *args):
    return subprocess.run(argv(*args), cwd=home, env=env(home, models_folder), **HOW)


def records(home):
    return {r.run_id: r.digest for r in record.read_all(home / "outputs/smoke")[0]}


def test_a_study_cell_by_cell_and_nothing_twice(small, models_folder):
    begun = subprocess.Popen(
        argv(), cwd=small, env=env(small, models_folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    cells, deadline = small / "outputs/.smoke-cells", time.monotonic() + 120
    while not any(cells.glob("*/smoke/records/*.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    begun.send_signal(signal.SIGTERM)  # as a scheduler ends the controller: the cell in progress comes to its end
    begun.communicate(timeout=120)
    first = {p.name: p.read_bytes() for p in cells.glob("*/smoke/records/*.json")}
    assert first, "nothing was measured before it was stopped"
    done = run(small, models_folder)
    assert done.returncode == 0, done.stderr[-3000:]
    merged = small / "outputs/smoke"
    assert len(records(small)) == 4
    assert {p.name: p.read_bytes() for p in (merged / "records").glob("*.json")}.items() >= first.items()
    assert (merged / "MOE-TECHNICAL-VALIDATION.md").is_file()
    assert sorted(p.name for p in (merged / "notebooks").glob("*Q*.ipynb")) == [
        "deepseek-moe-16b-Q2_K.ipynb", "deepseek-moe-16b-Q8_0.ipynb"
    ]  # fmt: skip
    before = records(small)
    again = run(small, models_folder)
    assert again.returncode == 0
    assert "Nothing to be done" in again.stderr
    assert records(small) == before


def test_on_slurm_a_cell_is_asked_the_cpus_of_a_node_and_all_of_it(small, models_folder):
    """What would be submitted; `make cluster` does it on a real Slurm."""
    done = subprocess.run(
        [*argv("smoke", "-n", "--cores", "32", where="slurm"), "cpus=32"],
        cwd=small,
        env=env(small, models_folder),
        **HOW,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cells = [rule for rule in done.stdout.split("\nrule ") if rule.startswith("cell:")]
    assert len(cells) == 2
    for cell in cells:
        assert "threads: 32" in cell
        assert "gpu=1, slurm_extra=--exclusive --signal=TERM@60" in cell
    told = subprocess.run(["make", "workflow", "PROFILE=slurm"], cwd=REPO, env=env(small, models_folder), **HOW)
    assert told.returncode == 2
    said = "moelib: say how many CPUs a node has, as a cell is given no more: CPUS=32"
    assert said in told.stdout.splitlines()


def test_what_is_lacking_is_one_sentence(small, models_folder):
    unknown = run(small, models_folder, "smok")
    assert unknown.returncode != 0
    assert "moelib: unknown study 'smok'; did you mean 'smoke'?" in unknown.stderr
    (empty := small / "slurm.conf").touch()  # where there is none, sinfo looks for it for a minute
    lost = env(small, models_folder) | {"SLURM_CONF": str(empty)}
    unreached = subprocess.run([*argv(where="slurm"), "cpus=1"], cwd=small, env=lost, **HOW)
    assert unreached.returncode != 0
    assert "moelib: no Slurm answers here (sinfo): submit where it does, or use the profile local" in unreached.stderr
    assert "rule source" not in unreached.stdout + unreached.stderr, "nothing was submitted"
    named = subprocess.run(["make", "workflow", "PROFILE=slrm"], cwd=REPO, env=env(small, models_folder), **HOW)
    assert "moelib: no profile 'slrm'; there are: local, slurm" in named.stdout.splitlines()
    elsewhere = [*argv()[:-1], "moelib=/nowhere/moelib"]
    done = subprocess.run(elsewhere, cwd=small, env=env(small, models_folder), **HOW)
    assert "/nowhere/moelib is not there: run `make setup`" in done.stderr
