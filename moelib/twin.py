"""Geometry twins: GGUF files with a real model's architecture and tensor shapes, and random weights.

Memory, load and decode depend on shapes and types, so a twin stands in for the real model there. Text, quality and
expert routing are meaningless. Writing streams from one random pool: memory stays below 200 MiB at any size, and the
disk bounds the speed. The same geometry and seed give the same bytes.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from tqdm import tqdm

from moelib import files
from moelib.params import Geometry

POOL_BYTES = 1 << 26
PIECE_BYTES = 1 << 23
WEIGHT_RANGE = 0.035  # uniform in +-range: standard deviation 0.02, what models are initialised with
ALIGNMENT = 32
UNSPOKEN = 3 + 256  # special and byte tokens, first in the vocabulary
PROMPT_WORDS = ("▁Explain", "▁quantum", "▁computing", "▁in", "▁simple", "▁terms", ".")


@dataclass(frozen=True)
class TensorPlan:
    name: str
    shape: tuple[int, ...]
    """ggml order, fastest dimension first."""

    @property
    def type(self) -> GGMLQuantizationType:
        # llama.cpp's converter keeps vectors and the router in F32
        small = len(self.shape) == 1 or self.name.endswith("ffn_gate_inp.weight")
        return GGMLQuantizationType.F32 if small else GGMLQuantizationType.F16

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * (4 if self.type is GGMLQuantizationType.F32 else 2)


def tensors(g: Geometry) -> list[TensorPlan]:
    """Tensors of a model of geometry `g`, as llama.cpp's loader names and shapes them for its architecture."""
    biased = g.architecture == "phimoe"  # LayerNorm and attention biases, and one on the output
    out: list[TensorPlan] = []

    def add(name: str, *shape: int, bias: bool = False) -> None:
        out.append(TensorPlan(f"{name}.weight", shape))
        if bias and biased:
            out.append(TensorPlan(f"{name}.bias", shape[-1:]))

    n, ff, fx = g.embedding_length, g.feed_forward_length, g.expert_feed_forward_length
    kv = n // g.head_count * g.head_count_kv
    add("token_embd", n, g.vocab_size)
    for i in range(g.block_count):
        b = f"blk.{i}"
        add(f"{b}.attn_norm", n, bias=True)
        add(f"{b}.attn_q", n, n, bias=True)
        add(f"{b}.attn_k", n, kv, bias=True)
        add(f"{b}.attn_v", n, kv, bias=True)
        add(f"{b}.attn_output", n, n, bias=True)
        add(f"{b}.ffn_norm", n, bias=True)
        if i < g.leading_dense_block_count:
            add(f"{b}.ffn_gate", n, ff)
            add(f"{b}.ffn_down", ff, n)
            add(f"{b}.ffn_up", n, ff)
            continue
        add(f"{b}.ffn_gate_inp", n, g.expert_count)
        add(f"{b}.ffn_gate_exps", n, fx, g.expert_count)
        add(f"{b}.ffn_down_exps", fx, n, g.expert_count)
        add(f"{b}.ffn_up_exps", n, fx, g.expert_count)
        if g.expert_shared_count:
            add(f"{b}.ffn_gate_shexp", n, fx * g.expert_shared_count)
            add(f"{b}.ffn_down_shexp", fx * g.expert_shared_count, n)
            add(f"{b}.ffn_up_shexp", n, fx * g.expert_shared_count)
    add("output_norm", n, bias=True)
    add("output", n, g.vocab_size, bias=True)
    return out


def nbytes(g: Geometry) -> int:
    """Bytes of the twin's tensor data."""
    return sum(t.nbytes for t in tensors(g))


def vocabulary(size: int) -> tuple[list[bytes], list[float], list[int]]:
    """Tokens, scores and types of a SentencePiece vocabulary of `size` that spells the plan's prompt in 8 tokens.

    Every prefix of a prompt word is a token, so that pair merging reaches the whole word from the left.
    """
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256))]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    prefixes = sorted({w[:k] for w in PROMPT_WORDS for k in range(1, len(w) + 1)}, key=lambda p: (len(p), p))
    pieces = [p.encode() for p in prefixes]
    pieces += [f"▁t{i:05d}".encode() for i in range(size - len(tokens) - len(pieces))]
    tokens += pieces
    types += [TokenType.NORMAL] * len(pieces)
    return tokens, [float(-i) for i in range(len(tokens))], [int(t) for t in types]


