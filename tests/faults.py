"""The fault campaign: what can go wrong is made to go wrong, and must be survived.

Survived: the right reason is reported, within seconds; every record that was valid is still there and equal; no process
and no partial file is left; and without the fault the same study then completes.

    python tests/faults.py --seed 7 --rounds 10

prints a line a fault and `injected X / survived Y (seed N)`, and ends with 1 if one was not survived. `make faults`
runs it with a new seed; tests/test_faults.py runs the short form.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import mmap
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import stub_server
from conftest import SMOKE, copy_of, furnish, library_of
from factory import SHARED, measured
from fault_lab import BANDWIDTH, MIB, RUN, FakeGpu, Lab, complete, patience
from streams import parsed, recorded, timeless

from moelib.audit import audit
from moelib.audit import record as records
from moelib.base import files
from moelib.campaign import campaign
from moelib.catalogue import params
from moelib.catalogue.facts import Manifest
from moelib.engine import client, engine
from moelib.gguf import gguf_file
from moelib.machine import process
from moelib.measure import device, llama_server
from moelib.measure import run as runs
from moelib.measure.memory import Reading
from moelib.models import models, quantize
from moelib.study.plan import StudyError
from moelib.study.study import Study

MOELIB = [sys.executable, "-m", "moelib.cli"]
TRIES = 5  # for a lab's first study


@dataclass(frozen=True)
class Fault:
    name: str
    how: str
    """stub, real server, files, GPU readings, kill, parser."""
    expect: str
    """What must be reported: reasons as `Lab.measure` lists them, or words of the error."""
    within_s: float
    lab: str
    """loopback, gpu or real; empty for one that brings its own."""
    act: Callable[..., str]
    """Injects the fault; returns what was reported."""


FAULTS: dict[str, Fault] = {}


def fault(name: str, how: str, expect: str, within_s: float = 10.0, lab: str = "") -> Callable:
    def register(act):
        assert name not in FAULTS
        FAULTS[name] = Fault(name, how, expect, within_s, lab, act)
        return act

    return register


def scripted(name, expect, within_s=5.0, factor=1.0, words="", lab="loopback", **defect):
    """A fault of the stub in one run of the study."""

    @fault(name, "real server" if lab == "real" else "stub", expect, within_s, lab)
    def act(lab, chance, rounds):
        lab.script(times=1, **{k: v(chance) if callable(v) else v for k, v in defect.items()})
        with patience(factor):
            findings = lab.measure()
        assert words in lab.messages, lab.messages
        return findings


# at the start and at load
scripted("does not start", "engine-ended", words="out of luck", at="start", says="out of luck", how="exit 7")
scripted("crashes at start", "engine-crashed", at="start", how="signal 11")
scripted("killed at start", "engine-killed", at="start", how="signal 9")
BUSY = "srv start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8080"
scripted("port taken, llama-server's", "engine-ended", words="couldn't bind", at="start", says=BUSY, how="exit 1")
OTHER = {"model_path": "/elsewhere/other.gguf", "build_info": "b1"}
scripted("port taken, another server answers", "not-our-server", at="/props", answers=OTHER)
NO_KEY = {"error": {"message": "Invalid API Key", "type": "authentication_error", "code": 401}}
scripted("port taken, a server with another key", "not-our-server", at="/props", status=401, answers=NO_KEY)
scripted("hangs at start", "engine-timeout", factor=0.005, at="start", how="hang")
scripted("hangs when asked for its devices", "engine-unusable", factor=0.02, at="devices", how="hang")
scripted("hangs at load", "engine-timeout", factor=0.005, at="load", how="hang")
scripted("the real one hangs at load", "engine-timeout", factor=0.005, lab="real", stopped=True)
CUDA_OOM = (
    "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9.00 MiB on device 0: cudaMalloc failed: out of memory"
)
scripted("out of memory on the device", "out-of-memory", words="cudaMalloc", at="load", says=CUDA_OOM, how="exit 1")
ALLOC = "ggml_aligned_malloc: insufficient memory (attempted to allocate 1.00 MB)\nfailed to allocate CPU buffer"
scripted("out of memory on the host", "out-of-memory", at="load", says=ALLOC, how="signal 6")
scripted(
    "the real one out of memory", "out-of-memory", 20, lab="real", add=["-c", "4194304", "--device", "none"],
    address_space=1 << 30,
)  # fmt: skip

# while it is asked
scripted("dies mid-stream, killed", "engine-killed", at="token", token=3, how="signal 9")
scripted("dies mid-stream, crashed", "engine-crashed", at="token", token=3, how="signal 6")
scripted("dies mid-stream, with an exit code", "engine-ended", at="token", token=3, how="exit 3")
scripted("dies mid-stream, as if all were well", "engine-ended", at="token", token=3, how="exit 0")
scripted("dies when asked for tokens", "engine-ended", at="/tokenize", how="exit 1")
scripted("stalls before the first token", "engine-stalled", factor=0.005, at="token", token=1, how="hang")
scripted("stalls between tokens", "engine-stalled", factor=0.005, at="token", token=5, how="hang")
scripted("stalls when asked what it is", "engine-stalled", factor=0.005, at="/props", how="hang")
scripted("stalls when asked for its health", "engine-stalled", factor=0.005, at="/health", how="hang")
scripted("stalls when asked for tokens", "engine-stalled", factor=0.005, at="/tokenize", how="hang")
scripted("stream cut at a random byte", "connection-lost", cut=lambda chance: chance.randint(0, 3000))
scripted("stream split at every byte", "valid", pieces=1)
scripted("short output", "counts-exact", more=-3)
scripted("long output", "counts-exact", more=3)
scripted("cache hit", "cache-not-hit, counts-exact", cached=3)
scripted("no final event", "stream-finished", endless=True)
IN_STREAM = 'data: {"error": {"code": 500, "message": "no slot left", "type": "server_error"}}'
scripted("an error in the stream", "request-failed", words="no slot", at="token", token=4, event=IN_STREAM)
scripted("an old error in the stream", "request-failed", at="token", token=4, event='error: {"message": "x"}')
scripted("rubbish in the stream", "answer-unreadable", at="token", token=4, event='data: {"index": 0, "cont')
scripted("refuses", "request-refused", at="/completion", status=500, answers=NO_KEY)
scripted("no tokens", "tokenizer", at="/tokenize", answers={"tokens": []})
scripted("answers in another format", "answer-unreadable", at="/tokenize", answers="<html>")
scripted("counts that are no numbers", "answer-unreadable", timings={"predicted_n": "many"})
scripted("times that are NaN", "answer-unreadable", timings={"prompt_ms": float("nan")})
scripted("NaN sent as null", "output-alive", logprob=None)
scripted("NaN sent as NaN", "output-alive", logprob=float("nan"))
scripted("all tokens alike", "output-alive", logprob=-3.0)

# without measure
scripted("floods its log at load", "engine-log-flood", 10, words="more than 64 MiB", at="load", how="flood")
ZEROS = "\0" * 64
scripted("floods its log with zeros", "engine-log-flood", 10, at="start", how="flood", **{"with": ZEROS})
scripted("floods its log mid-stream", "engine-log-flood", 10, at="token", token=3, how="flood")
scripted("floods its log when asked to end", "engine-log-flood", 10, at="end", how="flood")
scripted("talks without end when asked for its devices", "engine-unusable", words="4 MiB", at="devices", how="flood")
scripted("hangs with a child when asked for its devices", "engine-unusable", factor=0.02, at="devices", how="hang on")
scripted("hangs at load with a child, deaf to its end", "engine-timeout", factor=0.005, at="load", how="hang on")
scripted("a line without end in the stream", "answer-too-large", at="token", token=3, how="endless", event="x")
scripted("events without end", "answer-too-large", at="token", token=3, how="endless", event="data: {}\n\n")
for path in ("/props", "/tokenize", "/completion"):
    scripted(f"an answer without end to {path}", "answer-too-large", at=path, body='{"tokens": [1]}')
DEEP = "[" * 100_000
scripted("an answer nested without measure", "answer-unreadable", at="/tokenize", answers=DEEP)

# what it does with its flags
scripted("flag ignored", "placement-on-device", load="deaf", only="cpu-moe")
scripted("the real one without the flag", "placement-on-device", lab="real", drop=["--cpu-moe"], only="cpu-moe")
CPU = "device-is-the-one, layers-offloaded, placement-on-device"
scripted("CPU instead of the device", CPU, load="cpu")
scripted("CPU instead of the GPU", CPU, load="cpu", lab="gpu")
scripted(
    "the real one on the CPU", "device-is-the-one, placement-on-device", 20, lab="real",
    add=["--device", "none"],
)  # fmt: skip
scripted("a log without what is looked for", "device-is-the-one, layers-offloaded", load="silent")

# at its end
scripted("an exit code at the end", "clean-end", at="end", how="exit 3")
scripted("does not end", "clean-end", 15, factor=0.05, at="end", how="hang")


@fault("port taken, the device's", "files", "valid", lab="loopback")
def _(lab, chance, rounds):
    """The port was free a moment ago; another process has it now."""
    free = process.free_port
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [taken.getsockname()[1]] * 2
        with mock.patch.object(process, "free_port", side_effect=lambda: ports.pop() if ports else free()):
            findings = lab.measure()
    assert not ports
    return findings


def _when_streaming(lab, action, delay_s):
    """Once, `delay_s` after the server was first asked for a stream, from a thread."""

    @contextmanager
    def within():
        over = threading.Event()

        def watch():
            while not over.wait(0.001):
                with contextlib.suppress(OSError):
                    if "processing task" in lab.server_log.read_text(errors="replace", encoding="utf-8"):
                        time.sleep(delay_s)
                        return action()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    return within


def _signal(name, number):
    for p in psutil.Process().children(recursive=True):
        if p.name() == name:
            p.send_signal(number)


def struck(name, tool, sign, expect, factor=1.0, within_s=10.0):
    """The process of a tool is sent a signal, at a random moment of the stream."""

    @fault(name, "kill", expect, within_s, "real")
    def act(lab, chance, rounds):
        send = functools.partial(_signal, tool, sign)
        with patience(factor):
            return lab.measure(_when_streaming(lab, send, chance.uniform(0, 0.05)))


struck("the real one killed mid-stream", "llama-server", signal.SIGKILL, "engine-killed")
struck("the real one stalls", "llama-server", signal.SIGSTOP, "engine-stalled", 0.01)
struck("the device's process killed mid-stream", "ggml-rpc-server", signal.SIGKILL, "engine-crashed")
struck("the device's process stalls", "ggml-rpc-server", signal.SIGSTOP, "engine-stalled", 0.01, 30)


@fault("a library exchanged while it runs", "files", "engine-changed", 20, "real")
def _(lab, chance, rounds):
    """Another build is installed over the running one: what it computed from then on is nobody's."""
    llama, likeliest = copy_of(engine.find(), lab.home / "build"), llama_server.Serving.likeliest
    file, library = lab.nano(llama), library_of(llama)

    def exchanged(*args):  # after the last timed request
        new = library.with_name("new")
        shutil.copy(library, new)
        os.replace(new, library)
        return likeliest(*args)

    with mock.patch.object(llama_server.Serving, "likeliest", exchanged):
        outcome = lab.execute(file, llama)
    assert library.name in outcome.message
    again = lab.execute(file, llama)
    assert again.reason is None, again.message
    return outcome.reason


