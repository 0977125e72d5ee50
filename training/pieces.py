"""Files written so that a kill loses nothing, and weights in pieces. Of the standard library and numpy alone."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PIECE_BYTES = 15_000_000
"""The most that a piece of weights holds: small enough for mail, chats and machines that hand back small files only."""

Weights = dict[str, npt.NDArray[np.floating]]
"""GGUF's name of a tensor -> its values, slowest dimension first (the reverse of ggml's shape)."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place once it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON for people and merges: sorted keys, one a line, no NaN."""
    text = json.dumps(data, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    with replacing(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def stored(name: str, values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """`values` in the type that an F16 GGUF has for the tensor `name`: vectors and routers stay F32."""
    small = values.ndim == 1 or name.endswith("ffn_gate_inp.weight")
    with np.errstate(over="ignore"):  # `save` says which
        return np.ascontiguousarray(values, np.float32 if small else np.float16)


def save(folder: Path, weights: Weights) -> dict[str, str]:
    """Write `weights` to `folder` as weights-00.npz and on, each of PIECE_BYTES at most; return their SHA-256 by name.

    Raises ValueError for a weight that is not finite, as one that F16 cannot hold.
    """
    bins: list[Weights] = [{}]
    for name, values in weights.items():
        made = stored(name, values)
        if not np.isfinite(made).all():
            raise ValueError(f"{name} has values that are not finite in {made.dtype}")
        if bins[-1] and sum(v.nbytes for v in bins[-1].values()) + made.nbytes > PIECE_BYTES:
            bins.append({})
        bins[-1][name] = made
    hashes = {}
    for i, some in enumerate(bins):
        path = folder / f"weights-{i:02}.npz"
        with replacing(path) as partial, partial.open("wb") as f:
            np.savez(f, **some)  # type: ignore[arg-type]  # names of tensors are no keywords of savez
        hashes[path.name] = sha256(path)
    return hashes


def load(folder: Path, hashes: dict[str, str]) -> Weights:
    """The weights in the pieces `hashes` of `folder`. Raises ValueError for one that is missing or another file."""
    weights: Weights = {}
    for name, known in hashes.items():
        path = folder / name
        if not path.exists() or sha256(path) != known:
            raise ValueError(f"{path} is missing, or not the file that was written: copy all of {', '.join(hashes)}")
        with np.load(path, allow_pickle=False) as piece:
            weights |= {key: piece[key] for key in piece.files}
    return weights
