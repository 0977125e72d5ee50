"""shimmy as a runner: `shimmy serve`, which binds llama.cpp and reads the model anew for each request. It streams in
form alone: the events of an answer come all at once when its last token is made.

Of what it says itself little is a measurement: its usage counts words, or is 0. Tokens are counted by the model's own
tokenizer, buffers and placement are read from llama.cpp's lines in its log.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import httpx

from moelib.base import files
from moelib.catalogue import params
from moelib.catalogue.facts import SHIMMY, EngineFacts
from moelib.catalogue.params import Workload
from moelib.catalogue.placement import Placement
from moelib.engine import archive, client
from moelib.engine.buffers import Report
from moelib.engine.client import Answer, Lines, RunError
from moelib.engine.engine import Engine
from moelib.engine.logs import parse_log
from moelib.machine import mapped, process
from moelib.machine.mapped import Digests
from moelib.measure.device import Session
from moelib.measure.llama_server import connect, reporting_its_end
from moelib.measure.runner import Content, Job, Prompt, Runner, Server
from moelib.runners import tokens

VARIABLE = "MOELIB_SHIMMY"
VERSION = "1.9.0"
"""What `make shimmy` builds, and the tests know. Version 2 takes the flags of offload and ignores them."""
CONTEXT = 4096
"""Tokens; shimmy has no setting for it."""
ASK_S = 30.0
PORTS = 5  # tries: another process may take a free one first
OVERRIDDEN = re.compile(r"^tensor (\S{1,128}) \(.{1,40}\) buffer type overridden to ", re.M)
LOADED = "llama_model_loader: loaded meta data with "
_FILE = re.compile(r"\d{1,9} key-value pairs and \d{1,9} tensors from (.{1,4096}?) \(version ")
DONE = "[DONE]"
LOG = ".shimmy.log.gz"
"""End of the file name of shimmy's stored log."""


class ShimmyError(params.UserError):
    """shimmy is missing, too old, or cannot do what is asked; the message says what to do."""


@dataclass(frozen=True)
class Shimmy:
    """One build of shimmy."""

    path: Path
    version: str

    @cached_property
    def sha256(self) -> str:
        return files.sha256(self.path.resolve())

    @cached_property
    def has_cuda(self) -> bool:
        """Whether it was built for NVIDIA GPUs."""
        return re.search(r"✅ CUDA", _said([str(self.path), "gpu-info"])) is not None

    def __str__(self) -> str:
        return f"shimmy {self.version}"


def cached() -> Path:
    """Where `make shimmy` puts it."""
    return archive.cache() / f"shimmy-{VERSION}" / "shimmy"


def find() -> Shimmy:
    """The binary that MOELIB_SHIMMY names, else one on PATH, else what `make shimmy` built.

    Raises ShimmyError where there is none, or one that has no --cpu-moe.
    """
    if named := os.environ.get(VARIABLE):
        path = Path(named)
        if not (path.is_file() and os.access(path, os.X_OK)):
            raise ShimmyError(f"{VARIABLE} names {named}, which is no program: name shimmy's binary, or unset it")
    else:
        path = Path(shutil.which("shimmy") or cached())
    if not path.is_file():
        raise ShimmyError(f"there is no shimmy here: run `make shimmy`, put it on PATH, or set {VARIABLE}")
    told = re.search(r"^shimmy (\d[\w.+-]{0,40})$", _said([str(path), "--version"]), re.M)
    if told is None:
        raise ShimmyError(f"{path} does not say that it is shimmy: name another one by {VARIABLE}")
    if "--cpu-moe" not in _said([str(path), "--help"]):
        raise ShimmyError(
            f"shimmy {told[1]} has no --cpu-moe, it cannot offload experts: `make shimmy` builds {VERSION}"
        )
    return Shimmy(path, told[1])


