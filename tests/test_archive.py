"""`make engine` and release archives: downloaded from a release site on loopback, verified, unpacked and tried.

The build from source itself takes minutes and is not run here.
"""

import hashlib
import http.server
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from types import SimpleNamespace

import build_engine
import pytest
import yaml
from conftest import REPO

from moelib.catalogue import params
from moelib.engine import archive, release
from moelib.engine import engine as engines
from moelib.engine.engine import EngineError
from moelib.engine.release import ArchiveError, Unreachable
from moelib.machine import gpus, mapped
from moelib.measure import trial

BUILD = 11194
NAME, CPU = "llama-b11194-bin-ubuntu-x64.tar.gz", "linux-x86_64/cpu"
SERVER = """#!/bin/sh
case "$1" in --version) echo "version: 0.6.0 (build 11194, commit x)";;
  --help) printf -- '--cpu-moe x\\n--rpc x\\n--list-devices\\n';; esac
"""
BUILT = "llama.cpp b1 (built)"


class Site(http.server.ThreadingHTTPServer):
    """A release site: serves `files` by path, a text as a redirection. `requests`: their paths.

    `cut`: how many bytes each of the next answers sends before the connection closes.
    """

    daemon_threads = True

    def __init__(self):
        self.files, self.requests, self.cut, self.delay_s = {}, [], [], 0
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site, data = self.server, self.server.files.get(self.path)
        assert self.headers["Accept-Encoding"] == "identity"
        site.requests.append(self.path)
        time.sleep(site.delay_s)
        if data is None:
            return self.send_error(404)
        if isinstance(data, str):
            self.send_response(302)
            self.send_header("Location", data)
            return self.end_headers()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: site.cut.pop(0)] if site.cut else data)

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    with Site() as server:
        yield server
        server.shutdown()


@pytest.fixture
def machine(tmp_path, monkeypatch, site):
    """A Linux machine without tools and GPU: an empty cache, params of its own, the release site on loopback."""
    shutil.copytree(REPO / "params", tmp_path / "home/params")
    monkeypatch.setenv("MOELIB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MOELIB_ENGINE_URL", f"http://127.0.0.1:{site.server_port}")
    monkeypatch.delenv("MOELIB_LLAMA_CPP", raising=False)
    monkeypatch.setattr(engines, "_package_folder", lambda: None)
    monkeypatch.setattr(engines, "_aside", lambda folder: [])
    monkeypatch.setattr(engines.shutil, "which", lambda name: None)
    monkeypatch.setattr(archive, "system", lambda: "linux-x86_64")
    monkeypatch.setattr(gpus, "driver_cuda", lambda: None)
    monkeypatch.setattr(build_engine, "has_cuda", lambda: False)
    params._yaml.cache_clear()
    yield tmp_path
    params._yaml.cache_clear()


@pytest.fixture
def make_engine(machine, monkeypatch, capsys):
    """Runs `make engine` with a builder that builds nothing, and returns what it prints."""
    monkeypatch.setattr(build_engine, "build", lambda: BUILT)

    def run():
        build_engine.main()
        return capsys.readouterr().out

    return run


