"""`make engine`: what it does with the tools that it finds, and without any. The build itself takes minutes."""

import os
import subprocess
import sys
from types import SimpleNamespace

import build_engine
import pytest
from conftest import REPO

from moelib import engine as engines
from moelib.engine import EngineError


@pytest.fixture
def none_found(tmp_path, monkeypatch):
    """A machine without the tools that reaches no release site, where nothing may be built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MOELIB_ENGINE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(engines, "_package_folder", lambda: None)
    monkeypatch.setattr(engines, "_aside", lambda folder: [])
    monkeypatch.setattr(engines.shutil, "which", lambda name: None)
    monkeypatch.delenv("MOELIB_LLAMA_CPP", raising=False)


@pytest.mark.engine
def test_tools_that_are_found_are_named_and_nothing_is_built(engine, monkeypatch, capsys):
    monkeypatch.setattr(build_engine, "build", lambda: pytest.fail("built"))
    build_engine.main()
    assert capsys.readouterr().out == f"using {engine}\n"


def test_a_named_folder_without_tools_is_one_line_and_an_exit_code(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELIB_LLAMA_CPP", str(tmp_path))
    argv = [sys.executable, str(REPO / "tools/build_engine.py")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, encoding="utf-8")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"moelib: MOELIB_LLAMA_CPP names {tmp_path}, which holds no llama-server")
    assert len(done.stderr.splitlines()) == 1


SERVER = """#!/bin/sh
case "$1" in --version) echo "version: 0.7.0 (build 11669, commit x)";;
  --help) printf -- '--rpc x\\n--list-devices\\n';; esac
"""


@pytest.mark.parametrize(
    ("rpc_server", "why"),
    [
        (None, "has no rpc-server"),
        ("#!/bin/sh\necho Failed to find RPC backend\nexit 1\n", "Failed to find RPC backend"),
    ],
)
def test_a_build_with_nothing_to_offload_to_is_told_with_its_cure(tmp_path, none_found, monkeypatch, rpc_server, why):
    """As where a distribution has RPC in packages of its own, which were not installed."""
    for name, text in (("llama-server", SERVER), ("ggml-rpc-server", rpc_server)):
        if text:
            (tmp_path / name).write_text(text, encoding="utf-8")
            (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("MOELIB_LLAMA_CPP", str(tmp_path))
    monkeypatch.setattr(build_engine, "build", lambda: pytest.fail("built"))
    cure = "apt-get install llama.cpp-tools-extra libggml0-backend-rpc"
    with pytest.raises(EngineError, match=f"(?s)nothing can be offloaded to.*{cure}.*{why}"):
        build_engine.main()


def test_an_installed_package_that_does_not_run_here_is_passed_over(tmp_path, none_found, monkeypatch, capsys):
    server = tmp_path / "package/llama-server"
    server.parent.mkdir()
    server.write_text("#!/bin/sh\nkill -4 $$\n", encoding="utf-8")
    server.chmod(0o755)
    monkeypatch.setattr(engines, "_package_folder", lambda: server.parent)
    monkeypatch.setattr(build_engine, "build", lambda: "llama.cpp b1 (made up)")
    with pytest.raises(EngineError, match=r"make engine.* \(one is installed, but does not run: .*built for a CPU"):
        engines.find()
    build_engine.main()
    assert capsys.readouterr().out.splitlines()[-1] == "built llama.cpp b1 (made up)"


def test_without_tools_they_are_built(none_found, monkeypatch, capsys):
    monkeypatch.setattr(build_engine, "build", lambda: "llama.cpp b1 (made up)")
    build_engine.main()
    assert capsys.readouterr().out.splitlines()[-1] == "built llama.cpp b1 (made up)"


def test_without_a_compiler_it_says_what_to_install(none_found):
    with pytest.raises(EngineError, match="apt-get install g"):
        build_engine.build()


def test_a_build_that_fails_says_so_with_its_last_words(tmp_path, monkeypatch):
    # its own name alone: the bar's lock starts a process of Python's, which would be a false one for all later tests
    monkeypatch.setattr(build_engine, "sys", SimpleNamespace(executable="/bin/false"))
    with pytest.raises(EngineError, match=r"could not be built; .*wheel\.log ends"):
        build_engine._compile(tmp_path / "wheel")
    assert not (tmp_path / "wheel").exists()


@pytest.mark.parametrize(("free", "want"), [(64 << 30, 3), (1 << 30, 2), (0, 1)])
def test_a_build_starts_no_more_compilers_than_the_machine_can_hold(tmp_path, monkeypatch, free, want):
    """The package says `-j`, which is as many as there are files: 60 compilers of 300 MB each on 2 cores."""
    real = tmp_path / "real"
    real.mkdir()
    (real / "gmake").write_text('#!/bin/sh\necho "$#" "$@"\n', encoding="utf-8")
    (real / "gmake").chmod(0o755)
    monkeypatch.setenv("PATH", f"{real}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(build_engine.process, "usable_cpus", lambda: 3)
    monkeypatch.setattr(build_engine.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    env = {"PATH": build_engine.bounded_make(tmp_path / "shim")}
    for args, called in ((["-f", "a b", "-j"], f"3 -f a b -j{want}"), (["-j7", "all"], "2 -j7 all"), ([], "0")):
        done = subprocess.run(["gmake", *args], env=env, capture_output=True, text=True, timeout=60, encoding="utf-8")
        assert done.stdout.strip() == called


def test_every_build_has_rpc_and_its_number():
    flags = build_engine.flags()
    assert {"-DGGML_RPC=ON", f"-DLLAMA_BUILD_NUMBER={build_engine.BUILD}"} <= set(flags)