@fault("a cold file that somebody has mapped", "files", "file-not-cold", lab="real")
def _(lab, chance, rounds):
    """It cannot be dropped from the page cache, and its load would be one from there."""
    file = lab.nano()
    with file.path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as held:
        assert sum(held[i] for i in range(0, len(held), mmap.PAGESIZE))
        outcome = lab.execute(file, asked=replace(RUN, placement="cpu-moe,cache=cold"))
    assert "$MOELIB_MODELS" in outcome.message
    again = lab.execute(file)
    assert again.reason is None, again.message
    return outcome.reason


@fault("NaN weights, the real server", "real server", "output-alive", lab="real")
def _(lab, chance, rounds):
    """Norms that are not numbers: the server serves them, and says null where asked how likely its tokens are."""
    good = lab.nano()
    path = lab.home / good.path.name
    shutil.copy(good.path, path)
    with path.open("r+b") as f:
        for t in good.header.tensors:
            if t.name.endswith("norm.weight"):
                f.seek(t.offset)
                f.write(np.full(t.shape, np.nan, np.float32).tobytes())
    content = files.Hashed(path)
    dead = quantize.Quantised(gguf_file.read_header(path), {**good.manifest, "sha256": content.sha256()}, content)
    verdicts = []
    for file in (dead, good):
        outcome = lab.execute(file)
        assert outcome.observation, outcome.message
        checks = audit.run(measured(RUN, outcome.observation, Manifest(**file.manifest)))
        verdicts.append(", ".join(i for i in audit.verdict(checks)[1] if i not in SHARED))
    assert verdicts[1] == ""
    return verdicts[0]