def packed(*members):
    """A .tar.gz of (name, bytes or TarInfo)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size, info.mode = len(content), 0o755
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return out.getvalue()


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def pinned(machine, files, key=CPU, **change):
    """Pin these files, name -> content, with `change` in each entry; the release site does not get them."""
    path = machine / "home/params/engine.yaml"
    book = yaml.safe_load(path.read_text(encoding="utf-8"))
    entries = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest(), **change} for n, d in files.items()}
    book["pins"][key] = {"build": BUILD, "glibc": "2.17", "files": entries}
    path.write_text(yaml.safe_dump(book), encoding="utf-8")
    params._yaml.cache_clear()
    return archive.Archive(key.partition("/")[2], archive.read().pins[key])


def offered(site, machine, data, **change):
    """Pin an archive with this content that the release site serves."""
    site.files[f"/b{BUILD}/{NAME}"] = data
    return pinned(machine, {NAME: data}, **change)


GOOD = packed(
    (f"llama-b{BUILD}/llama-server", SERVER.encode()),
    (f"llama-b{BUILD}/libggml.so.0", os.urandom(200_000)),
    link(f"llama-b{BUILD}/libggml.so", "libggml.so.0"),
)


def cached(machine):
    return sorted(p.name for p in (machine / "cache/moelib").iterdir() if not p.name.endswith(".lock"))


# pins
def test_the_repository_pins_the_cpu_archive(machine):
    (pin,) = archive.read().pins.values()
    assert (pin.build, pin.glibc, list(pin.files)) == (BUILD, "2.35", [NAME])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"build": None}, "valid integer"),
        ({"files": {}}, "at least 1 item"),
        ({"files": {"../x.tar.gz": {"bytes": 1, "sha256": "0" * 64}}}, "pattern"),
        ({"files": {"x.tar.gz": {"bytes": 0, "sha256": "0" * 64}}}, "greater than 0"),
        ({"files": {"x.tar.gz": {"bytes": 1, "sha256": "0"}}}, "pattern"),
        ({"more": 1}, "not permitted"),
    ],
)
def test_a_pin_that_is_not_whole_is_refused(machine, change, words):
    pin = {"build": 1, "glibc": "2.35", "files": {"x.tar.gz": {"bytes": 1, "sha256": "0" * 64}}, **change}
    book = yaml.safe_dump({"url": "https://x", "pins": {CPU: pin}})
    (machine / "home/params/engine.yaml").write_text(book, encoding="utf-8")
    with pytest.raises(params.ParamsError, match=f"params/engine.yaml: .*{words}"):
        archive.read()


# download
def test_a_good_archive_is_downloaded_once_unpacked_and_kept(machine, site):
    pin = offered(site, machine, GOOD)
    tools = archive.fetch(pin)
    assert (tools / "llama-server").stat().st_mode & 0o111
    assert os.readlink(tools / "libggml.so") == "libggml.so.0"
    assert cached(machine) == [pin.folder.name]
    assert str(BUILD) in pin.folder.name
    assert archive.fetch(pin) == tools
    assert len(site.requests) == 1


def test_another_hash_or_file_name_is_another_folder(machine):
    folders = {pinned(machine, {name: data}).folder for data in (b"a", b"b") for name in ("a.tar.gz", "b.tar.gz")}
    assert len(folders) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": "0" * 64}, r"has SHA-256 .*, but 000000000000\.\.\. is pinned; it was deleted"),
        ({"bytes": 1000}, "longer than the 1000 bytes that are pinned; it was deleted"),
    ],
)
def test_a_file_of_another_hash_or_size_is_deleted(machine, site, change, words):
    with pytest.raises(ArchiveError, match=words):
        archive.fetch(offered(site, machine, GOOD, **change))
    assert cached(machine) == []


def test_an_interrupted_download_is_tried_again_whatever_an_earlier_process_left(machine, site):
    pin, site.cut = offered(site, machine, GOOD), [1000, 50_000]
    (machine / f"cache/moelib/.{pin.folder.name}.unpacking/llama-b{BUILD}").mkdir(parents=True)
    archive.fetch(pin)
    assert (len(site.requests), cached(machine)) == (3, [pin.folder.name])


def test_a_site_that_breaks_off_again_and_again_is_given_up(machine, site):
    site.cut = [1000] * release.TRIES
    with pytest.raises(Unreachable, match="127.0.0.1 cannot be reached: .*closed"):
        archive.fetch(offered(site, machine, GOOD))
    assert cached(machine) == []


def test_a_missing_file_is_named(machine):
    with pytest.raises(ArchiveError, match=f"{NAME} cannot be downloaded: the release site answers 404"):
        archive.fetch(pinned(machine, {NAME: b"x"}))


@pytest.mark.parametrize(
    "url",
    ["http://example.org", "ftp://127.0.0.1", "file:///etc", "127.0.0.1", "http://127.0.0.1.example.org", "http://["],
)
def test_only_https_or_loopback_is_asked(machine, monkeypatch, url):
    monkeypatch.setenv("MOELIB_ENGINE_URL", url)
    with pytest.raises(ArchiveError, match="MOELIB_ENGINE_URL names"):
        archive.fetch(pinned(machine, {NAME: b"x"}))


def test_a_redirection_may_not_lead_off_https(machine, site):
    site.files[f"/b{BUILD}/{NAME}"] = "http://example.org/x"
    with pytest.raises(ArchiveError, match="release site names 'http://example.org/x': give an address that begins"):
        archive.fetch(pinned(machine, {NAME: b"x"}))


# unpacking
@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("../out", b"xx")], "outside"),
        ([link("a", "/etc")], "absolute path"),
        ([link("a", ".."), ("a/out", b"xx")], "outside"),
        ([link("dev", "", tarfile.CHRTYPE)], "special file"),
    ],
)
def test_members_that_no_release_has_are_refused(tmp_path, members, words):
    path = tmp_path / "x.tar.gz"
    path.write_bytes(packed(*members))
    (tmp_path / "in").mkdir()
    with pytest.raises(ArchiveError, match=words):
        release.extract(path, tmp_path / "in")
    assert {p.name for p in tmp_path.iterdir()} == {"x.tar.gz", "in"}


def test_an_absolute_name_is_unpacked_inside_the_folder(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(packed((f"{tmp_path}/out", b"x")))
    release.extract(tmp_path / "x.tar.gz", tmp_path / "in")
    assert {p.name for p in tmp_path.iterdir()} == {"x.tar.gz", "in"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        *((GOOD[:cut] or b"PK", "cannot be unpacked") for cut in (0, 10, 100, 5000)),
        (packed(("x", b"x")), "holds no llama-server"),
    ],
    ids=["0 bytes", "10 bytes", "100 bytes", "5000 bytes", "another program"],  # the data's own differ by the hour
)
def test_a_damaged_archive_is_refused_whatever_its_hash(machine, site, data, words):
    pin = offered(site, machine, data)
    with pytest.raises(ArchiveError, match=words):
        archive.fetch(pin)
    assert pin.tools() is None


def relink(tools):
    (tools / "libggml.so").unlink()
    (tools / "libggml.so").symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    "harm",
    [
        lambda tools: os.truncate(tools / "libggml.so.0", 100),
        lambda tools: (tools / "libggml.so.0").unlink(),
        lambda tools: (tools / "libmore.so").write_bytes(b"x"),
        lambda tools: (tools.parent / archive.MANIFEST).write_text("{", encoding="utf-8"),
        relink,
    ],
    ids=["cut", "missing", "more", "manifest", "link"],
)
def test_a_damaged_cache_is_replaced(machine, site, harm):
    pin = offered(site, machine, GOOD)
    tools = archive.fetch(pin)
    harm(tools)
    assert not archive.whole(pin.folder)
    assert archive.fetch(pin) == tools
    assert archive.whole(pin.folder)
    assert ((tools / "libggml.so.0").stat().st_size, len(site.requests)) == (200_000, 2)


def test_the_libraries_of_a_separate_runtime_are_moved_beside_the_tools(machine, site):
    files = {"a.tar.gz": GOOD, "b.tar.gz": packed(("cudart/lib/libcudart.so.12", b"runtime"))}
    site.files = {f"/b{BUILD}/{name}": data for name, data in files.items()}
    folder = archive.fetch(pinned(machine, files, "linux-x86_64/cuda-12.8"))
    assert (folder / "libcudart.so.12").read_bytes() == b"runtime"


def test_several_processes_at_once_download_once(machine, site):
    pin, site.delay_s = offered(site, machine, GOOD), 1.5  # so that all are there before the first is done
    code = (
        f"from moelib.engine import archive; print(archive.fetch(archive.Archive('cpu', archive.read().pins['{CPU}'])))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, encoding="utf-8")
        for _ in range(3)
    ]
    assert {run.communicate(timeout=60)[0] for run in runs} == {f"{pin.tools()}\n"}
    assert len(site.requests) == 1


def test_without_a_cache_the_message_is_one_sentence_with_the_next_step(machine, monkeypatch):
    pin = pinned(machine, {NAME: GOOD})
    (machine / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine / "file"))
    with pytest.raises(ArchiveError, match="file/moelib cannot be written: set XDG_CACHE_HOME to a folder of yours"):
        archive.fetch(pin)
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setattr(archive.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(ArchiveError, match="no home folder to store an engine in: set XDG_CACHE_HOME"):
        archive.fetch(pin)
    assert archive.installed() is None


# which archive fits
@pytest.mark.parametrize(
    ("system", "cuda", "libc", "backends", "reasons"),
    [
        ("linux-x86_64", None, "2.39", ["cpu"], 0),
        ("linux-x86_64", (12, 8), "2.39", ["cuda-12.8", "cpu"], 1),
        ("linux-x86_64", (13, 4), "2.39", ["cuda-13.4", "cuda-12.8", "cpu"], 0),
        ("linux-x86_64", (12, 4), "2.39", ["cpu"], 2),
        ("linux-x86_64", (13, 4), "2.36", ["cpu"], 2),
        ("linux-x86_64", None, "2.31", [], 1),
        ("linux-x86_64", None, "", [], 1),  # another C library
        ("linux-aarch64", None, "2.39", [], 0),
    ],
)
def test_the_archive_is_chosen_by_system_driver_and_c_library(
    machine, monkeypatch, system, cuda, libc, backends, reasons
):
    monkeypatch.setattr(archive, "system", lambda: system)
    monkeypatch.setattr(gpus, "driver_cuda", lambda: cuda)
    monkeypatch.setattr(archive.platform, "libc_ver", lambda: ("glibc", libc) if libc else ("", ""))
    file = {"x.tar.gz": archive.File(bytes=1, sha256="0" * 64)}
    pins = {
        f"linux-x86_64/{backend}": archive.Pin(build=1, glibc=glibc, files=file)
        for backend, glibc in (("cpu", "2.35"), ("cuda-12.8", "2.39"), ("cuda-13.4", "2.39"))
    }
    monkeypatch.setattr(archive, "read", lambda: archive.Pins(url="https://x", pins=pins))
    fitting, passed_over = archive.fitting()
    assert [a.backend for a in fitting] == backends
    assert len(passed_over) == reasons


# make engine, without tools
def test_offline_it_is_built_from_source_within_seconds_and_one_line_says_why(machine, make_engine, monkeypatch):
    monkeypatch.setenv("MOELIB_ENGINE_URL", "http://127.0.0.1:9")
    pinned(machine, {NAME: b"x"})
    started = time.monotonic()
    lines = make_engine().splitlines()
    assert time.monotonic() - started < 10
    assert len([line for line in lines if "127.0.0.1 cannot be reached" in line]) == 1
    assert lines[-1] == f"built {BUILT}"


def test_a_machine_without_a_pinned_archive_builds_from_source(make_engine, monkeypatch):
    monkeypatch.setattr(archive, "system", lambda: "darwin-arm64")
    output = make_engine()
    assert "none is pinned for darwin-arm64" in output
    assert output.endswith(f"built {BUILT}\n")


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (SERVER, f"{NAME} is not used: llama.cpp b11194 (release archive) has no llama-quantize"),
        ("#!/bin/sh\nkill -4 $$\n", "built for a CPU with instructions that this one lacks"),
        ("#!/bin/sh\necho \"libc.so.6: version 'GLIBC_2.99' not found\" >&2; exit 1\n", "GLIBC_2.99"),
    ],
)
def test_an_archive_that_fails_its_trial_is_not_used_and_says_why(machine, site, make_engine, server, words):
    pin = offered(site, machine, packed(("llama-server", server.encode("latin-1"))))
    output = make_engine()
    assert words in output
    assert output.endswith(f"built {BUILT}\n")
    assert archive.installed() is None
    with pytest.raises(EngineError, match="make engine"):
        engines.find()
    assert archive.whole(pin.folder), "it is kept: another try costs no download"


def test_with_a_gpu_and_nvcc_the_cpu_archive_is_not_downloaded(machine, site, make_engine, monkeypatch):
    offered(site, machine, GOOD)
    monkeypatch.setattr(build_engine, "has_cuda", lambda: True)
    assert "built with CUDA" in make_engine()
    assert site.requests == []


def test_a_trial_on_another_machine_does_not_count(machine, site, monkeypatch):
    pin = offered(site, machine, GOOD)
    archive.fetch(pin)
    assert archive.installed() is None
    archive.accept(pin)
    assert archive.installed() == pin.tools()
    monkeypatch.setattr(archive, "_machine", lambda: {"cpu": "another"})
    assert archive.installed() is None


@pytest.mark.engine
def test_the_real_tools_packed_as_a_release_are_tried_and_used(engine, machine, site, make_engine):
    """Tools and libraries in one folder; of a distribution's build, whose tools find the system's, the tools alone."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        libraries = {p for p in engine.folder.iterdir() if mapped.OWN.search(p.name)}
        for p in sorted(libraries | set(engine.tools.values())):
            tar.add(p, f"llama-b{BUILD}/{p.name}")
    pin = offered(site, machine, out.getvalue())
    output = make_engine()
    llama = engines.find()
    assert (llama.folder, llama.origin, llama.build) == (pin.tools(), "release archive", engine.build)
    assert output.splitlines()[-1] == f"using {llama}"
    assert make_engine() == f"using {llama}\n"
    os.truncate(pin.tools() / "llama-quantize", 100)
    assert make_engine().splitlines()[-1] == f"using {llama}"
    assert archive.whole(pin.folder)


