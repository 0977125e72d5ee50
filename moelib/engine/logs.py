"""Parse llama-server's log of a run: its load, its requests, and the device memory in use at its end.

The log is a second source for every number that the client measured, with the engine's own clock. Values that a build
does not print are None. `witness` compares them.
Format: llama.cpp b6666 to b11669; since 2026 each line begins with `minutes.seconds.milliseconds.microseconds`.
"""

import itertools
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moelib.base.schema import UserError
from moelib.engine.buffers import Buffer, Report

MAX_BYTES = 64 << 20  # of a log, unpacked; a usual one has 30 kB, and a run with a longer log is ended
SERVER = ".server.log.gz"
"""End of the file name of llama-server's stored log."""


class LogError(UserError, ValueError):
    """A stored log cannot be read; the message says why."""


@dataclass(frozen=True)
class Task:
    """One request, with the engine's timings in seconds."""

    prompt_n: int
    prompt_s: float
    predicted_n: int
    predicted_s: float
    launched_s: float | None
    """When it started, since the start of the log; None in builds that print no times."""
    ended_s: float | None


@dataclass(frozen=True)
class Log:
    report: Report
    tasks: tuple[Task, ...]
    """In order, including the untimed requests at the end of a run."""
    ready_s: float | None
    """When the server began to listen, since the start of the log."""
    device_used_bytes: int | None
    """Memory in use on the whole device when the server ended, by all processes; None on loopback, whose processes
    share the host's memory."""
    experts: tuple[int, int] | None
    """(experts of a layer, experts used per token)."""
    parameters: float | None
    """Number of parameters in all tensors, to four digits."""
    bits_per_weight: float | None
    type_counts: dict[str, int]
    """Number of tensors by type, in capitals."""
    context: int | None
    ubatch: int | None
    kv_types: frozenset[str]
    """Types of keys and of values, in all caches; empty for a model without one."""
    threads: int | None
    batch_threads: int | None
    """Threads for a prompt."""
    load_mode: str | None
    """None in builds that do not name it."""
    mapped: bool | None
    """Whether the file was to be mapped, in builds that do not name the load mode."""
    unlocked: str | None
    """Why memory could not be locked, for load mode mlock."""
    splits: tuple[int, int] | None
    """Parts of the graph for a prompt's batch, and of the one for a token; a report holds what its day's code read."""


KINDS = ("model", "KV", "compute", "output", "RS", "LoRA")
MAX_BUFFERS, MAX_UNUSED = 256, 1 << 16  # a report with more is ignored
# numbers are limited in length: Python refuses to parse one of thousands of digits
_BUFFER = re.compile(r"^(.{0,400}?)[ \t]buffer size[ \t]*=[ \t]*(\d{1,12}(?:\.\d{1,9})?)[ \t]*([KMG]iB)\b", re.M)
_UNUSED = re.compile(r"model has unused tensor (\S{1,128}) \(size = \d+ bytes\)")
_BUILT = re.compile(r"\bbuild:? (\d+ \(.{1,400})")
_LAYERS = re.compile(r"offloaded (\d{1,9})/(\d{1,9}) layers")
_SPLITS = re.compile(r"splits = (\d{1,9})(?: \(with bs=\d+\), (\d{1,9}) \(with bs=1\))?")
_BOTH_SPLITS = re.compile(r"splits = (\d{1,9})(?:(?: \(with bs=\d+\),| /) (\d{1,9}))?")
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_TIME = re.compile(r"(\d+)\.(\d\d)\.(\d{3})\.(\d{3}) ")
_PROMPT = re.compile(r"prompt eval time = *([\d.]+) ms / *(\d+) tokens")
_EVAL = re.compile(r"\beval time = *([\d.]+) ms / *(\d+) (?:tokens|runs)")
_PARAMETERS = re.compile(r"([\d.]+) ([KMBT])")
_BITS = re.compile(r"\(([\d.]+) BPW\)")
_BATCH_THREADS = re.compile(r"n_threads_batch = (\d{1,9})\)")
_KV = re.compile(r"\b[KV] \((\w{1,16})\):")
_LEFT = re.compile(r"\| +- CUDA\d+ [^|]*\| +(\d+) = +(\d+) \+")
_REPORT = ("buffer size", "splits =", "offloaded ", "build", "unused tensor")
_FACTS = {
    "print_info: n_expert ": "n_expert",
    "print_info: n_expert_used ": "n_expert_used",
    "llama_context: n_ctx ": "n_ctx",
    "llama_context: n_ubatch ": "n_ubatch",
    "(load_mode ": "load_mode",
    "(mmap ": "mmap",
    "system_info: n_threads ": "n_threads",
}
_READY = "listening on http"
_CACHE, _UNLOCKED = ", K (", "failed to mlock"
_LOADING = {w: w.encode() for w in (*_REPORT, *_FACTS, "- type ", "model params", " BPW)", _CACHE, _UNLOCKED, _READY)}
_SERVING = {w: w.encode() for w in ("eval time = ", "processing task", "memory_breakdown")}
"""Words in the relevant lines, a tenth of all, before and after the server is ready. Searching the whole text for a
word is many times faster than testing each line for each word, or matching a pattern."""


