"""llama.cpp's own account of a file: its token ids, its log-probabilities, its text.

Log-probabilities come from the file that `llama-perplexity --save-all-logits` writes: of each window, those after the
second half's tokens, in 16 bits. The tool's summary is not read, as it is lost now and then; all figures are computed
from that file, which also gives them for each window.
"""

import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moelib.engine import engine

LIMIT_S = 3600
WINDOW = 512
"""Tokens of a window, of which the second half is scored."""
Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]


class MeasureError(Exception):
    """A tool of llama.cpp is missing or did not do its work; the message has the end of what it said."""


def tool(name: str) -> str:
    """The path of a tool beside llama-quantize, or on PATH. Raises MeasureError, engine.EngineError."""
    beside = Path(engine.find().tool("llama-quantize")).resolve().parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise MeasureError(f"this build of llama.cpp has no {name}: use another, see `make doctor`")
    return found


def call(*argv: str) -> str:
    """What a tool prints. Raises MeasureError if it fails. Variables that llama.cpp's tools read are not passed on."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_")}
    done = subprocess.run(
        argv,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=LIMIT_S,
        env=env,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-600:]
        raise MeasureError(f"{Path(argv[0]).name} ended with {done.returncode}: {said}")
    return done.stdout


def token_ids(model: Path, text: Path) -> list[int]:
    """The ids that llama.cpp makes of the whole of `text`, without the one that begins it."""
    said = call(tool("llama-tokenize"), "-m", str(model), "-f", str(text), "--ids", "--no-bos", "--log-disable")
    listed = re.search(r"\[[\d,\s]*\]", said)
    if listed is None:
        raise MeasureError(f"llama-tokenize printed no ids of {text.name}: {said[-200:]}")
    return [int(i) for i in json.loads(listed[0])]


@dataclass(frozen=True)
class Logits:
    """Log-probabilities of a text's windows, in the file that llama-perplexity wrote."""

    path: Path
    window: int
    vocab: int
    tokens: Ids
    """(windows, window), as in the text: the tool replaces the first of each by the one that begins a text."""

    @property
    def first(self) -> int:
        """Position in a window of the first token after which there are log-probabilities."""
        return self.window // 2

    @property
    def targets(self) -> Ids:
        """(windows, rows): the tokens that were to be predicted."""
        return self.tokens[:, self.first + 1 :]

    def windows(self) -> Iterator[Floats]:
        """Log-probabilities of each window in turn, (rows, vocab); those far below the largest are at a floor."""
        rows, width = self.window - 1 - self.first, 2 * ((self.vocab + 1) // 2) + 4
        start = 20 + 4 * self.tokens.size
        raw = np.memmap(self.path, np.uint16, "r", start, (len(self.tokens), rows, width))
        for one in raw:
            scale, least = np.ascontiguousarray(one[:, :4]).view(np.float32).astype(np.float64).T[:2]
            yield one[:, 4 : 4 + self.vocab] * scale[:, None] + least[:, None]


def read(path: Path) -> Logits:
    """The file of `llama-perplexity --save-all-logits`. Raises MeasureError for a file that is none, or not whole."""
    with path.open("rb") as f:
        head = f.read(20)
        if len(head) < 20 or head[:8] != b"_logits_":
            raise MeasureError(f"{path.name} holds no log-probabilities of llama-perplexity")
        window, vocab, count = struct.unpack("<3i", head[8:])
        tokens = np.frombuffer(f.read(4 * window * count), np.int32)
    rows, width = window - 1 - window // 2, 2 * ((vocab + 1) // 2) + 4
    if not count or path.stat().st_size != 20 + 4 * window * count + 2 * count * rows * width:
        raise MeasureError(f"{path.name} is not whole: llama-perplexity was stopped, or the text is too short")
    return Logits(path, window, vocab, tokens.reshape(count, window))


def logits(model: Path, text: Path, into: Path, windows: int | None = None) -> Logits:
    """Let llama.cpp compute the log-probabilities of `text`, of its first `windows` if given, on the CPU."""
    argv = [tool("llama-perplexity"), "-m", str(model), "-f", str(text), "-c", str(WINDOW), "-ngl", "0", "--no-warmup"]
    argv += ["--save-all-logits", str(into), *(["--chunks", str(windows)] if windows else [])]
    call(*argv)
    return read(into)


@dataclass(frozen=True)
class Damage:
    """A quantised file against the unquantised one on a text: each figure of every window, (windows,)."""

    nats: Floats
    """Mean negative log-likelihood of a token."""
    kld: Floats
    """Mean Kullback-Leibler divergence from the unquantised model's distribution, in nats."""
    same_top: Floats
    """Share of tokens after which both find the same one most likely."""


def compare(base: Logits, other: Logits) -> Damage:
    """Raises MeasureError unless both are of the same tokens."""
    if not np.array_equal(base.tokens, other.tokens):
        raise MeasureError(f"{base.path.name} and {other.path.name} are of different tokens")
    found = []
    for p, q, target in zip(base.windows(), other.windows(), other.targets, strict=True):
        kld = (np.exp(p) * (p - q)).sum(-1).mean()
        same = (p.argmax(-1) == q.argmax(-1)).mean()
        found.append((-q[np.arange(len(target)), target].mean(), kld, same))
    return Damage(*np.array(found).T)


def mean(values: Floats) -> dict[str, float]:
    """Mean and its standard error by the spread between windows, as tokens of a window are not independent."""
    spread = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(values.mean()), "standard_error": spread}  # type: ignore[dict-item]  # None: of one window


def continuation(model: Path, prompt: str, tokens: int, seed: int) -> str:
    """What the model writes after `prompt`, at temperature 0.8 from a seed."""
    argv = [tool("llama-completion"), "-m", str(model), "-p", prompt, "-n", str(tokens), "--temp", "0.8"]
    argv += ["--seed", str(seed), "-no-cnv", "--no-display-prompt", "--no-warmup", "-ngl", "0"]
    return call(*argv).strip()
