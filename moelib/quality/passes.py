"""A pass of llama-perplexity over a text: to write log-probabilities, or to have the tool itself compare with some.

The tool ends with 0 on a text that is too short and without its base file, and sometimes loses its last lines: what
counts is what it says at its end, and that the file it wrote is whole.
"""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moelib.base.bar import tqdm
from moelib.catalogue.placement import Placement
from moelib.engine.client import RunError
from moelib.engine.engine import Engine
from moelib.machine import process
from moelib.measure.device import Session
from moelib.quality.logprobs import LogProbs, LogProbsError, bytes_of

STALL_S = 3600.0  # without a further chunk, which takes minutes at the very worst
TRIES = 2
NUMBER = r"(-?\d{1,12}(?:\.\d{1,12})?|-?nan|-?inf)"
FINAL = re.compile(rf"Final estimate: PPL = {NUMBER}")
NO_NUMBER = re.compile(r"\[\d{1,9}\](-?(?:nan|inf)),")
CHUNK = re.compile(r"\[(\d{1,9})\]-?[\d.naif]+,|^ {0,3}(\d{1,4}) {4,}", re.M)
TOLD = {
    "perplexity": rf"^Mean PPL\(Q\) +: +{NUMBER}",
    "base_perplexity": rf"^Mean PPL\(base\) +: +{NUMBER}",
    "kld": rf"^Mean +KLD: +{NUMBER}",
    "kld_99": rf"^99\.0% +KLD: +{NUMBER}",
    "kld_999": rf"^99\.9% +KLD: +{NUMBER}",
    "rms_p_diff": rf"^RMS Δp +: +{NUMBER}",
    "same_top": rf"^Same top p: +{NUMBER}",
}
"""What the tool says of a comparison -> where; the last two in percent."""
PERCENT = ("rms_p_diff", "same_top")


@dataclass(frozen=True)
class How:
    """What passes that are compared have in common."""

    text: Path
    context: int
    chunks: int
    session: Session
    threads: int
    work: Path
    """Scratch, for logs."""


@dataclass(frozen=True)
class Pass:
    """What a pass came to."""

    argv: tuple[str, ...]
    """With names of files alone."""
    seconds: float
    logs: tuple[Path, ...]


def argv(llama: Engine, file: Path, placed: Placement, how: How, base: Path, compares: bool) -> list[str]:
    """llama-perplexity's command line. Raises EngineError for a flag that the build does not have."""
    args = [llama.tool("llama-perplexity"), "-m", str(file), "-f", str(how.text), "--chunks", str(how.chunks)]
    args += ["-c", str(how.context), "-b", str(how.context), "-ngl", "999", llama.need("-fa", "--flash-attn"), "on"]
    args += ["-t", str(placed.threads or how.threads), "-tb", str(placed.threads or how.threads)]
    args += ["--fit", "off"] if "--fit" in llama.help.flags else []
    args += ["--kl-divergence-base", str(base), *(["--kl-divergence"] if compares else [])]
    return args + llama.placement_argv(placed) + how.session.args


def write(llama: Engine, file: Path, placed: Placement, how: How, into: Path) -> tuple[LogProbs, Pass]:
    """Have the log-probabilities of a file over a text written.

    Raises RunError: text-too-short, not-a-number, no-result; and ProcessError, EngineError.
    """
    done = _run(argv(llama, file, placed, how, into, compares=False), how, into.stem, _final)
    try:
        written = LogProbs.read(into)
        _ = written.sha256_of_tokens
    except LogProbsError as err:
        raise RunError("no-result", f"llama-perplexity left no whole result of {file.name}: {err}") from None
    if (written.context, written.chunks) != (how.context, how.chunks):
        raise RunError(
            "text-too-short",
            f"{how.text.name} has {written.chunks} chunks of {written.context} tokens by {file.name}'s vocabulary, "
            f"not {how.chunks} of {how.context}: ask for fewer `chunks`",
        )
    return written, done


def compare(llama: Engine, file: Path, placed: Placement, how: How, base: LogProbs) -> tuple[dict[str, float], Pass]:
    """What the tool itself finds, its log-probabilities of `file` against those of `base`; shares as fractions.

    Raises as `write` does.
    """
    told: dict[str, float] = {}

    def look(text: str) -> bool:
        found = {name: re.search(pattern, text, re.M) for name, pattern in TOLD.items()}
        told.update({name: float(m[1]) for name, m in found.items() if m})
        return all(found.values())

    done = _run(argv(llama, file, placed, how, base.path, compares=True), how, f"{file.stem}-divergence", look)
    _finite(told, file)
    return {name: value / 100 if name in PERCENT else value for name, value in told.items()}, done


def need_bytes(context: int, vocabulary: int, chunks: int) -> int:
    """What the log-probabilities of a base, and of one file at a time, need on the disk."""
    return 2 * bytes_of(context, vocabulary, chunks)


def _final(text: str) -> bool:
    m = FINAL.search(text) or NO_NUMBER.search(text)  # of which the tool says no last line
    if m:
        _finite({"perplexity": float(m[1])}, None)
    return bool(m)


def _finite(values: dict[str, float], file: Path | None) -> None:
    if wrong := sorted(name for name, value in values.items() if not math.isfinite(value)):
        whose = f" of {file.name}" if file else ""
        raise RunError(
            "not-a-number", f"llama-perplexity found no number for {', '.join(wrong)}{whose}: its weights are damaged"
        )


def _run(args: list[str], how: How, name: str, whole: Callable[[str], bool]) -> Pass:
    """Run the tool to its end, with a bar over the chunks; again if it has not said all that it should."""
    started, logs = time.monotonic(), []
    for attempt in range(TRIES):
        log = how.work / f"{name}{f'-again-{attempt}' if attempt else ''}.log"
        logs.append(log)
        code, text = _once(args, how, log, name)
        if code:
            raise RunError("engine-ended", f"llama-perplexity ended with {code}; its log ends:\n{ending(text)}")
        if whole(text):
            return Pass(names_alone(args), round(time.monotonic() - started, 3), tuple(logs))
        if re.search(r"need at least|too short|you need", text):
            break
    reason = "text-too-short" if re.search(r"need at least|you need", text) else "no-result"
    raise RunError(reason, f"llama-perplexity ended without a result; its log ends:\n{ending(text)}")


def _once(args: list[str], how: How, log: Path, name: str) -> tuple[int | None, str]:
    env = process.environment(how.work, dict(how.session.env))
    bar = tqdm(total=how.chunks, desc=name, unit="chunk", disable=None, leave=False)
    with process.Child(args, log, env, how.session.cpus) as child, bar:
        seen, deadline = 0, time.monotonic() + process.patience(STALL_S)
        while child.running():
            done = max((int(a or b) for a, b in CHUNK.findall(child.tail(1000))), default=0)
            if done > seen:
                bar.update(done - seen)
                seen, deadline = done, time.monotonic() + process.patience(STALL_S)
            if time.monotonic() > deadline:
                raise RunError("engine-timeout", f"{child.name} made no progress in {STALL_S:.0f} s:\n{child.tail()}")
            child.check_log()
            time.sleep(0.02)
        ended = child.stop()
        child.check_log()
        return ended.code, child.text()


def names_alone(args: list[str]) -> tuple[str, ...]:
    """A command line for a record: names of files, not of folders."""
    return tuple(Path(a).name if a.startswith("/") else a for a in args)


def ending(text: str) -> str:
    """The last lines of a log, for people."""
    return "\n".join(text.splitlines()[-8:])[-2000:]
