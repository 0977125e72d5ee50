"""The commands as a person types them."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import REPO

from moelib import cli, terminal
from moelib.base import files
from moelib.catalogue import params
from moelib.engine import engine
from moelib.gguf import gguf_file
from moelib.models import models


def call(*args):
    return CliRunner().invoke(cli.main, args)


@pytest.mark.engine
def test_doctor_finds_what_is_here(home):
    result = call("doctor")
    assert result.exit_code == 0, result.output
    for what in ("python", "papermill", "llama-server", "--cpu-moe", "device of a study", "RAM", "disk", "studies"):
        assert f"ok {what}" in result.output
    assert "fix:" not in result.output


def test_doctor_says_what_is_missing_and_how_to_mend_it(home, monkeypatch):
    monkeypatch.setattr(engine, "find", lambda *_: (_ for _ in ()).throw(engine.EngineError("not found")))
    result = call("doctor")
    assert result.exit_code == 1
    assert "!! engine" in result.output
    assert "fix: make engine" in result.output


def test_a_wrong_name_is_one_line_and_an_exit_code(home):
    for args in (("twin", "nobody"), ("study", "run", "dmeo"), ("study", "run", "demo", "--cell", "phi/Q2_K")):
        result = call(*args)
        assert result.exit_code == 1
        assert "allowed: " in result.output
        assert "Traceback" not in result.output


@pytest.mark.engine
def test_twin_and_quantize_make_files_that_are_what_they_say(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "m"))
    result = call("twin", "deepseek-moe-16b", "--scale", "nano")
    assert result.exit_code == 0, result.output
    assert files.sha256(models.twin_folder("deepseek-moe-16b", "nano") / "deepseek-moe-16b-F16.gguf") in result.output
    result = call("quantize", "deepseek-moe-16b", "Q2_K", "--scale", "nano")
    assert result.exit_code == 0, result.output
    path, manifest = result.output.splitlines()
    assert json.loads(manifest)["sha256"] == files.sha256(gguf_file.read_header(path).path)


def command(*argv, **how):
    """The command as a process of its own, on the committed demo unless `env` says otherwise."""
    env = {**os.environ, "MOELIB_HOME": str(REPO), "MOELIB_OUTPUTS": str(REPO / "docs/example"), **how.pop("env", {})}
    python = how.pop("python", [])
    argv = [sys.executable, *python, "-m", "moelib.cli", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    return subprocess.run(argv, env=env, encoding="utf-8", errors="replace", timeout=120, cwd=REPO, **pipes)


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys\nfrom moelib import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({m.partition('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=REPO, timeout=60)
    assert "study" in done.stdout
    loaded = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert "click" in loaded
    assert not loaded & {"pandas", "numpy", "scipy", "seaborn", "matplotlib", "papermill", "pydantic", "yaml", "psutil"}


@pytest.mark.parametrize("argv", [("--help",), ("audit", "demo"), ("study", "status", "demo")])
def test_without_docstrings_and_assertions_it_works_the_same(argv):
    done = command(*argv, python=["-OO"])
    assert done.returncode == 0, done.stderr
    if argv != ("--help",):
        assert done.stdout == command(*argv).stdout


ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def test_a_terminal_without_arrows_shows_the_rest():
    for argv in (("audit", "demo"), ("study", "status", "demo"), ("study", "status", "nicht-därin")):
        done = command(*argv, env=ASCII)
        assert "Traceback" not in done.stderr
        assert done.returncode == ("demo" not in argv)
        assert done.stdout + done.stderr


def test_a_document_is_the_same_whatever_the_locale(tmp_path):
    done = command("card", "demo", "--namespace", "moelib", "--into", str(tmp_path), env=ASCII)
    assert done.returncode == 0, done.stderr
    here = REPO / "docs/example/demo/cards"
    made = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert made == {p.relative_to(here): p.read_bytes() for p in here.rglob("*") if p.is_file()}
    assert not any(text.isascii() for name, text in made.items() if name.name == "README.md")


def test_a_reader_that_goes_away_ends_it_quietly():
    read, write = os.pipe()
    os.close(read)
    done = command("audit", "demo", stdout=write)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full: Linux has one")
def test_a_full_disk_behind_standard_output_is_a_sentence():
    with open("/dev/full", "wb") as full:
        done = command("audit", "demo", stdout=full)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("moelib: standard output: No space left on device; free some space")


PLACES = {
    "a file": lambda tmp: (tmp / "file").write_text("x", encoding="utf-8") and tmp / "file",
    "below a file": lambda tmp: (tmp / "file").write_text("x", encoding="utf-8") and tmp / "file/below",
    "a loop": lambda tmp: (tmp / "loop").symlink_to(tmp / "loop") or tmp / "loop",
    "a name too long": lambda tmp: tmp / ("x" * 300),
    "not writable": lambda tmp: Path("/proc/nothing"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("variable", ["MOELIB_OUTPUTS", "MOELIB_HOME", "MOELIB_MODELS"])
def test_a_place_that_is_none_is_a_sentence(home, tmp_path, monkeypatch, variable, place):
    monkeypatch.setenv(variable, str(PLACES[place](tmp_path)))
    params._yaml.cache_clear()
    card = ("card", "smoke", "--namespace", "a")
    reading = (("study", "status", "smoke"), ("audit", "smoke"), ("report", "smoke"), card)
    writing = (("twin", "deepseek-moe-16b", "--scale", "nano"), ("study", "run", "smoke"))
    for argv in (*reading, *writing):
        if argv[0] == "twin" and variable == "MOELIB_OUTPUTS":
            continue  # it needs no such place
        if argv[:2] == ("study", "run") and variable == "MOELIB_MODELS":
            continue  # that a cell cannot be made is said by its notebook
        done = call(*argv)
        assert done.exit_code == 1, (argv, done.output)
        assert isinstance(done.exception, SystemExit)
        assert "bug in moelib" not in done.output, (argv, done.output)
        assert "Traceback" not in done.output


def test_ctrl_c_says_that_nothing_is_lost(monkeypatch):
    """That nothing is: the fault campaign's Ctrl-C at random moments."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("moelib.study.study.Study.read", interrupted)
    done = call("audit", "demo")
    assert done.exit_code == 130
    assert "what is finished is kept, run the same command to go on" in done.output


