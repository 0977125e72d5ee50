"""An endpoint as a runner: any server with OpenAI's streaming completions that runs already. It is attached to, asked,
and left running.

It tells little, and what it tells is checked: its count of a generation is believed where its count of the prompt is
that of the model's own tokenizer, else the answer's text is counted. Its memory and CPU time are those of the process
that listens on the port, and of that process's children.
"""

import ipaddress
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from moelib.catalogue import params
from moelib.catalogue.facts import ENDPOINT, EngineFacts
from moelib.catalogue.params import Workload
from moelib.engine import client
from moelib.engine.client import Answer, Lines, RunError
from moelib.engine.engine import Engine
from moelib.measure.device import Session
from moelib.measure.llama_server import CHECKED, connect
from moelib.measure.runner import Content, Job, Prompt, Runner, Server
from moelib.runners import tokens

KEY = "MOELIB_ENDPOINT_KEY"
"""Variable with the key that the server asks for, where it does."""
ANY = ""
"""Stands for every placement, in a runner's addresses."""
COMPLETIONS, MODELS = "/v1/completions", "/v1/models"
SHOWN = 200  # characters of an answer, in a message


class EndpointError(params.UserError):
    """An address that cannot be measured; the message says why, and what to do."""


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    url: str
    port: int
    here: bool
    """Whether that is this machine."""

    @classmethod
    def of(cls, text: str, beyond: bool = False) -> "Address":
        """The address `http://127.0.0.1:8080`, with or without /v1. `beyond`: also one of another machine.

        Raises EndpointError.
        """
        try:
            parts = httpx.URL(text)
        except (httpx.InvalidURL, TypeError) as err:
            raise EndpointError(f"{text!r} is no address: {err}; write http://127.0.0.1:PORT") from None
        path = parts.path.rstrip("/").removesuffix("/v1")
        if parts.scheme not in ("http", "https") or not parts.host or path or parts.query or parts.userinfo:
            raise EndpointError(f"{text!r} is no server's address: write http://127.0.0.1:PORT")
        here = _is_loopback(parts.host)
        if not here and not beyond:
            raise EndpointError(
                f"{text} is beyond this machine: what its server uses of memory cannot be seen from here, and times "
                "would have the network in them; run moelib where it is, or add --beyond-loopback"
            )
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        return cls(str(parts.copy_with(path="", port=port)).rstrip("/"), port, here)


def addresses(named: Mapping[str, str], beyond: bool = False) -> dict[str, Address]:
    """The addresses of servers by placement. Raises EndpointError."""
    return {placement: Address.of(text, beyond) for placement, text in named.items()}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Endpoint(Runner):
    """Attaches to the server of each placement, or to the one of all: `addresses` has it under the placement's name, or
    under none. `llama`: the build whose tokenizer counts. Raises EndpointError where there is no address.
    """

    name = ENDPOINT
    log = "endpoint.log"

    def __init__(self, addresses: Mapping[str, Address], llama: Engine) -> None:
        if not addresses:
            raise EndpointError("an endpoint is a server that runs already: give its address, http://127.0.0.1:PORT")
        self.addresses, self.llama = addresses, llama

    @property
    def here(self) -> bool:
        """Whether all servers are on this machine."""
        return all(a.here for a in self.addresses.values())

    def facts(self) -> EngineFacts:
        return EngineFacts(build=None, version="a server that ran already", server_sha256=None, runner=self.name)

    @contextmanager
    def start(self, job: Job, session: Session, work: Path) -> Iterator["Attached"]:
        address = self.addresses.get(str(job.placement)) or self.addresses.get(ANY)
        if address is None:
            raise RunError("no-endpoint", f"no endpoint is named for {job.placement}: name its server's address")
        yield Attached(self.llama, address, job.file)