def _writer(path: Path, g: Geometry, title: str) -> GGUFWriter:
    w = GGUFWriter(path, g.architecture)
    # llama.cpp takes a name with "phi-3" for another tokenizer, so the twin's name has no model name in it
    w.add_name("geometry twin")
    w.add_description(f"random weights in the shape of {title}; text and quality are meaningless")
    w.add_file_type(LlamaFileType.MOSTLY_F16)
    w.add_quantization_version(2)
    w.add_block_count(g.block_count)
    w.add_context_length(g.context_length)
    w.add_embedding_length(g.embedding_length)
    w.add_feed_forward_length(g.feed_forward_length)
    w.add_head_count(g.head_count)
    w.add_head_count_kv(g.head_count_kv)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(g.embedding_length // g.head_count)
    w.add_rope_freq_base(10000.0)
    w.add_expert_count(g.expert_count)
    w.add_expert_used_count(g.expert_used_count)
    w.add_vocab_size(g.vocab_size)
    if g.original_context_length:
        w.add_rope_scaling_orig_ctx_len(g.original_context_length)
    if g.architecture == "deepseek":
        w.add_leading_dense_block_count(g.leading_dense_block_count)
        w.add_expert_feed_forward_length(g.expert_feed_forward_length)
        w.add_expert_shared_count(g.expert_shared_count)
        w.add_expert_weights_scale(1.0)
    tokens, scores, types = vocabulary(g.vocab_size)
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores(scores)
    w.add_token_types(types)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_add_bos_token(True)
    for t in tensors(g):
        dtype = np.dtype(np.float32 if t.type is GGMLQuantizationType.F32 else np.float16)
        w.add_tensor_info(t.name, t.shape[::-1], dtype, t.nbytes)
    return w


class _Pool:
    """Random values to cut tensors from. The bit generator's raw stream is stable across numpy releases."""

    def __init__(self, seed: int):
        raw = np.random.Philox(seed).random_raw(POOL_BYTES // 8).view(np.int16)
        self._f16 = (raw.astype(np.float32) * np.float32(WEIGHT_RANGE / 32768)).astype(np.float16)
        self._f32 = self._f16[: 1 << 20].astype(np.float32)
        self._seed = seed

    def pieces(self, t: TensorPlan):
        """Yield buffers that add up to the tensor's data."""
        if t.name.endswith("norm.weight"):
            yield memoryview(np.ones(t.shape, np.float32)).cast("B")
            return
        left, k = t.nbytes, 0
        if t.name == "output.weight":  # zero logits: the greedy choice is never half a character, which is not streamed
            zeros = UNSPOKEN * t.shape[0] * 2
            yield memoryview(bytes(zeros))
            left -= zeros
        values = self._f32 if t.type is GGMLQuantizationType.F32 else self._f16
        pool = memoryview(values).cast("B")
        while left:
            n = min(left, PIECE_BYTES, len(pool) // 2)
            key = hashlib.sha256(f"{self._seed}:{t.name}:{k}".encode()).digest()
            at = int.from_bytes(key[:8], "little") % ((len(pool) - n) // ALIGNMENT + 1) * ALIGNMENT
            yield pool[at : at + n]
            left, k = left - n, k + 1


def write(path: Path, g: Geometry, *, title: str = "a model", seed: int = 0) -> str:
    """Write the twin of geometry `g` to `path`, atomically, and return its SHA-256.

    Raises files.FileError if the disk is too small.
    """
    plan = tensors(g)
    files.need_space(path.parent, nbytes(g), f"the twin {path.name}")
    pool, sha = _Pool(seed), hashlib.sha256()
    with files.replacing(path) as partial:
        writer = _writer(partial, g, title)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        sha.update(partial.read_bytes())
        bar = tqdm(total=nbytes(g), unit="B", unit_scale=True, desc=path.name, disable=None, leave=False)
        # hashing releases the interpreter lock, so it runs beside the write instead of after it
        with partial.open("ab", buffering=0) as f, ThreadPoolExecutor(1) as hasher, bar:
            pending: list[Future] = []

            def put(piece) -> None:
                f.write(piece)
                pending.append(hasher.submit(sha.update, piece))
                if len(pending) > 16:
                    pending.pop(0).result()
                bar.update(len(piece))

            pad = -f.seek(0, 2) % ALIGNMENT
            put(bytes(pad))
            for t in plan:
                for piece in pool.pieces(t):
                    put(piece)
                if t.nbytes % ALIGNMENT:
                    put(bytes(-t.nbytes % ALIGNMENT))
            for p in pending:
                p.result()
    return sha.hexdigest()
