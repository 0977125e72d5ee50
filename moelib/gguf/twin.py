"""Geometry twins: GGUF files with a real model's architecture and tensor shapes, and random weights.

Memory, load time and decode speed depend on shapes and types, so a twin can replace the real model when measuring them.
Its text, quality and expert routing are meaningless. Tensors are cut from one pool of random values: memory stays below
300 MiB at any size, and the disk limits the speed. The same geometry and seed give the same bytes.
"""

import errno
import hashlib
import mmap
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from gguf import GGUFWriter, LlamaFileType, TokenType

from moelib.base import files
from moelib.base.bar import tqdm
from moelib.catalogue.params import Geometry
from moelib.gguf.gguf_header import TWIN_NAME

POOL_BYTES = 1 << 26
PIECE_BYTES = 1 << 23
WEIGHT_RANGE = 0.035  # uniform in +-range: standard deviation 0.02, as in newly initialised models
ALIGNMENT = 32
UNSPOKEN = 3 + 256  # special and byte tokens, first in the vocabulary
DESCRIPTION = "random weights in the shape of"
MEANINGLESS = "; text and quality are meaningless"
RING = 4  # buffers of PIECE_BYTES that are being filled, hashed and written
PAGE = 4096  # what is written past the page cache is a multiple of it
PROMPT_WORDS = ("▁Explain", "▁quantum", "▁computing", "▁in", "▁simple", "▁terms", ".")


@dataclass(frozen=True)
class TensorPlan:
    name: str
    shape: tuple[int, ...]
    """ggml order, fastest dimension first."""

    @property
    def dtype(self) -> type[np.floating]:
        # llama.cpp's converter keeps vectors and the router in F32
        small = len(self.shape) == 1 or self.name.endswith("ffn_gate_inp.weight")
        return np.float32 if small else np.float16

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype().itemsize


def tensors(g: Geometry) -> list[TensorPlan]:
    """Tensors of a model of geometry `g`, with the names and shapes that llama.cpp expects of its architecture."""
    n, ff, fx, experts = g.embedding_length, g.feed_forward_length, g.expert_feed_forward_length, g.expert_count
    kv = n // g.head_count * g.head_count_kv
    shared = fx * g.expert_shared_count
    attention: dict[str, tuple[int, ...]]
    attention = {"attn_norm": (n,), "attn_q": (n, n), "attn_k": (n, kv), "attn_v": (n, kv), "attn_output": (n, n)}
    attention["ffn_norm"] = (n,)
    dense: dict[str, tuple[int, ...]] = {"ffn_gate": (n, ff), "ffn_down": (ff, n), "ffn_up": (n, ff)}
    sparse: dict[str, tuple[int, ...]] = {"ffn_gate_inp": (n, experts)}
    sparse |= {"ffn_gate_exps": (n, fx, experts), "ffn_down_exps": (fx, n, experts), "ffn_up_exps": (n, fx, experts)}
    if shared:
        sparse |= {"ffn_gate_shexp": (n, shared), "ffn_down_shexp": (shared, n), "ffn_up_shexp": (n, shared)}
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (n, g.vocab_size)}
    for i in range(g.block_count):
        block = attention | (dense if i < g.leading_dense_block_count else sparse)
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"output_norm": (n,), "output": (n, g.vocab_size)}
    out = []
    for name, shape in shapes.items():
        out.append(TensorPlan(f"{name}.weight", shape))
        # biases of LayerNorm, attention and output
        if g.architecture == "phimoe" and re.search(r"attn_|norm$|^output$", name):
            out.append(TensorPlan(f"{name}.bias", shape[-1:]))
    return out


def nbytes(g: Geometry) -> int:
    """Bytes of the twin's tensor data."""
    return sum(t.nbytes for t in tensors(g))


