"""Release archives: from a stand-in for the release site on loopback, packed from the build that is here."""

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

import build_engine
import pin_engine
import pytest
import yaml
from conftest import REPO

from moelib import archive, mapped, params, release, tarball, trial
from moelib import engine as engines
from moelib.release import ArchiveError, Unreachable

BUILD = 11194
NAME = "llama-b11194-bin-ubuntu-x64.tar.gz"
FAKE = """#!/bin/sh
case "$1" in --version) echo "version: 0.6.0 (build 11194, commit x)";; --help) echo "--cpu-moe  x";; esac
"""


class Site(http.server.ThreadingHTTPServer):
    """Serves `held` by path, with ranges. `cut`: how many bytes the next answers send; `asked`: ranges that came."""

    daemon_threads = True

    def __init__(self):
        self.held, self.cut, self.asked, self.ranges, self.length = {}, [], [], True, None
        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site, data = self.server, self.server.held.get(self.path)
        wanted = self.headers.get("Range")
        site.asked.append(wanted)
        if isinstance(data, str):
            self.send_response(302)
            self.send_header("Location", data)
            return self.end_headers()
        if data is None:
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and site.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(site.length or len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:][: site.cut.pop(0)] if site.cut else data[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    with Site() as made:
        yield made
        made.shutdown()


@pytest.fixture
def place(tmp_path, monkeypatch, site):
    """A machine without tools, with an empty cache, params of its own and the release site on loopback."""
    shutil.copytree(REPO / "params", tmp_path / "home/params")
    monkeypatch.setenv("MOELIB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MOELIB_ENGINE_URL", site.url)
    monkeypatch.delenv("MOELIB_LLAMA_CPP", raising=False)
    monkeypatch.setattr(engines, "_package_folder", lambda: None)
    monkeypatch.setattr(engines, "_aside", lambda folder: [])
    monkeypatch.setattr(engines.shutil, "which", lambda name: None)
    monkeypatch.setattr(archive, "system", lambda: "linux-x86_64")
    monkeypatch.setattr(archive, "driver_cuda", lambda: None)
    monkeypatch.setattr(build_engine, "has_cuda", lambda: False)
    params._yaml.cache_clear()
    yield tmp_path
    params._yaml.cache_clear()


def packed(members):
    """A .tar.gz of (name, bytes or TarInfo)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, what in members:
            info = what if isinstance(what, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(what, bytes):
                info.size, info.mode = len(what), 0o755
            tar.addfile(info, io.BytesIO(what) if isinstance(what, bytes) else None)
    return out.getvalue()


def link(name, to, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return name, info


def pinned(place, data, name=NAME, key="linux-x86_64/cpu", **change):
    """Have `data` pinned as the archive; the release site gets nothing."""
    path = place / "home/params/engine.yaml"
    book = yaml.safe_load(path.read_text(encoding="utf-8"))
    held = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **change}
    book["pins"][key] = {"build": BUILD, "glibc": "2.17", "files": {name: held}}
    path.write_text(yaml.safe_dump(book), encoding="utf-8")
    params._yaml.cache_clear()
    return archive.Archive(key.partition("/")[2], archive.read().pins[key])


def offered(site, place, data, **change):
    site.held[f"/b{BUILD}/{NAME}"] = data
    return pinned(place, data, **change)


GOOD = [
    (f"llama-b{BUILD}/llama-server", FAKE.encode()),
    (f"llama-b{BUILD}/libggml.so.0", os.urandom(200_000)),
    link(f"llama-b{BUILD}/libggml.so", "libggml.so.0"),
]


def left(place):
    return sorted(p.name for p in (place / "cache/moelib").iterdir() if not p.name.endswith(".lock"))


def test_the_pins_of_the_repository_are_the_known_ones():
    pins = archive.check(yaml.safe_load((REPO / "params/engine.yaml").read_text(encoding="utf-8")))
    cpu = pins.pins["linux-x86_64/cpu"]
    sha256 = "527c09064f3c89e4b6e1008a641e31903a04ccdd1c69abd0752acbbd4e1905f6"
    assert (cpu.build, cpu.glibc) == (BUILD, "2.35")
    assert cpu.files == {NAME: archive.File(bytes=17_014_362, sha256=sha256)}
    assert {name for name, pin in pins.pins.items() if not pin.files} == {
        "linux-x86_64/cuda-12.8",
        "linux-x86_64/cuda-13.4",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"build": None}, "must be given together"),
        ({"files": {}}, "must be given together"),
        ({"files": {"../x.tar.gz": {"bytes": 1, "sha256": "0" * 64}}}, "pattern"),
        ({"files": {"x.tar.gz": {"bytes": 0, "sha256": "0" * 64}}}, "greater than 0"),
        ({"files": {"x.tar.gz": {"bytes": 1, "sha256": "0"}}}, "pattern"),
        ({"more": 1}, "not permitted"),
    ],
)
def test_a_pin_that_is_not_whole_is_refused(change, words):
    pin = {"build": 1, "glibc": "2.35", "files": {"x.tar.gz": {"bytes": 1, "sha256": "0" * 64}}, **change}
    with pytest.raises(params.ParamsError, match=words):
        archive.check({"url": "https://x", "pins": {"linux-x86_64/cpu": pin}})


def test_a_good_archive_is_downloaded_unpacked_and_kept(place, site):
    one = offered(site, place, packed(GOOD))
    tools = archive.fetch(one)
    assert (tools / "llama-server").stat().st_mode & 0o111
    assert os.readlink(tools / "libggml.so") == "libggml.so.0"
    assert left(place) == [one.folder.name]
    assert str(BUILD) in one.folder.name
    assert archive.fetch(one) == tools
    assert site.asked == [None], "it is not asked for again"


def test_another_hash_or_asset_is_another_folder(place):
    folders = {pinned(place, data, name).folder for data in (b"a", b"b") for name in ("a.tar.gz", "b.tar.gz")}
    assert len(folders) == 4


def test_a_wrong_hash_deletes_what_came_and_says_so(place, site):
    one = offered(site, place, packed(GOOD), sha256="0" * 64)
    with pytest.raises(ArchiveError, match=r"has SHA-256 .*, but 000000000000\.\.\. is pinned; it was deleted"):
        archive.fetch(one)
    assert left(place) == []


@pytest.mark.parametrize("by", [-1, 1, 10**6])
def test_a_wrong_size_is_not_taken(place, site, by):
    data = packed(GOOD)
    one = offered(site, place, data, bytes=len(data) + by)
    with pytest.raises(ArchiveError, match=f"has {len(data)} bytes at the release site, not {len(data) + by}"):
        archive.fetch(one)
    assert left(place) == []


def test_more_than_was_announced_is_not_taken(place, site, monkeypatch):
    """A site that does not say how much it sends cannot fill the disk."""
    data = packed(GOOD)
    one = offered(site, place, data, bytes=1000)
    monkeypatch.setattr(Answer, "send_header", lambda self, name, value: None)
    with pytest.raises(ArchiveError, match="longer than 1000 bytes; it was deleted"):
        archive.fetch(one)
    assert left(place) == []


def test_a_download_that_breaks_off_goes_on_where_it_was(place, site):
    one = offered(site, place, packed(GOOD))
    site.cut = [1000, 50_000]
    archive.fetch(one)
    assert site.asked == [None, "bytes=1000-", "bytes=51000-"]


def test_what_an_interrupted_run_left_is_gone_on_with(place, site):
    data = packed(GOOD)
    one = offered(site, place, data)
    part = place / f"cache/moelib/.{NAME}.{hashlib.sha256(data).hexdigest()[:12]}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(data[:777])
    archive.fetch(one)
    assert site.asked == ["bytes=777-"]
    assert left(place) == [one.folder.name]


def test_a_site_without_ranges_sends_all_of_it_again(place, site):
    one = offered(site, place, packed(GOOD))
    site.cut, site.ranges = [1000], False
    archive.fetch(one)
    assert site.asked == [None, "bytes=1000-"]


def test_a_site_that_sends_nothing_is_given_up(place, site):
    one = offered(site, place, packed(GOOD))
    site.cut = [1000, 0]
    with pytest.raises(Unreachable, match="closed"):
        archive.fetch(one)
    assert len(left(place)) == 1, "what came is kept"


def test_a_missing_file_is_said(place):
    with pytest.raises(ArchiveError, match=f"{NAME} cannot be downloaded: the release site answers 404"):
        archive.fetch(pinned(place, b"x"))


@pytest.mark.parametrize(
    "url",
    ["http://example.org", "ftp://127.0.0.1", "file:///etc", "127.0.0.1", "http://127.0.0.1.example.org", "http://["],
)
def test_only_https_or_loopback_is_asked(place, monkeypatch, url):
    monkeypatch.setenv("MOELIB_ENGINE_URL", url)
    with pytest.raises(ArchiveError, match="MOELIB_ENGINE_URL names"):
        archive.fetch(pinned(place, b"x"))


def test_a_redirection_may_not_lead_off_https(place, site):
    one = pinned(place, b"x")
    site.held[f"/b{BUILD}/{NAME}"] = "http://example.org/x"
    with pytest.raises(
        ArchiveError, match="the release site names 'http://example.org/x': give an address that begins with https"
    ):
        archive.fetch(one)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("../out", b"x")], "holds '../out'"),
        ([("a/../../out", b"x")], "holds 'a/../../out'"),
        ([("/tmp/out", b"x")], "holds '/tmp/out'"),
        ([link("a", "../../out")], "outside"),
        ([link("a", "/etc")], "absolute path"),
        ([link("a", ".."), ("a/out", b"x")], "outside"),
        ([link("a", "../../out", tarfile.LNKTYPE)], "outside"),
        ([link("pipe", "", tarfile.FIFOTYPE)], "holds 'pipe'"),
        ([link("dev", "", tarfile.CHRTYPE)], "holds 'dev'"),
        ([("x", b"x")] * 11, "unpacks to too m"),
        ([("zeros", bytes(50 << 20))], "unpacks to too m"),
    ],
)
def test_members_that_no_release_has_are_refused(tmp_path, monkeypatch, members, words):
    monkeypatch.setattr(tarball, "MEMBERS", 10)
    monkeypatch.setattr(tarball, "ROOM", 1 << 20)
    path = tmp_path / "x.tar.gz"
    path.write_bytes(packed(members))
    (tmp_path / "in").mkdir()
    with pytest.raises(ArchiveError, match=words):
        tarball.extract(path, tmp_path / "in")
    assert {p.name for p in tmp_path.iterdir()} == {"x.tar.gz", "in"}
    assert not [p for p in (tmp_path / "in").rglob("*") if p.is_file() and p.stat().st_size > 1]


def test_a_long_name_is_not_unpacked_into_memory(tmp_path, monkeypatch):
    """The name of a member comes before its check."""
    monkeypatch.setattr(tarball, "ROOM", 1 << 20)
    path = tmp_path / "x.tar.gz"
    path.write_bytes(packed([("n" * (80 << 20), b"x")]))
    with pytest.raises(ArchiveError, match="unpacks to too m"):
        tarball.extract(path, tmp_path)


@pytest.mark.parametrize("cut", [0, 10, 100, 5000])
def test_a_cut_or_foreign_archive_is_refused_whatever_its_hash(place, site, cut):
    one = offered(site, place, packed(GOOD)[:cut] or b"PK")
    with pytest.raises(ArchiveError, match="cannot be unpacked"):
        archive.fetch(one)
    assert not one.folder.exists()


def test_an_archive_without_tools_is_refused(place, site):
    with pytest.raises(ArchiveError, match="holds no llama-server"):
        archive.fetch(offered(site, place, packed([("x", b"x")])))


@pytest.mark.parametrize("harm", ["cut", "gone", "more", "note", "link"])
def test_a_damaged_cache_is_made_again(place, site, harm):
    one = offered(site, place, packed(GOOD))
    tools = archive.fetch(one)
    lib = tools / "libggml.so.0"
    if harm == "cut":
        os.truncate(lib, 100)
    elif harm == "gone":
        lib.unlink()
    elif harm == "more":
        (tools / "libmore.so").write_bytes(b"x")
    elif harm == "note":
        (one.folder / archive.MANIFEST).write_text("{", encoding="utf-8")
    else:
        (tools / "libggml.so").unlink()
        (tools / "libggml.so").symlink_to("/etc/passwd")
    assert not archive.whole(one.folder)
    assert archive.fetch(one) == tools
    assert archive.whole(one.folder)
    assert (lib.stat().st_size, len(site.asked)) == (200_000, 2)


def test_the_libraries_of_a_runtime_come_beside_the_tools(place, site):
    tools, runtime = packed(GOOD), packed([("cudart/lib/libcudart.so.12", b"runtime")])
    path = place / "home/params/engine.yaml"
    book = yaml.safe_load(path.read_text(encoding="utf-8"))
    held = {"a.tar.gz": tools, "b.tar.gz": runtime}
    pins = {k: {"bytes": len(v), "sha256": hashlib.sha256(v).hexdigest()} for k, v in held.items()}
    book["pins"]["linux-x86_64/cuda-12.8"] = {"build": BUILD, "glibc": "2.17", "files": pins}
    path.write_text(yaml.safe_dump(book), encoding="utf-8")
    params._yaml.cache_clear()
    site.held = {f"/b{BUILD}/{k}": v for k, v in held.items()}
    folder = archive.fetch(archive.Archive("cuda-12.8", archive.read().pins["linux-x86_64/cuda-12.8"]))
    assert (folder / "libcudart.so.12").read_bytes() == b"runtime"


FETCH = (
    "from moelib import archive; print(archive.fetch(archive.Archive('cpu', archive.read().pins['linux-x86_64/cpu'])))"
)


def test_two_at_once_download_once(place, site):
    one = offered(site, place, packed(GOOD))
    runs = [
        subprocess.Popen([sys.executable, "-c", FETCH], stdout=subprocess.PIPE, text=True, encoding="utf-8")
        for _ in range(3)
    ]
    said = {r.communicate(timeout=60)[0] for r in runs}
    assert [r.returncode for r in runs] == [0, 0, 0]
    assert said == {f"{one.tools()}\n"}
    assert site.asked == [None]


def test_a_cache_that_cannot_be_had_is_one_sentence(place, site, monkeypatch):
    one = offered(site, place, packed(GOOD))
    (place / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file"))
    with pytest.raises(ArchiveError, match="file/moelib cannot be written: set XDG_CACHE_HOME to a folder of yours"):
        archive.fetch(one)
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setattr(archive.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(ArchiveError, match="no home folder to store an engine in: set XDG_CACHE_HOME"):
        archive.fetch(one)
    assert archive.installed() is None


# which one fits
@pytest.mark.parametrize(
    ("system", "cuda", "libc", "want"),
    [
        ("linux-x86_64", None, "2.39", ["cpu"]),
        ("linux-x86_64", (12, 8), "2.39", ["cuda-12.8", "cpu"]),
        ("linux-x86_64", (13, 4), "2.39", ["cuda-13.4", "cuda-12.8", "cpu"]),
        ("linux-x86_64", (12, 4), "2.39", ["cpu"]),
        ("linux-x86_64", (13, 4), "2.36", ["cpu"]),
        ("linux-x86_64", None, "2.31", []),
        ("linux-aarch64", None, "2.39", []),
        ("darwin-arm64", None, "", []),
    ],
)
def test_the_archive_is_chosen_by_system_driver_and_c_library(place, monkeypatch, system, cuda, libc, want):
    monkeypatch.setattr(archive, "system", lambda: system)
    monkeypatch.setattr(archive, "driver_cuda", lambda: cuda)
    monkeypatch.setattr(archive.platform, "libc_ver", lambda: ("glibc", libc) if libc else ("", ""))
    file = {"x.tar.gz": archive.File(bytes=1, sha256="0" * 64)}
    pins = {f"linux-x86_64/{b}": archive.Pin(build=1, glibc=g, files=file)
            for b, g in (("cpu", "2.35"), ("cuda-12.8", "2.39"), ("cuda-13.4", "2.39"))}  # fmt: skip
    monkeypatch.setattr(archive, "read", lambda: archive.Pins(url="https://x", pins=pins))
    fitting, passed_over = archive.fitting()
    assert [a.backend for a in fitting] == want
    same = system == "linux-x86_64"
    assert len(passed_over) == (len(pins) if cuda else 1) - len(want) if same else passed_over == []


def test_a_gpu_without_a_pinned_archive_is_told(place, monkeypatch):
    monkeypatch.setattr(archive, "driver_cuda", lambda: (12, 8))
    monkeypatch.setattr(archive.platform, "libc_ver", lambda: ("glibc", "2.39"))
    assert "linux-x86_64/cuda-12.8 is not pinned in params/engine.yaml" in archive.fitting()[1]


# make engine
@pytest.fixture
def built(monkeypatch):
    """A builder that builds nothing."""
    monkeypatch.setattr(build_engine, "build", lambda: "llama.cpp b1 (made up)")


def test_offline_it_is_built_from_source_within_seconds_and_said_in_one_line(place, built, monkeypatch, capsys):
    monkeypatch.setenv("MOELIB_ENGINE_URL", "http://127.0.0.1:9")
    pinned(place, b"x")
    started = time.monotonic()
    build_engine.main()
    assert time.monotonic() - started < 10
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if "127.0.0.1 cannot be reached" in line]) == 1
    assert said[-1] == "built llama.cpp b1 (made up)"


def test_a_name_that_nobody_answers_for_is_given_up_within_seconds(place, built, monkeypatch, capsys):
    over = threading.Event()
    monkeypatch.setenv("MOELIB_ENGINE_URL", "https://release.invalid")
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(release, "CONNECT_S", 0.2)
    monkeypatch.setattr(release.socket, "getaddrinfo", lambda *_: over.wait(30))
    pinned(place, b"x")
    build_engine.main()
    over.set()
    assert "release.invalid cannot be reached: its name was not found in time" in capsys.readouterr().out


def test_a_machine_without_a_pinned_archive_builds_from_source(place, built, monkeypatch, capsys):
    monkeypatch.setattr(archive, "system", lambda: "darwin-arm64")
    build_engine.main()
    said = capsys.readouterr().out
    assert "none is pinned for darwin-arm64" in said
    assert said.endswith("built llama.cpp b1 (made up)\n")


def test_an_archive_that_fails_its_trial_is_not_used_and_the_next_is(place, site, built, monkeypatch, capsys):
    bad = offered(site, place, packed(GOOD))
    build_engine.main()
    said = capsys.readouterr().out
    assert f"{NAME} is not used: llama.cpp b11194 (release archive) has no llama-quantize" in said
    assert said.endswith("built llama.cpp b1 (made up)\n")
    assert archive.installed() is None
    with pytest.raises(engines.EngineError, match="make engine"):
        engines.find()
    assert archive.whole(bad.folder), "it is kept: another try costs no download"


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ("#!/bin/sh\nkill -4 $$\n", "built for a CPU with instructions that this one lacks"),
        ("#!/bin/sh\necho \"libc.so.6: version 'GLIBC_2.99' not found\" >&2; exit 1\n", "GLIBC_2.99"),
        ("\x7fELF\x02\x01\x01" + "\0" * 9 + "\x02\0\xb7\0" + "\0" * 44, "program for another processor"),
        ("#!/nowhere/ld.so\n", "the interpreter or loader that it names, does not exist"),
    ],
)
def test_an_archive_for_another_machine_is_not_used_and_says_why(place, site, built, capsys, server, words):
    offered(site, place, packed([("llama-server", server.encode("latin-1"))]))
    build_engine.main()
    said = capsys.readouterr().out
    assert words in said
    assert said.endswith("built llama.cpp b1 (made up)\n")


def test_with_a_gpu_and_nvcc_the_cpu_archive_is_passed_over(place, site, built, monkeypatch, capsys):
    offered(site, place, packed(GOOD))
    monkeypatch.setattr(build_engine, "has_cuda", lambda: True)
    build_engine.main()
    assert site.asked == []
    assert "built with CUDA" in capsys.readouterr().out


def test_a_trial_of_another_machine_does_not_count(place, site, monkeypatch):
    one = offered(site, place, packed(GOOD))
    archive.fetch(one)
    assert archive.installed() is None
    archive.accept(one)
    assert archive.installed() == one.tools()
    monkeypatch.setattr(archive, "_machine", lambda: {"cpu": "another"})
    assert archive.installed() is None


@pytest.mark.engine
def test_the_real_tools_packed_as_a_release_are_tried_and_used(engine, place, site, monkeypatch, capsys):
    """As a release is: tools and libraries in one folder, links between them. Of a distribution's build only what lies
    where its tools do, which find the system's libraries."""
    monkeypatch.setattr(build_engine, "build", lambda: pytest.fail("built"))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        own = {p for p in engine.folder.iterdir() if mapped.OWN.search(p.name)}
        for p in sorted(own | set(engine.tools.values())):
            tar.add(p, f"llama-b{BUILD}/{p.name}")
    one = offered(site, place, out.getvalue())
    build_engine.main()
    llama = engines.find()
    assert (llama.folder, llama.origin, llama.build) == (one.tools(), "release archive", engine.build)
    assert capsys.readouterr().out.splitlines()[-1] == f"using {llama}"
    build_engine.main()
    assert capsys.readouterr().out == f"using {llama}\n"
    os.truncate(one.tools() / "llama-quantize", 100)
    build_engine.main()
    assert capsys.readouterr().out.splitlines()[-1] == f"using {llama}"
    assert archive.whole(one.folder)


@pytest.mark.engine
def test_the_trial_refuses_what_starts_and_does_not_compute(engine, tmp_path, monkeypatch):
    import stub_server

    stub = stub_server.install(tmp_path / "tools", engine)
    stub_server.script(stub, logprob=None)
    with pytest.raises(engines.EngineError, match="not numbers"):
        trial.run(stub, "cpu")
    stub_server.script(stub, at="load", how="signal 4")
    with pytest.raises(engines.EngineError, match="ended with -4"):
        trial.run(stub, "cpu")
    stub_server.script(stub)
    trial.run(stub, "cpu")


# the command that pins
def test_a_release_is_pinned_by_what_comes(place, site, capsys, monkeypatch):
    data, path = packed(GOOD), place / "home/params/engine.yaml"
    site.held["/b12000/tools.tar.gz"] = data
    before = path.read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["x", "linux-x86_64/cuda-12.8", "--build", "12000", "tools.tar.gz"])
    pin_engine.main()
    sha256 = hashlib.sha256(data).hexdigest()
    assert f"tools.tar.gz: {len(data)} bytes, SHA-256 {sha256}" in capsys.readouterr().out
    pins = archive.read().pins
    assert pins["linux-x86_64/cuda-12.8"].files == {"tools.tar.gz": archive.File(bytes=len(data), sha256=sha256)}
    assert (pins["linux-x86_64/cuda-12.8"].build, pins["linux-x86_64/cuda-12.8"].glibc) == (12000, "2.39")
    kept = [line for line in before.splitlines() if line.startswith(("#", "  #")) or "527c09" in line]
    assert set(kept) <= set(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(
    ("name", "asset", "held", "words"),
    [
        ("linux-x86_64/cpu", "x.tar.gz", None, "answers 404"),
        ("linux-x86_64/cpu", "x.tar.gz", b"<html>", "cannot be unpacked"),
        ("linux-x86_64/cpu", "x.tar.gz", packed([("x", b"x")]), "no llama-server"),
        ("linux-x86_64/cpu", "../x.tar.gz", b"", "pattern"),
        ("nonsense", "x.tar.gz", b"", "pattern"),
    ],
)
def test_what_cannot_be_pinned_changes_nothing(place, site, name, asset, held, words):
    path = place / "home/params/engine.yaml"
    before = path.read_bytes()
    if held is not None:
        site.held[f"/b1/{asset}"] = held
    with pytest.raises(params.UserError, match=words):
        pin_engine.pin(name, 1, [asset], None)
    assert path.read_bytes() == before


def test_the_request_says_that_nothing_is_to_be_compressed():
    with release.client("http://127.0.0.1:1") as c:
        assert c.headers["accept-encoding"] == "identity"