@pytest.mark.engine
def test_the_trial_refuses_tools_that_start_and_do_not_compute(engine, tmp_path):
    import stub_server

    stub = stub_server.install(tmp_path / "tools", engine)
    for script, words in (({"logprob": None}, "not numbers"), ({"at": "load", "how": "signal 4"}, "ended with -4")):
        stub_server.script(stub, **script)
        with pytest.raises(EngineError, match=words):
            trial.run(stub, "cpu")
    stub_server.script(stub)
    trial.run(stub, "cpu")


# make engine, with tools
@pytest.mark.engine
def test_tools_that_are_installed_are_named_and_nothing_is_built(engine, monkeypatch, capsys):
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


def tool(path, script):
    path.parent.mkdir(exist_ok=True)
    path.write_text(script, encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("rpc_server", "why"),
    [
        (None, "has no rpc-server"),
        ("#!/bin/sh\necho Failed to find RPC backend\nexit 1\n", "Failed to find RPC backend"),
    ],
)
def test_a_named_build_without_rpc_is_refused_with_the_cure(machine, make_engine, monkeypatch, rpc_server, why):
    """As of a distribution that has RPC in other packages, which were not installed."""
    tool(machine / "tools/llama-server", SERVER)
    if rpc_server:
        tool(machine / "tools/ggml-rpc-server", rpc_server)
    monkeypatch.setenv("MOELIB_LLAMA_CPP", str(machine / "tools"))
    cure = "apt-get install llama.cpp-tools-extra libggml0-backend-rpc"
    with pytest.raises(EngineError, match=f"(?s)nothing can be offloaded to.*{cure}.*{why}"):
        make_engine()


