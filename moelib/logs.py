"""What llama-server's own log says of a run: its load, its requests, and what the device had left at its end.

The log is the second witness of every number that the client took: the engine wrote it by its own clock. Lines that a
build does not print are None; nothing here judges (that is `witness`).
Format: llama.cpp b6666 to b11434; since 2026 each line begins with `minutes.seconds.milliseconds.microseconds`.
"""

import gzip
import io
import re
import zlib
from dataclasses import dataclass

from moelib.engine import Report, parse_log
from moelib.params import UserError

MAX_BYTES = 64 << 20  # of a log, unpacked: 30 kB seen; a flood is ended long before
SERVER = ".server.log.gz"
"""End of the name of llama-server's kept log."""


class LogError(UserError, ValueError):
    """A kept log cannot be read; the message says why."""


@dataclass(frozen=True)
class Task:
    """One request, as the engine accounts for it. Times in seconds."""

    prompt_n: int
    prompt_s: float
    predicted_n: int
    predicted_s: float
    launched_s: float | None
    """When it was taken up, from the log's first instant; None in builds without times."""
    ended_s: float | None


@dataclass(frozen=True)
class Log:
    report: Report
    tasks: tuple[Task, ...]
    """In order; the untimed requests of the end are here too."""
    ready_s: float | None
    """When it began to listen, from the log's first instant."""
    device_used_bytes: int | None
    """Memory in use on the whole device when the server ended, others' included; None on loopback, whose processes
    share the host's."""
    experts: tuple[int, int] | None
    """(experts of a layer, those that a token uses)."""
    type_counts: dict[str, int]
    """Tensors of the file by type, in capitals."""
    context: int | None
    threads: int | None
    load_mode: str | None


_TIME = re.compile(r"(\d+)\.(\d\d)\.(\d{3})\.(\d{3}) ")
_PROMPT = re.compile(r"prompt eval time = *([\d.]+) ms / *(\d+) tokens")
_EVAL = re.compile(r"\beval time = *([\d.]+) ms / *(\d+) (?:tokens|runs)")
_LEFT = re.compile(r"\| +- CUDA\d+ [^|]*\| +(\d+) = +(\d+) \+")
_TYPE = re.compile(r"- type +(\w+): +(\d+) tensors")
_FACT = re.compile(r"(n_expert|n_expert_used|n_ctx|load_mode|n_threads) += (\w+)")


def unpack(packed: bytes, name: str) -> Log:
    """The kept log `name`, by its gzipped bytes. Raises LogError if they cannot be unpacked, or are a flood."""
    try:
        with gzip.open(io.BytesIO(packed)) as f:
            data = f.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as err:
        raise LogError(f"{name} cannot be unpacked: {err}") from None
    if len(data) > MAX_BYTES:
        raise LogError(f"{name} unpacks to more than {MAX_BYTES >> 20} MiB: it is no log of a run")
    return parse(data.decode("utf-8", errors="replace"))


def _seconds(line: str) -> float | None:
    if not (m := _TIME.match(line)):
        return None
    minutes, seconds, milli, micro = map(int, m.groups())
    return 60 * minutes + seconds + milli / 1e3 + micro / 1e6


def parse(text: str) -> Log:
    """Read a log's text."""
    report, tasks, types, facts = [], [], {}, {}
    ready = launched = prompt = used = None
    # `in` is many times quicker than a pattern, and most lines say nothing of interest
    for line in text.split("\n"):
        if "eval time = " in line:
            if m := _PROMPT.search(line):
                prompt = (int(m[2]), float(m[1]) / 1e3)
            elif prompt and (m := _EVAL.search(line)):
                tasks.append(Task(*prompt, int(m[2]), float(m[1]) / 1e3, launched, _seconds(line)))
                prompt = launched = None
        elif "processing task" in line:
            launched = _seconds(line)
        elif "buffer size" in line or "splits =" in line or "offloaded " in line or "build" in line:
            report.append(line)
        elif "tensors" in line and (m := _TYPE.search(line)):
            types[m[1].upper()] = int(m[2])
        elif "listening on http" in line and ready is None:
            ready = _seconds(line)
        elif "memory_breakdown" in line and (m := _LEFT.search(line)):
            used = (used or 0) + (int(m[1]) - int(m[2]) << 20)
        elif "n_expert" in line or "n_ctx " in line or "(load_mode" in line or "system_info:" in line:
            for key, value in _FACT.findall(line):
                facts.setdefault(key, value)
    number = {key: int(value) for key, value in facts.items() if value.isdigit()}
    experts = (number.get("n_expert"), number.get("n_expert_used"))
    return Log(
        report=parse_log("\n".join(report)),
        tasks=tuple(tasks),
        ready_s=ready,
        device_used_bytes=used,
        experts=None if None in experts else experts,
        type_counts=types,
        context=number.get("n_ctx"),
        threads=number.get("n_threads"),
        load_mode=facts.get("load_mode"),
    )
