"""Publishing under faults: every request of a publication made to fail, in every way the Hub on loopback can.

    python tests/publishing.py             the whole campaign, and its table
    python tests/publishing.py --every 8   each eighth of its cases, as the test suite does

A case is safe if nothing partial or wrong was ever public, the end is success or one of our errors without a token in
it, and the same command run again finishes the work and sends no finished file again. Where storage itself keeps wrong
bytes, the second run cannot mend it: safe is then that both runs refuse to make anything public.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from hub import HOWS, Hub, official_client
from hub_state import MAIN

from moelib.campaign import campaign as measuring
from moelib.catalogue import params
from moelib.publish import upload
from moelib.study import study

TOKEN, SPACE = "hf_write", "alice"
STUDY = """
title: Files to publish
models: [{models}]
weights: twin
scale: nano
quants: [{quants}]
placements:
  - {{placement: baseline, load_mode: mmap}}
  - {{placement: cpu-moe, load_mode: mmap}}
workloads: [smoke]
requests: 2
rounds: 2
context: 256
device: loopback
seed: 7
"""


def measured(home: Path, models="deepseek-moe-16b", quants="Q8_0"):
    """Run a small study in `home` with the real llama.cpp, if it has not been; its results."""
    (home / "params/studies/files.yaml").write_text(STUDY.format(models=models, quants=quants), encoding="utf-8")
    params._yaml.cache_clear()
    folder, cells = measuring.select("files")
    assert measuring.run_cells(folder, cells) == []
    return study.Study.read(folder.path)


@contextmanager
def loopback_hub(folder, xet=False):
    with tempfile.TemporaryDirectory(dir=folder) as own:
        with Hub(Path(own), xet=xet, part_bytes=1 << 20, silence_s=3) as server, official_client(server):
            with mock.patch.dict(os.environ, HF_TOKEN=TOKEN, MOELIB_PATIENCE="0.005"):  # 60 s of silence: 0.3 s
                yield server


def go(results, server, public=True):
    """Plan and publish; returns the lines of its progress."""
    progress = []
    upload.publish(upload.plan(results, SPACE, public, server.url), progress.append, server.url)
    return progress


def wanted(results):
    """Repository -> {file: SHA-256} as it must be in the end."""
    digests = {}
    for p in upload.plan(results, SPACE, True, "http://127.0.0.1:9"):
        digests[p.repository] = {i.name: i.sha256 for i in p.items}
    return digests


def visible(server):
    """[{repository: {file: SHA-256}}] that anyone could see on main, at each change of it."""
    states = []
    for _, repositories in server.public_history():
        shown = {r: refs.get(MAIN, {}) for r, refs in repositories.items()}
        states.append({r: {k: v for k, v in tree.items() if k != ".gitattributes"} for r, tree in shown.items()})
    return states


OLD = b"---\nlicense: mit\n---\n# What was here before\n"


class Scene(NamedTuple):
    """A Hub to publish to: with xet or without, the repositories new or public already."""

    xet: bool
    public: bool

    def __str__(self):
        return f"{'xet' if self.xet else 'LFS'}, {'a public repository' if self.public else 'a new repository'}"

    @contextmanager
    def hub(self, folder, goal):
        with loopback_hub(folder, self.xet) as server:
            for repository in goal if self.public else ():
                server.put(repository, {"README.md": OLD})
            yield server


SCENES = [Scene(xet, public) for public in (False, True) for xet in (False, True)]


class Case(NamedTuple):
    how: str
    nth: int
    times: int | None
    line: str

    def __str__(self):
        return f"{self.how} {'always' if self.times is None else 'once'} at request {self.nth}, {self.line}"


def cases(results, folder, scene, every=1, first=0):
    """The requests of a clean publication, each with every fault, once and always."""
    with scene.hub(folder, wanted(results)) as server:
        go(results, server)
        lines = [r.line for r in server.requests]
    every_case = [Case(how, n + 1, t, line) for n, line in enumerate(lines) for how in HOWS for t in (1, None)]
    return every_case[first % every :: every]


def judge(results, folder, scene, case):
    """None if the case is safe, else what went wrong; and whether the fault struck."""
    goal = wanted(results)
    with scene.hub(folder, goal) as server:
        before = visible(server)[-1]
        fault = server.fail(case.how, nth=case.nth, times=case.times)
        first = attempt(results, server)
        struck = fault.struck
        server._faults.clear()
        server.let_go()
        sent = server.requests[:]
        with mock.patch.dict(os.environ, MOELIB_PATIENCE="1"):  # nothing fails now, on a busy machine neither
            second = attempt(results, server)
        states = visible(server)
        again = server.requests[len(sent) :]
        shown = {repository: tree for repository, tree in states[-1].items() if tree == goal[repository]}
        given = {r: {k: sha256(server.read(r, k)).hexdigest() for k in tree} for r, tree in shown.items()}
    if shown != given:
        return "wrong bytes became public", struck
    for tree in states:
        for repository, shown in tree.items():
            if shown not in (goal[repository], before.get(repository)):
                return f"{repository} showed {sorted(shown)}", struck
    for error in (first, second):
        if isinstance(error, str) and error.startswith("BUG"):
            return error, struck
    rotten = second is not None and "was read back with SHA-256" in second and case.how == "corrupt"
    if second is not None and not rotten:
        return f"the second run failed: {second}", struck
    if not rotten and states[-1] != goal:
        return "after the second run not everything is public", struck
    if rotten and states[-1] != before:
        return "wrong bytes became public", struck
    stored = {r.line for r in sent if r.method == "PUT" and r.status == 200 and r.fault is None}
    # the parts of one file begin anew together
    if twice := [r.line for r in again if r.method == "PUT" and r.line in stored and "part" not in r.line]:
        return f"sent again: {twice[0]}", struck
    return None, struck


def attempt(results, server):
    """None for success, the message of one of our errors, or a text that begins with BUG."""
    try:
        go(results, server)
    except params.UserError as err:
        return str(err) if TOKEN not in str(err) else f"BUG: the token is in {err}"
    except Exception as err:
        return f"BUG: {type(err).__name__}: {err}"
    return None


def campaign(results, folder, scene, every=1, first=0, say=print):
    """Every case; returns (injected by fault, safe by fault, what was not safe)."""
    injected, safe, wrong = Counter(), Counter(), []
    todo = cases(results, folder, scene, every, first)
    for n, case in enumerate(todo):
        finding, struck = judge(results, folder, scene, case)
        if not struck:
            continue  # another order of requests: nothing failed
        injected[case.how] += 1
        safe[case.how] += finding is None
        if finding:
            wrong.append(f"{case}: {finding}")
            say(f"NOT SAFE {wrong[-1]}")
        if (n + 1) % 50 == 0:
            say(f"  {n + 1} of {len(todo)} cases")
    return injected, safe, wrong


def main():
    from conftest import furnish, stay_off_the_hub

    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--every", type=int, default=1, help="each so many cases")
    ask.add_argument("--scene", type=int, choices=range(len(SCENES)), help="one of: " + "; ".join(map(str, SCENES)))
    args = ask.parse_args()
    with tempfile.TemporaryDirectory() as own:
        stay_off_the_hub(own)
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error"}
        home = furnish(Path(own) / "home")
        os.environ |= {"MOELIB_HOME": str(home), "MOELIB_MODELS": str(Path(own) / "models")}
        results, failed = measured(home), []
        for scene in SCENES if args.scene is None else [SCENES[args.scene]]:
            injected, safe, wrong = campaign(results, own, scene, args.every)
            failed += wrong
            print(f"\n{scene}: injected {injected.total()}, safe {safe.total()}")
            for how in HOWS:
                print(f"  {how:8} injected {injected[how]:4}  safe {safe[how]:4}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