def vocabulary(size: int) -> tuple[list[bytes], list[float], list[int]]:
    """Tokens, scores and types of a SentencePiece vocabulary of `size` that encodes the plan's prompt in 8 tokens.

    Every prefix of a prompt word is a token, so that merging pairs from the left ends with the whole word.
    """
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256))]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    prefixes = sorted({w[:k] for w in PROMPT_WORDS for k in range(1, len(w) + 1)}, key=lambda p: (len(p), p))
    tokens += [p.encode() for p in prefixes]
    tokens += [f"▁t{i:05d}".encode() for i in range(size - len(tokens))]
    types += [TokenType.NORMAL] * (len(tokens) - len(types))
    return tokens, [float(-i) for i in range(len(tokens))], [int(t) for t in types]


def describe(title: str) -> str:
    """general.description of a twin of the model `title`."""
    return f"{DESCRIPTION} {title}{MEANINGLESS}"


def _writer(path: Path, g: Geometry, title: str) -> GGUFWriter:
    def of(names: str) -> dict[str, Any]:
        return {k: getattr(g, k) for k in names.split()}

    tokens, scores, types = vocabulary(g.vocab_size)
    facts: dict[str, Any] = {
        "name": TWIN_NAME,  # without the model's name: for a name with "phi-3", llama.cpp uses another tokenizer
        "description": describe(title),
        "file_type": LlamaFileType.MOSTLY_F16,
        "quantization_version": 2,
        **of("block_count context_length embedding_length feed_forward_length head_count head_count_kv"),
        "layer_norm_rms_eps": 1e-5,
        "rope_dimension_count": g.embedding_length // g.head_count,
        "rope_freq_base": 10000.0,
        **of("expert_count expert_used_count vocab_size"),
    }
    if g.original_context_length:
        facts["rope_scaling_orig_ctx_len"] = g.original_context_length
    if g.architecture == "deepseek":
        facts |= of("leading_dense_block_count expert_feed_forward_length expert_shared_count")
        facts["expert_weights_scale"] = 1.0
    facts |= {"tokenizer_model": "llama", "token_list": tokens, "token_scores": scores, "token_types": types}
    facts |= {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, "add_bos_token": True}
    w = GGUFWriter(path, g.architecture)
    for name, value in facts.items():
        getattr(w, f"add_{name}")(value)
    for t in tensors(g):
        w.add_tensor_info(t.name, t.shape[::-1], np.dtype(t.dtype), t.nbytes)
    return w


