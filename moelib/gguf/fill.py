"""Valid random blocks of every ggml type, made with ggml's own quantiser, and twins filled with them.

A type's pool holds half a million random weights (standard deviation 0.02), in rows that come again in other orders.
Tensors are cut from it at block boundaries: memory stays below a GiB at any size, and the disk limits the speed. The
same outline, seed and quantiser (a build of llama.cpp) give the same bytes.

Embeddings are LOUD times as large, so that what a token is outweighs what layers add to it: otherwise all tokens look
alike after some random layers, which then all need the same few experts, and generation repeats itself.
"""

import ctypes
import re
from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from moelib.gguf import twin
from moelib.gguf.gguf_reader import GGUFError
from moelib.gguf.outline import Outline, Slot

WEIGHTS = 1 << 19
ROW = 256  # weights, whole blocks of every type
POOL_BYTES = 1 << 25
ONES = re.compile(r"norm\w*\.weight$|_ln\.weight$|scale|rope_\w+\.weight$")
"""Names of tensors that multiply, or divide as rope factors do: 1. What is no weight, such as biases, is 0."""
EMBEDDING, LOUD = "token_embd.weight", 4096
WHOLE = {"I8", "I16", "I32", "I64"}
"""Types of whole numbers, such as indices: 0."""
INTERNAL = {"Q8_1", "Q8_K"}
"""Types of products while ggml computes, which no file holds and no quantiser makes."""


class FillError(GGUFError):
    """Blocks of a type cannot be made; the message says why and what to do."""


class Blocks:
    """Blocks of every type that the ggml in `library` (libggml-base) makes."""

    def __init__(self, library: Path, seed: int = 0):
        self._seed, self._library, self._base = seed, library, _ggml(library)
        raw = np.random.Philox(seed).random_raw(WEIGHTS // 4).view(np.int16)
        self._weights = raw.astype(np.float32) * np.float32(twin.WEIGHT_RANGE / 32768)
        self._pools: dict[tuple[str, int], memoryview] = {}

    def pool(self, kind: str, factor: int = 1) -> memoryview:
        """Random blocks of a type, some 32 MiB of them. Raises FillError for a type that cannot be made."""
        if (kind, factor) not in self._pools:
            rows = self._make(kind, self._weights * np.float32(factor)).reshape(WEIGHTS // ROW, -1)
            # in orders of all of them, so that equal ones are far apart: equal rows of the output are equal logits
            orders = np.random.Philox(self._seed + 1).random_raw((POOL_BYTES // rows.size, len(rows)))
            self._pools[kind, factor] = rows[np.argsort(orders, axis=1, kind="stable").ravel()].data.cast("B")
        return self._pools[kind, factor]

    def constant(self, kind: str, value: float) -> bytes:
        """Blocks of a row of ROW equal weights."""
        return self._make(kind, np.full(ROW, value, np.float32)).tobytes()

    def _make(self, kind: str, weights: np.ndarray) -> np.ndarray:
        """Bytes of `weights`, which are a multiple of ROW, in a type."""
        if kind == "F64":
            return weights.astype(np.float64).view(np.uint8)
        if kind in WHOLE:
            return np.zeros(weights.size * GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1], np.uint8)
        number, (block, size) = int(GGMLQuantizationType[kind]), GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        named = self._base.ggml_type_name(number).decode()
        known = (named.upper(), self._base.ggml_blck_size(number), self._base.ggml_type_size(number))
        if kind in INTERNAL:
            raise FillError(f"a type {kind} tensor cannot be made: files hold none; take another quant of the model")
        if known != (kind, block, size):
            raise FillError(f"this build of llama.cpp does not know type {kind}; use a newer one, or another quant")
        made, even = np.empty(weights.size // block * size, np.uint8), np.ones(ROW, np.float32)
        source, target, importance = (a.ctypes.data for a in (weights, made, even))
        self._base.ggml_quantize_chunk(number, source, target, 0, weights.size // ROW, ROW, importance)
        if not self._base.ggml_validate_row_data(number, target, made.size):
            raise FillError(
                f"this build of llama.cpp makes blocks of type {kind} that are not valid; use another build"
            )
        return made

    def pieces(self, t: Slot, outline: Outline) -> Iterator[bytes | memoryview]:
        """Yield buffers that add up to the tensor's data."""
        one = ONES.search(t.name) is not None
        if t.type in WHOLE or one or not t.name.endswith(".weight"):
            yield from _repeated(self.constant(t.type, float(one)), t.nbytes)
            return
        pool, label = self.pool(t.type, LOUD if t.name == EMBEDDING else 1), f"{self._seed}:{t.name}"
        step, row = GGML_QUANT_SIZES[GGMLQuantizationType[t.type]][1], t.nbytes // prod(t.shape[1:])
        silent = np.array(outline.silent(t.shape[1]) if t.name == "output.weight" else [False])
        if not silent.any():
            yield from twin.cuts(pool, t.nbytes, step, label)
            return
        zeros, at = np.frombuffer(b"".join(_repeated(self.constant(t.type, 0), row)), np.uint8), 0
        for piece in twin.cuts(pool, t.nbytes, step, label, max(1, twin.PIECE_BYTES // row) * row):
            rows = np.frombuffer(piece, np.uint8).reshape(-1, row).copy()
            rows[silent[at : at + len(rows)]] = zeros
            at += len(rows)
            yield rows.data.cast("B")


def _repeated(block: bytes, nbytes: int) -> Iterator[memoryview]:
    """Yield buffers of `block` again and again, of `nbytes` together."""
    many = memoryview(block * (twin.PIECE_BYTES // len(block)))
    while nbytes:
        yield many[:nbytes]
        nbytes -= min(nbytes, len(many))


@cache
def _ggml(library: Path) -> ctypes.CDLL:
    """ggml's base library. Raises FillError where it cannot be used."""
    try:
        base = ctypes.CDLL(str(library))
        base.ggml_type_name.restype = ctypes.c_char_p
        base.ggml_blck_size.restype, base.ggml_type_size.restype = ctypes.c_int64, ctypes.c_size_t
        base.ggml_quantize_chunk.restype = ctypes.c_size_t
        base.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            *[ctypes.c_void_p] * 2,
            *[ctypes.c_int64] * 3,
            ctypes.c_void_p,
        ]
        base.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        base.ggml_validate_row_data.restype = ctypes.c_bool
    except (OSError, AttributeError) as err:
        raise FillError(f"{library} is no ggml to make blocks with ({err}); use another build of llama.cpp") from None
    return base


def write(path: Path, outline: Outline, library: Path, seed: int = 0) -> str:
    """Write the twin of `outline` to `path`, atomically, with blocks made by the ggml in `library`; return its SHA-256.

    Raises FillError for a type that cannot be made, before anything is written, and files.FileError if the disk is too
    small.
    """
    named = outline.as_twin()
    blocks = Blocks(library, seed)
    for kind in {t.type for t in named.tensors}:
        blocks.constant(kind, 0)

    def pieces() -> Iterator[bytes | memoryview]:
        yield named.to_bytes()
        for t in named.tensors:
            yield from blocks.pieces(t, named)
            yield bytes(-t.nbytes % named.alignment)

    return twin.stream(path, pieces(), named.file_bytes)
