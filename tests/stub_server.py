"""A scripted stand-in for llama-server that misbehaves on demand; the standard library alone.

`install` puts a copy of this file as `llama-server` into a folder of tools; `script` writes beside it defect goes wrong
in the next runs. Children get an allow-listed environment, so nothing can be passed that way. What is asked about the
build (--version, --help, --list-devices) goes to the real server, and so does a run whose script says `real`.
tests/test_stub.py holds it to the real one.
"""

import ctypes
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

HERE = Path(sys.argv[0]).resolve().parent
MIB = 1 << 20
PR_CAPBSET_DROP, CAP_IPC_LOCK = 24, 14
STEP_S = 0.0005  # a token
ALPHABET = 500  # token ids
REASON = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 500: "Internal Server Error"}


def install(folder, engine):
    """`engine` with this stub in front of its llama-server, in `folder`. Other tools are the real ones."""
    from dataclasses import replace

    from conftest import REPO

    folder.mkdir(parents=True)
    facts = {"real": engine.tool("llama-server"), "build": engine.build, "said": engine.version}
    facts["path"] = [str(REPO), *sys.path]
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    path = folder / "llama-server"
    path.write_text(f"#!{sys.executable} -IS\n" + Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    path.chmod(0o755)
    for name in ("llama-quantize", "rpc-server"):  # for who looks for the tools in a folder
        tool = Path(engine.tool(name))
        (folder / tool.name).write_text(f'#!/bin/sh\nexec {tool} "$@"\n', encoding="utf-8")
        (folder / tool.name).chmod(0o755)
    return replace(engine, folder=folder, tools={**engine.tools, "llama-server": path})


def loopback():
    """The loopback device of a stub, which loads nothing: its process counts as holding what the stub says is there."""
    from moelib.machine import process
    from moelib.measure import device

    class Held(device.Loopback):
        @contextmanager
        def session(self, llama, work):
            note = llama.folder / "held"
            note.unlink(missing_ok=True)
            with super().session(llama, work) as held:
                held_bytes = lambda: int(note.read_text(encoding="utf-8")) if note.exists() else 0  # noqa: E731
                held.peak_bytes = lambda: process.peak_rss(held.pid) + held_bytes()
                yield held

    return Held()


@contextmanager
def serving(llama, model, work, where, key, placement="baseline", load_mode="mmap"):
    """(port, server) of a llama-server, the stub or the real one, as moelib starts it."""
    from moelib.catalogue.placement import Placement
    from moelib.engine import engine
    from moelib.machine import process

    with where.session(llama, work) as session:
        argv = llama.server_argv(model, Placement.parse(placement, load_mode), 256, 1, session.args)
        env = process.environment(work, {"LLAMA_API_KEY": key})
        with process.Child(argv, work / "server.log", env) as server:
            yield int(next(filter(None, server.wait_for(engine.LISTENING, 30).groups()))), server


def script(engine, times=None, **defect):
    """Let the next `times` runs (all, without it) have this `defect`; nothing to do again with neither."""
    path = engine.folder / "script.json"
    path.write_text(json.dumps({"times": times, **defect}), encoding="utf-8")


def _script():
    """What is to be done now, with how often it still is; a script that is used up is all well."""
    path = HERE / "script.json"
    defect = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {"real": defect.get("real", False)} if defect.get("times") == 0 else defect


def _take(argv):
    """What this run is to do, which is then done once more. A script for another placement is all well."""
    defect = _script()
    if "only" in defect and f"--{defect['only']}" not in argv:
        return {"real": defect.get("real", False)}
    if defect.get("times"):
        (HERE / "script.json").write_text(json.dumps({**defect, "times": defect["times"] - 1}), encoding="utf-8")
    return defect


def main():
    facts, argv = json.loads((HERE / "facts.json").read_text(encoding="utf-8")), sys.argv[1:]
    if argv[0] == "--read":
        return _read(facts, *map(Path, argv[1:]))
    if "--list-devices" in argv and _script().get("at") == "devices":
        _end(_take(argv))
    if set(argv) & {"--version", "--help", "--list-devices"}:
        os.execv(facts["real"], [facts["real"], *argv])
    defect = _take(argv)
    if defect.get("real"):
        _real(facts["real"], argv, defect)
    if defect.get("at") == "start":
        _end(defect)
    Server(facts, argv, defect).serve()


def _real(tool, argv, defect):
    """Become the real server: without the words in `drop`, with those in `add`, within `address_space` bytes, or with
    the right to lock `memlock` bytes at most."""
    if defect.get("stopped"):
        os.kill(os.getpid(), signal.SIGSTOP)
    argv = [a for a in argv if a not in defect.get("drop", ())] + defect.get("add", [])
    if "address_space" in defect:
        resource.setrlimit(resource.RLIMIT_AS, (defect["address_space"],) * 2)
    if "memlock" in defect:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0)  # root would not heed the limit
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (defect["memlock"],) * 2)
    os.execv(tool, [tool, *argv])


