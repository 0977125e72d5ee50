"""The door between a run and what serves its model: started or attached to, asked, and heard about its load.

`llama_server` is one runner; another one is two classes like its, and an entry in TELLS. A runner is not asked for what
it does not tell: the audit then cannot tell either, and says so.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from moelib.catalogue.facts import ENDPOINT, LLAMA_SERVER, SHIMMY, SHIMMY_GENERATE, EngineFacts
from moelib.catalogue.params import Workload
from moelib.catalogue.placement import Placement
from moelib.engine.buffers import Report
from moelib.engine.client import Answer, Lines
from moelib.engine.engine import Engine
from moelib.machine.mapped import Digests
from moelib.machine.process import Exit
from moelib.measure.device import Session

QUANTITIES = {
    "timings": "how long prompt and generation took by its own clock",
    "usage": "how many tokens it processed and generated",
    "cache": "how much of a prompt came from a cache",
    "tokens": "how many tokens a prompt and each event of its stream have",
    "buffers": "its buffers, layers and graph splits",
    "build": "how it was built",
    "file": "which file it has loaded",
    "likeliest": "how likely its tokens are",
    "command": "the flags and the environment of its process",
    "process": "its process, which was not started by this run",
    "owner": "what its process uses of the host",
    "log": "what it did, in a log that could bear witness",
    "residence": "what it keeps in memory from one request to the next",
}
"""What a runner may tell -> in words."""
EVERYTHING = frozenset(QUANTITIES)
TELLS: dict[str, frozenset[str]] = {
    LLAMA_SERVER: EVERYTHING,
    SHIMMY: frozenset({"buffers", "command", "process", "owner", "file"}),
    SHIMMY_GENERATE: frozenset({"buffers", "command", "file"}),
    ENDPOINT: frozenset(),  # what one tells is judged, and another may not tell it
}
"""Name of a runner -> what it tells. By its name in a record and not by what the record holds: a value that its runner
tells and that is missing was taken out."""


def untold(name: str) -> frozenset[str]:
    """What the runner does not tell. One that is not known here has to tell everything."""
    return EVERYTHING - TELLS.get(name, EVERYTHING)


@dataclass(frozen=True)
class Job:
    """What a runner is to serve, and how."""

    file: Path
    placement: Placement
    context: int
    threads: int


Content = Sequence[int] | str
"""Of a prompt: token ids, or text for a runner that takes no ids."""


class Prompt(NamedTuple):
    workload: Workload
    content: Content
    tokens: int | None
    """None where the runner cannot count them."""


class Server(ABC):
    """A model that is served, for one run."""

    pid: int | None = None
    """None for a process that cannot be looked at."""
    attached: bool = False
    """Whether it ran before this run, and goes on after it."""
    argv: tuple[str, ...] = ()
    """Command line for the record, with the model's file name alone."""
    env: tuple[str, ...] = ()
    """Names of environment variables."""
    build_info: str | None = None

    @abstractmethod
    def serving(self, limit_s: float) -> AbstractContextManager[float | None]:
        """Wait until it takes requests: seconds from the start of its process, None if it was up already. Within the
        block, what breaks is reported by its cause. Raises ProcessError."""

    @abstractmethod
    def prompts(self, workloads: Sequence[Workload], context: int) -> list[Prompt]:
        """Every workload with its prompt. Raises RunError if one does not fit the context."""

    @abstractmethod
    def connect(self) -> None:
        """Whatever must happen before each request, outside the time that is measured."""

    @abstractmethod
    def ask(self, content: Content, tokens: int) -> tuple[float, Lines]:
        """Request `tokens` tokens: (when it was sent, on the monotonic clock; what arrived, unread). A run's numbers
        rest on these times: nothing else is done meanwhile. Raises RunError."""

    @abstractmethod
    def read(self, lines: Lines, tokens: int) -> Answer:
        """What arrived, read after the clock has stopped. Raises RunError."""

    def likeliest(self, content: Content) -> tuple[float | None, ...]:
        """Log-probabilities of the likeliest next tokens, best first."""
        return ()

    def files(self, device_pid: int | None, since: float) -> tuple[Callable[[], Digests], dict[str, str]]:
        """Look at the programs and libraries in use, while it runs: (what reads them and gives their
        digests; group -> why it could not be looked at). `since`: the wall clock before it was started."""
        return dict, {}

    def stop(self) -> Exit:
        """End it if it was started here."""
        return Exit(None, False)

    def report(self) -> Report:
        """What it reported of its load, after it was stopped."""
        return Report((), None, None, ())


class Runner(ABC):
    """One way of serving a model."""

    name: ClassVar[str]
    """Key of TELLS."""
    log: ClassVar[str] = "server.log"
    """Name of its log, by which a kept one is known."""
    tools: Engine | None = None
    """llama.cpp's, of which a loopback device is made; None where the runner cannot use one."""

    @abstractmethod
    def facts(self) -> EngineFacts:
        """What a record says of it."""

    @abstractmethod
    def start(self, job: Job, session: Session, work: Path) -> AbstractContextManager[Server]:
        """Start it, or attach to it; leaving the block ends what was started. Its log goes to `work`."""