def _said(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, timeout=ASK_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise ShimmyError(f"{argv[0]} cannot be run: {err}; run `make shimmy`, or set {VARIABLE}") from None
    return (done.stdout + done.stderr).decode("utf-8", "replace")


class ShimmyServe(Runner):
    """A fresh process of `shimmy serve`. `llama`: the build whose tokenizer counts what shimmy does not."""

    name = SHIMMY
    log = "shimmy.log"

    def __init__(self, shimmy: Shimmy, llama: Engine) -> None:
        self.shimmy, self.llama, self.hashes = shimmy, llama, mapped.Hashes()

    def facts(self) -> EngineFacts:
        return EngineFacts(build=None, version=str(self.shimmy), server_sha256=self.shimmy.sha256, runner=self.name)

    @contextmanager
    def start(self, job: Job, session: Session, work: Path) -> Iterator["Serving"]:
        flags, home = placement_flags(job.placement, job.context), work / "home"
        home.mkdir(parents=True, exist_ok=True)  # empty: it looks for models there, and where it is started
        env = process.environment(work, {**session.env, "HOME": str(home)})
        for tries_left in reversed(range(PORTS)):
            port = process.free_port()
            argv = [str(self.shimmy.path), "serve", "--bind", f"127.0.0.1:{port}"]
            argv += ["--model-path", str(file := job.file.resolve()), *flags]
            with process.Child(argv, work / self.log, env, session.cpus, cwd=home) as child:
                try:
                    child.wait_listening(port, process.patience(ASK_S))
                except process.ProcessError:
                    if tries_left and "in use" in child.text():
                        continue
                    raise
                yield Serving(self, child, file, env, port)
                return


def placement_flags(placed: Placement, context: int) -> list[str]:
    """shimmy's flags of a placement. Raises RunError for settings that it does not have."""
    if placed.load_mode != "mmap":
        raise RunError("placement-unsupported", f"shimmy maps its file: it has no load mode {placed.load_mode}")
    if context != CONTEXT:
        raise RunError("context-unsupported", f"shimmy serves {CONTEXT} tokens and no others: set `context: {CONTEXT}`")
    flags = placed.flags()
    if other := sorted({*flags, *(["-t"] if placed.threads else [])} - {"--cpu-moe", "--n-cpu-moe"}):
        raise RunError("placement-unsupported", f"shimmy has no {', '.join(other)}: leave that out of {placed}")
    return [part for flag, value in flags.items() for part in (flag, value) if part is not None]


class Serving(Server):
    """shimmy's process while it serves."""

    connection: httpx.Client

    def __init__(self, runner: ShimmyServe, child: process.Child, file: Path, env: dict[str, str], port: int) -> None:
        self.runner, self.child, self.file, self.port, self.pid = runner, child, file, port, child.pid
        self.argv = tuple(file.name if part == str(file) else part for part in ("shimmy", *child.argv[1:]))
        self.env = tuple(sorted(env))

    @contextmanager
    def serving(self, limit_s: float) -> Iterator[float]:
        load_s = time.monotonic() - self.child.started
        with reporting_its_end(self.child), client.connect(self.port, "no key") as self.connection:
            self._check_ours()
            yield load_s

    def _check_ours(self) -> None:
        listed = client.answer(self.connection, "GET", "/v1/models").raise_for_status().json()["data"]
        if self.file.stem not in {model["id"] for model in listed}:
            raise RunError("not-our-server", f"shimmy does not have {self.file.stem}, but {str(listed)[:200]}")

    def prompts(self, workloads: Sequence[Workload], context: int) -> list[Prompt]:
        return tokens.prompts(self.runner.llama, self.file, workloads, context)

    def connect(self) -> None:
        connect(self.connection)

    def ask(self, content: Content, tokens: int) -> tuple[float, Lines]:
        body = {"model": self.file.stem, "prompt": content, "max_tokens": tokens, "temperature": 0.0, "stream": True}
        try:
            return client.stream(self.connection, "/api/generate", body, tokens)
        except RunError as err:
            if err.reason != "request-refused":
                raise
            raise RunError(
                err.reason, f"shimmy refuses to serve {self.file.name}: {err}; its log ends:\n{self.child.tail()}"
            ) from None

    def read(self, lines: Lines, tokens_asked: int) -> Answer:
        pieces, finished = pieces_of(lines)
        text = "".join(piece for _, piece in pieces)
        counted = tokens.count(self.runner.llama, self.file, text, begin=False) if text else 0
        return Answer(
            prompt_n=None,
            cache_n=None,
            predicted_n=None,
            engine_prompt_s=None,
            engine_predicted_s=None,
            token_s=tuple(round(t, 6) for t, _ in pieces),
            token_n=(),
            tokens=(),
            finished=finished,
            text=text,
            counted_n=counted,
        )

    def files(self, device_pid: int | None, since: float) -> tuple[Callable[[], Digests], dict[str, str]]:
        try:
            mappings = mapped.look(self.child.pid, since, [self.runner.shimmy.path.parent])
        except mapped.NotListed as err:
            return dict, {"engine_files": str(err)}

        def digests() -> Digests:
            own, system = ([m for m in mappings if m.own is mine] for mine in (True, False))
            return {"engine_files": self.runner.hashes.of(own), "system_files": self.runner.hashes.of(system)}

        return digests, {}

    def stop(self) -> process.Exit:
        ended = self.child.stop()
        self.child.check_log()
        return ended

    def report(self) -> Report:
        return report_of(self.child.text(), self.file)


def pieces_of(lines: Lines) -> tuple[list[tuple[float, str]], bool]:
    """(arrival, text) of each event of a stream of plain text, and whether it came to its end.

    An event is one token; a newline in it makes a further `data:` line. Raises RunError for what comes after the end.
    """
    pieces: list[tuple[float, str]] = []
    held: list[str] = []
    over = False
    for t, line in lines:
        text = line.decode("utf-8", "replace").removesuffix("\r")
        if text.startswith("data:"):
            if over:
                raise RunError("request-failed", f"text came after the end of the stream: {text[:200]}")
            held.append(text.removeprefix("data:").removeprefix(" "))
        elif not text and held:
            piece, held = "\n".join(held), []
            if piece == DONE:
                over = True
            elif piece.startswith('{"error"'):
                raise RunError("request-failed", str(json.loads(piece))[:300])
            else:
                pieces.append((t, piece))
    return pieces, over


def report_of(log: str, file: Path) -> Report:
    """What llama.cpp reported in shimmy's log, of its last load: every request loads the model anew, the same way.

    Raises RunError where a load is of another file, or differs from the others.
    """
    _, *loads = log.split(LOADED)
    if not loads:  # as of version 2, which has another engine: nothing was moved
        return Report((), None, None, (), overridden=())
    named = [_FILE.match(load) for load in loads]
    other = {Path(m[1]).name if m else "a file without a name" for m in named} - {file.name}
    if other:
        raise RunError("not-our-model", f"shimmy loaded {', '.join(sorted(other))}, not {file.name}")
    found = [replace(parse_log(load), overridden=tuple(OVERRIDDEN.findall(load))) for load in loads]
    if any(one != found[-1] for one in found):
        raise RunError("loads-differ", f"shimmy loaded {file.name} {len(found)} times, and not each time the same way")
    return found[-1]