def parse_log(text: str) -> Report:
    """Read the load report from llama-server's log (b6666 to b11669; format of common/log.h and llama.cpp)."""
    sums: dict[tuple[str, str], float] = {}
    for label, size, unit in _BUFFER.findall(text):
        # after the function's name: the buffer's name and its kind, which is one word except for DeepSeek V4's states
        words = re.split(r":\s+", label.strip())[-1].split()
        of_kind = 1 if words[1:2] == ["DSV4"] else -1
        name, kind = (" ".join(part) for part in (words[:of_kind], words[of_kind:]))
        if not name or (kind not in KINDS and Buffer(name, kind, 0).place == "unknown"):
            continue  # another message about buffers
        # a graph is reserved several times and its last size counts; weights and caches consist of several buffers
        before = 0.0 if kind == "compute" else sums.get((name, kind), 0.0)
        sums[name, kind] = before + float(size) * _UNITS[unit]
    buffers = tuple(Buffer(n, k, round(size)) for (n, k), size in sums.items()) if len(sums) <= MAX_BUFFERS else ()
    unused = tuple(dict.fromkeys(_UNUSED.findall(text)))
    reported = any(b.kind == "model" for b in buffers) and len(unused) <= MAX_UNUSED
    layers, splits, built = _LAYERS.search(text), _SPLITS.findall(text), _BUILT.search(text)
    on, of = (int(layers[1]), int(layers[2])) if layers else (None, None)
    last = tuple(int(s) for s in splits[-1] if s) if splits else ()
    return Report(buffers, on, of, last, built and built[1], unused if reported else None)


def unpack(packed: bytes, name: str) -> Log:
    """The stored log `name`, from its gzipped bytes. Raises LogError as `unpacked` does."""
    return parse(unpacked(packed, name))


def unpacked(packed: bytes, name: str) -> bytes:
    """A stored log as it was written. Raises LogError if it cannot be unpacked, or to too much."""
    unpacker = zlib.decompressobj(wbits=31)  # gzip
    try:
        data = unpacker.decompress(packed, MAX_BYTES)
    except zlib.error as err:
        raise LogError(f"{name} cannot be unpacked: {err}") from None
    if unpacker.unconsumed_tail:
        raise LogError(f"{name} unpacks to more than {MAX_BYTES >> 20} MiB: it is not the log of a run")
    if not unpacker.eof:
        raise LogError(f"{name} cannot be unpacked: it is cut short")
    return data


