"""kill -9 at 50 random moments of a study, the runner or its kernel; run again; nothing is lost, nothing done twice."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import SMOKE, furnish

from moelib.audit import record
from moelib.catalogue import params
from moelib.study.study import Study

KILLS = 50
LONGEST_S = 6.0  # a whole smoke study takes about as long: every moment of it is hit
# What a cell of a test may be flagged with: its runs are few and short, and others hold them up.
HELD_UP = {"arms-keep-the-engines-time", "starts-alike", "monitors-alike"}
MOELIB = [sys.executable, "-m", "moelib.cli"]


@pytest.mark.engine
def test_kill_9_at_random_moments_loses_nothing(tmp_path, monkeypatch, models_folder):
    furnish(tmp_path, SMOKE.replace("rounds: 2", "rounds: 3"))
    monkeypatch.setenv("MOELIB_HOME", str(tmp_path))
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "models"))
    monkeypatch.delenv("MOELIB_OUTPUTS", raising=False)
    params._yaml.cache_clear()
    chance = random.Random(seed := int(os.environ.get("MOELIB_TEST_SEED", "20261123")))
    out = tmp_path / "outputs/smoke"
    kills = completed = 0
    kept: dict[str, bytes] = {}
    while kills < KILLS:
        process = subprocess.Popen(
            [*MOELIB, "study", "run", "smoke"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            ended = process.wait(timeout=chance.uniform(0.2, LONGEST_S))
        except subprocess.TimeoutExpired:
            kill(process, chance)
            kills += 1
            ended = process.wait(timeout=60)
        records, damaged = record.read_all(out) if out.exists() else ([], [])
        assert not damaged, f"seed {seed}, kill {kills}"
        now = {r.run_id: r.digest for r in records if r.done}
        assert kept.items() <= now.items(), f"seed {seed}, kill {kills}: a valid record was lost or changed"
        kept = now
        if ended == 0:
            complete(out)
            completed += 1
            kept = {}
            # start over, every other time with the files to be made again too
            shutil.rmtree(out)
            if completed % 2 == 0:
                shutil.rmtree(tmp_path / "models")
    # whatever the last kill left, one more run makes it whole
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        done = subprocess.run(
            [*MOELIB, "study", "run", "smoke"], capture_output=True, text=True, timeout=120, encoding="utf-8"
        )
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    complete(out)
    assert no_orphans(), "an engine outlived its study"
    params._yaml.cache_clear()


def kill(process, chance):
    """Kill the runner, whose kernel must then end by itself, or its kernel, whose death the runner must notice."""
    try:
        children = psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        children = []
    with contextlib.suppress(ProcessLookupError):
        os.kill(chance.choice([process.pid, *(c.pid for c in children)]), signal.SIGKILL)


def complete(out):
    """The valid records are exactly the planned runs, one each."""
    folder = Study.named("smoke")
    records, damaged = record.read_all(out)
    assert not damaged
    planned = sorted(record.spec_key(s) for c in folder.cells for s in c.specs)
    assert sorted(r.key for r in records if r.done) == planned
    problems = [p for c in folder.cells for p in folder.status_now(c).problems]
    assert [p for p in problems if not any(f": {check}: " in p for check in HELD_UP)] == []


def no_orphans(within_s=15):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        mine = [
            p
            for p in psutil.process_iter(["name", "cmdline"])
            if "nano" in " ".join(p.info["cmdline"] or []) and "llama" in (p.info["name"] or "")
        ]
        if not mine:
            return True
        time.sleep(0.2)
    return False
