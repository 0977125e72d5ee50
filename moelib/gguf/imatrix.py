"""Importance matrices of llama-imatrix: whether a file is one, and of which model."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from moelib.base import files
from moelib.gguf import gguf_file
from moelib.gguf.gguf_file import GGUFError
from moelib.gguf.gguf_header import Header

MOST_BYTES = 4 << 30
SUMS = ".in_sum2"


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
