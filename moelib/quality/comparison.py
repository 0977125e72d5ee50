"""The record of a comparison of two passes over a text: one JSON file, with its own digest, and its tokens beside it.

Two files compared at the same placement say what quantising costs; one file at two placements, whether the placement
changes what the model says; one file twice, with its tokens taken in other batches, how much rounding alone changes.
"""

import gzip
import io
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from moelib.audit import record
from moelib.audit.record import RecordError
from moelib.base import files, neutral, stats
from moelib.base.files import stored
from moelib.base.schema import Count, Seconds, Sha256
from moelib.catalogue.facts import Manifest
from moelib.catalogue.placement import Placement
from moelib.quality.score import Chunks, Scores, Tail, divergence, nmse

SCHEMA_VERSION = 1
FOLDER = "quality"
COLUMNS = ("base_nll", "nll", "kld", "same_top", "error", "power")
DIGITS = 6  # of a token's values, significant ones


@stored
class Side:
    """A file at a placement, one half of a comparison."""

    quant: str
    placement: str
    load_mode: str

    @property
    def placed(self) -> Placement:
        return Placement.parse(self.placement, self.load_mode)

    def __str__(self) -> str:
        return f"{self.quant} {self.placed.label}"


@stored
class Spec:
    """What defines a comparison."""

    study: str
    model: str
    weights: str
    scale: str
    corpus: str
    corpus_sha256: Sha256
    context: Count
    chunks: Count
    device: str
    base: Side
    other: Side

    @property
    def kind(self) -> Literal["quality", "floor", "placement"]:
        """What it is for: the cost of quantising, of rounding alone, or of a placement."""
        if self.base.quant != self.other.quant:
            return "quality"
        return "floor" if self.base.placed.cpu_layers == self.other.placed.cpu_layers else "placement"


@stored
class Found:
    """What the two passes showed."""

    tokens_sha256: Sha256
    """Of the text's token ids, as little-endian 32-bit integers."""
    vocabulary: Count
    scored: Count
    """Tokens of a chunk that are predicted."""
    chunks: Chunks
    """Means over each chunk's tokens."""
    tails: dict[str, Tail]
    """Quantiles of the divergence of single tokens, by name."""
    tool: dict[str, float] | None
    """The same by llama-perplexity's own comparison, where it was asked."""
    argv: tuple[tuple[str, ...], ...]
    """Command lines, with names of files alone."""
    seconds: Seconds


class Comparison(record.Beside):
    """One comparison: what was asked, of which files, engine, device and host, what was found, and its checks. The
    values of its tokens are in raw/."""

    FOLDER = FOLDER

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    spec: Spec
    base: Manifest
    other: Manifest
    found: Found | None

    @property
    def own_id(self) -> str:
        return run_id(self.spec, self.attempt)

    @property
    def key(self) -> str:
        return spec_key(self.spec)

    @property
    def line(self) -> str:
        """One line for people who wait."""
        s, found = self.spec, self.found
        what = f"{s.model}, {s.corpus}: {s.other} against {s.base}: {self.status}"
        what += f" ({', '.join(self.reasons)})" if self.reasons else ""
        if found is None:
            return neutral.plain(what)
        mean = stats.estimate(divergence(found.chunks))
        return neutral.plain(f"{what}, divergence {mean} nats, NMSE {nmse(found.chunks).value:.2g}")


def spec_key(spec: Spec) -> str:
    """Digest of what defines a comparison; attempts at the same one share it."""
    return files.digest(asdict(spec))[:12]


def run_id(s: Spec, attempt: int) -> str:
    side = s.other.quant if s.kind == "quality" else f"{s.other.quant}_{s.other.placement}"
    return f"{s.model}_{side}_{s.corpus}_{spec_key(s)}_a{attempt}"


write, standing = record.write, record.standing


def read(path: Path) -> Comparison:
    """The comparison at `path`, verified, its evidence too. Raises RecordError."""
    return record.read_beside(Comparison, path)


def read_all(folder: Path) -> tuple[list[Comparison], list[str]]:
    """All of a study's folder, by id, and what was wrong with the others."""
    return record.all_beside(Comparison, folder)


def next_attempt(folder: Path, spec: Spec) -> int:
    """The number of an attempt that has no file yet."""
    return record.next_attempt(folder / FOLDER, run_id(spec, 1))


def keep_tokens(folder: Path, name: str, scores: Scores) -> dict[str, str]:
    """Write the values of each token to `folder`/quality/raw/NAME.tokens.csv.gz; file name -> SHA-256."""
    n, scored = scores.kld.shape
    table = np.column_stack(
        [np.repeat(np.arange(n), scored), *(getattr(scores, c).astype(float).ravel() for c in COLUMNS)]
    )
    text = io.StringIO()
    text.write(",".join(("chunk", *COLUMNS)) + "\n")
    np.savetxt(text, table, fmt=["%d", *[f"%.{DIGITS}g"] * len(COLUMNS)], delimiter=",")
    path = folder / FOLDER / "raw" / f"{name}.tokens.csv.gz"
    files.write_bytes(path, gzip.compress(text.getvalue().encode(), mtime=0))
    return {path.name: files.sha256(path)}


def tokens(folder: Path, comparison: Comparison) -> Scores:
    """The values of each token, from the file beside the record. Raises RecordError where there is none that fits."""
    (name,) = [n for n in comparison.raw if n.endswith(".tokens.csv.gz")] or [""]
    path = folder / FOLDER / "raw" / name
    found = comparison.found
    try:
        if found is None or not name or files.sha256(path) != comparison.raw[name]:
            raise ValueError("it has no tokens, or they are not those that it names")
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        if lines[0] != ",".join(("chunk", *COLUMNS)):
            raise ValueError(f"{name} has other columns")
        table = np.loadtxt(lines[1:], delimiter=",", ndmin=2)
        values = table[:, 1:].T.reshape(len(COLUMNS), comparison.spec.chunks, found.scored)
    except (OSError, ValueError, EOFError) as err:
        raise RecordError(f"{comparison.run_id}: {' '.join(str(err).split())[:300]}") from None
    by = dict(zip(COLUMNS, values, strict=True))
    return Scores(**{k: v for k, v in by.items() if k != "same_top"}, same_top=by["same_top"] > 0.5)
