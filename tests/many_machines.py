"""The campaign of many machines: a study's cells on a real Slurm of two nodes, with what happens to clusters.

`make cluster` does all of it and prints a table; the tests do the short part. Nodes are namespaces of this machine,
with one thread each, so their speeds say nothing; what is asked is that nothing is lost, nothing is done twice, and
what cannot be compared is refused.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cluster
import yaml
from cluster import Cluster
from conftest import REPO, SMOKE, furnish, tree
from machines import until

from moelib.audit import record
from moelib.engine import engine
from moelib.merge import merge
from moelib.study.study import Study

QUANTS = ("Q2_K", "Q8_0")
DEMO = ("trained-phimoe", "trained-deepseek")
MODEL = "deepseek-moe-16b"
WORKFLOW, SNAKEMAKE = REPO / "workflow", REPO / ".venv-workflow/bin/snakemake"
QUOTE = "'"  # around what Snakemake would read as an expression
CELL_S = 150.0  # for a cell, with the minute after which a dead holder's lease ends
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


@dataclass
class Scene:
    """Two nodes, a study of two cells, and a folder that the nodes share."""

    slurm: Cluster
    folder: Path
    models: Path
    rounds: int = 2
    study: str = "smoke"

    def __post_init__(self) -> None:
        study = SMOKE.replace("[Q8_0]", f"[{', '.join(QUANTS)}]").replace("rounds: 2", f"rounds: {self.rounds}")
        self.home = furnish(self.folder / "home", study)

    @property
    def outputs(self) -> Path:
        return self.home / "outputs"

    def place(self, home: Path | None = None, outputs: Path | None = None) -> dict[str, str]:
        """The environment of a job: where parameters, models, outputs and the engine are."""
        places = {
            "MOELIB_HOME": home or self.home,
            "MOELIB_MODELS": self.models,
            "MOELIB_OUTPUTS": outputs or self.outputs,
            "MOELIB_LLAMA_CPP": engine.find().folder,
        }
        return {name: str(value) for name, value in places.items()}

    def submit(self, part: str, *options: str, home: Path | None = None, outputs: Path | None = None) -> int:
        """A job of a cell of `smoke` by its quant, or of the demo by its model; on the node that Slurm gives it, or
        that `options` name."""
        cell = f"{MODEL}/{part}" if self.study == "smoke" else part
        lines = [f"export {name}='{value}'" for name, value in self.place(home, outputs).items()]
        lines.append(f"cpu=$(( ${{SLURMD_NODENAME#node}} % {os.cpu_count()} ))")
        lines.append(f"exec taskset -c $cpu {sys.executable} -m moelib.cli study run {self.study} --cell {cell}")
        return self.slurm.submit("\n".join(lines), "--time=30", *options)

    def records(self, outputs: Path | None = None) -> dict[str, str]:
        """Run id -> digest of the usable runs."""
        listed, damaged = record.read_all((outputs or self.outputs) / "smoke")
        assert not damaged, damaged
        return {r.run_id: r.digest for r in listed if r.done}

    def until_records(self, n: int) -> dict[str, str]:
        place = self.outputs / "smoke/records"
        until(lambda: len(list(place.glob("*.json"))) >= n, CELL_S, lambda: f"fewer than {n} records in {place}")
        return self.records()

    def finish(self, *jobs: int, state: str = "COMPLETED", within_s: float = CELL_S) -> None:
        for job in jobs:
            ended = self.slurm.wait(job, ENDED, within_s)
            assert ended == state, f"job {job} is {ended}:\n{self.slurm.output(job)[-3000:]}"

    def complete(self, before: dict[str, str] | None = None) -> None:
        """Every planned run once, by one machine a round, and what was measured before is still there."""
        study = Study.read(self.outputs / "smoke")
        runs = 2 * self.rounds * len(QUANTS)
        assert (study.tally["planned"], study.tally["usable"]) == (runs, runs), study.problems
        assert (before or {}).items() <= self.records().items(), "a record was lost or changed"
        keys = [r.key for r in study.records if r.done and r.key in {s.key for s in study.used}]
        assert len(set(keys)) == runs
        assert all(len({r.host.host_id for r in block}) == 1 for block in study.rounds)
        assert not study.problems, study.problems

    def hosts(self) -> set[str | None]:
        return {r.host.host_id for r in record.read_all(self.outputs / "smoke")[0]}


Event = Callable[[Scene], None]
EVENTS: dict[str, Event] = {}


def event(name: str) -> Callable[[Event], Event]:
    def keep(happens: Event) -> Event:
        EVENTS[name] = happens
        return happens

    return keep


@event("two cells at once on two nodes, one folder")
def _(s: Scene) -> None:
    s.finish(*(s.submit(q) for q in QUANTS))
    s.complete()
    assert len(s.hosts()) == 2, "both were measured on one node"


@event("the workflow, by its profile for Slurm")
def _(s: Scene) -> None:
    if not SNAKEMAKE.exists():
        raise RuntimeError("no Snakemake here: `make workflow ARGS=--version` sets it up")
    profile = WORKFLOW / "profiles/slurm"
    asked = yaml.safe_load((profile / "config.yaml").read_text(encoding="utf-8"))["set-resources"]
    asked["cell"]["gpu"], asked["quantise"]["cpus_per_task"] = 0, 1  # what these nodes have
    resources = [f"{rule}:{k}={str(v).strip(QUOTE)}" for rule, of in asked.items() for k, v in of.items()]
    argv = [SNAKEMAKE, "-s", WORKFLOW / "Snakefile", "--profile", profile, "--directory", s.home]
    argv += ["--set-resources", *resources, "--slurm-status-command", "squeue"]  # accounts are kept nowhere here
    argv += ["--slurm-init-seconds-before-status-checks", 3]
    argv += ["--config", "study=smoke", "cpus=1", f"moelib={Path(sys.executable).with_name('moelib')}"]
    s.slurm.run(list(map(str, argv)), 2 * CELL_S, XDG_CACHE_HOME=str(s.folder / "cache"), **s.place())
    s.complete()
    assert len(s.hosts()) == 2, "both were measured on one node"
    assert (s.outputs / "smoke/MOE-TECHNICAL-VALIDATION.md").is_file()


@event("two controllers ask for the same cell")
def _(s: Scene) -> None:
    jobs = [s.submit("Q8_0", f"--nodelist=node{n}") for n in (1, 2)]
    s.finish(*jobs, s.submit("Q2_K"))
    s.complete()
    attempts = [r.attempt for r in record.read_all(s.outputs / "smoke")[0]]
    assert set(attempts) == {1}, "a run was done twice"
    waited = [int(s.slurm.show(job)["Restarts"]) for job in jobs]
    told = "".join(map(s.slurm.output, jobs))
    assert sum(waited) == 0 or "is in use by" in told, told


@event("a node is killed in the middle of a cell")
def _(s: Scene) -> None:
    job, other = s.submit("Q8_0", "--nodelist=node1"), s.submit("Q2_K", "--nodelist=node2")
    before = s.until_records(1)
    s.slurm.kill_node(1)
    s.finish(other)
    s.slurm.start_node(1)
    s.slurm.wait(job, ENDED, 2 * CELL_S, restarts=1)
    s.finish(job)
    s.complete(before)


@event("SIGTERM at a requeue, with time to end in")
def _(s: Scene) -> None:
    job, other = s.submit("Q8_0"), s.submit("Q2_K")
    before = s.until_records(1)
    s.slurm.run(["scontrol", "requeue", str(job)])
    s.finish(job, other)
    told = s.slurm.output(job)
    assert "interrupted; what is finished is kept" in told, told
    s.complete(before)


@event("a clock that is an hour off on one node")
def _(s: Scene) -> None:
    s.slurm.shift_clock(2, -3600)
    try:
        s.finish(s.submit("Q8_0", "--nodelist=node1"), s.submit("Q2_K", "--nodelist=node2"))
    finally:
        s.slurm.shift_clock(2, 0)
    s.complete()
    begun = {r.spec.quant: r.started_utc for r in record.read_all(s.outputs / "smoke")[0]}
    assert begun["Q8_0"] > begun["Q2_K"], "the clock of the second node was not off"


@event("a plan changed on one node")
def _(s: Scene) -> None:
    job = s.submit("Q8_0", "--nodelist=node1")
    s.until_records(1)
    changed = furnish(
        s.folder / "changed",
        (s.home / "params/studies/smoke.yaml").read_text(encoding="utf-8").replace("seed: 1", "seed: 2"),
    )
    refused = s.submit("Q2_K", "--nodelist=node2", home=changed)
    s.finish(refused, state="FAILED")
    assert "is the plan of a study with other parameters" in s.slurm.output(refused)
    s.finish(job, s.submit("Q2_K"))
    s.complete()


@event("folders of their own, merged in any order")
def _(s: Scene) -> None:
    own = [s.folder / f"own{n}" for n in (1, 2)]
    s.finish(*(s.submit(q, f"--nodelist=node{n + 1}", outputs=own[n]) for n, q in enumerate(QUANTS)))
    folders = [o / "smoke" for o in own]
    for place, order in ((s.outputs / "smoke", folders), (s.folder / "other/smoke", folders[::-1])):
        merge.merge(place, order)
    assert tree(s.outputs / "smoke") == tree(s.folder / "other/smoke")
    s.complete()


def inject(slurm: Cluster, name: str, folder: Path, models: Path) -> float:
    """Let it happen to a study of its own; how long that took, in seconds."""
    started = time.monotonic()
    folder.mkdir(parents=True)
    EVENTS[name](Scene(slurm, folder, models))
    return time.monotonic() - started


def demo(slurm: Cluster, folder: Path, models: Path, nodes: int) -> float:
    """Seconds of the demo's cells on so many nodes, which share a folder."""
    scene, started = Scene(slurm, folder, models, study="demo"), time.monotonic()
    scene.finish(*(scene.submit(m, f"--nodelist=node{1 + n % nodes}") for n, m in enumerate(DEMO)), within_s=900)
    study = Study.read(scene.outputs / "demo")
    assert not study.problems, study.problems
    return time.monotonic() - started


def main() -> None:
    if why := cluster.missing():
        sys.exit(f"moelib: {why}")
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    order = list(EVENTS)
    random.Random(seed).shuffle(order)
    folder = Path(tempfile.mkdtemp(prefix="moelib-cluster-"))
    lost = 0
    print(f"| event (seed {seed}) | survived | s |\n| --- | --- | --- |", flush=True)
    try:
        with Cluster(folder / "slurm") as slurm:
            for i, name in enumerate(order):
                try:
                    took = f"yes | {inject(slurm, name, folder / str(i), folder / 'models'):.0f}"
                except Exception as err:
                    lost += 1
                    took = f"no: {' '.join(str(err).split())[:300]} | "
                print(f"| {name} | {took} |", flush=True)
            for nodes in (1, 2):
                took_s = demo(slurm, folder / f"on{nodes}", folder / "models", nodes)
                print(f"the demo on {nodes} node{'s' * (nodes > 1)}, one thread each: {took_s:.0f} s", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(order) - lost} of {len(order)} survived")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
