"""The record of a comparison of two passes over a text: one JSON file, with its own digest, and its tokens beside it.

Two files compared at the same placement say what quantising costs; one file at two placements, whether the placement
changes what the model says; one file twice, with its tokens taken in other batches, how much rounding alone changes.
"""

import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, ValidationError

from moelib.audit.record import MAX_BYTES, Check, RecordError
from moelib.base import files, neutral, stats
from moelib.base.files import stored
from moelib.base.schema import Count, Seconds, Sha256
from moelib.catalogue import params
from moelib.catalogue.facts import DeviceFacts, EngineFacts, HostFacts, Manifest
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


class Comparison(params.Strict):
    """One comparison: what was asked, of which files, engine, device and host, what was found, and its checks."""

    model_config = ConfigDict(allow_inf_nan=False)

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    run_id: str
    attempt: Annotated[int, Field(ge=1, le=10_000)]
    status: Literal["valid", "invalid", "failed"]
    reasons: tuple[str, ...]
    message: str | None
    spec: Spec
    base: Manifest
    other: Manifest
    engine: EngineFacts
    device: DeviceFacts
    host: HostFacts
    started_utc: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")]
    found: Found | None
    audit: tuple[Check, ...]
    raw: dict[Annotated[str, Field(pattern=r"^[\w.=,-]+\.(log|csv)\.gz$")], Sha256]
    """Compressed logs, and the tokens' values, in raw/ beside the record: file name -> SHA-256."""
    digest: str = ""

    @property
    def done(self) -> bool:
        return self.status == "valid"

    @property
    def key(self) -> str:
        return spec_key(self.spec)

    @property
    def cited(self) -> dict[str, str]:
        """Its path in the study's folder -> its digest, for provenance."""
        return {f"{FOLDER}/{self.run_id}.json": self.digest}

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
    return files.digest(_plain(spec))[:12]


def _plain(value: Any) -> Any:
    fields = getattr(value, "__dataclass_fields__", None)
    return {name: _plain(getattr(value, name)) for name in fields} if fields else value


def run_id(s: Spec, attempt: int) -> str:
    side = s.other.quant if s.kind == "quality" else f"{s.other.quant}_{s.other.placement}"
    return f"{s.model}_{side}_{s.corpus}_{spec_key(s)}_a{attempt}"


def write(folder: Path, comparison: Comparison) -> Comparison:
    """Write it with its digest to `folder`/quality/ and return it. Raises RecordError if it is there already, or holds
    what `read` would refuse."""
    path = folder / FOLDER / f"{comparison.run_id}.json"
    data = comparison.model_dump(mode="json")
    try:
        Comparison.model_validate_json(files.canonical(data), strict=True)
    except ValueError as err:
        raise RecordError(f"{path.name} would not be read back: {' '.join(str(err).split())[:300]}") from None
    if path.exists():
        raise RecordError(f"{path.name} exists; records are never overwritten")
    files.write_bytes(path, files.sealed(data))
    return comparison.model_copy(update={"digest": files.own_digest(data)})


def read(path: Path) -> Comparison:
    """The comparison at `path`, verified, its evidence too. Raises RecordError."""
    try:
        raw = files.head(path, MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise RecordError(f"more than {MAX_BYTES >> 20} MiB are no comparison")
        loaded = Comparison.model_validate_json(raw, strict=True)
        if not files.is_sealed(raw, loaded.digest):
            raise RecordError("its digest does not fit its content")
        if loaded.run_id != path.stem or loaded.run_id != run_id(loaded.spec, loaded.attempt):
            raise RecordError(f"it is the record of {loaded.run_id}")
        for name, sha256 in loaded.raw.items():
            if files.sha256(path.parent / "raw" / name) != sha256:
                raise RecordError(f"raw/{name} is not what it names")
    except (OSError, ValueError, ValidationError, RecursionError) as err:
        raise RecordError(f"{path.name}: {' '.join(str(err).split())[:300]}") from None
    return loaded


def read_all(folder: Path) -> tuple[list[Comparison], list[str]]:
    """All comparisons of a study's folder, by id, and what was wrong with the others."""
    good, damaged = [], []
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            good.append(read(path))
        except RecordError as err:
            damaged.append(str(err))
    return good, damaged


def next_attempt(folder: Path, spec: Spec) -> int:
    """The number of an attempt that has no file yet, of a record that can be read or not."""
    stem = run_id(spec, 1).removesuffix("1")
    made = [p.stem.removeprefix(stem) for p in (folder / FOLDER).glob("*.json") if p.stem.startswith(stem)]
    return 1 + max((int(n) for n in made if n.isascii() and n.isdigit()), default=0)


def standing(comparisons: Sequence[Comparison]) -> dict[str, Comparison]:
    """The record that stands for each comparison, by its key: the last one that is valid, else the last attempt."""
    return {c.key: c for c in sorted(comparisons, key=lambda c: (c.done, c.attempt))}


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
