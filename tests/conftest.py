"""Shared fixtures: a home of its own for every test that writes, and the real engine on the loopback device."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hub import Hub, official_client

from moelib.catalogue import params
from moelib.engine import engine as engines
from moelib.machine import mapped
from moelib.study import plan as plans

REPO = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).parent / "fixtures"

SMOKE = """
title: Smoke test on the smallest twins
models: [deepseek-moe-16b]
weights: twin
scale: nano
quants: [Q8_0]
placements:
  - {placement: baseline, load_mode: mmap}
  - {placement: cpu-moe, load_mode: mmap}
workloads: [smoke]
requests: 2
rounds: 2
context: 256
device: loopback
seed: 1
"""


def stay_off_the_hub(home: str) -> None:
    """Keep away from the real Hub and the user's token; huggingface_hub reads these when imported."""
    for name in [n for n in os.environ if n.startswith(("HF_", "HUGGING"))]:
        del os.environ[name]
    os.environ |= {"HF_HOME": home, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}


def pytest_configure(config: pytest.Config) -> None:
    home = tempfile.mkdtemp(prefix="moelib-tests-hf-")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    stay_off_the_hub(home)


SLOW = {
    # kernels are started; documents, cards, figures and models are made
    "test_committed",
    "test_notebooks",
    "test_cards",
    "test_losses",
    "test_plots",
    "test_twin",
    # commands run as processes of their own, or through whole studies
    "test_cli",
    "test_cluster",
    "test_damaged",
    "test_demo",
    # campaigns: of faults, of forgeries, of hostile strings, of simulated studies
    "test_forgeries",
    "test_neutral::test_no_string_gets_out_in_the_document",
    "test_neutral::test_no_string_gets_out_in_a_card",
    "test_stats::test_a_pooled_95_percent_interval_covers_95_percent",
    "test_stats::test_how_many_intervals_over_machines_hold_the_truth",
    "test_contrasts::test_how_often_it_is_wrong_over_machines",
    "test_sources",
    "test_hub_limits",
    "test_hub",
    "test_gguf_reader::test_hostile_headers_end_in_an_error_or_a_header",
    "test_memory::test_a_value_is_the_truth_whatever_the_driver_shows",
    "test_archive",
    "test_pins",
    "test_remote",
    "test_process",
    "test_probe",
}
"""Files, and tests of other files, that take seconds each; `make quick` leaves them out."""
ALONE = {
    # runs are timed, and audited by what else ran meanwhile
    "test_demo",
    "test_face",
    "test_faults",
    "test_given",
    "test_many_machines",
    "test_notebooks",
    "test_preflight",
    "test_preview",
    "test_quality",
    "test_reference",
    "test_run",
    "test_settings",
    "test_study",
    "test_stub",
    "test_sweep",
    "test_workflow",
}
"""Files whose tests with the real engine have the machine for themselves; `make test` runs all others side by side."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever uses the real engine, whatever is slow, and whatever needs the machine for itself, is marked so."""
    for item in items:
        if "engine" in getattr(item, "fixturenames", ()):
            item.add_marker("engine")
        name = item.path.stem
        if name in ALONE and item.get_closest_marker("engine"):
            item.add_marker("alone")
        if SLOW & {name, f"{name}::{getattr(item, 'originalname', item.name)}"}:
            item.add_marker("slow")


def furnish(home: Path, smoke: str = SMOKE) -> Path:
    """Copy the repository's params and notebooks to `home` and add the study `smoke`; the models that it holds are
    linked."""
    for name in ("params", "notebooks"):
        shutil.copytree(REPO / name, home / name)
    (home / "training").symlink_to(REPO / "training")
    (home / "params/studies/smoke.yaml").write_text(smoke, encoding="utf-8")
    return home


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder -> its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def link_small_studies(study: Path, home: Path) -> None:
    """Let the small studies that a committed study names be found in another folder of studies."""
    for name in plans.read(study / "plan.json").study.small_studies:
        (home / name).symlink_to(study.parent / name)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models_folder: Path) -> Path:
    """A home with the repository's params and notebooks and a study `smoke`; outputs stay inside it."""
    monkeypatch.setenv("MOELIB_HOME", str(furnish(tmp_path)))
    monkeypatch.setenv("MOELIB_MODELS", str(models_folder))
    monkeypatch.delenv("MOELIB_OUTPUTS", raising=False)
    params._yaml.cache_clear()
    yield tmp_path
    params._yaml.cache_clear()


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twins and quants, made once for the whole session."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def engine() -> engines.Engine:
    """The real llama.cpp. `make test` builds it; without it these tests fail rather than pass unseen."""
    return engines.find()


def copy_of(llama: engines.Engine, folder: Path) -> engines.Engine:
    """A copy of the build in `folder`, libraries and all: of a distribution's, that keeps them elsewhere, too."""
    if any(p.name.startswith(LIBRARY) for p in llama.folder.iterdir()):
        return engines.load(shutil.copytree(llama.folder, folder, symlinks=True), "a copy")
    (real := folder / "real").mkdir(parents=True)
    for tool in llama.tools.values():
        said = subprocess.run(["ldd", tool], capture_output=True, text=True, check=True, encoding="utf-8").stdout
        for name, path in re.findall(r"(\S+) => (/\S+)", said):
            if mapped.OWN.search(name):
                shutil.copy(path, real / name)
        shutil.copy(tool, real)
        script = folder / tool.name
        script.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={real} exec {real / tool.name} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
    return engines.load(folder, "a copy")


def need_disk(folder: Path) -> None:
    """Skip the test where the files of `folder` are nowhere but in RAM: they cannot be dropped from the page cache."""
    mounts = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    kind = next((mounts[f] for f in (folder.resolve(), *folder.resolve().parents) if f in mounts), "")
    if kind in ("tmpfs", "ramfs"):
        pytest.skip(f"{folder} is a {kind}, and needs to be on a disk: pytest --basetemp=FOLDER")


LIBRARY = "libggml-base"


def library_of(copy: engines.Engine) -> Path:
    """One that every tool of a copy of a build has mapped."""
    return next(p for p in copy.folder.rglob(f"{LIBRARY}*") if not p.is_symlink())


@pytest.fixture
def peak_rss() -> Callable[[str], int]:
    """Runs code in a Python of its own: the most RAM, in bytes, that it held."""

    def run(code: str) -> int:
        code += "\nimport os; from moelib.machine import process; print(process.peak_rss(os.getpid()))"
        argv = [sys.executable, "-c", code]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    return run


@pytest.fixture
def lfs_hub(tmp_path: Path) -> Hub:
    """A Hub on loopback without xet, and huggingface_hub made fit for it; LFS files above 1 MiB come in parts."""
    with Hub(tmp_path, part_bytes=1 << 20) as hub, official_client(hub):
        yield hub


@pytest.fixture(params=["lfs", "xet"])
def hub(request: pytest.FixtureRequest, tmp_path: Path) -> Hub:
    """A Hub on loopback of either kind, and huggingface_hub made fit for it."""
    with Hub(tmp_path, xet=request.param == "xet", part_bytes=1 << 20) as hub, official_client(hub):
        yield hub
