"""llama-server as a runner: its command line, its endpoints, how its stream is read, and how its end is reported."""

import math
import random
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from pydantic import TypeAdapter

from moelib.catalogue.facts import LLAMA_SERVER, EngineFacts
from moelib.catalogue.params import Workload
from moelib.engine import client
from moelib.engine.buffers import Report
from moelib.engine.client import EVENT_LINES, REQUEST_S, SPARE_LINES, Answer, Lines, RunError
from moelib.engine.engine import LISTENING, Engine
from moelib.engine.logs import parse_log
from moelib.machine import process
from moelib.machine.mapped import Digests
from moelib.measure.device import Session
from moelib.measure.runner import Content, Job, Prompt, Runner, Server

END_S = 2.0  # for a dying server to be gone, so that its end is what is reported and not the broken connection
PROBS = 5
# one candidate: the default sampler chain costs 2 % at 300 tok/s and is not what is measured
SAMPLING = {"temperature": 0, "samplers": ["top_k"], "top_k": 1}
OUT_OF_MEMORY = re.compile(
    r"out of memory|failed to allocate|unable to allocate|cannot allocate|bad_alloc|ErrorOutOfDeviceMemory", re.I
)
CHECKED = TypeAdapter(Answer)  # so that a value of the wrong type fails here and not in the record


class LlamaServer(Runner):
    """A fresh process of a build's llama-server."""

    name = LLAMA_SERVER

    def __init__(self, llama: Engine) -> None:
        self.tools: Engine = llama

    def facts(self) -> EngineFacts:
        llama = self.tools
        return EngineFacts(build=llama.build, version=llama.version, server_sha256=llama.server_sha256)

    @contextmanager
    def start(self, job: Job, session: Session, work: Path) -> Iterator["Serving"]:
        key = process.new_key()
        argv = self.tools.server_argv(job.file, job.placement, job.context, job.threads, session.args)
        env = process.environment(work, {**session.env, "LLAMA_API_KEY": key})
        with process.Child(argv, work / "server.log", env, session.cpus) as child:
            yield Serving(self.tools, child, job.file, env, key)


class Serving(Server):
    """llama-server's process while it serves."""

    connection: httpx.Client

    def __init__(self, llama: Engine, child: process.Child, file: Path, env: dict[str, str], key: str) -> None:
        self.llama, self.child, self.file, self.key, self.pid = llama, child, file, key, child.pid
        self.argv = (Path(child.argv[0]).name, "-m", file.name, *child.argv[3:])
        self.env = tuple(sorted(env))

    @contextmanager
    def serving(self, limit_s: float) -> Iterator[float]:
        with reporting_its_end(self.child):
            port = next(filter(None, self.child.wait_for(LISTENING, limit_s).groups()))
            load_s = time.monotonic() - self.child.started
            with client.connect(int(port), self.key) as self.connection:
                self.build_info = check_ours(self.connection, self.file)
                yield load_s

    def prompts(self, workloads: Sequence[Workload], context: int) -> list[Prompt]:
        return prepare(self.connection, workloads, context)

    def connect(self) -> None:
        connect(self.connection)

    def ask(self, content: Content, tokens: int) -> tuple[float, Lines]:
        body = {**SAMPLING, "ignore_eos": True, "cache_prompt": False}
        body |= {"return_tokens": True, "timings_per_token": True, "stream": True}
        body |= {"prompt": content, "n_predict": tokens}
        return client.stream(self.connection, "/completion", body, tokens)

    def read(self, lines: Lines, tokens: int) -> Answer:
        return read_stream(lines, tokens)

    def likeliest(self, content: Content) -> tuple[float | None, ...]:
        return top_logprobs(self.connection, content)

    def files(self, device_pid: int | None, since: float) -> tuple[Callable[[], Digests], dict[str, str]]:
        return self.llama.mapped_files(self.child.pid, device_pid, since)

    def stop(self) -> process.Exit:
        ended = self.child.stop()
        self.child.check_log()
        return ended

    def report(self) -> Report:
        return parse_log(self.child.text())


@contextmanager
def reporting_its_end(server: process.Child) -> Iterator[None]:
    """Report a server that died by how it died, whatever broke first on this side."""
    try:
        yield
    except process.ProcessError as err:
        server.check_log()
        deadline = time.monotonic() + END_S
        while err.reason == "connection-lost" and server.running() and time.monotonic() < deadline:
            time.sleep(process.POLL_S)
        if server.running():
            raise
        code = server.stop().code or 0
        if OUT_OF_MEMORY.search(server.text()):
            reason = "out-of-memory"
        elif code < 0:
            reason = "engine-killed" if -code == signal.SIGKILL else "engine-crashed"
        else:
            reason = "engine-ended"
        raise RunError(reason, f"{server.name} ended with {code}; its log ends:\n{server.tail()}") from err