# the GPU's readings
def readings(name, expect, change):
    @fault(name, "GPU readings", expect, 15, "gpu")
    def act(lab, chance, rounds):
        lab.where.change = change
        try:
            with patience(0.05):  # for a device that never settles
                return lab.measure()
        finally:
            lab.where.change = lambda _, reading: reading


def _others(pids):
    return lambda reading: replace(
        reading, others=pids, device_bytes=reading.device_bytes + sum(n or 0 for _, n in pids)
    )


readings(
    "a foreign process comes to the GPU", "memory-undoubted",
    lambda i, r: _others(((4242, 300 * MIB),))(r) if i >= 1 else r,
)  # fmt: skip
readings(
    "a foreign process of unknown size comes to the GPU", "memory-known",
    lambda i, r: _others(((4242, None),))(r) if i >= 1 else r,
)  # fmt: skip
readings(
    "a foreign process is on the GPU all the time", "memory-undoubted", lambda i, r: _others(((4242, 300 * MIB),))(r)
)
readings("the GPU is lost", "memory-known", lambda i, r: replace(r, errors=("gpu-lost",)) if i >= 1 else r)
readings("the driver lists nothing and sees nothing", "memory-undoubted", lambda i, r: Reading(r.t_s, None, None))


def _breaks(i, reading):
    if i >= 1:
        raise OSError("the driver's library broke")
    return reading