def test_what_nobody_thought_of_is_one_line_too(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("made up \x1b[31m")

    monkeypatch.setattr("moelib.study.study.Study.read", broken)
    done = call("audit", "demo")
    assert done.exit_code == 1
    assert "moelib: ZeroDivisionError: made up" in done.output
    assert "this is a bug in moelib" in done.output
    assert "\x1b" not in done.output


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["stduy"], "did you mean 'study'"),
        (["study", "rn"], "did you mean 'run'"),
        (["xyz"], "there are audit, card, doctor"),
        (["study", "status", "demmo"], "unknown study 'demmo'; did you mean 'demo'?; allowed: demo, demo-shimmy,"),
        (["twin", "phi-3-moe"], "did you mean 'phi-3.5-moe'"),
        (["quantize", "phi-3.5-moe", "Q4_KM"], "did you mean 'Q4_K_M'"),
    ],
)
def test_a_misspelt_name_gets_the_nearest_one_or_the_list(argv, says):
    done = call(*argv)
    assert done.exit_code
    assert says in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("moelib st", {"study"}),
        ("moelib study run d", {"demo", "demo-shimmy", "demo-shimmy-2", "demo-shimmy-generate", "demo-twins"}),
        ("moelib study run demo --cell trained-phimoe/Q2", {"trained-phimoe/Q2_K", "trained-phimoe/Q2_K-imatrix"}),
        ("moelib quantize deep", {"deepseek-moe-16b"}),
        ("moelib quantize phi-3.5-moe IQ4", {"IQ4_NL", "IQ4_XS"}),
        ("moelib audit h200-", {"h200-cold", "h200-context", "h200-twins"}),
        ("moelib he", {"header"}),
        ("moelib header --j", {"--json"}),
    ],
)
def test_a_shell_completes_names(words, offered):
    env = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_MOELIB_COMPLETE": "bash_complete"}
    argv = [sys.executable, "-c", "from moelib.cli import main; main(prog_name='moelib')"]
    done = subprocess.run(argv, env={**os.environ, **env}, capture_output=True, text=True, encoding="utf-8", cwd=REPO)
    assert {line.partition(",")[2] for line in done.stdout.split()} == offered


def test_a_shell_completes_the_names_of_files():
    (argument,) = [p for p in cli.header.params if p.name == "file"]
    assert [item.type for item in argument.shell_complete(None, "models/")] == ["file"]


def test_a_name_that_cannot_be_completed_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv("MOELIB_HOME", str(tmp_path))
    assert terminal.STUDIES(None, None, "") == terminal.CELLS(None, None, "") == []


def test_the_answer_comes_first(monkeypatch):
    monkeypatch.setenv("MOELIB_OUTPUTS", str(REPO / "docs/example"))
    for argv in (["study", "status", "demo"], ["audit", "demo"]):
        assert call(*argv).output.startswith("60 of 60 runs usable: 60 valid, 0 degraded\n")
    assert re.match(r"all that a study needs is here|\d+ to fix: ", call("doctor").output)
