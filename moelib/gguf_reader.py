"""Bounded reader of a GGUF's header: metadata and tensor list of a file from an untrusted source.

Every length is checked against the file's size and a limit before it is used, so that no header takes more than
seconds, or more memory than that of a real model. The file is read a window at a time: if it shrinks meanwhile, reading
ends early with an error, whereas a memory-mapped file would crash the process.
Format: the GGUF specification of ggml (versions 2 and 3, little-endian).
"""

import struct
from math import prod
from typing import Any, BinaryIO, NamedTuple

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from moelib.params import UserError

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
WINDOW_BYTES = 1 << 18
ITEM_BYTES = 64  # memory that Python needs for a small value

AGAIN = "fetch or write the file again"

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")

REMOVED = {4: "Q4_2", 5: "Q4_3"} | {31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
REMOVED |= {36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
FORKS_FROM = 97  # ik_llama.cpp numbers its own types from here


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


def refuse(wrong: object, why: str, do: str = AGAIN) -> None:
    """Raise GGUFError with the cause and the next step if `wrong` is true."""
    if wrong:
        raise GGUFError(f"{why}; {do}")


def mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 2**20 else f"{nbytes} bytes"


class _Cursor:
    """Bounds-checked reads of a stream of `size` bytes, a window at a time."""

    def __init__(self, stream: BinaryIO, size: int):
        self._stream, self._size = stream, size
        self._window, self._base = b"", 0
        self.at, self._kept, self._strings = 0, 0, 0

    def _index(self, n: int) -> int:
        """Index in the window of the next `n` bytes."""
        at = self.at - self._base
        if 0 <= at <= len(self._window) - n:
            return at
        if n > self._size - self.at:
            raise HeaderCut(f"truncated: it ends within its header, at {self._size} bytes; {AGAIN}")
        refuse(self.at + n > MAX_HEADER_BYTES, f"corrupt: its header is longer than {mib(MAX_HEADER_BYTES)}")
        self._stream.seek(self.at)
        self._window, self._base = self._stream.read(max(n, WINDOW_BYTES)), self.at
        if len(self._window) < n:
            raise HeaderCut(f"truncated: it ends within its header, at {self.at + len(self._window)} bytes; {AGAIN}")
        return 0

    def take(self, n: int) -> bytes:
        i = self._index(n)
        self.at += n
        return self._window[i : i + n]

    def skip(self, n: int) -> None:
        if n > self._size - self.at:
            raise HeaderCut(f"truncated: it ends within its header, at {self._size} bytes; {AGAIN}")
        self.at += n

    def keep(self, nbytes: int) -> None:
        self._kept += nbytes
        refuse(self._kept > KEEP_BYTES, f"corrupt: its metadata fills more than {mib(KEEP_BYTES)} beside a vocabulary")

    def scalar(self, fmt: str) -> Any:
        i = self._index(size := struct.calcsize(fmt))
        self.at += size
        return struct.unpack_from(fmt, self._window, i)[0]

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        n = self.scalar("<Q")
        refuse(n > limit, f"corrupt: {what} of {n} bytes at {self.at}; the limit is {limit}")
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
            i = self._index(8)
            (length,) = _LENGTH.unpack_from(self._window, i)
            if length > MAX_STRING_BYTES:
                refuse(True, f"corrupt: a string of {length} bytes at {self.at}")
            self.at += 8
            self.skip(length)

    def value(self, key: str, kind: int) -> Any:
        if kind in _SCALARS:
            self.keep(ITEM_BYTES)
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string(f"a string of {key!r}")
        refuse(kind != _ARRAY, f"corrupt: value type {kind} does not exist")
        item, n = self.scalar("<I"), self.scalar("<Q")
        refuse(
            item == _ARRAY,
            f"{key!r} is an array of arrays, which llama.cpp does not read",
            "take a file that its converter wrote",
        )
        refuse(item != _STRING and item not in _SCALARS, f"corrupt: array of type {item}")
        size = struct.calcsize(_SCALARS.get(item, "<Q"))  # a string takes at least the 8 bytes of its length
        if n * size > self._size - self.at:
            raise HeaderCut(f"truncated: an array of {n} items at {self.at} of {self._size} bytes; {AGAIN}")
        if n <= KEEP_ARRAY_ITEMS:
            return [self.value(key, item) for _ in range(n)]
        if item == _STRING:
            self.pass_strings(n)
        else:
            self.skip(n * size)
        return f"<{n} items>"


def tensor_bytes(shape: tuple[int, ...], type_name: str) -> int:
    """Bytes of a tensor of `shape` (fastest dimension first) in ggml type `type_name`.

    Raises GGUFError if its rows do not divide into the type's blocks.
    """
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    refuse(shape[0] % block, f"corrupt: a row of {shape[0]} does not divide into {type_name} blocks of {block}")
    return prod(shape) // block * size


def _known(name: str, kind: int) -> str:
    """The name of ggml type number `kind`."""
    if kind in GGMLQuantizationType._value2member_map_:
        return GGMLQuantizationType(kind).name
    tensor = f"tensor {name!r} has type {kind}"
    refuse(kind in REMOVED, f"{tensor} ({REMOVED.get(kind)}), which ggml removed", "take another quant of the model")
    refuse(kind > 1 << 10, f"corrupt: {tensor}")
    fork = "; numbers from 97 on are ik_llama.cpp's, which llama.cpp does not read" if kind >= FORKS_FROM else ""
    newer = "if it is a new type, a newer `gguf` package reads it (pip install -U gguf); else take another quant"
    refuse(True, f"{tensor}, which this reader does not know{fork}", newer)
    raise AssertionError


def parse(stream: BinaryIO, size: int) -> Layout:
    """Read the header at the start of `stream`, a file of `size` bytes; its magic and version are already checked.

    Raises GGUFError; HeaderCut if the stream ends too early.
    """
    c = _Cursor(stream, size)
    c.take(8)
    n_tensors, n_keys = c.scalar("<Q"), c.scalar("<Q")
    refuse(n_tensors > MAX_TENSORS or n_keys > MAX_KEYS, f"corrupt: {n_tensors} tensors and {n_keys} keys announced")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = c.string("a key", MAX_KEY_BYTES)
        if key in metadata:
            refuse(True, f"corrupt: key {key[:100]!r} twice")
        metadata[key] = c.value(key[:100], c.scalar("<I"))

    tensors, names = [], set()
    for _ in range(n_tensors):
        name, n_dims = c.string("a tensor's name", MAX_NAME_BYTES), c.scalar("<I")
        if not 1 <= n_dims <= 4 or name in names:
            refuse(name in names, f"corrupt: tensor {name!r} is listed twice")
            refuse(True, f"corrupt: tensor {name!r} has {n_dims} dimensions")
        shape = struct.unpack(f"<{n_dims}Q", c.take(8 * n_dims))
        kind, offset = c.scalar("<I"), c.scalar("<Q")
        if min(shape) < 1 or prod(shape) > 1 << 48:
            refuse(True, f"corrupt: tensor {name!r} has shape {shape}")
        names.add(name)
        tensors.append((name, shape, _known(name, kind), offset))

    align = metadata.get("general.alignment", 32)
    number = isinstance(align, int) and not isinstance(align, bool)
    refuse(not number or align < 1 or align & (align - 1) or align > 1 << 20, f"corrupt: alignment {align!r:.60}")
    return Layout(metadata, tensors, align, -(-c.at // align) * align)