class Attached(Server):
    """The endpoint, for one run."""

    attached = True
    connection: httpx.Client
    model: str

    def __init__(self, llama: Engine, address: Address, file: Path) -> None:
        self.llama, self.address, self.file, self.counts = llama, address, file, dict[Content, int | None]()
        self.pid = owner(address.port) if address.here else None
        if self.pid is not None and (other := other_model(self.pid, file)):
            raise RunError(
                "not-our-model", f"{self} has {other} open, and not {file.name}: give the file that it serves"
            )

    def __str__(self) -> str:
        return f"the server at {self.address.url}"

    @contextmanager
    def serving(self, limit_s: float) -> Iterator[None]:
        with self._named(), client.connect(self.address.url, os.environ.get(KEY) or "no key") as self.connection:
            self.model = self._only_model()
            self._completes()
            yield None
            if (now := self._only_model()) != self.model:
                raise self._switched(now)
            if self.address.here and owner(self.address.port) != self.pid:
                raise RunError("not-our-server", f"{self} was replaced by another process while it was measured")

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say of what breaks whose it was."""
        try:
            yield
        except RunError as err:
            if err.reason not in ("connection-lost", "engine-stalled", "answer-unreadable"):
                raise
            what = {"connection-lost": "cannot be reached, or stopped", "engine-stalled": "stopped answering"}
            said = what.get(err.reason, "is no server of OpenAI's interface")
            why = " ".join(str(err).split())[:SHOWN]
            raise RunError(err.reason, f"{self} {said} ({why}): see that it runs, and run again") from None

    def _only_model(self) -> str:
        """The name of the model that is served: the only one, or the one that is called as the file is."""
        told = connect(self.connection, MODELS)
        if told.status_code in (401, 403):
            raise RunError("request-refused", f"{self} asks for a key: set {KEY}")
        if told.status_code != 200:
            raise RunError(
                "not-a-language-model", f"{self} is no server of a language model: {MODELS} gives {told.status_code}"
            )
        names = [str(entry["id"]) for entry in told.json()["data"]]
        if len(names) > 1:
            names = [n for n in names if Path(n).name.removesuffix(".gguf") == self.file.stem]
        if len(names) != 1:
            raise RunError("not-our-model", f"{self} does not have {self.file.stem}, but {_line(told)}")
        return names[0]

    def _completes(self) -> None:
        """Ask for one token. Raises RunError "not-a-language-model"."""
        self.connect()
        body = {"model": self.model, "prompt": "a", "max_tokens": 1, "temperature": 0}
        told = client.answer(self.connection, "POST", COMPLETIONS, body)
        if told.status_code != 200 or not isinstance(_first_choice(told), str):
            raise RunError(
                "not-a-language-model",
                f"{self} completes no text: {COMPLETIONS} gives {told.status_code} {_line(told)}",
            )

    def _switched(self, to: str) -> RunError:
        return RunError("model-switched", f"{self} went from model {self.model} to {to} while it was measured")

    def prompts(self, workloads: Sequence[Workload], context: int) -> list[Prompt]:
        found = tokens.prompts(self.llama, self.file, workloads, context)
        self.counts |= {p.content: p.tokens for p in found}
        return found

    def connect(self) -> None:
        connect(self.connection, MODELS)

    def ask(self, content: Content, tokens: int) -> tuple[float, Lines]:
        self.asked = content
        body: dict[str, Any] = {"model": self.model, "prompt": content, "max_tokens": tokens, "temperature": 0}
        # the last two are llama.cpp's and vLLM's; servers that do not know them leave them out
        body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "cache_prompt": False}
        return client.stream(self.connection, COMPLETIONS, body, tokens)

    def read(self, lines: Lines, tokens_asked: int) -> Answer:
        arrived, pieces, finished = list[float](), list[str](), False
        used: dict[str, Any] = {}
        for t, event in client.events(lines):
            if event is None:
                finished = True
                continue
            if (name := event.get("model", self.model)) != self.model:
                raise self._switched(str(name)[:SHOWN])
            used = event.get("usage") or used
            text = "".join(choice.get("text") or "" for choice in event.get("choices", ()))
            if text:
                arrived.append(round(t, 6))
                pieces.append(text)
        text, prompt_n = "".join(pieces), used.get("prompt_tokens")
        believed = prompt_n is not None and prompt_n == self.counts.get(self.asked)
        counted = tokens.count(self.llama, self.file, text, begin=False) if text and not believed else 0
        return CHECKED.validate_python(
            {
                "prompt_n": prompt_n if believed else None,
                "cache_n": (used.get("prompt_tokens_details") or {}).get("cached_tokens"),
                "predicted_n": used.get("completion_tokens") if believed else None,
                "engine_prompt_s": None,
                "engine_predicted_s": None,
                "token_s": tuple(arrived),
                "token_n": (),
                "tokens": (),
                "finished": finished,
                "text": text,
                "counted_n": None if believed else counted,
            }
        )


def _line(told: httpx.Response) -> str:
    return " ".join(told.text[:SHOWN].split())


def _first_choice(told: httpx.Response) -> object:
    try:
        return told.json()["choices"][0]["text"]
    except (json.JSONDecodeError, KeyError, IndexError, TypeError):
        return None


def owner(port: int) -> int | None:
    """The oldest process that listens on a port of this machine; None where the system does not show it, as of another
    user's process."""
    found: dict[int, float] = {}
    try:
        for c in psutil.net_connections("tcp"):
            if c.status == psutil.CONN_LISTEN and c.pid and c.laddr and c.laddr.port == port:
                found[c.pid] = psutil.Process(c.pid).create_time()
    except psutil.Error:
        return None
    return min(found, key=lambda pid: found[pid], default=None)


def other_model(pid: int, file: Path) -> str | None:
    """The name of a GGUF that a process has mapped or open while it has not `file`; None where it has none, or where
    the system does not show it."""
    try:
        seen = psutil.Process(pid)
        paths = {m.path for m in seen.memory_maps()} | {f.path for f in seen.open_files()}
    except (psutil.Error, OSError):
        return None
    models = {path for path in paths if path.endswith(".gguf")}
    if any(Path(path).exists() and Path(path).samefile(file) for path in models):
        return None
    return min((Path(path).name for path in models), default=None)
