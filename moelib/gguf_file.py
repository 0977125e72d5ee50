"""Read and check the headers of GGUF files, whole or split.

Weights are not read. A file that is truncated, corrupt, of another format or not a model raises GGUFError, with the
cause and the next step, before the engine opens it.
"""

import io
import re
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

from moelib import gguf_foreign, gguf_reader
from moelib.gguf_header import UNQUANTISED, Header, Tensor
from moelib.gguf_reader import AGAIN, GGUFError, HeaderCut, mib, refuse, tensor_bytes

__all__ = [
    "UNQUANTISED",
    "GGUFError",
    "Header",
    "HeaderCut",
    "Tensor",
    "from_bytes",
    "read_header",
    "split_paths",
    "tensor_bytes",
]

SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
"""End of the name of one file of a split model; llama.cpp is given the first and finds the others."""
MAX_PARTS = 4096

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


def read_header(path: str | Path, any_kind: bool = False) -> Header:
    """Read and check the header of `path`, or of all files of a split model, given any of them.

    `any_kind`: accept files that are not models; see `Header.kind`. Raises GGUFError.
    """
    paths = split_paths(Path(path))
    if len(paths) > 1 and (gone := [p.name for p in paths if not p.exists()]):
        listed = ", ".join(gone[:3]) + (f" and {len(gone) - 3} more" if len(gone) > 3 else "")
        raise GGUFError(
            f"{Path(path).name} is one of {len(paths)} files of a model, and {listed} cannot be found; fetch all files"
        )
    parts, total = [], 0
    for p in paths:
        parts.append(_read(p))
        total += len(parts[-1].tensors)
        refuse(total > gguf_reader.MAX_TENSORS, f"{p.name}: corrupt: more than {gguf_reader.MAX_TENSORS} tensors")
    _belong(parts)
    first, tensors = parts[0], tuple(t for p in parts for t in p.tensors)
    twice = len({t.name for t in tensors}) != len(tensors)
    refuse(twice, f"{first.path.name}: corrupt: two of its files hold the same tensor", "fetch all of them again")
    return _checked(Header(first.path, sum(p.file_bytes for p in parts), first.metadata, tensors), any_kind)


def from_bytes(first: bytes, name: str, file_bytes: int) -> Header:
    """The header of a remote file of `file_bytes` bytes, from its first bytes; any kind of file is accepted.

    For a split model, it describes this one file. Raises GGUFError; HeaderCut if more of the file is needed.
    """
    return _named(name, lambda: _parse(Path(name), io.BytesIO(first), file_bytes))


def _belong(parts: list[Header]) -> None:
    """Raise GGUFError unless the parts are the files of one model."""
    first, n = parts[0].path.name, len(parts)
    for i, p in enumerate(parts):
        of, at = (p.metadata.get(f"split.{k}", absent) for k, absent in (("count", 0), ("no", i)))
        whole = n == 1 and of in (0, 1)
        again = f"rename it as it was published, ...-0000N-of-{of:05}.gguf, beside all others" if n == 1 else AGAIN
        refuse(of != n and not whole, f"{p.path.name}: its header says one of {of} files, its name one of {n}", again)
        refuse(at != i and not whole, f"{p.path.name}: its header says file {at + 1} of the model", again)
    announced, held = parts[0].metadata.get("split.tensors.count"), sum(len(p.tensors) for p in parts)
    refuse(
        n > 1 and announced not in (None, held),
        f"{first}: its files hold {held} of {announced} tensors",
        "fetch all again",
    )


def _checked(h: Header, any_kind: bool) -> Header:
    if not any_kind and (kind := h.kind) != "model":
        refuse(True, f"{h.path.name} is {NOT_MODELS[kind][0]}", NOT_MODELS[kind][1])
    return h


def _named(name: str, read: Any) -> Header:
    try:
        return read()
    except GGUFError as err:
        raise type(err)(f"{name}: {err}") from None
    except OSError as err:
        raise GGUFError(f"{name} cannot be read: {err.strerror or err}; check its path, owner and disk") from None


def _read(path: Path) -> Header:
    def read() -> Header:
        status = path.stat()
        refuse(path.is_dir(), "it is a folder", "name the GGUF file in it")
        refuse(not S_ISREG(status.st_mode), "it is a device or a pipe, not a file", "give a GGUF file")
        with path.open("rb") as f:
            return _parse(path, f, f.seek(0, 2))

    return _named(path.name, read)


def _parse(path: Path, stream: BinaryIO, size: int) -> Header:
    stream.seek(0)
    if foreign := gguf_foreign.cause(stream.read(gguf_foreign.LOOK_BYTES), path.name):
        refuse(True, *foreign)
    try:
        layout = gguf_reader.parse(stream, size)
    except HeaderCut as err:
        if sliced := gguf_foreign.part(path.name):
            refuse(True, *sliced)
        raise err
    _counts(layout.metadata)
    tensors, end = [], layout.data_start
    for name, shape, kind, offset in layout.tensors:
        tensors.append(Tensor(name, shape, kind, tensor_bytes(shape, kind), layout.data_start + offset))
    for t in sorted(tensors, key=lambda t: t.offset):
        if t.offset % layout.alignment or t.offset < end:
            refuse(True, f"corrupt: tensor {t.name!r} overlaps or is not aligned")
        end = t.offset + t.nbytes
    missing = f"truncated: the tensors need {end} bytes, the file has {size}: {mib(end - size)} are missing"
    refuse(end > size, *(gguf_foreign.part(path.name) or (missing, AGAIN)))
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
    refuse(blocks == 0, f"corrupt: {arch}.block_count is 0", "take another conversion of the model")
    refuse(
        blocks is not None and (nextn or 0) >= blocks,
        f"corrupt: nextn_predict_layers is {nextn}, but block_count is {blocks}",
        "take another conversion of the model",
    )
