"""`shimmy generate` as a runner: a process for each request, which prints its text when it is whole."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moelib.catalogue.facts import SHIMMY_GENERATE, EngineFacts
from moelib.catalogue.params import Workload
from moelib.engine.buffers import Report
from moelib.engine.client import REQUEST_S, Answer, Lines, RunError
from moelib.engine.engine import Engine
from moelib.machine import process
from moelib.measure.device import Session
from moelib.measure.llama_server import OUT_OF_MEMORY
from moelib.measure.runner import Content, Job, Prompt, Runner, Server
from moelib.runners import shimmy, tokens
from moelib.runners.shimmy import Shimmy

NAME, FILE = "phi3-lora", "SHIMMY_BASE_GGUF"
"""The one model whose file can be named: by this variable."""


class ShimmyGenerate(Runner):
    """`shimmy generate`, the command of the plan. `llama`: the build whose tokenizer counts tokens."""

    name = SHIMMY_GENERATE
    log = "shimmy.log"

    def __init__(self, shimmy: Shimmy, llama: Engine) -> None:
        self.shimmy, self.llama = shimmy, llama

    def facts(self) -> EngineFacts:
        return EngineFacts(build=None, version=str(self.shimmy), server_sha256=self.shimmy.sha256, runner=self.name)

    @contextmanager
    def start(self, job: Job, session: Session, work: Path) -> Iterator["Generating"]:
        flags, home = shimmy.placement_flags(job.placement, job.context), work / "home"
        home.mkdir(parents=True, exist_ok=True)
        (work / self.log).write_bytes(b"")  # each request adds to it
        variables = {**session.env, "HOME": str(home), FILE: str(job.file.resolve())}
        yield Generating(self, job.file, flags, process.environment(work, variables), session, work)


class Generating(Server):
    """Nothing runs between requests; `pid` and `argv` are those of the request at hand."""

    def __init__(
        self, runner: ShimmyGenerate, file: Path, flags: list[str], env: dict[str, str], session: Session, work: Path
    ) -> None:
        self.runner, self.file, self.flags, self.variables = runner, file, flags, env
        self.session, self.work, self.env = session, work, tuple(sorted(env))

    @contextmanager
    def serving(self, limit_s: float) -> Iterator[None]:
        yield None

    def prompts(self, workloads: Sequence[Workload], context: int) -> list[Prompt]:
        return tokens.prompts(self.runner.llama, self.file, workloads, context)

    def connect(self) -> None:
        """There is nothing to connect to."""

    def ask(self, content: Content, tokens: int) -> tuple[float, Lines]:
        argv = [str(self.runner.shimmy.path), "generate", NAME, "--prompt", str(content), "--max-tokens", str(tokens)]
        argv += self.flags
        self.argv = ("shimmy", *argv[1:])
        said, log = self.work / "generate.out", self.work / "generate.log"
        with process.Child(argv, said, self.variables, self.session.cpus, cwd=self.work / "home", errors=log) as child:
            self.pid = child.pid
            child.wait_end(process.patience(REQUEST_S))
            took, code = time.monotonic() - child.started, child.stop().code
        self.pid = None
        told = log.read_text(encoding="utf-8", errors="replace")
        with (self.work / self.runner.log).open("a", encoding="utf-8") as kept:
            kept.write(told)
        if code:
            reason = "out-of-memory" if OUT_OF_MEMORY.search(told) else "engine-ended"
            raise RunError(reason, f"shimmy generate ended with {code}; its log ends:\n{told[-1500:]}")
        return child.started, [(took, child.text().removesuffix("\n").encode())]

    def read(self, lines: Lines, tokens_asked: int) -> Answer:
        ((took, said),) = lines
        text = said.decode("utf-8", "replace")
        return Answer(
            prompt_n=None,
            cache_n=None,
            predicted_n=None,
            engine_prompt_s=None,
            engine_predicted_s=None,
            token_s=(round(took, 6),) if text else (),
            token_n=(),
            tokens=(),
            finished=True,
            text=text,
            counted_n=tokens.count(self.runner.llama, self.file, text, begin=False) if text else 0,
        )

    def report(self) -> Report:
        kept = self.work / self.runner.log
        told = kept.read_text(encoding="utf-8", errors="replace") if kept.exists() else ""
        return shimmy.report_of(told, self.file)
