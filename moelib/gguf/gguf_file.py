"""Read and check the headers of GGUF files, whole or split.

Weights are not read. A file that is truncated, corrupt, of another format or not a model raises GGUFError, with the
cause and the next step, before the engine opens it.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, BinaryIO

from moelib.gguf import gguf_reader
from moelib.gguf.gguf_header import SPLIT, Header, Tensor
from moelib.gguf.gguf_reader import AGAIN, GGUFError, HeaderCut, mib, refuse, tensor_bytes

__all__ = ["GGUFError", "Header", "HeaderCut", "Tensor", "from_bytes", "read_header", "split_paths", "tensor_bytes"]

MAX_PARTS = 4096
SLICE = re.compile(r"[(._ -]*part(\d+)of(\d+)", re.IGNORECASE)
"""In the name of a slice of one file, cut for upload, which is no GGUF by itself."""

NOT_MODELS = {
    "adapter": ("a LoRA adapter, which changes a model", "give the model's own GGUF, or merge with llama-export-lora"),
    "control vector": ("a control vector, which steers a model", "give the model's own GGUF"),
    "imatrix": ("an importance matrix, an input of llama-quantize", "give the model's own GGUF"),
    "projector": ("a multimodal projector (mmproj), which encodes images or sound", "give the model's own GGUF"),
    "draft": ("a draft head, which predicts tokens for another model", "give the GGUF of the model that it belongs to"),
    "vocabulary": ("a vocabulary without tensors", "give the model's own GGUF"),
    "unknown": ("not a language model of llama.cpp: it has no general.architecture", "give the model's own GGUF"),
}
"""`Header.kind` of a file that is not a model -> what it is, and the next step."""

WINDOW_BYTES = 1 << 18  # read at once

COUNTS = ("block_count", "nextn_predict_layers", "expert_count", "expert_used_count")


def split_paths(path: Path) -> list[Path]:
    """All files of a split model, in order, from the name of any of them; `path` alone if the model is not split.

    Raises GGUFError if the numbers in the name are impossible.
    """
    if not (m := SPLIT.search(path.name)):
        return [path]
    at, of = int(m[1]), int(m[2])
    refuse(
        not 1 <= at <= of or of > MAX_PARTS,
        f"{path.name}: its name says file {at} of {of} of a split model, which is impossible",
        "rename it as it was published",
    )
    return [path.with_name(f"{path.name[: m.start()]}-{i + 1:05}-of-{m[2]}.gguf") for i in range(of)]


def read_header(path: str | Path) -> Header:
    """Read and check the header of the model in `path`, or in all files of a split model, given any of them.

    Raises GGUFError, also for a file that is not a model; see `Header.kind`.
    """
    paths = split_paths(Path(path))
    if len(paths) > 1 and (missing := [p.name for p in paths if not p.exists()]):
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise GGUFError(
            f"{Path(path).name} is one of {len(paths)} files of a model, and {listed} cannot be found; fetch all files"
        )
    parts, total = [], 0
    for p in paths:
        with _named(p):
            parts.append(_read(p))
            total += len(parts[-1].tensors)
            refuse(total > gguf_reader.MAX_TENSORS, f"corrupt: more than {gguf_reader.MAX_TENSORS} tensors")
    return model(joined(parts))


def joined(parts: list[Header]) -> Header:
    """The header of a model from those of its files, in order. Raises GGUFError unless they are one model's."""
    _belong(parts)
    first, tensors = parts[0], tuple(t for p in parts for t in p.tensors)
    twice = len({t.name for t in tensors}) != len(tensors)
    refuse(twice, f"{first.path.name}: corrupt: two of its files hold the same tensor", "fetch all of them again")
    return Header(first.path, sum(p.file_bytes for p in parts), first.metadata, tensors)


def model(header: Header) -> Header:
    """`header`, if it is that of a model. Raises GGUFError that says what else the file is."""
    if header.kind != "model":
        kind, step = NOT_MODELS[header.kind]
        raise GGUFError(f"{header.path.name} is {kind}; {step}")
    return header