class _Pool:
    """Random values that tensors are cut from. The bit generator's raw stream is stable across numpy releases."""

    def __init__(self, seed: int):
        raw = np.random.Philox(seed).random_raw(POOL_BYTES // 8).view(np.uint16)
        every = np.arange(1 << 16, dtype=np.uint16).view(np.int16).astype(np.float32)
        self._f16 = (every * np.float32(WEIGHT_RANGE / 32768)).astype(np.float16)[raw]  # a look-up, not 32 M roundings
        self._f32 = self._f16[: 1 << 20].astype(np.float32)
        self._seed = seed

    def pieces(self, t: TensorPlan) -> Iterator[memoryview]:
        """Yield buffers that add up to the tensor's data."""
        if t.name.endswith("norm.weight"):
            yield np.ones(t.shape, np.float32).data.cast("B")
            return
        left = t.nbytes
        if t.name == "output.weight":  # zero logits: greedy sampling never picks a partial character
            zeros = UNSPOKEN * t.shape[0] * 2
            yield memoryview(bytes(zeros))
            left -= zeros
        pool = (self._f32 if t.dtype is np.float32 else self._f16).data.cast("B")
        yield from cuts(pool, left, ALIGNMENT, f"{self._seed}:{t.name}")


def cuts(pool: memoryview, nbytes: int, step: int, label: str, most: int = PIECE_BYTES) -> Iterator[memoryview]:
    """Yield views of `pool` that add up to `nbytes`, of at most `most` bytes each.

    They begin at multiples of `step`, wherever the hash of `label` says.
    """
    most, k = min(most, len(pool) // 2) // step * step, 0
    while nbytes:
        n = min(nbytes, most)
        key = hashlib.sha256(f"{label}:{k}".encode()).digest()
        at = int.from_bytes(key[:8], "little") % ((len(pool) - n) // step + 1) * step
        yield pool[at : at + n]
        nbytes, k = nbytes - n, k + 1


def head(g: Geometry, title: str) -> bytes:
    """The header of the twin of geometry `g`, filled up to where the first tensor begins."""
    with TemporaryDirectory(prefix="moelib-twin-") as scratch:
        writer = _writer(path := Path(scratch) / "header", g, title)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        raw = path.read_bytes()
    return raw + bytes(-len(raw) % ALIGNMENT)


def stream(path: Path, pieces: Iterable[bytes | memoryview], nbytes: int) -> str:
    """Write `pieces`, of about `nbytes` bytes together, to `path`, atomically; return the file's SHA-256.

    Past the page cache where the disk allows it: that takes a tenth of the CPU time, which the hash needs, and leaves
    other files cached; the new one is read from the disk when it is first used. Raises files.FileError if the disk is
    too small.
    """
    files.need_space(path.parent, nbytes, f"the twin {path.name}")
    sha, at = hashlib.sha256(), 0
    ring = [
        memoryview(mmap.mmap(-1, PIECE_BYTES)) for _ in range(RING)
    ]  # aligned to pages, as writes past the cache are
    busy: deque[list[Future[None]]] = deque()
    bar = tqdm(total=nbytes, unit="B", unit_scale=True, desc=path.name, disable=None, leave=False)
    # hashing and writing release the interpreter lock, so they run in parallel
    with (
        files.replacing(path) as partial,
        _opened(partial) as fd,
        ThreadPoolExecutor(1) as hasher,
        ThreadPoolExecutor(2) as writer,
        bar,
    ):
        for turn, used in enumerate(_gathered(pieces, ring, busy)):
            buffer = ring[turn % RING]
            padded = -(-used // PAGE) * PAGE
            busy.append([writer.submit(_put, fd, buffer[:padded], at), hasher.submit(sha.update, buffer[:used])])
            at += used
            bar.update(used)
        for future in (f for futures in busy for f in futures):
            future.result()
        os.ftruncate(fd, at)
        os.fsync(fd)
    return sha.hexdigest()


def _gathered(
    pieces: Iterable[bytes | memoryview], ring: list[memoryview], busy: deque[list[Future[None]]]
) -> Iterator[int]:
    """Fill the buffers of `ring` with `pieces` in turn; yield how much of each is used, when it is full.

    `busy` are the tasks that still need a buffer, oldest first; the oldest are waited for when all buffers are in use.
    """
    turn, used = 0, 0
    for piece in pieces:
        left = memoryview(piece)
        while left:
            if not used and len(busy) == len(ring):
                for future in busy.popleft():
                    future.result()
            n = min(len(left), PIECE_BYTES - used)
            ring[turn % len(ring)][used : used + n] = left[:n]
            left, used = left[n:], used + n
            if used == PIECE_BYTES:
                yield used
                turn, used = turn + 1, 0
    if used:
        yield used


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A new file to write to, past the page cache where the system and the disk allow it."""
    direct = getattr(os, "O_DIRECT", 0)
    for flag in (direct, 0):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flag, 0o666)
            try:
                _put(fd, memoryview(mmap.mmap(-1, PAGE)), 0)
            except OSError:
                os.close(fd)
                raise
            break
        except OSError as err:
            if err.errno != errno.EINVAL or not flag:
                raise
    try:
        yield fd
    finally:
        os.close(fd)


def _put(fd: int, data: memoryview, at: int) -> None:
    if os.pwrite(fd, data, at) != len(data):  # a disk that becomes full takes a part
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write(path: Path, g: Geometry, *, title: str = "a model", seed: int = 0) -> str:
    """Write the twin of geometry `g` to `path`, atomically, and return its SHA-256.

    Raises files.FileError if the disk is too small.
    """
    pool = _Pool(seed)

    def pieces() -> Iterator[bytes | memoryview]:
        yield head(g, title)
        for t in tensors(g):
            yield from pool.pieces(t)
            yield bytes(-t.nbytes % ALIGNMENT)

    return stream(path, pieces(), nbytes(g))
