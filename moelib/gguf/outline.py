"""The outline of a model's file: its header as something to edit and to write again, without its weights.

Every key keeps the bytes that it has in the file, a tokenizer of any size too; offsets are computed anew. What is
written from an outline has random weights, and says so in place of the model's name, authors and licence.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gguf.constants import GGMLQuantizationType

from moelib.base import neutral
from moelib.catalogue.params import Geometry
from moelib.gguf import gguf_file, gguf_reader, twin
from moelib.gguf.gguf_header import TWIN_NAME, Header
from moelib.gguf.gguf_reader import ARRAY, SCALARS, STRING, GGUFError, refuse, tensor_bytes

KEPT_GENERAL = ("architecture", "type", "alignment", "file_type", "quantization_version")
"""Keys of `general.` that are true of a file with random weights as well."""
FROM_THE_END = ("attention.shared_kv_layers",)
"""Keys of the architecture that count layers from the last one back."""
NOT_BY_LAYER = ("rope.dimension_sections",)
"""Lists that may be as long as there are layers, and have no item for each."""
U32 = 4  # type of a value
DENSE = "leading_dense_block_count"
PLAIN = re.compile("[!-~▁ĠĊ]+")
"""Text of whole characters in every vocabulary: with the signs that stand for a space and a line break."""
LAYERED = re.compile(r"blk\.(\d{1,9})\.")


class Slot(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    """Elements along each dimension, fastest first."""
    type: str

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.shape, self.type)


@dataclass(frozen=True)
class Outline:
    """What the header of a file says, in the file's order."""

    keys: Mapping[str, bytes]
    """Key -> its type and value, as the file has them."""
    tensors: tuple[Slot, ...]
    name: str = "outline.gguf"
    """Of the file, for messages."""

    @cached_property
    def header(self) -> Header:
        """The header of the file that this outline becomes. Raises GGUFError if the engine could not read it."""
        return gguf_file.from_bytes(self.to_bytes(), self.name, self.file_bytes)

    @cached_property
    def alignment(self) -> int:
        """Every tensor begins at a multiple of so many bytes."""
        return self._number("general.alignment", 32)

    @property
    def padded_bytes(self) -> int:
        """Bytes of the tensors, each with what fills it up to the alignment."""
        return sum(_up(t.nbytes, self.alignment) for t in self.tensors)

    @property
    def file_bytes(self) -> int:
        return len(self.to_bytes()) + self.padded_bytes

    def to_bytes(self) -> bytes:
        """The header, filled up to where the first tensor begins."""
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:
        out = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.keys))]
        for key, raw in self.keys.items():
            out += [_text(key), raw]
        at = 0
        for t in self.tensors:
            kind = int(GGMLQuantizationType[t.type])
            out += [_text(t.name), struct.pack(f"<I{len(t.shape)}QIQ", len(t.shape), *t.shape, kind, at)]
            at += _up(t.nbytes, self.alignment)
        head = b"".join(out)
        return head + bytes(-len(head) % self.alignment)

    def as_twin(self) -> Outline:
        """With the name and description of a geometry twin; what else names the original is left out."""
        said, named = (self._string(f"general.{k}") for k in ("description", "name"))
        again = named == TWIN_NAME and said.startswith(twin.DESCRIPTION)
        says = {
            "general.name": _string(TWIN_NAME),
            "general.description": _string(said if again else twin.describe(neutral.plain(named or self.name))),
        }
        kept = {f"general.{k}" for k in KEPT_GENERAL} | says.keys()
        true = {k: v for k, v in self.keys.items() if not k.startswith("general.") or k in kept}
        return replace(self, keys=true | says)

    def first_layers(self, count: int) -> Outline:
        """The first `count` layers, with what belongs to no layer: an outline of a twin that says so.

        Layers that only predict further tokens (NextN) are left out. Raises GGUFError.
        """
        layers, arch = self.header.layers, self.header.architecture
        if layers is None or not any(LAYERED.match(t.name) for t in self.tensors):
            raise GGUFError(f"{self.name} has no layers to choose from; leave out the number of layers")
        impossible = not 1 <= count <= layers
        refuse(impossible, f"the first {count} of the {layers} layers of {self.name} cannot be taken", f"1 to {layers}")
        whole = self.as_twin()
        keys = {k: whole._cut(k, count) for k in whole.keys if k != f"{arch}.nextn_predict_layers"}
        numbers = {"block_count": count, DENSE: min(count, self._number(f"{arch}.{DENSE}"))}
        numbers |= {k: max(0, self._number(f"{arch}.{k}") - (layers - count)) for k in FROM_THE_END}
        for key, value in numbers.items():
            if (kind := _kind(keys.get(f"{arch}.{key}"))) in SCALARS:
                keys[f"{arch}.{key}"] = struct.pack("<I", kind) + struct.pack(SCALARS[kind], value)
        said = whole._string("general.description").removesuffix(twin.MEANINGLESS)
        keys["general.description"] = _string(f"{said}, first {count} of {layers} layers{twin.MEANINGLESS}")
        kept = (t for t in self.tensors if not (m := LAYERED.match(t.name)) or int(m[1]) < count)
        return replace(whole, keys=keys, tensors=tuple(kept))

    def with_types(self, types: Mapping[str, str], file_type: int | None = None) -> Outline:
        """With the tensors' types, and in the order, of `types`; `file_type`: llama.cpp's number of the mix.

        Raises GGUFError unless they are the outline's tensors, and their rows divide into the types' blocks.
        """
        shapes = {t.name: t.shape for t in self.tensors}
        refuse(types.keys() != shapes.keys(), f"the types given are not of the tensors of {self.name}")
        for name, kind in types.items():
            refuse(
                kind not in GGMLQuantizationType.__members__, f"{name} cannot have type {kind!r}", "take another quant"
            )
            tensor_bytes(shapes[name], kind)
        tensors = tuple(Slot(name, shapes[name], kind) for name, kind in types.items())
        mix = ("general.quantization_version", "general.file_type")
        keys = {k: v for k, v in self.keys.items() if file_type is None or k not in mix}
        if file_type is not None:
            keys |= {
                k: struct.pack("<II", U32, v) for k, v in zip(mix, (2, file_type), strict=True)
            }  # as llama-quantize
        return replace(self, keys=keys, tensors=tensors)

    def silent(self, rows: int) -> list[bool]:
        """For each of the `rows` of the output: whether it is of no token, or of one that is no plain text.

        Plain: a normal token of printable ASCII. The others have logits of zero, so that greedy sampling never picks a
        special token or a part of a character.
        """
        tokens = _strings(self.keys.get("tokenizer.ggml.tokens"))
        types = _ints(self.keys.get("tokenizer.ggml.token_type")) or [1] * len(tokens)
        plain = [kind == 1 and PLAIN.fullmatch(token) is not None for token, kind in zip(tokens, types, strict=False)]
        quiet = [not spoken for spoken in plain[:rows]] + [True] * (rows - len(plain))
        return quiet if not all(quiet) else [False] * rows

    def _cut(self, key: str, count: int) -> bytes:
        """The value of a key; a list with an item for each layer is cut to the first ones."""
        raw, arch, header = self.keys[key], self.header.architecture, self.header
        if not key.startswith(f"{arch}.") or key.removeprefix(f"{arch}.") in NOT_BY_LAYER or _kind(raw) != ARRAY:
            return raw
        item, n = struct.unpack_from("<IQ", raw, 4)
        if n not in (header.layers, header.number("block_count")) or item not in SCALARS:
            return raw
        return struct.pack("<IIQ", ARRAY, item, count) + raw[16 : 16 + count * struct.calcsize(SCALARS[item])]

    def _number(self, key: str, default: int = 0) -> int:
        raw = self.keys.get(key)
        return int(struct.unpack_from(SCALARS[kind], raw, 4)[0]) if raw and (kind := _kind(raw)) in SCALARS else default

    def _string(self, key: str) -> str:
        raw = self.keys.get(key)
        return raw[12:].decode("utf-8", errors="replace") if raw and _kind(raw) == STRING else ""