def test_an_installed_package_that_does_not_run_here_is_passed_over(machine, make_engine, monkeypatch):
    tool(machine / "package/llama-server", "#!/bin/sh\nkill -4 $$\n")
    monkeypatch.setattr(engines, "_package_folder", lambda: machine / "package")
    with pytest.raises(EngineError, match=r"make engine.* \(one is installed, but does not run: .*built for a CPU"):
        engines.find()
    assert make_engine().splitlines()[-1] == f"built {BUILT}"


# the build from source
def test_without_a_compiler_it_says_what_to_install(machine):
    with pytest.raises(EngineError, match="apt-get install g"):
        build_engine.build()


def test_a_build_that_fails_shows_the_end_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(build_engine, "sys", SimpleNamespace(executable="/bin/false"))
    with pytest.raises(EngineError, match=r"could not be built; .*wheel\.log ends"):
        build_engine._compile(tmp_path / "wheel")
    assert not (tmp_path / "wheel").exists()


@pytest.mark.parametrize(("free", "jobs"), [(64 << 30, 3), (1 << 30, 2), (0, 1)])
def test_a_build_starts_no_more_compilers_than_the_machine_can_hold(tmp_path, monkeypatch, free, jobs):
    """The package says `-j`, which is as many as there are files: 60 compilers of 300 MB each on 2 cores."""
    tool(tmp_path / "real/gmake", '#!/bin/sh\necho "$#" "$@"\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'real'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(build_engine.host, "usable_cpus", lambda: 3)
    monkeypatch.setattr(build_engine.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    env = {"PATH": build_engine.bounded_make(tmp_path / "shim")}
    for args, called in ((["-f", "a b", "-j"], f"3 -f a b -j{jobs}"), (["-j7", "all"], "2 -j7 all"), ([], "0")):
        done = subprocess.run(["gmake", *args], env=env, capture_output=True, text=True, timeout=60, encoding="utf-8")
        assert done.stdout.strip() == called


def test_every_build_has_rpc_and_its_number():
    assert {"-DGGML_RPC=ON", f"-DLLAMA_BUILD_NUMBER={build_engine.BUILD}"} <= set(build_engine.flags())