def _breaks_at_the_end(i, reading):
    return _breaks(i + 1, reading) if i >= 0 and not reading.listed else reading


readings("what reads the GPU breaks on the way", "monitor-failed", _breaks)
readings("what reads the GPU breaks after the end", "monitor-failed", _breaks_at_the_end)


# two at once
@fault("two studies on one GPU", "kill", "device cuda is in use by process", 30, "gpu")
def _(lab, chance, rounds):
    other = lab.home / "other"
    with contextlib.ExitStack() as stack:
        stub_server.script(lab.stub, at="token", token=3, how="hang", times=1)
        argv = [sys.executable, __file__, "--hold", str(other), str(lab.home), lab.where.uuid]
        holder = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=os.environ, encoding="utf-8")
        stack.callback(holder.wait)
        stack.callback(holder.kill)
        assert holder.stdout.readline().strip() == "streaming"
        lab.script()
        with patience(0.02):
            try:
                lab.measure()
                error = "nothing"
            except files.FileError as err:
                error = str(err)
            mine, lab.where.uuid = lab.where.uuid, "GPU-another"
            try:
                beside = lab.measure()
            except files.FileError as err:
                beside = str(err)
            lab.where.uuid = mine
        assert error.endswith(f"in use by process {holder.pid}; wait for it to end, then run again"), error
        assert beside == error, "on another GPU, experts are read from the RAM of the host that the other one has"
        children = psutil.Process(holder.pid).children(recursive=True)
        holder.kill()
        assert not psutil.wait_procs(children, timeout=5)[1], "an engine outlived its study"
    return error


def hold(home: Path, lab_home: Path, uuid: str) -> None:
    """In a process of its own: another study of the same GPU, that says when it is in the middle of a run."""
    shutil.copytree(lab_home / "params", home / "params")
    os.environ["MOELIB_HOME"] = str(home)
    real = llama_server.Serving.ask

    def ask(*args):
        print("streaming", flush=True)
        return real(*args)

    stub = replace(engine.find(), tools={**engine.find().tools, "llama-server": lab_home / "tools/llama-server"})
    with mock.patch.object(engine, "find", return_value=stub), mock.patch.object(llama_server.Serving, "ask", ask):
        with mock.patch.object(device, "choose", return_value=FakeGpu(uuid)), BANDWIDTH:
            list(campaign.measure(Study.named("smoke"), Study.named("smoke").cells[:1]))


