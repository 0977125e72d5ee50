"""Importance matrices of llama-imatrix: whether a file is one, of which model, and what was counted for it."""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from moelib.base import files
from moelib.gguf import gguf_file
from moelib.gguf.gguf_file import GGUFError
from moelib.gguf.gguf_header import Header

MOST_BYTES = 4 << 30
MAX_HEADER_BYTES = 1 << 26
SUMS, COUNTS = ".in_sum2", ".counts"
MOST_COUNT = 1 << 24  # from there on a 32-bit float no longer counts by one


@dataclass(frozen=True)
class Imatrix:
    path: Path
    sha256: str
    columns: dict[str, int]
    """Name of a weight -> numbers that the matrix has for it: the length of its rows, for each expert."""

    @property
    def facts(self) -> dict[str, str]:
        """What a manifest says of it."""
        return {"file_name": self.path.name, "sha256": self.sha256}

    def refuse_other(self, model: Header) -> None:
        """Raise GGUFError unless the matrix is of this model, as far as names and shapes tell."""
        weights = {t.name: t.shape[0] * prod(t.shape[2:]) for t in model.tensors}
        other = [name for name, n in self.columns.items() if weights.get(name) != n]
        if not self.columns.keys() & weights.keys() or other:
            name = other[0] if other else next(iter(self.columns))
            why = f"{self.columns[name]} numbers for {name}, which has {weights.get(name, 'no such weight')} there"
            raise GGUFError(
                f"{self.path.name} is an importance matrix of another model than {model.path.name} ({why}): make one "
                f"with `llama-imatrix -m {model.path.name} -f TEXT -o FILE.gguf`"
            )


def read(path: Path) -> Imatrix:
    """The importance matrix in `path`, its numbers unread but for its digest. Raises GGUFError for what is none."""
    make = "make one with `llama-imatrix -m MODEL-F16.gguf -f TEXT -o FILE.gguf`"
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise GGUFError(f"{path.name} is no importance matrix (it has {size} bytes): {make}")
        header = gguf_file.from_bytes(files.head(path, size), path.name, size)
        sha256 = files.sha256(path)
    except OSError as err:
        raise GGUFError(f"{path.name} cannot be read ({err.strerror or err}): {make}") from None
    except GGUFError as err:
        old = "; one of the old format is converted by `llama-imatrix --in-file OLD -o FILE.gguf`"
        raise GGUFError(f"{path.name} is no importance matrix ({err}): {make}{old}") from None
    found = {t.name.removesuffix(SUMS): prod(t.shape) for t in header.tensors if t.name.endswith(SUMS)}
    if header.kind != "imatrix" or not found:
        raise GGUFError(f"{path.name} is no importance matrix, but of the kind {header.kind}: {make}")
    return Imatrix(path, sha256, found)


def counts(path: Path) -> dict[str, tuple[int, ...]]:
    """How many rows of each weight the matrix was made of: of an expert tensor, those of each expert.

    Only the counts are read. Raises GGUFError for what is no matrix, or has what is no count.
    """
    try:
        size = path.stat().st_size
        header = gguf_file.from_bytes(files.head(path, min(size, MAX_HEADER_BYTES)), path.name, size)
        of = {t.name.removesuffix(COUNTS): t for t in header.tensors if t.name.endswith(COUNTS)}
        found = {}
        with path.open("rb") as f:
            for name, t in sorted(of.items(), key=lambda item: item[1].offset):
                if t.type != "F32":
                    raise GGUFError(f"{path.name}: corrupt: the counts of {name} are {t.type}, not F32")
                f.seek(t.offset)
                values = [v for (v,) in struct.iter_unpack("<f", f.read(t.nbytes))]
                if len(values) != prod(t.shape) or not all(0 <= v < MOST_COUNT and v.is_integer() for v in values):
                    raise GGUFError(f"{path.name}: corrupt: the counts of {name} are no whole numbers")
                found[name] = tuple(map(int, values))
    except OSError as err:
        raise GGUFError(f"{path.name} cannot be read ({err.strerror or err})") from None
    if header.kind != "imatrix" or not found:
        raise GGUFError(f"{path.name} is no importance matrix with counts, but of the kind {header.kind}")
    return found
