"""Read the header of a GGUF (metadata and tensor list) from bytes that nobody has checked.

Every length is checked against the file's size and a limit before it is used, so that no header takes more than
seconds, or more memory than that of a real model. The reader of the `gguf` package trusts the file: it maps it, so that
a file that shrinks meanwhile ends the process; it needs the whole file, where this one reads a download's first bytes;
and it keeps every string, which takes 13 s and 1 GiB for a vocabulary of 262,144 tokens, here 0.3 s and 1 MiB.
Format: the GGUF specification of ggml (versions 2 and 3, little-endian).
"""

import re
import struct
from math import prod
from typing import Any, BinaryIO, NamedTuple

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from moelib.base.schema import UserError

MAX_HEADER_BYTES = 1 << 28  # the largest vocabularies, with their merges and scores, fill some 30 MB
MAX_TENSORS = 1 << 16  # 61 layers of 256 experts, a tensor each, are 47,000
MAX_KEYS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1  # from the specification
MAX_NAME_BYTES = 63  # ggml's GGML_MAX_NAME, less the zero at its end
MAX_STRING_BYTES = 1 << 26
KEEP_STRING_BYTES = 1 << 20  # chat templates stay below 200 kB; longer strings are skipped
KEEP_ARRAY_ITEMS = 1024  # longer arrays (vocabularies) are skipped
KEEP_BYTES = 1 << 24  # of all kept values together
MAX_ARRAY_STRINGS = 1 << 22  # in all arrays; a vocabulary of 262,144 tokens has 515,000 merges
ITEM_BYTES = 64  # memory that Python needs for a small value

AGAIN = "fetch or write the file again"
CONVERT = "convert the folder that it came in: `moelib fetch MODEL --from FOLDER`"

LOOK_BYTES = 512
FOREIGN = (
    (rb"version https://git-lfs", "a Git LFS pointer, which stands for the file", "run `git lfs pull` in the clone"),
    (
        rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype|\?xml|html|head|body)",
        "a web page, as a site sends if a login is needed or the name is wrong",
        "open the address in a browser, then fetch the file itself, with a token where one is needed",
    ),
    (rb".{3}[\0-\x3f]\0{4}\{", "safetensors, a model as it is published", CONVERT),
    (rb"(\xef\xbb\xbf)?\s*[{\[]", "JSON, such as a site's error or a model's settings", "fetch the GGUF itself"),
    (rb"PK\x03\x04", "a zip archive, as PyTorch's checkpoints are", f"unpack it if it holds a GGUF, else {CONVERT}"),
    (rb"\x80[\x02-\x05]", "a Python pickle, as PyTorch's older checkpoints are", CONVERT),
    (rb"tjgg|lmgg|fmgg|algg|ggml|ggjt", "GGML or GGJT, of before August 2023", "take a GGUF of the model"),
    (rb"GGUF\x01\0{3}", "of GGUF version 1, which llama.cpp no longer reads", "take a newer conversion"),
    (
        rb"FUGG|GGUF\0{3}[\x01-\x03]",
        "a big-endian GGUF, as mainframes read it",
        "take the little-endian file, or convert it with `gguf-convert-endian FILE little`",
    ),
    (rb"\x1f\x8b|\x28\xb5\x2f\xfd|\xfd7zXZ|BZh|7z\xbc\xaf|Rar!", "a compressed file", "unpack it"),
    (rb".{257}ustar", "a tar archive", "unpack it"),
    (rb"\x89HDF", "an HDF5 file, as Keras keeps models", "take the model's safetensors or a GGUF of it"),
    (rb"\0+\Z", "it begins with zeros, like a download that reserved its space and then stopped", "fetch it again"),
)
"""First bytes of files that are named like a GGUF and are not one to read, what such a file is, and the next step."""

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")


class GGUFError(UserError, ValueError):
    """The file is not a usable GGUF; the message says why, and what to do."""


class HeaderCut(GGUFError):
    """The file, or the part of it that was downloaded so far, ends within its header."""


class Layout(NamedTuple):
    """The content of a header, uninterpreted."""

    metadata: dict[str, Any]
    tensors: list[tuple[str, tuple[int, ...], str, int]]
    """(name, shape, type, offset from `data_start`)."""
    alignment: int
    data_start: int
    spans: dict[str, tuple[int, int]]
    """Key -> where its type and value begin and end in the file."""


def refuse(wrong: object, why: str, do: str = AGAIN) -> None:
    """Raise GGUFError with the cause and the next step if `wrong` is true."""
    if wrong:
        raise GGUFError(f"{why}; {do}")


def mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 2**20 else f"{nbytes} bytes"


def _refuse_foreign(first: bytes) -> None:
    """Raise GGUFError unless a file that begins with the bytes `first` can be a GGUF of a version that is read."""
    refuse(not first, "it is empty", "fetch it again")
    gguf = first.startswith((b"GGUF", b"FUGG"))
    for pattern, kind, step in FOREIGN:
        refuse(re.match(pattern, first, re.DOTALL), f"it is {'' if gguf else 'not a GGUF file: '}{kind}", step)
    refuse(not gguf, f"it is not a GGUF file: it starts with {first[:4]!r}", "give a GGUF file, or fetch it again")