# files
def flip(path: Path, chance: random.Random) -> None:
    """Turn one bit over; size and times stay."""
    stat = path.stat()
    with path.open("r+b") as f:
        at = chance.randrange(stat.st_size)
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1 << chance.randrange(8)]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def truncate(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


NANO = "deepseek-moe-16b/twin-nano/deepseek-moe-16b"


def damaged(name: str, where: Callable[[Lab], Path], again: Callable[[Lab], Path | None] = lambda _: None):
    """A file is truncated or has a bit turned over: the study goes on, and the file is then what it was.

    again: a product to be removed first, so that the damaged file is needed.
    """
    for how, harm in (("truncated", truncate), ("bit-flipped", flip)):

        @fault(f"{how} {name}", "files", "valid", 20, "loopback")
        def act(lab, chance, rounds, harm=harm):
            path, product = where(lab), again(lab)
            before = None if path.name.endswith("json") else files.sha256(path)
            harm(path, chance)
            if product:
                product.unlink()
            findings = lab.measure()
            assert before in (None, files.sha256(path))
            return findings


damaged("source", lambda lab: lab.models / f"{NANO}-F16.gguf", lambda lab: lab.models / f"{NANO}-Q8_0.gguf")
damaged("quantised file", lambda lab: lab.models / f"{NANO}-Q8_0.gguf")
damaged("note of a source", lambda lab: lab.models / f"{NANO}-F16.gguf.json")
damaged("note of a quantised file", lambda lab: lab.models / f"{NANO}-Q8_0.gguf.json")
damaged("record", lambda lab: sorted(lab.folder.path.glob("records/*_b0_*"))[0])
damaged("sheet", lambda lab: lab.folder.manifest_path(lab.folder.cells[0]))


@fault("damaged plan", "files", "delete it and run the study", lab="loopback")
def _(lab, chance, rounds):
    path = lab.folder.path / "plan.json"
    whole, errors = path.read_bytes(), set()
    for harm in (truncate, flip):
        path.write_bytes(whole)
        harm(path, chance)
        try:
            lab.measure()
        except StudyError as err:
            errors.add(str(err))
    path.unlink()
    lab.folder.begin()
    assert path.read_bytes() == whole
    return errors.pop() if len(errors) == 1 else f"{len(errors)} reasons"


def while_it_runs(name: str, expect: str, harm: Callable[[Path, random.Random], object]) -> None:
    """The quantised file is harmed once its server has it open; the engine may have read it all by then."""

    @fault(f"quantised file {name} while it runs", "files", expect, lab="loopback")
    def act(lab, chance, rounds):
        check_ours, runs_begun = llama_server.check_ours, []

        def harmed(*args):
            runs_begun.append(args)
            if len(runs_begun) == 1:
                harm(lab.models / f"{NANO}-Q8_0.gguf", chance)
            return check_ours(*args)

        with mock.patch.object(llama_server, "check_ours", harmed):
            return lab.measure()


while_it_runs("truncated", "file-is-its-sheet", truncate)
while_it_runs("deleted", "file-gone", lambda path, chance: path.unlink())


class Disk:
    """A disk to be filled: a tiny one, where it could be mounted, else a limit on the size of files."""

    def __init__(self, folder: Path):
        self.ballast = folder / "ballast"
        self.mounted = folder.is_mount()

    def fill(self, leave: int) -> None:
        if not self.mounted:
            return resource.setrlimit(resource.RLIMIT_FSIZE, (leave, resource.RLIM_INFINITY))
        self.empty()
        free = shutil.disk_usage(self.ballast.parent).free
        with self.ballast.open("wb") as f:
            os.posix_fallocate(f.fileno(), 0, max(1, free - leave))

    def empty(self) -> None:
        if not self.mounted:
            return resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        self.ballast.unlink(missing_ok=True)


FULL = ("a twin", "a quant", "the plan", "a record", "before a run")


def full_disk(folder: Path) -> None:
    """In a process of its own: a line of JSON for each write to a full disk; then the study completes."""
    disk = Disk(folder)
    lab = Lab(folder / "home", engine.find(), stub_server.loopback())
    lab.__enter__()
    kept, roomy = {}, mock.patch.object(files, "need_space")

    def full(step, act, leave, patched=roomy):
        disk.fill(leave)
        started, error = time.monotonic(), "nothing"
        try:
            with patched:
                act()
        except params.UserError as err:
            error = f"{type(err).__name__}: {err}"
        disk.empty()
        left = [p.name for p in folder.rglob("*.partial")] + [p.name for p in folder.rglob("*.child.json")]
        print(json.dumps([step, error, round(time.monotonic() - started, 2), left, disk.mounted]), flush=True)

    twin = functools.partial(models.make_twin, "deepseek-moe-16b", "nano")
    full("a twin", twin, MIB)
    source = twin()
    full("a quant", lambda: quantize.make(source, "Q8_0", lab.stub, folder.parent / "q"), MIB // 2)
    full("the plan", lambda: lab.folder.begin(), 100)
    lab.script()
    execute = runs.execute

    def then_full(*args):
        outcome = execute(*args)
        if not records.read_all(lab.folder.path)[0]:
            return outcome
        kept.update(lab.valid())
        disk.fill(100)
        return outcome

    with mock.patch.object(runs, "execute", then_full):
        full("a record", lab.measure, 40 * MIB)
    assert kept.items() <= lab.valid().items()
    assert kept
    small = mock.patch.object(files.shutil, "disk_usage", return_value=mock.Mock(free=MIB))
    full("before a run", lab.measure, 40 * MIB, small)
    assert lab.measure() == "valid"
    complete(lab.folder.path)
    assert kept.items() <= lab.valid().items()


@fault("disk full", "files", ", ".join(FULL), 60)
def _(folder, chance, rounds):
    """On a tiny file system of its own where that can be mounted without privileges."""
    (folder / "disk").mkdir()
    inner = [sys.executable, __file__, "--full-disk", str(folder / "disk")]
    tiny = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=128m none "$0" && exec "$@"', str(folder / "disk")]
    can = shutil.which("unshare") and not subprocess.run([*tiny, "true"], capture_output=True).returncode
    done = subprocess.run(
        [*(tiny if can else []), *inner], capture_output=True, text=True, timeout=120, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for step, error, seconds, left, _ in lines:
        assert error.startswith("FileError: "), (step, error)
        assert "free some space" in error
        assert str(folder / "disk") in error or "GiB are free" in error, error
        assert not left, (step, left)
        assert seconds < 10, step
    return ", ".join(step for step, *_ in lines)


# streams, cut and split at every byte
@fault("stream cut at every byte", "parser", "never finished", 60, "real")
def _(lab, chance, rounds):
    """Through the line reader; through a socket the stub's are cut at a random byte, and split at every one."""
    stream = recorded(lab)
    assert parsed([stream]).finished
    end = stream.rindex(b"\n\n") + 1  # the end of the final event's line; from there on nothing is missing
    for at in range(end):
        try:
            cut = parsed([stream[:at]])
        except client.RunError:
            continue
        assert not cut.finished, f"cut at {at}"
    return "never finished"


@fault("stream split at every byte, through the reader", "parser", "nothing but times", 60, "real")
def _(lab, chance, rounds):
    stream = recorded(lab)
    want = timeless(parsed([stream]))
    assert want.finished
    assert want.token_n == (1, 2, 3)
    for at in range(1, len(stream)):
        assert timeless(parsed([stream[:at], stream[at:]])) == want, f"split at {at}"
    assert timeless(parsed([bytes([b]) for b in stream])) == want
    return "nothing but times"


@fault("a stream that trickles and never ends a line", "stub", "engine-stalled", lab="loopback")
def _(lab, chance, rounds):
    lab.script(times=1, at="token", token=2, how="trickle")
    with mock.patch.object(client, "REQUEST_S", 1.0):
        return lab.measure()


@fault("a token that is a line separator", "parser", "one token each", lab="loopback")
def _(lab, chance, rounds):
    """JSON leaves U+0085, U+2028 and U+2029 as they are."""
    events = [
        {"tokens": [i + 5], "content": c, "timings": {"predicted_n": i + 1}} for i, c in enumerate("\x85\u2028\u2029")
    ]
    last = {"tokens": [], "stop": True, "timings": {"predicted_n": 3, "prompt_n": 3, "cache_n": 0}}
    text = "".join(f"data: {json.dumps(e, ensure_ascii=False)}\n\n" for e in [*events, last])
    r = parsed([text.encode()])
    return "one token each" if (r.token_n, r.tokens, r.finished) == ((1, 2, 3), (5, 6, 7), True) else str(r)


# kills at random moments of a whole study, notebooks and all
def interrupted(folder: Path, chance: random.Random, times: int, stop: Callable) -> str:
    """The study from the command line, stopped so often at a random moment; then to its end."""
    home = furnish(folder / "home", SMOKE if times > 1 else SMOKE.replace("rounds: 2", "rounds: 1"))
    out, digests, stopped, completed = home / "outputs/smoke", {}, 0, 0
    env = {"MOELIB_HOME": str(home), "MOELIB_MODELS": str(folder / "models")}
    with mock.patch.dict(os.environ, env):
        os.environ.pop("MOELIB_OUTPUTS", None)
        params._yaml.cache_clear()
        while stopped < times:
            started_by_it = []
            run = subprocess.Popen(
                [*MOELIB, "study", "run", "smoke"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                start_new_session=True, encoding="utf-8",
            )  # fmt: skip
            try:
                run.wait(chance.uniform(0.3, 7))
            except subprocess.TimeoutExpired:
                started_by_it = psutil.Process(run.pid).children(recursive=True)
                stop(run, chance)
                stopped += 1
            started, now = time.monotonic(), f"stop {stopped}"
            _, errors = run.communicate(timeout=30)
            took = time.monotonic() - started
            assert took < 15, f"{now}: it took {took:.1f} s to end"
            left = psutil.wait_procs(started_by_it, timeout=15)[1]
            assert not left, f"{now}: left {left}"
            listed, damaged = records.read_all(out) if out.exists() else ([], [])
            assert not damaged, now
            valid = {r.run_id: r.digest for r in listed if r.done}
            assert digests.items() <= valid.items(), f"{now}: a valid record was lost or changed"
            digests = valid
            if run.returncode == 0:
                complete(out)
                completed += 1
                shutil.rmtree(out)
                digests = {}
                if completed % 2 == 0:  # every other time the files are made again too
                    shutil.rmtree(folder / "models")
            elif stop is ctrl_c:
                assert run.returncode in (130, -signal.SIGINT), f"{now}: {run.returncode}\n{errors[-2000:]}"
            elif stop is terminate:  # by the signal itself where Python had hardly begun
                assert run.returncode in (143, -signal.SIGTERM), f"{now}: {run.returncode}\n{errors[-2000:]}"
        assert no_orphans(), "an engine outlived its study"
        for _ in range(2):  # what a kernel left may still hold the device for a moment
            done = subprocess.run(
                [*MOELIB, "study", "run", "smoke"], capture_output=True, text=True, timeout=120, encoding="utf-8"
            )
            if done.returncode == 0:
                break
        assert done.returncode == 0, done.stderr[-2000:]
        complete(out)
        assert not [*home.rglob("*.partial"), *(out / "work").iterdir()]
    params._yaml.cache_clear()
    return "nothing lost"


def kill(run: subprocess.Popen, chance: random.Random) -> None:
    """Kill the runner, whose kernel must then end by itself, or its kernel, whose death the runner must notice."""
    try:
        # not the dry runs before the first notebook: a study whose needs cannot be foretold goes on, to its end
        kernels = [c.pid for c in psutil.Process(run.pid).children() if "ipykernel_launcher" in c.cmdline()]
    except psutil.NoSuchProcess:
        kernels = []
    with contextlib.suppress(ProcessLookupError):
        os.kill(chance.choice([run.pid, *kernels]), signal.SIGKILL)


def ctrl_c(run: subprocess.Popen, chance: random.Random) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: the whole foreground group


def terminate(run: subprocess.Popen, chance: random.Random) -> None:
    """As schedulers do before they kill: to the process alone, or to all of its group."""
    with contextlib.suppress(ProcessLookupError):
        (os.kill if chance.random() < 0.5 else os.killpg)(run.pid, signal.SIGTERM)


def no_orphans(within_s: float = 15) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        listed = psutil.process_iter(["name", "cmdline"])
        if not any("nano" in " ".join(p.info["cmdline"] or []) and "llama" in (p.info["name"] or "") for p in listed):
            return True
        time.sleep(0.2)
    return False


for _name, _stop, _often in (("kill -9", kill, 5), ("Ctrl-C", ctrl_c, 1), ("SIGTERM", terminate, 1)):

    @fault(f"{_name} at random moments", "kill", "nothing lost", 120)
    def _(folder, chance, rounds, stop=_stop, often=_often):
        return interrupted(folder, chance, often * rounds, stop)


class Campaign:
    """The labs, made once, and one fault after another in them."""

    def __init__(self, folder: Path):
        self.folder, self.labs = folder, {}

    def lab(self, kind: str) -> Lab:
        where = FakeGpu(f"GPU-{os.getpid()}") if kind == "gpu" else stub_server.loopback()
        for left in reversed(range(TRIES)):
            if kind in self.labs:
                break
            lab = Lab(Path(tempfile.mkdtemp(dir=self.folder)) / kind, engine.find(), where, kind == "real")
            try:
                self.labs[kind] = lab.prepare()
            except AssertionError:  # others on the machine held up a whole placement: there is nothing to lose
                if not left:
                    raise
        return self.labs[kind]

    def inject(self, f: Fault, seed: int, rounds: int = 1, turn: int = 0) -> tuple[str, float, bool]:
        """(what was reported, seconds until then, whether another turn would be another fault). Raises AssertionError
        where the fault was not survived."""
        chance = random.Random(f"{seed}/{f.name}/{turn}")
        untouched = chance.getstate()
        if not f.lab:
            place = Path(tempfile.mkdtemp(dir=self.folder))
            started = time.monotonic()
            reason = f.act(place, chance, rounds)
            assert f.expect in reason, f"reported {reason!r}"
            return reason, time.monotonic() - started, False
        with self.lab(f.lab) as lab:
            lab.reset()
            before = lab.valid()
            assert len(before) == 2
            started = time.monotonic()
            reason = f.act(lab, chance, rounds)
            took = time.monotonic() - started
            assert f.expect in reason, f"reported {reason!r}, {getattr(lab, 'messages', '')}"
            assert took <= f.within_s, f"took {took:.1f} s"
            now = lab.valid()
            lost = [n for n in before if now.get(n) != before[n]]
            assert len(lost) <= f.name.endswith(" record"), f"lost or changed: {lost}"
            assert not (left := lab.left_behind()), f"left behind: {left}"
            lab.script()
            again = lab.measure()
            assert again == "valid", f"without the fault: {again}"
            complete(lab.folder.path)
        return reason, took, chance.getstate() != untouched


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)), help="default: a new one")
    p.add_argument("--rounds", type=int, default=1, help="how often what is random is tried")
    p.add_argument("--only", default="", help="faults whose name holds this")
    p.add_argument("--hold", nargs=3, help=argparse.SUPPRESS)
    p.add_argument("--full-disk", type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.hold:
        return hold(Path(a.hold[0]), Path(a.hold[1]), a.hold[2]) or 0
    if a.full_disk:
        return full_disk(a.full_disk) or 0
    chosen = [f for f in FAULTS.values() if a.only in f.name]
    injected = survived = 0
    print(f"{len(chosen)} faults, seed {a.seed}", flush=True)
    logging.disable(logging.WARNING)  # of files that are made again
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder  # what is left there goes with it
        campaign = Campaign(Path(folder))
        for f in chosen:
            wrong, slowest, turn, again = [], 0.0, 0, True
            while again and turn < a.rounds:
                try:
                    reason, seconds, again = campaign.inject(f, a.seed, a.rounds, turn)
                    slowest = max(slowest, seconds)
                except Exception as err:  # a fault that breaks the campaign was not survived
                    wrong.append(f"turn {turn}: {type(err).__name__}: {err}")
                turn += 1
            injected, survived = injected + turn, survived + turn - len(wrong)
            line = "NOT SURVIVED  " + "; ".join(wrong) if wrong else f"survived  {reason}"
            print(f"{f.name:<48} {f.how:<13} {turn:2} x, {slowest:6.2f} s  {line}", flush=True)
    print(f"injected {injected} / survived {survived} (seed {a.seed})")
    return survived != injected


if __name__ == "__main__":
    sys.exit(main())