def read(path: str | Path) -> Outline:
    """The outline of a local file; of all files of a split model, as one, given any of them. Raises GGUFError."""
    header = gguf_file.read_header(path)
    with ExitStack() as stack:
        streams = [stack.enter_context(p.open("rb")) for p in gguf_file.split_paths(Path(path))]
        return _joined([(s, s.seek(0, 2)) for s in streams], header.path.name)


def from_bytes(parts: Sequence[tuple[bytes, int]], name: str) -> Outline:
    """The outline of a remote file, or of all files of a split model: (first bytes, bytes of the whole file) of each.

    Raises GGUFError; HeaderCut if more of a file is needed.
    """
    for first, file_bytes in parts:
        header = gguf_file.from_bytes(first, name, file_bytes)
        count = header.metadata.get("split.count") or 1
        refuse(count != len(parts), f"{name} is one of {count} files of a model, {len(parts)} are given", "give all")
    joined = _joined([(io.BytesIO(first), file_bytes) for first, file_bytes in parts], name)
    gguf_file.model(joined.header)
    return joined


def of_geometry(g: Geometry, title: str, name: str = "twin.gguf") -> Outline:
    """The outline of the F16 twin of a catalogued geometry."""
    head = twin.head(g, title)
    return from_bytes([(head, len(head) + sum(_up(t.nbytes, twin.ALIGNMENT) for t in twin.tensors(g)))], name)


def _joined(parts: Iterable[tuple[BinaryIO, int]], name: str) -> Outline:
    keys: dict[str, bytes] = {}
    tensors: list[Slot] = []
    for stream, size in parts:
        layout = gguf_reader.parse(stream, size)
        if not keys:
            for key, (start, end) in layout.spans.items():
                stream.seek(start)
                keys[key] = stream.read(end - start)
        tensors += [Slot(*t[:3]) for t in layout.tensors]
    return Outline({k: v for k, v in keys.items() if not k.startswith("split.")}, tuple(tensors), name)


def _up(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _string(text: str) -> bytes:
    return struct.pack("<I", STRING) + _text(text)


def _kind(raw: bytes | None) -> int | None:
    return int(struct.unpack_from("<I", raw)[0]) if raw else None


def _strings(raw: bytes | None) -> list[str]:
    """The items of a list of strings; none where there is no such list."""
    if raw is None or _kind(raw) != ARRAY or (head := struct.unpack_from("<IQ", raw, 4))[0] != STRING:
        return []
    out, at = [], 16
    for _ in range(head[1]):
        (n,) = struct.unpack_from("<Q", raw, at)
        out.append(raw[at + 8 : at + 8 + n].decode("utf-8", errors="replace"))
        at += 8 + n
    return out


def _ints(raw: bytes | None) -> list[int]:
    """The items of a list of numbers; none where there is no such list."""
    if raw is None or _kind(raw) != ARRAY or (head := struct.unpack_from("<IQ", raw, 4))[0] not in SCALARS:
        return []
    return list(struct.unpack_from(f"<{head[1]}{SCALARS[head[0]][1]}", raw, 16))