class _Cursor:
    """Bounds-checked reads of a stream of `size` bytes, from its start on."""

    def __init__(self, stream: BinaryIO, size: int):
        self._stream, self._size = stream, size
        self.at, self._kept, self._strings = 0, 0, 0

    def _require(self, n: int) -> None:
        """Raise HeaderCut or GGUFError unless the header can have `n` more bytes."""
        if n > self._size - self.at:
            raise HeaderCut(f"truncated: it ends within its header, at {self._size} bytes; {AGAIN}")
        if n > MAX_HEADER_BYTES - self.at:
            raise GGUFError(f"corrupt: its header is longer than {mib(MAX_HEADER_BYTES)}; {AGAIN}")

    def take(self, n: int) -> bytes:
        self._require(n)
        data = self._stream.read(n)
        if len(data) < n:
            raise HeaderCut(f"truncated: it ends within its header, at {self.at + len(data)} bytes; {AGAIN}")
        self.at += n
        return data

    def skip(self, n: int) -> None:
        self._require(n)
        self._stream.seek(n, 1)
        self.at += n

    def keep(self, nbytes: int) -> None:
        """Count bytes of memory that a value takes."""
        self._kept += nbytes
        refuse(self._kept > KEEP_BYTES, f"corrupt: its metadata fills more than {mib(KEEP_BYTES)} beside a vocabulary")

    def scalar(self, fmt: str) -> Any:
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def string(self, label: str, limit: int = MAX_STRING_BYTES) -> str:
        n = self.scalar("<Q")
        refuse(n > limit, f"corrupt: {label} of {n} bytes at {self.at}; the limit is {limit}")
        if n > KEEP_STRING_BYTES:
            self.skip(n)
            return f"<{n} bytes>"
        self.keep(n + ITEM_BYTES)
        return self.take(n).decode("utf-8", errors="replace")

    def pass_strings(self, n: int) -> None:
        """Skip `n` strings without reading their bytes: a vocabulary has hundreds of thousands."""
        self._strings += n
        refuse(self._strings > MAX_ARRAY_STRINGS, f"corrupt: arrays of {self._strings} strings")
        for _ in range(n):
            self.skip(_LENGTH.unpack(self.take(8))[0])

    def value(self, key: str, kind: int) -> Any:
        if kind in SCALARS:
            self.keep(ITEM_BYTES)
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string(f"a string of {key!r}")
        refuse(kind != ARRAY, f"corrupt: value type {kind} does not exist")
        item, n = self.scalar("<I"), self.scalar("<Q")
        nested = f"{key!r} is an array of arrays, which llama.cpp does not read"
        refuse(item == ARRAY, nested, "take a file that its converter wrote")
        refuse(item != STRING and item not in SCALARS, f"corrupt: array of type {item}")
        if n <= KEEP_ARRAY_ITEMS:
            return [self.value(key, item) for _ in range(n)]
        if item == STRING:
            self.pass_strings(n)
        else:
            self.skip(n * struct.calcsize(SCALARS[item]))
        return f"<{n} items>"


def tensor_bytes(shape: tuple[int, ...], type_name: str) -> int:
    """Bytes of a tensor of `shape` (fastest dimension first) in ggml type `type_name`.

    Raises GGUFError if its rows do not divide into the type's blocks.
    """
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    refuse(shape[0] % block, f"corrupt: a row of {shape[0]} does not divide into {type_name} blocks of {block}")
    return prod(shape) // block * size


def _type_name(tensor: str, kind: int) -> str:
    refuse(kind > 1 << 10, f"corrupt: tensor {tensor!r} has type {kind}")
    refuse(
        kind not in GGMLQuantizationType._value2member_map_,
        f"tensor {tensor!r} has type {kind}, which this reader does not know: llama.cpp removed it, a fork such as "
        "ik_llama.cpp added it, or it is new",
        "take another quant of the model, or for a new type a newer `gguf` package (pip install -U gguf)",
    )
    return GGMLQuantizationType(kind).name


def parse(stream: BinaryIO, size: int) -> Layout:
    """Read the header at the start of `stream`, a file of `size` bytes.

    Raises GGUFError; HeaderCut if the stream ends too early.
    """
    stream.seek(0)
    _refuse_foreign(stream.read(LOOK_BYTES))
    stream.seek(0)
    c = _Cursor(stream, size)
    c.take(4)
    version = c.scalar("<I")
    known = "versions 2 and 3 are read"
    refuse(version not in (2, 3), f"it is of GGUF version {version}; {known}", "fetch it again, or update moelib")
    n_tensors, n_keys = c.scalar("<Q"), c.scalar("<Q")
    refuse(n_tensors > MAX_TENSORS or n_keys > MAX_KEYS, f"corrupt: {n_tensors} tensors and {n_keys} keys announced")
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(n_keys):
        key = c.string("a key", MAX_KEY_BYTES)
        refuse(key in metadata, f"corrupt: key {key[:100]!r} twice")
        at = c.at
        metadata[key] = c.value(key[:100], c.scalar("<I"))
        spans[key] = at, c.at

    tensors, names = [], set()
    for _ in range(n_tensors):
        name, n_dims = c.string("a tensor's name", MAX_NAME_BYTES), c.scalar("<I")
        refuse(name in names, f"corrupt: tensor {name!r} is listed twice")
        refuse(not 1 <= n_dims <= 4, f"corrupt: tensor {name!r} has {n_dims} dimensions")
        shape = struct.unpack(f"<{n_dims}Q", c.take(8 * n_dims))
        refuse(min(shape) < 1 or prod(shape) > 1 << 48, f"corrupt: tensor {name!r} has shape {shape}")
        names.add(name)
        tensors.append((name, shape, _type_name(name, c.scalar("<I")), c.scalar("<Q")))

    align = metadata.get("general.alignment", 32)
    number = isinstance(align, int) and not isinstance(align, bool)
    refuse(not number or align < 1 or align & (align - 1) or align > 1 << 20, f"corrupt: alignment {align!r:.60}")
    return Layout(metadata, tensors, align, -(-c.at // align) * align, spans)
