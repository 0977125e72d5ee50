"""Where the fault campaign works: a home with a study that the stub or the real server runs, or a GPU of readings."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import psutil
import stub_server
from conftest import SMOKE, furnish
from factory import SHARED, spec

from moelib.audit import record as records
from moelib.base import files
from moelib.campaign import campaign
from moelib.catalogue import params
from moelib.engine import engine
from moelib.machine import host
from moelib.measure import device, llama_server
from moelib.measure import run as runs
from moelib.measure.memory import Reading
from moelib.measure.nvml import Counters
from moelib.models import models, quantize
from moelib.study.study import Study

MIB = 1 << 20
LONG = """
long:
  title: long enough to be interrupted
  text: Explain quantum computing in simple terms.
  generate_tokens: 240
"""
# What a cell of a test may be flagged with: its runs are few and short, and others hold them up.
HELD_UP = {"placements-keep-the-engines-time", "starts-alike", "monitors-alike"}
LOOK_S = 3e-4  # of CPU, as a look at a real card takes
BANDWIDTH = mock.patch.object(host, "read_bandwidth", return_value=1e9)  # measured once a cell, and slow


class FakeGpu(device.Device):
    """A GPU by its readings alone; the stub plays the engine on it. `during` changes a reading of the run."""

    kind, name, context_bytes = "cuda", "fake GPU", 512 * MIB

    def __init__(self, uuid: str = "GPU-fake"):
        self.uuid = uuid
        self.change: Callable[[int, Reading], Reading] = lambda _, reading: reading

    @contextmanager
    def session(self, engine, work):
        taken = iter(range(10**9))

        def read(server_pid, t_s):
            began = time.thread_time()
            while time.thread_time() - began < LOOK_S:
                pass
            ours = 560 * MIB if server_pid and psutil.pid_exists(server_pid) else None
            plain = Reading(t_s, ours, 1024 * MIB + (ours or 0), bool(ours), ())
            return self.change(next(taken) - device.IDLE_READINGS, plain)

        yield device.Session(["--device", "CUDA0"], read, lambda t_s: Counters(t_s, events=0), shared=True)


class Lab:
    """A home with a study of two blocks and the stub in front of llama-server."""

    def __init__(self, home: Path, llama: engine.Engine, where: device.Device, real: bool = False):
        self.home, self.where, self.real = home, where, real
        smoke = SMOKE.replace("[smoke]", "[long]").replace("requests: 2", "requests: 1") if real else SMOKE
        furnish(home, smoke)
        with (home / "params/workloads.yaml").open("a", encoding="utf-8") as f:
            f.write(LONG)
        self.stub = stub_server.install(home / "tools", llama)
        self.models = home.parent / "models"

    def prepare(self):
        """Have the study whole, to be copied by `reset`."""
        with self:
            self.script()
            assert self.measure() == "valid"
            complete(self.folder.path)
            shutil.copytree(self.folder.path, self.home / "whole")
        return self

    def __enter__(self):
        self.environ = mock.patch.dict(os.environ, MOELIB_HOME=str(self.home), MOELIB_MODELS=str(self.models))
        self.environ.start()
        os.environ.pop("MOELIB_OUTPUTS", None)
        params._yaml.cache_clear()
        return self

    def __exit__(self, *_):
        self.environ.stop()
        params._yaml.cache_clear()

    def reset(self):
        """The study with its first block done."""
        out = self.home / "outputs/smoke"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.home / "whole", out)
        for path in (out / "records").glob("*_b1_*"):
            path.unlink()
        self.script()

    def script(self, **defect):
        stub_server.script(self.stub, **({"real": True} if self.real else {}) | defect)

    @property
    def folder(self):
        return Study.named("smoke")

    @property
    def server_log(self):
        return self.folder.work / f"{files.node()}.{os.getpid()}" / "server.log"

    def measure(self, within=contextlib.nullcontext):
        """Do what is not done; what was wrong with the runs that were done now, or `valid`."""
        folder = self.folder
        before = {r.run_id for r in records.read_all(folder.path)[0]}
        with mock.patch.object(engine, "find", return_value=self.stub), within():
            with mock.patch.object(device, "choose", return_value=self.where), BANDWIDTH:
                list(campaign.measure(folder, folder.cells[:1]))
        new = [r for r in records.read_all(folder.path)[0] if r.run_id not in before]
        wrong = {reason for r in new for reason in r.reasons if reason not in SHARED}
        self.messages = " ".join(r.message for r in new if r.message)
        return ", ".join(sorted(wrong)) or "valid"

    def valid(self):
        """Files of the valid records, with their bytes."""
        paths = sorted((self.home / "outputs/smoke/records").glob("*.json"))
        return {p.name: p.read_bytes() for p in paths if _done(p)}

    def left_behind(self):
        """Processes, partial files, notes and scratch that should be gone."""
        out = [f"process {p.pid} {p.name()}" for p in psutil.Process().children(recursive=True) if _alive(p)]
        for base in (self.home / "outputs", self.models):
            out += [str(p) for kind in ("*.partial", "*.child.json") for p in base.rglob(kind)]
        work = self.home / "outputs/smoke/work"
        return out + ([str(p) for p in work.iterdir()] if work.exists() else [])

    def nano(self, llama: engine.Engine | None = None) -> quantize.Quantised:
        """The smallest quant, in a folder of its own."""
        return quantize.make(models.make_twin("deepseek-moe-16b", "nano"), "Q8_0", llama or self.stub, self.home / "q")

    def execute(
        self, file: quantize.Quantised, llama: engine.Engine | None = None, asked: runs.Spec | None = None
    ) -> runs.Outcome:
        """One run, of no study."""
        runner = llama_server.LlamaServer(llama or self.stub)
        outcome = runs.execute(asked or RUN, file, runner, self.where, self.home / "run")
        shutil.rmtree(self.home / "run")
        return outcome


RUN = spec(workloads=("smoke",), context=256)


def complete(out: Path) -> None:
    """The valid records are exactly the planned runs, one each."""
    study = Study.named("smoke")
    listed, damaged = records.read_all(out)
    assert not damaged
    planned = sorted(records.spec_key(s) for c in study.cells for s in c.specs)
    assert sorted(r.key for r in listed if r.done) == planned
    problems = [p for c in study.cells for p in study.status_now(c).problems]
    assert [p for p in problems if not any(f": {check}: " in p for check in HELD_UP)] == []


def _done(path: Path) -> bool:
    try:
        return records.read(path).done
    except records.RecordError:
        return False


def _alive(p: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return p.status() != psutil.STATUS_ZOMBIE
    return False


@contextmanager
def patience(factor: float) -> Iterator[None]:
    """Limits of waits, made short."""
    with mock.patch.dict(os.environ, MOELIB_PATIENCE=str(factor)):
        yield