def _end(defect):
    """End as `how` says: by a signal, by an exit code, or not at all."""
    how = defect["how"]
    if "says" in defect:
        print(defect["says"], flush=True)
    if how == "hang":
        time.sleep(600)
    elif how == "hang on":  # and what it started too, whatever they are sent
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.execv("/bin/sh", ["sh", "-c", "trap '' TERM; sleep 600 & wait; sleep 600"])
    elif how == "flood":
        while True:
            sys.stdout.buffer.write(defect.get("with", "plausible output\n").encode() * 4096)
    elif how.startswith("signal "):
        os.kill(os.getpid(), int(how.split()[1]))
        time.sleep(10)
    os._exit(int(how.removeprefix("exit ")))


def _header(facts, path):
    """What of the file's header is needed, kept beside; read by a process of its own, as that takes half a second and
    40 MB of imports, which are not to be this one's."""
    stat = path.stat()
    kept = HERE / f"header-{stat.st_size}-{stat.st_mtime_ns}.json"
    if not kept.exists():
        part = kept.with_suffix(f".{os.getpid()}")
        subprocess.run([sys.executable, "-IS", sys.argv[0], "--read", str(path), str(part)], check=True)
        part.rename(kept)
    return json.loads(kept.read_text(encoding="utf-8"))


def _read(facts, path, part):
    sys.path[:] = facts["path"]
    from moelib.gguf import gguf_file

    h = gguf_file.read_header(path)
    placements = ["baseline", "cpu-moe", *(f"n-cpu-moe={n}" for n in range(1, 9))]
    described = {"device": {p: h.device_bytes(p) for p in placements}, "all": h.tensor_bytes}
    short = {k.removeprefix(h.metadata["general.architecture"] + "."): v for k, v in h.metadata.items()}
    described |= {k: short[k] for k in ("block_count", "embedding_length")}
    described["kv"] = short["attention.head_count_kv"] * short["embedding_length"] // short["attention.head_count"]
    part.write_text(json.dumps(described), encoding="utf-8")