def _seconds(line: str) -> float | None:
    if not (m := _TIME.match(line)):
        return None
    minutes, seconds, milli, micro = map(int, m.groups())
    return 60 * minutes + seconds + milli / 1e3 + micro / 1e6


def _lines(text: bytes, words: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    """(word, line) for each line that holds one of the words, in order; for a fact, only the first such line."""
    lines: dict[int, tuple[str, int]] = {}
    find, last = text.find, len(text)
    for word, sought in words.items():
        at = find(sought)
        while at >= 0:
            begin, end = text.rfind(b"\n", 0, at) + 1, find(b"\n", at)
            if begin not in lines:
                lines[begin] = (word, end if end >= 0 else last)
                if word in _FACTS:
                    break
            at = find(sought, end) if end >= 0 else -1
    for begin in sorted(lines):
        word, end = lines[begin]
        yield word, text[begin:end].decode("utf-8", "replace")


def parse(text: bytes) -> Log:
    """Parse a log's text as the engine wrote it."""
    report, tasks = [], []
    types: dict[str, int] = {}
    facts: dict[str, str] = {}
    kv_types: set[str] = set()
    ready = launched = prompt = used = parameters = bits = batch_threads = unlocked = None
    listening = text.find(_LOADING[_READY])
    head = text.find(b"\n", listening + 1) if listening >= 0 else len(text)
    for word, line in itertools.chain(_lines(text[:head], _LOADING), _lines(text[head:], _SERVING)):
        if word in _REPORT:
            report.append(line)
        elif word in _FACTS:
            value = line.partition(word)[2].lstrip(" =").partition(" ")[0]
            facts.setdefault(_FACTS[word], value.rstrip("),"))
            if m := _BATCH_THREADS.search(line):
                batch_threads = int(m[1])
        elif word == _CACHE:
            kv_types |= set(_KV.findall(line))
        elif word == _UNLOCKED:
            unlocked = unlocked or line.partition("warning: ")[2][:200]
        elif word == "eval time = ":
            if m := _PROMPT.search(line):
                prompt = (int(m[2]), float(m[1]) / 1e3)
            elif prompt and (m := _EVAL.search(line)):
                tasks.append(Task(*prompt, int(m[2]), float(m[1]) / 1e3, launched, _seconds(line)))
                prompt = launched = None
        elif word == "processing task":
            launched = _seconds(line)
        elif word == "- type ":
            name, _, count = line.partition(word)[2].partition(":")
            types[name.strip().upper()] = int(count.split()[0])
        elif word == "model params":
            m = _PARAMETERS.search(line.partition("=")[2])
            parameters = float(m[1]) * 10 ** (3 * " KMBT".index(m[2])) if m else None
        elif word == " BPW)":
            m = _BITS.search(line)
            bits = float(m[1]) if m else None
        elif word == _READY:
            ready = _seconds(line) if ready is None else ready
        elif m := _LEFT.search(line):
            used = (used or 0) + (int(m[1]) - int(m[2]) << 20)
    splits = _BOTH_SPLITS.findall("\n".join(report))
    number = {key: int(value) for key, value in facts.items() if value.isdigit()}
    experts, used_experts = number.get("n_expert"), number.get("n_expert_used")
    return Log(
        report=parse_log("\n".join(report)),
        tasks=tuple(tasks),
        ready_s=ready,
        device_used_bytes=used,
        experts=None if experts is None or used_experts is None else (experts, used_experts),
        parameters=parameters,
        bits_per_weight=bits,
        type_counts=types,
        context=number.get("n_ctx"),
        ubatch=number.get("n_ubatch"),
        kv_types=frozenset(kv_types),
        threads=number.get("n_threads"),
        batch_threads=batch_threads,
        load_mode=facts.get("load_mode"),
        mapped={"true": True, "false": False}.get(facts.get("mmap", "")),
        unlocked=unlocked,
        splits=(int(splits[-1][0]), int(splits[-1][1] or splits[-1][0])) if splits else None,
    )
