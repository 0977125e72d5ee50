"""Whatever lies in a study's folder, each command that reads it ends in a sentence or a document, never a traceback."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import shown
from click.testing import CliRunner, Result
from conftest import FIXTURES, REPO, furnish

from moelib import cli
from moelib.base import files
from moelib.catalogue import params
from moelib.evidence import appendix
from moelib.report import document
from moelib.study import plan, study

CELL = "deepseek-moe-16b-Q2_K"
DEEP = "[" * 10_000 + "]" * 10_000
READERS = {
    "report": ["report", "demo", "--into", "{into}"],
    "status": ["study", "status", "demo"],
    "audit": ["audit", "demo"],
    "card": ["card", "demo", "--namespace", "acme", "--into", "{into}"],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A home whose study is one cell of an earlier demo: six runs, their logs and their manifest."""
    home = furnish(tmp_path_factory.mktemp("small"))
    shutil.copy(FIXTURES / "cell/demo.yaml", home / "params/studies/demo.yaml")
    for kind in ("records", "raw", "quants"):
        shutil.copytree(FIXTURES / "cell" / kind, home / "outputs/demo" / kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELIB_HOME", str(home))
        patch.delenv("MOELIB_OUTPUTS", raising=False)
        params._yaml.cache_clear()
        study.Study.named("demo").begin()
    params._yaml.cache_clear()
    return home


@pytest.fixture
def folder(small, tmp_path, monkeypatch):
    """A copy of that study's folder, to be damaged."""
    shutil.copytree(small, tmp_path / "home")
    monkeypatch.setenv("MOELIB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MOELIB_OUTPUTS", raising=False)

    def without_a_kernel(_: Path, into: Path) -> document.Reported:
        files.write_bytes(into / document.DOCUMENT, shown.document("demo").encode())
        verdict = appendix.problems(study.Study.read(plan.outputs() / "demo")).verdict
        return document.Reported(into / document.DOCUMENT, **verdict)

    monkeypatch.setattr(document.notebooks, "execute", lambda *_: None)
    monkeypatch.setattr(document, "render", without_a_kernel)
    params._yaml.cache_clear()
    yield tmp_path / "home/outputs/demo"
    params._yaml.cache_clear()


def call(how: str, into: Path) -> Result:
    argv = [a.format(into=into) for a in READERS[how]]
    return CliRunner().invoke(cli.main, argv)


def resign(path: Path, change: Callable[[dict], object]) -> None:
    """Change a file that carries its own digest, and make the digest fit."""
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    data["digest"] = files.digest({k: v for k, v in data.items() if k != "digest"})
    path.write_text(json.dumps(data), encoding="utf-8")


def records(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted((folder / "records").glob(f"{pattern}.json"))


def remove(*paths: Path) -> None:
    for path in paths:
        path.unlink()


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def failed(folder: Path, pattern: str = "*") -> None:
    """Put a record of a run that failed in the place of each."""
    for path in records(folder, pattern):
        change = {"status": "failed", "reasons": ["engine-ended"], "message": "x", "observed": None, "audit": []}
        resign(path, lambda data, change=change: data.update(change))


def unknown(folder: Path, key: str) -> None:
    """Take a quantity away from every record."""
    for path in records(folder):
        resign(path, lambda data: data["observed"].update({key: None}))


HARNESS = "outputs/h200-twins/harness/deepseek-moe-16b-Q4_K_M.json"


def harness(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "harness/x.json"
    write(path, (REPO / HARNESS).read_bytes())
    resign(path, change)


@dataclass(frozen=True)
class Harm:
    """What is done to the folder, and what is said of it."""

    do: Callable[[Path], object]
    words: str
    """A pattern that the command's words, or the document, match."""
    document: bool = True
    """Whether there is a document all the same."""
    usable: int = 6
    """Runs that are left to use."""


def manifest(folder: Path) -> Path:
    return folder / "quants" / f"{CELL}.json"


def edit(path: Path, **change: object) -> None:
    write(path, json.dumps(json.loads(path.read_text(encoding="utf-8")) | change))


HARMS = {
    "nothing": Harm(lambda f: None, "6 of 6 runs usable: 6 valid, 0 degraded"),
    "no plan": Harm(lambda f: remove(f / "plan.json"), "holds no plan|6 of 6 runs usable", False, 6),
    "plan of bytes": Harm(lambda f: write(f / "plan.json", b"\xff\xfe\x00"), "was changed or damaged", False, 0),
    "plan a list": Harm(lambda f: write(f / "plan.json", "[]"), "was changed or damaged", False, 0),
    "plan deep": Harm(lambda f: write(f / "plan.json", DEEP), "was changed or damaged", False, 0),
    "plan a folder": Harm(
        lambda f: (remove(f / "plan.json"), (f / "plan.json").mkdir()), "was changed or damaged", False, 0
    ),
    "plan of words": Harm(
        lambda f: resign(f / "plan.json", lambda d: d.update(cells="x")), "no plan of this moelib", False, 0
    ),
    "plan without cells": Harm(
        lambda f: resign(f / "plan.json", lambda d: d.update(cells=[])), "are not those of its study", False, 0
    ),
    "no record": Harm(lambda f: remove(*records(f)), "no valid record|0 of 6 runs usable; 6 missing", False, 0),
    "no folder of records": Harm(
        lambda f: shutil.rmtree(f / "records"), "no valid record|0 of 6 runs usable", False, 0
    ),
    "one record": Harm(
        lambda f: remove(*records(f)[1:]), "1 of 6 runs usable: 1 valid, 0 degraded; 5 missing", True, 1
    ),
    "no offload": Harm(lambda f: remove(*records(f, "*cpu-moe*")), "3 of 6 runs usable", True, 3),
    "no baseline": Harm(lambda f: remove(*records(f, "*baseline*")), "3 of 6 runs usable", True, 3),
    "one block": Harm(lambda f: remove(*records(f, "*_b[12]_*")), "2 of 6 runs usable: 2 valid", True, 2),
    "all failed": Harm(failed, "no valid record|0 of 6 runs usable; 6 invalid", False, 0),
    "all but one failed": Harm(
        lambda f: failed(f, "*_b[12]_*"), "2 of 6 runs usable: 2 valid, 0 degraded; 4 invalid", True, 2
    ),
    "half of each block failed": Harm(lambda f: failed(f, "*cpu-moe*"), "3 of 6 runs usable", True, 3),
    "records of bytes": Harm(
        lambda f: [write(p, b"\xff\x00") for p in records(f)], "no valid record|damaged", False, 0
    ),
    "records deep": Harm(lambda f: [write(p, DEEP) for p in records(f)], "no valid record|damaged", False, 0),
    "one record a list": Harm(lambda f: write(records(f)[0], "[]"), "damaged: ", True, 5),
    "one record empty": Harm(lambda f: write(records(f)[0], ""), "damaged: ", True, 5),
    "one record deep": Harm(lambda f: write(records(f)[0], DEEP), "damaged: ", True, 5),
    "one record a folder": Harm(lambda f: (remove(p := records(f)[0]), p.mkdir()), "damaged: ", True, 5),
    "words for a number": Harm(
        lambda f: resign(records(f)[0], lambda d: d["observed"].update(load_s="soon")), "damaged: ", True, 5
    ),
    "a key too few": Harm(lambda f: resign(records(f)[0], lambda d: d["observed"].pop("load_s")), "damaged: ", True, 5),
    "a key too many": Harm(lambda f: resign(records(f)[0], lambda d: d.update(more=1)), "damaged: ", True, 5),
    "a check of no known name": Harm(
        lambda f: resign(records(f)[0], lambda d: d["audit"].append({"id": "x", "passed": False, "measured": "y"})),
        "its own checks say invalid",
        True,
        5,
    ),
    "valid with a dead output": Harm(
        lambda f: resign(records(f)[0], lambda d: d["observed"].update(top_logprobs=[])),
        "but its audit says invalid: output-alive",
        True,
        5,
    ),
    "no manifest": Harm(lambda f: remove(manifest(f)), "6 of 6 runs usable|could be made|no card"),
    "manifest a list": Harm(lambda f: write(manifest(f), "[]"), "not the manifest of its records"),
    "manifest of bytes": Harm(lambda f: write(manifest(f), b"\xff\xfe"), "not the manifest of its records"),
    "manifest deep": Harm(lambda f: write(manifest(f), DEEP), "not the manifest of its records"),
    "manifest without its keys": Harm(lambda f: write(manifest(f), "{}"), "not the manifest of its records"),
    "manifest of words": Harm(lambda f: edit(manifest(f), file_bytes="big"), "not the manifest of its records"),
    "manifest a folder": Harm(lambda f: (remove(manifest(f)), manifest(f).mkdir()), "not the manifest of its records"),
    "manifest of no cell": Harm(
        lambda f: write(f / "quants/other.json", json.dumps(json.loads(manifest(f).read_bytes()) | {"model": "other"})),
        "6 of 6 runs usable",
    ),
    "harness of words": Harm(lambda f: write(f / "harness/x.json", "none"), "harness/x.json: not what was written"),
    "harness deep": Harm(lambda f: write(f / "harness/x.json", DEEP), "harness/x.json: not what was written"),
    "harness of nothing": Harm(lambda f: harness(f, lambda d: d.update(rounds=[])), "6 of 6 runs usable"),
    "harness about nothing": Harm(lambda f: harness(f, lambda d: d.update(about={})), "not what was written"),
    "harness that stood still": Harm(
        lambda f: harness(f, lambda d: d["rounds"][0]["watched"].update(client=[0.0])), "not what was written"
    ),
    "no logs": Harm(lambda f: shutil.rmtree(f / "raw"), "log-kept", True, 0),
    "a log of bytes": Harm(lambda f: write(next((f / "raw").glob("*server*")), b"\xff"), "log-kept|unpacked", True, 5),
    "notebooks a file": Harm(lambda f: write(f / "notebooks", "x"), "6 of 6 runs usable"),
    "a damaged notebook": Harm(lambda f: write(f / f"notebooks/{CELL}.ipynb", DEEP), "6 of 6 runs usable"),
    "a damaged provenance": Harm(lambda f: write(f / "provenance.json", b"\xff"), "6 of 6 runs usable"),
    "figures a file": Harm(lambda f: write(f / "figures", "x"), "6 of 6 runs usable"),
    "memory unknown": Harm(lambda f: unknown(f, "host_rss_peak_bytes"), "runs usable"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_study_is_a_sentence_or_a_document(folder, tmp_path, harm):
    case = HARMS[harm]
    case.do(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for how in READERS:
        into = tmp_path / how
        done = call(how, into)
        output = done.output
        assert done.exception is None or isinstance(done.exception, SystemExit), (how, done.exception)
        assert "bug in moelib" not in output, (how, output)
        assert "Traceback" not in output
        assert done.exit_code in (0, 1), (how, output)
        assert output.strip()
        if how == "report":
            assert (into / document.DOCUMENT).exists() is case.document, output
            if case.document:
                output += (into / document.DOCUMENT).read_text(encoding="utf-8")
                assert not re.search(r"\b(nan|None|inf)\b", output)
                assert "## Records" in output
                assert not re.search(r"`: \*$", output, re.MULTILINE), "a table without rows and without a reason"
        if how == "card":  # says of what it was made
            continue
        assert re.search(case.words, output), (how, output)
        if harm == "nothing":
            assert done.exit_code == 0, (how, output)
        if case.usable < 6:
            # runs that were not done yet are no fault of a document
            assert done.exit_code == 1 or (how == "report" and "missing" in output), (how, output)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before, "reading wrote something"