class Server:
    def __init__(self, facts, argv, defect):
        self.facts, self.defect, self.sent, self.task, self.started = facts, defect, 0, 0, time.monotonic()
        self.commit = re.search(r"(?:commit |\()(\w+)\)", facts["said"])[1]  # b11434; Debian in Debian's build
        after = dict(zip(argv, [*argv[1:], ""], strict=True))
        self.model, self.context = Path(after["-m"]), int(after["-c"])
        self.device, self.rpc = after.get("--device", "none"), after.get("--rpc")
        self.placement = "cpu-moe" if "--cpu-moe" in argv else "baseline"
        if "--n-cpu-moe" in argv:
            self.placement = f"n-cpu-moe={after['--n-cpu-moe']}"
        self.mode = after.get("--load-mode", "mmap")
        self.mapped = self.mode == "mmap"
        self.threads, self.ubatch, self.kv = after["-t"], int(after.get("-ub", 512)), after.get("-ctk", "f16")
        self.op_offload = "--no-op-offload" not in argv
        self.key = os.environ.get("LLAMA_API_KEY")

    def log(self, part, text):
        seconds, micro = divmod(int((time.monotonic() - self.started) * 1e6), 1_000_000)
        clock = f"{seconds // 60}.{seconds % 60:02}.{micro // 1000:03}.{micro % 1000:03}"
        print(f"{clock} I {part}: {text}", flush=True)

    def load(self):
        """Say what the real one says of its build and of its load, where moelib looks."""
        h = _header(self.facts, self.model)
        number, with_ = self.facts["build"], re.search(r"built (with .*?)(;|$)", self.facts["said"])[1]
        self.log("cmn  common_param", f"common_params_print_info: build {number} ({self.commit}) {with_}")
        if self.defect.get("load") == "silent":
            return
        self.log("cmn  common_param", f"system_info: n_threads = {self.threads} (n_threads_batch = {self.threads}) / 2")
        self.log("load_tensors", f"loading model tensors, this can take a while... (load_mode = {self.mode})")
        self.log("llama_context", f"n_ctx                 = {self.context}")
        self.log("llama_context", f"n_ubatch              = {min(self.ubatch, self.context)}")
        placement = "baseline" if self.defect.get("load") == "deaf" else self.placement
        device = "none" if self.defect.get("load") == "cpu" else self.device
        layers = h["block_count"] + 1
        on = h["device"][placement] if device != "none" else 0
        host = "CPU_Mapped" if self.mapped else "CPU"
        name = f"RPC0[{self.rpc}]" if device.startswith("RPC") else device
        if self.defect.get("load") == "cpu":  # as a build without a GPU: it warns and serves
            print("warning: no usable GPU found, --gpu-layers option will be ignored", flush=True)
        else:
            self.log("load_tensors", f"offloaded {layers}/{layers} layers to GPU")
        self._buffer("load_tensors", host, "model", h["all"] - on)
        if on:
            self._buffer("load_tensors", name, "model", on)
        kv = 2 * 2 * self.context * h["block_count"] * h["kv"]
        where = name if on else "CPU"
        (HERE / "held").write_text(str(on + kv + 2 * MIB if on else 0), encoding="utf-8")
        self._buffer("llama_context", "CPU", "output", 2048)
        self._buffer("llama_kv_cache", where, "KV", kv)
        self.log("llama_kv_cache", f"size = 0.00 MiB, K ({self.kv}):    0.00 MiB, V ({self.kv}):    0.00 MiB")
        if on:
            self._buffer("sched_reserve", where, "compute", 2 * MIB)
        self._buffer("sched_reserve", "CPU", "compute", MIB)
        splits = 2 if on and placement == "baseline" else 1 if not on else 4
        if splits == 4 and device.startswith("CUDA") and self.op_offload and self.ubatch >= 32:
            splits = "6 / 4"
        self.log("sched_reserve", f"graph: nodes = 95, splits = {splits}, input objects = 4, input tensors = 9")

    def _buffer(self, part, name, kind, nbytes):
        self.log(part, f"{name:>10} {kind} buffer size = {nbytes / MIB:8.2f} MiB")

    def serve(self):
        self.load()
        signal.signal(signal.SIGTERM, self._on_sigterm)
        if self.defect.get("at") == "load":
            _end(self.defect)
        with socket.create_server(("127.0.0.1", 0)) as s:
            self.log("srv  llama_server", "model loaded")
            self.log("srv  llama_server", f"listening on http://127.0.0.1:{s.getsockname()[1]}")
            while True:
                threading.Thread(target=self._connection, args=(s.accept()[0],), daemon=True).start()

    def _on_sigterm(self, *_):
        if self.defect.get("at") == "end":
            _end(self.defect)
        os._exit(0)

    def _connection(self, c):
        c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with c, c.makefile("rb") as lines:
            try:
                while self._request(c, lines):
                    pass
            except OSError:
                pass

    def _request(self, c, lines):
        """Answer one request; True if the connection stays open."""
        head = lines.readline().split()
        if not head:
            return False
        headers = {}
        while line := lines.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        arrived = time.monotonic()
        body = lines.read(int(headers.get("content-length", 0)))
        path, keep = head[1].decode(), headers.get("connection") != "close"
        if path != "/health" and headers.get("authorization") != f"Bearer {self.key}":
            return self._json(c, 401, _error(401, "Invalid API Key", "authentication_error"), keep)
        if self.defect.get("at") == path:
            if "body" in self.defect:  # without an end
                c.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
                while True:
                    c.sendall(self.defect["body"].encode() * 1000)
            if "answers" not in self.defect:
                _end(self.defect)
            return self._json(c, self.defect.get("status", 200), self.defect["answers"], keep)
        fields = json.loads(body) if body else {}
        if path == "/health":
            return self._json(c, 200, {"status": "ok"}, keep)
        if path == "/props":
            number = self.facts["build"]
            properties = {"model_path": str(self.model), "build_info": f"b{number}-{self.commit}", "total_slots": 1}
            return self._json(c, 200, properties, keep)
        if path == "/v1/models":
            meta = {"vocab_type": 1, "n_vocab": 512, "n_ctx_train": 4096, "n_embd": 256, "n_params": 1, "size": 1}
            return self._json(c, 200, {"object": "list", "data": [{"id": self.model.name, "meta": meta}]}, keep)
        if path == "/tokenize":
            words = re.findall(r"\w+|[^\w\s]", fields["content"])
            ids = [259 + sum(map(ord, w)) % 200 for w in words]
            return self._json(c, 200, {"tokens": ([1] if fields.get("add_special") else []) + ids}, keep)
        if path == "/completion":
            return self._completion(c, fields, arrived, keep)
        return self._json(c, 404, _error(404, "File Not Found", "not_found_error"), keep)

    def _json(self, c, status, data, keep):
        body = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
        head = [f"HTTP/1.1 {status} {REASON[status]}", "Server: llama.cpp"]
        head += ["Content-Type: application/json; charset=utf-8", f"Content-Length: {len(body.encode())}"]
        head += [] if keep else ["Connection: close"]
        c.sendall(("\r\n".join(head) + "\r\n\r\n" + body).encode())
        return keep

    def _completion(self, c, fields, arrived, keep):
        prompt, n = fields["prompt"], fields["n_predict"]
        if len(prompt) > self.context:
            says = f"request ({len(prompt)} tokens) exceeds the available context size ({self.context} tokens)"
            wrong = _error(400, f"{says}, try increasing it", "exceed_context_size_error")
            wrong["error"] |= {"n_prompt_tokens": len(prompt), "n_ctx": self.context}
            return self._json(c, 400, wrong, keep)
        n += self.defect.get("more", 0)
        cached = self.defect.get("cached", 0)
        self.task += 1
        self.log("slot launch_slot_", f"id  0 | task {self.task} | processing task, is_child = 0")
        time.sleep(STEP_S)
        prompt_ms = (first := time.monotonic()) - arrived

        def timings(done):
            spent = (time.monotonic() - first) * 1e3 if done > 1 else 0.001
            t = {"cache_n": cached, "prompt_n": len(prompt) - cached, "prompt_ms": prompt_ms * 1e3}
            t |= {"prompt_per_token_ms": prompt_ms * 1e3 / len(prompt), "prompt_per_second": len(prompt) / prompt_ms}
            t |= {"predicted_n": done, "predicted_ms": spent, "predicted_per_token_ms": spent / max(1, done - 1)}
            return {**t, "predicted_per_second": 1e3 * (done - 1) / spent, **self.defect.get("timings", {})}

        def event(done):
            i = (sum(prompt) + done * 7) % ALPHABET
            e = {"index": 0, "content": f" t{i}", "tokens": [i], "stop": False, "id_slot": -1}
            return e | {"tokens_predicted": done, "tokens_evaluated": len(prompt), "timings": timings(done)}

        def final(done):
            e = {"index": 0, "content": "", "tokens": [], "id_slot": 0, "stop": True, "model": str(self.model)}
            e |= {"tokens_predicted": done, "tokens_evaluated": len(prompt), "generation_settings": {}, "prompt": ""}
            e |= {"has_new_line": False, "truncated": False, "stop_type": "limit", "stopping_word": ""}
            t = timings(done)
            for phase, ms, tokens in (
                ("prompt eval time", t["prompt_ms"], t["prompt_n"]),
                ("       eval time", t["predicted_ms"], t["predicted_n"]),
            ):
                spent = f"{phase} = {ms:10.2f} ms / {tokens:5} tokens ("
                self.log("slot print_timing", f"id  0 | task {self.task} | {spent}")
            return e | {"tokens_cached": len(prompt) + done - 1, "timings": t}

        if not fields.get("stream"):
            top = [{"id": i, "token": f" t{i}", "bytes": [32]} for i in range(fields.get("n_probs", 0))]
            top = [{**t, "logprob": self.defect.get("logprob", -5.0 - t["id"] / 10)} for t in top]
            probabilities = [{**top[0], "top_logprobs": top}] if top else []
            more = {"completion_probabilities": probabilities} if top else {}
            return self._json(c, 200, {**final(n), "content": " t0", **more}, keep)
        head = ["HTTP/1.1 200 OK", "Server: llama.cpp", "Content-Type: text/event-stream"]
        head += ["Transfer-Encoding: chunked", "Connection: close"]
        out = Pieces(c, self.defect)
        out.send(("\r\n".join(head) + "\r\n\r\n").encode())
        for done in range(1, n + 1):
            if done > 1:
                time.sleep(STEP_S)
            if self.defect.get("at") == "token" and self.defect["token"] == done:
                while self.defect.get("how") == "trickle":  # bytes, and never a line
                    out.chunk("x")
                    time.sleep(0.02)
                while self.defect.get("how") == "endless":
                    out.chunk(self.defect["event"] * 1000)
                if "event" not in self.defect:
                    _end(self.defect)
                out.chunk(self.defect["event"] + "\n\n")
            out.event(event(done))
        if not self.defect.get("endless"):
            out.event(final(n))
        out.send(b"0\r\n\r\n")
        return False


class Pieces:
    """A stream's way out: whole, in `pieces` of so many bytes, or only the first `cut` bytes."""

    def __init__(self, c, defect):
        self.c, self.cut, self.pieces = c, defect.get("cut"), defect.get("pieces")
        self.sent = 0

    def event(self, data):
        self.chunk("data: " + json.dumps(data, separators=(",", ":")) + "\n\n")

    def chunk(self, text):
        data = text.encode()
        self.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def send(self, data):
        if self.cut is not None and self.sent + len(data) >= self.cut:
            self.c.sendall(data[: self.cut - self.sent])
            raise ConnectionAbortedError
        size = self.pieces or len(data)
        for i in range(0, len(data), size):
            self.c.sendall(data[i : i + size])
        self.sent += len(data)


def _error(code, message, kind):
    return {"error": {"message": message, "type": kind, "code": code}}


if __name__ == "__main__":
    main()
