"""The commands as a person types them."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from moelib import cli, engine, files, gguf_file, record


def call(*args):
    return CliRunner().invoke(cli.main, args)


@pytest.mark.engine
def test_doctor_finds_what_is_here(home):
    result = call("doctor")
    assert result.exit_code == 0, result.output
    for what in ("python", "papermill", "llama-server", "--cpu-moe", "device of a study", "RAM", "disk", "studies"):
        assert f"ok {what}" in result.output
    assert "mend" not in result.output


def test_doctor_says_what_is_missing_and_how_to_mend_it(home, monkeypatch):
    monkeypatch.setattr(engine, "find", lambda *_: (_ for _ in ()).throw(engine.EngineError("not found")))
    result = call("doctor")
    assert result.exit_code == 1
    assert "!! engine" in result.output
    assert "mend: make engine" in result.output


def test_a_wrong_name_is_one_line_and_an_exit_code(home):
    for args in (("twin", "nobody"), ("study", "run", "dmeo"), ("study", "run", "demo", "--cell", "phi/Q2_K")):
        result = call(*args)
        assert result.exit_code == 1
        assert "allowed: " in result.output
        assert "Traceback" not in result.output


def test_twin_and_quantize_make_files_that_are_what_they_say(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "m"))
    result = call("twin", "deepseek-moe-16b", "--scale", "nano", "--out", str(tmp_path / "t.gguf"))
    assert result.exit_code == 0, result.output
    assert files.sha256(tmp_path / "t.gguf") in result.output
    result = call("quantize", "deepseek-moe-16b", "Q2_K", "--scale", "nano")
    assert result.exit_code == 0, result.output
    path, sheet = result.output.splitlines()
    assert json.loads(sheet)["sha256"] == files.sha256(gguf_file.read_header(path).path)


@pytest.mark.engine
def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(home, models_folder):
    argv = [sys.executable, "-m", "moelib.cli", "study", "run", "smoke"]
    env = {**os.environ, "MOELIB_MODELS": str(models_folder)}
    # as a terminal starts it: a job in the background of a script is told to ignore Ctrl-C
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(argv, env=env, preexec_fn=listen, **pipes)
    out, deadline = home / "outputs/smoke", time.monotonic() + 60
    while not list(out.glob("records/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command to go on" in words
    kept, damaged = record.read_all(out)
    assert kept
    assert not damaged
    assert len(kept) < 4
    again = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "4 of 4 runs usable" in again.stdout
    after = {r.run_id: r.digest for r in record.read_all(out)[0]}
    assert {r.run_id: r.digest for r in kept}.items() <= after.items()
    assert len(after) == 4
