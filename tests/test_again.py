"""How to measure a study again: the commands are those of this project, and what they start is what was started."""

import re
import shlex

import factory
import pytest
from conftest import REPO

from moelib.cli import main
from moelib.evidence import again
from moelib.study.study import Study


def shell(text):
    """The lines of the commands, and of what they start."""
    return [block.splitlines() for block in re.findall(r"```bash\n(.*?)\n```", text, re.S)]


@pytest.mark.parametrize(
    ("folder", "made"),
    [
        ("docs/example/demo", "make setup engine"),
        ("outputs/demo-shimmy", "make setup engine shimmy"),
        ("outputs/two-gpus", "make setup engine"),
    ],
)
def test_the_commands_are_ones_that_there_are(folder, made):
    study = Study.read(REPO / folder)
    steps, started = shell(again.commands(study).text)
    commit = steps[0].removeprefix("git checkout ")
    assert commit in {r.host.commit for r in study.used}
    assert steps[1:] == [made, f".venv/bin/moelib study run {study.name}", f".venv/bin/moelib report {study.name}"]
    targets = (REPO / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in targets for target in made.split()[1:])
    assert {"run", "status"} <= set(main.commands["study"].commands)
    assert "report" in main.commands
    labels = [line.removeprefix("# ") for line in started[::2]]
    assert sorted(labels) == sorted({r.spec.label for r in study.used})
    argvs = {tuple(r.observed.argv) for r in study.used}
    assert {tuple(shlex.split(line)) for line in started[1::2]} <= argvs


def test_the_plans_command_stands_as_it_was_started():
    _, started = shell(again.commands(Study.read(REPO / "outputs/demo-shimmy-generate")).text)
    baseline, away = started[1::2]
    assert baseline.startswith("shimmy generate ")
    assert away == f"{baseline} --cpu-moe"


def test_runs_by_several_commits_are_said_and_those_without_one_are_not_checked_out():
    records = [factory.record_of(placement=p, order=i) for i, p in enumerate(("baseline", "cpu-moe"))]
    demo = Study.read(REPO / "docs/example/demo").parameters

    def of(*commits):
        some = [factory.with_facts(r, "host", commit=c) for r, c in zip(records, commits, strict=True)]
        made = factory.study_of(demo, [], some)
        made.__dict__["used"] = some
        return again.commands(made).text

    assert "2 commits, of which this is the last" in of("a" * 40, "b" * 40)
    assert f"git checkout {'b' * 40}" in of("a" * 40, "b" * 40)
    assert "git checkout" not in of(None, None)
    empty = factory.study_of(demo, [], [])
    assert again.commands(empty).text == "No run is usable."
