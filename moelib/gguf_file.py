"""Header of a GGUF file: architecture, tensors, types and exact bytes.

A bounded reader for files from anywhere: every length is checked against the file before it is believed, and a
truncated, corrupt or foreign file raises GGUFError before an engine sees it. Weights are not read.
Format: the GGUF specification of ggml (versions 2 and 3, little-endian).
"""

import mmap
import re
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from moelib.params import UserError

MAX_TENSORS = 1 << 20
MAX_KEYS = 1 << 16
MAX_STRING_BYTES = 1 << 26  # a chat template or a merges entry is far below this
KEEP_ARRAY_ITEMS = 1024  # longer arrays (vocabularies) are walked, not kept

EXPERT_TENSOR = re.compile(r"^blk\.(\d+)\.ffn_(up|down|gate|gate_up)_(ch|)exps\.(weight|bias|scale)$")
"""What `--cpu-moe` overrides: llama.cpp's `\\.ffn_(up|down|gate|gate_up)_(ch|)exps`."""

SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
"""End of the name of one file of a split model; llama.cpp takes the first and finds the others."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


class GGUFError(UserError, ValueError):
    """The file is not a GGUF that can be used; the message says why."""


def _refuse(wrong: object, why: str) -> None:
    if wrong:
        raise GGUFError(why)


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    """Elements along each dimension, fastest first (ggml's `ne`)."""
    type: str
    nbytes: int
    offset: int
    """From the start of the file."""

    @property
    def block(self) -> int | None:
        """Index of the transformer block that the tensor belongs to, None for the others."""
        m = re.match(r"blk\.(\d+)\.", self.name)
        return int(m.group(1)) if m else None

    @property
    def is_expert(self) -> bool:
        return EXPERT_TENSOR.match(self.name) is not None


@dataclass(frozen=True)
class Header:
    """What a GGUF says of itself."""

    path: Path
    file_bytes: int
    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def type_counts(self) -> dict[str, int]:
        """Number of tensors by type: the label of a quant is not its types."""
        return dict(sorted(Counter(t.type for t in self.tensors).items()))

    @property
    def expert_types(self) -> dict[str, int]:
        return dict(sorted(Counter(t.type for t in self.moved("cpu-moe")).items()))

    @property
    def parameters(self) -> int:
        return sum(prod(t.shape) for t in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.tensor_bytes / self.parameters

    def moved(self, placement: str) -> tuple[Tensor, ...]:
        """Expert tensors that `placement` keeps on the CPU: none for baseline, those of the first N blocks for
        `n-cpu-moe=N`. Dense first blocks count among the N and move nothing."""
        if placement == "baseline":
            return ()
        limit = None if placement == "cpu-moe" else int(placement.removeprefix("n-cpu-moe="))
        return tuple(t for t in self.tensors if t.is_expert and (limit is None or (t.block or 0) < limit))

    def moved_bytes(self, placement: str) -> int:
        return sum(t.nbytes for t in self.moved(placement))

    def device_bytes(self, placement: str) -> int:
        """Bytes of the weights that llama.cpp puts on the device with all layers offloaded: everything but the token
        embedding (always on the CPU, and copied to the device where it is also the output) and what was moved."""
        embedding = sum(t.nbytes for t in self.tensors if t.name == "token_embd.weight")
        tied = embedding if not any(t.name == "output.weight" for t in self.tensors) else 0
        return self.tensor_bytes - embedding + tied - self.moved_bytes(placement)

    def read_bytes(self, placement: str) -> tuple[int, int]:
        """(device, host) bytes of the weights that decoding one token must read: all of a dense tensor, the used
        share of an expert one; one row of the token embedding does not count."""
        arch = self.metadata["general.architecture"]
        used, count = (self.metadata.get(f"{arch}.{k}", 1) for k in ("expert_used_count", "expert_count"))
        experts = sum(t.nbytes for t in self.tensors if t.is_expert)
        moved = self.moved_bytes(placement)
        dense = self.device_bytes("baseline") - experts
        return dense + (experts - moved) * used // count, moved * used // count


class _Cursor:
    """Bounds-checked reads from a mapped file."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        size = len(self.data)
        _refuse(n > size - self.at, f"truncated: {n} bytes wanted at {self.at}, the file has {size}")
        self.at += n
        return self.data[self.at - n : self.at]

    def scalar(self, fmt: str) -> Any:
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def string(self) -> str:
        n = self.scalar("<Q")
        _refuse(n > MAX_STRING_BYTES, f"corrupt: a string of {n} bytes at {self.at}")
        return self.take(n).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        _refuse(kind != _ARRAY, f"corrupt: value type {kind} does not exist")
        item, n = self.scalar("<I"), self.scalar("<Q")
        # arrays of arrays exist in the format, not in any model file
        _refuse(item != _STRING and item not in _SCALARS, f"corrupt: array of type {item}")
        size = struct.calcsize(_SCALARS.get(item, "<Q"))  # a string is at least its length
        _refuse(n * size > len(self.data) - self.at, f"truncated: an array of {n} items at {self.at}")
        if n <= KEEP_ARRAY_ITEMS:
            return [self.value(item) for _ in range(n)]
        if item == _STRING:
            for _ in range(n):
                self.string()
        else:
            self.at += n * size
        return f"<{n} items>"


def tensor_bytes(shape: tuple[int, ...], type_name: str) -> int:
    """Bytes of a tensor of `shape` (fastest dimension first) in ggml type `type_name`.

    Raises GGUFError if its rows do not divide into the type's blocks.
    """
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    _refuse(shape[0] % block, f"a row of {shape[0]} does not divide into {type_name} blocks of {block}")
    return prod(shape) // block * size


def split_paths(path: Path) -> list[Path]:
    """All files of a model that was split, in order, by the name of any of them; else `path` alone."""
    if not (m := SPLIT.search(path.name)):
        return [path]
    return [path.with_name(f"{path.name[: m.start()]}-{i + 1:05}-of-{m[2]}.gguf") for i in range(int(m[2]))]


def read_header(path: str | Path) -> Header:
    """Read and check the header of `path`, or of all files of a split model by its first one.

    Raises GGUFError, or OSError if a file cannot be opened.
    """
    paths = split_paths(Path(path))
    if len(paths) > 1 and (gone := [p.name for p in paths if not p.exists()]):
        raise GGUFError(f"{paths[0].name} is one of {len(paths)} files, and there is no {', '.join(gone)}; fetch them")
    parts = [_read(p) for p in paths]
    first = parts[0]
    told = [p.metadata.get("split.count", 0) for p in parts]
    if told != ([len(parts)] * len(parts) if len(parts) > 1 else [0]) and told != [1]:
        raise GGUFError(f"{first.path.name}: it is one of {told[0]} files, {len(parts)} by its name; fetch all of them")
    tensors = tuple(t for p in parts for t in p.tensors)
    if not tensors or not first.metadata.get("general.architecture") or len({t.name for t in tensors}) != len(tensors):
        raise GGUFError(f"{first.path.name}: corrupt: no tensors, one of them twice, or no general.architecture")
    return Header(first.path, sum(p.file_bytes for p in parts), first.metadata, tensors)


def _read(path: Path) -> Header:
    with path.open("rb") as f:
        size = f.seek(0, 2)
        try:
            _refuse(size < 24, f"truncated: {size} bytes is less than any GGUF")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, size, data)
        except GGUFError as err:
            raise GGUFError(f"{path.name}: {err}; fetch or write the file again") from None


def _parse(path: Path, size: int, data: mmap.mmap) -> Header:
    c = _Cursor(data)
    magic = c.take(4)
    _refuse(magic != b"GGUF", f"not a GGUF file (it starts with {magic!r})")
    version = c.scalar("<I")
    _refuse(
        version not in (2, 3), f"GGUF version {version} (2 and 3 are read; a big-endian file reads as a huge version)"
    )
    n_tensors, n_keys = c.scalar("<Q"), c.scalar("<Q")
    _refuse(n_tensors > MAX_TENSORS or n_keys > MAX_KEYS, f"corrupt: {n_tensors} tensors and {n_keys} keys announced")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = c.string()
        _refuse(key in metadata, f"corrupt: key {key!r} twice")
        metadata[key] = c.value(c.scalar("<I"))
    part = metadata.get("split.count", 0) != 0  # only a model's first file tells of the model, and it may do no more
    _refuse(n_tensors == 0 and not part, "it holds no tensors")
    _refuse(not part and not metadata.get("general.architecture"), "corrupt: no general.architecture")

    infos = []
    for _ in range(n_tensors):
        name, n_dims = c.string(), c.scalar("<I")
        _refuse(not 1 <= n_dims <= 4, f"corrupt: tensor {name!r} has {n_dims} dimensions")
        shape = tuple(c.scalar("<Q") for _ in range(n_dims))
        kind, offset = c.scalar("<I"), c.scalar("<Q")
        _refuse(
            kind not in GGMLQuantizationType._value2member_map_,
            f"tensor {name!r} has type {kind}, which this reader does not know",
        )
        _refuse(min(shape) < 1 or prod(shape) > 1 << 48, f"corrupt: tensor {name!r} has shape {shape}")
        infos.append((name, shape, GGMLQuantizationType(kind).name, offset))

    align = metadata.get("general.alignment", 32)
    _refuse(
        not isinstance(align, int) or align < 1 or align & (align - 1) or align > 1 << 20,
        f"corrupt: alignment {align!r}",
    )
    start = -(-c.at // align) * align
    tensors = tuple(Tensor(n, s, t, tensor_bytes(s, t), start + o) for n, s, t, o in infos)
    _refuse(len({t.name for t in tensors}) != len(tensors), "corrupt: a tensor name stands twice")
    end = start
    for t in sorted(tensors, key=lambda t: t.offset):
        _refuse(t.offset % align or t.offset < end, f"corrupt: tensor {t.name!r} overlaps or is not aligned")
        end = t.offset + t.nbytes
    _refuse(end > size, f"truncated: the tensors need {end} bytes, the file has {size}")
    return Header(path, size, metadata, tensors)