def check_ours(connection: httpx.Client, model: Path) -> str | None:
    """Check that the server behind the port has loaded our file; return its build."""
    answer = client.answer(connection, "GET", "/props")
    if answer.status_code != 200 or Path(answer.json().get("model_path", "")).name != model.name:
        raise RunError("not-our-server", f"another server answers here: {answer.status_code} {answer.text[:200]}")
    build = answer.json().get("build_info")
    return build[:200] if isinstance(build, str) else None


def prepare(connection: httpx.Client, workloads: Sequence[Workload], context: int) -> list[Prompt]:
    """Every workload with its prompt. Raises RunError if one does not fit the context."""
    prompts = [Prompt(w, ids, len(ids)) for w in workloads for ids in (prompt_ids(connection, w),)]
    for w, ids, _ in prompts:
        if (tokens := len(ids)) + w.generate_tokens > context:
            need = f"{w.name} needs {tokens} + {w.generate_tokens} tokens, the context is {context}"
            raise RunError("context-too-small", f"{need}: raise `context` in the study")
    return prompts


def vocabulary(connection: httpx.Client) -> int:
    """How many token ids the model has. Raises RunError where the server does not tell."""
    (model,) = client.answer(connection, "GET", "/v1/models").raise_for_status().json()["data"]
    count = (model.get("meta") or {}).get("n_vocab")
    if not isinstance(count, int) or count < 1:
        raise RunError("tokenizer", "the engine does not say how many tokens its vocabulary has: use a newer build")
    return count


def prompt_ids(connection: httpx.Client, workload: Workload) -> list[int]:
    """The workload's prompt as token ids: drawn, or its text by the engine, repeated and cut to its exact length."""
    length, text = workload.prompt_tokens, workload.text or ""
    if workload.drawn is not None and length is not None:
        count, chance = vocabulary(connection), random.Random(workload.drawn)
        again, rest = divmod(length, count)
        return [*range(count)] * again + chance.sample(range(count), rest)
    for _ in range(8):
        body = {"content": text, "add_special": True}
        answer = client.answer(connection, "POST", "/tokenize", body).raise_for_status()
        ids = answer.json()["tokens"]
        if not ids or not all(isinstance(i, int) for i in ids):
            raise RunError("tokenizer", f"the engine returned no token ids for {workload.name}: {answer.text[:200]}")
        if length is None or len(ids) >= length:
            return ids if length is None else ids[:length]
        text += (" " + (workload.text or "")) * length
    raise RunError("tokenizer", f"{workload.name}'s text does not reach {length} tokens, however often it is repeated")


def top_logprobs(connection: httpx.Client, prompt: Content) -> tuple[float | None, ...]:
    """Log-probabilities of the likeliest next tokens, best first: a server with invalid weights answers all the
    same, and these values show it."""
    body = {"prompt": prompt, "n_predict": 1, "n_probs": PROBS, "temperature": 0, "cache_prompt": False}
    connect(connection)
    answer = client.answer(connection, "POST", "/completion", body, REQUEST_S).raise_for_status().json()
    candidates = [t["top_logprobs"] for t in answer.get("completion_probabilities", [])[:1]]
    logprobs = [t["logprob"] for t in candidates[0][:PROBS]] if candidates else []
    # llama.cpp sends null; Python's JSON also reads NaN, which no record can hold
    return tuple(p if p is not None and math.isfinite(p) else None for p in logprobs)


def connect(connection: httpx.Client, path: str = "/health") -> httpx.Response:
    """Open a connection before the clock starts; what the server says there. The server closes it after a stream,
    whatever its headers say, and a pooled connection may be closed at any moment."""
    for _ in range(3):
        try:
            return client.answer(connection, "GET", path)
        except httpx.TimeoutException:
            raise  # if the server hangs, another attempt would hang too
        except httpx.TransportError as err:
            last = err
    raise last


def read_stream(lines: Lines, generate_tokens: int) -> Answer:
    """A stream's lines -> Answer. Raises RunError if the engine sent an error, or more than was asked."""
    arrived: list[tuple[float, int]] = []
    tokens: list[int] = []
    text: list[str] = []
    final: dict[str, Any] | None = None
    for t, event in client.events(lines):
        if event is None:
            continue
        if event.get("stop"):
            final = event
        if event.get("content"):
            text.append(event["content"])
        if event.get("tokens"):
            tokens += event["tokens"]
            if len(tokens) > SPARE_LINES + EVENT_LINES * generate_tokens:
                raise RunError("answer-too-large", f"{len(tokens)} tokens came for {generate_tokens}")
            predicted = event["timings"]["predicted_n"] if "timings" in event else event["tokens_predicted"]
            arrived.append((round(t, 6), predicted))
    timings = (final or {}).get("timings", {})
    ms = {f"engine_{k}_s": timings.get(f"{k}_ms") for k in ("prompt", "predicted")}
    return CHECKED.validate_python(
        {k: timings.get(k) for k in ("prompt_n", "cache_n", "predicted_n")}
        | {k: None if v is None else round(v / 1000, 6) for k, v in ms.items()}
        | {"token_s": tuple(t for t, _ in arrived), "token_n": tuple(n for _, n in arrived)}
        | {"tokens": tuple(tokens), "finished": final is not None, "text": "".join(text)}
    )