def from_bytes(first: bytes, name: str, file_bytes: int) -> Header:
    """The header of a remote file of `file_bytes` bytes, from its first bytes; any kind of file is accepted.

    For a split model, it describes this one file. Raises GGUFError; HeaderCut if more of the file is needed.
    """
    path = Path(name)
    with _named(path):
        return _parse(path, io.BytesIO(first), file_bytes)


def _belong(parts: list[Header]) -> None:
    """Raise GGUFError unless the parts are the files of one model."""
    first, n = parts[0], len(parts)
    count = first.metadata.get("split.count", 0)
    if n == 1 and count in (0, 1):
        return
    again = f"rename it as it was published, ...-0000N-of-{count:05}.gguf, beside all others" if n == 1 else AGAIN
    for i, p in enumerate(parts):
        count, at = p.metadata.get("split.count", 0), p.metadata.get("split.no", i)
        refuse(count != n, f"{p.path.name}: its header says one of {count} files, its name one of {n}", again)
        refuse(at != i, f"{p.path.name}: its header says file {at + 1} of the model", again)
    announced, held = first.metadata.get("split.tensors.count"), sum(len(p.tensors) for p in parts)
    lacking = announced not in (None, held)
    refuse(lacking, f"{first.path.name}: its files hold {held} of {announced} tensors", "fetch all again")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the file's name before an error, and the cause where the name says it."""
    try:
        yield
    except GGUFError as err:
        if m := SLICE.search(path.name):
            cause, whole = f"it is slice {m[1]} of {m[2]} of a file split for upload", path.name[: m.start()] or "it"
            raise GGUFError(f"{path.name}: {cause}; join the slices of {whole} with cat") from None
        raise type(err)(f"{path.name}: {err}") from None
    except OSError as err:
        raise GGUFError(f"{path.name} cannot be read: {err.strerror or err}; check its path, owner and disk") from None


def _read(path: Path) -> Header:
    status = path.stat()
    refuse(S_ISDIR(status.st_mode), "it is a folder", "name the GGUF file in it")
    refuse(not S_ISREG(status.st_mode), "it is a device or a pipe, not a file", "give a GGUF file")
    with path.open("rb", buffering=WINDOW_BYTES) as f:
        return _parse(path, f, f.seek(0, 2))


def _parse(path: Path, stream: BinaryIO, size: int) -> Header:
    layout = gguf_reader.parse(stream, size)
    _counts(layout.metadata)
    tensors, end = [], layout.data_start
    for name, shape, kind, offset in layout.tensors:
        tensors.append(Tensor(name, shape, kind, tensor_bytes(shape, kind), layout.data_start + offset))
    for t in sorted(tensors, key=lambda t: t.offset):
        overlaps = t.offset % layout.alignment or t.offset < end
        refuse(overlaps, f"corrupt: tensor {t.name!r} overlaps or is not aligned")
        end = t.offset + t.nbytes
    refuse(end > size, f"truncated: the tensors need {end} bytes, the file has {size}: {mib(end - size)} are missing")
    return Header(path, size, layout.metadata, tuple(tensors))


def _counts(metadata: dict[str, Any]) -> None:
    """Raise GGUFError if a count in the metadata is not a whole number."""
    arch = metadata.get("general.architecture", "")
    refuse(not isinstance(arch, str), f"corrupt: general.architecture is {arch!r:.60}, not a name")
    for key in (*(f"{arch}.{k}" for k in COUNTS), "split.count", "split.no", "split.tensors.count"):
        value = metadata.get(key, 0)
        layers = key.endswith(("expert_count", "expert_used_count"))  # they may differ from layer to layer
        each = value if isinstance(value, list) and layers else [value]
        valid = all(type(n) is int and 0 <= n < 1 << 32 for n in each)
        refuse(not valid, f"corrupt: {key} is {value!r:.60}, not a count", "take another conversion of the model")
    blocks, nextn = (metadata.get(f"{arch}.{k}") for k in COUNTS[:2])
    no_layer = blocks is not None and (nextn or 0) >= blocks
    counted = f"block_count is {blocks} and nextn_predict_layers {nextn or 0}, so that no layer is left"
    refuse(no_layer, f"corrupt: {counted}", "take another conversion of the model")
