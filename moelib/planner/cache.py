"""Bytes of the attention cache, from a file's metadata: what each layer keeps of each token, and for how many tokens.

Follows llama.cpp's `llama_kv_cache`, `llama_kv_cache_iswa` and `llama_memory_recurrent` (b11434), one sequence.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from moelib.catalogue.placement import KV, UBATCH
from moelib.gguf.gguf_header import Header
from moelib.gguf.gguf_reader import GGUFError

PAD = 256  # tokens that a cache, and the part of it that is looked at, are multiples of
STATE_BYTES = 4  # recurrent states are F32
WINDOWS = {  # architecture -> (every how many-th layer sees all tokens, whether the first of them, its window or None)
    "gpt-oss": (2, False, None),
    "llama4": (4, False, 8192),
    "afmoe": (4, False, None),
    "exaone-moe": (4, False, None),
    "mellum": (4, False, None),
    "cohere2moe": (4, True, None),
    "laguna": (4, True, None),
    "smallthinker": (4, True, 4096),
}
"""Sliding windows that the engine's source knows and a file need not state; a pattern in the file goes first."""
STATED_WINDOWS = {"gemma4", "granite-swa", "maple", "mimo2", "step35", "spark2_5"}
"""Architectures whose files state for each layer whether it has a window."""
OTHER_CACHES = {
    "deepseek32",
    "deepseek4",
    "dots3-note",
    "glm-dsa",
    "glm5-next",
    "kimi-linear",
    "kimi-k3",
    "minimax-01",
    "minimax-m3",
    "qwen4exp",
    "rwkv6",
    "rwkv7",
}
"""Architectures with caches of their own kind, which are not computed here."""


class UnknownCache(GGUFError):
    """The size of the model's cache cannot be told from its header; the message says why."""


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps."""

    key: int = 0
    """Elements a token."""
    value: int = 0
    window: int | None = None
    """Only the last so many tokens are kept; None: all of the context."""
    state_bytes: int = 0
    """Of a recurrent layer: a state of one size at any length."""


def row_bytes(elements: int, kv: str) -> int:
    """Bytes of `elements` in the cache's type, such as f16 or q8_0. Raises UnknownCache where they do not divide."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kv.upper()]]
    if elements % block:
        raise UnknownCache(f"a row of {elements} of the cache does not divide into {kv} blocks of {block}: take f16")
    return elements // block * size


def padded(tokens: int) -> int:
    return -(-tokens // PAD) * PAD


def layers(header: Header) -> list[LayerCache]:
    """What each layer of the model keeps. Raises UnknownCache."""
    arch = header.architecture
    if arch in OTHER_CACHES:
        raise UnknownCache(f"{arch} has a cache of its own kind, whose size is not computed from the header")
    windows = _windows(header)
    kept = []
    for i in range(header.layers or 0):
        names = header.of_layer(i)
        if not any(n.startswith(("attn_k", "attn_qkv", "attn_q")) for n in names) or _recurrent(header, i):
            kept.append(LayerCache(state_bytes=_state(header, names)))
            continue
        heads, window = header.number("attention.head_count_kv", i), windows[i]
        heads = header.number("attention.head_count", i) if heads is None else heads
        suffix = "_swa" if window and header.number("attention.key_length_swa") else ""
        width = _width(header)
        key = header.number(f"attention.key_length{suffix}") or width
        value = header.number(f"attention.value_length{suffix}") or width
        if heads is None or key is None or value is None:
            raise UnknownCache(f"{arch}: the header does not say how wide attention is in layer {i}")
        mla = header.number("attention.key_length_mla") and header.number("attention.value_length_mla")
        kept.append(LayerCache(key * heads, 0 if mla else value * heads, window))
    return kept


def nbytes(header: Header, context: int, kv: str = KV, ubatch: int = UBATCH) -> int:
    """Bytes of the cache for `context` tokens of one sequence, keys and values in type `kv`; a window's cache has room
    for a batch of `ubatch` tokens more. Raises UnknownCache."""
    total, tokens = 0, padded(context)
    for layer in layers(header):
        count = tokens if layer.window is None else min(tokens, padded(min(tokens, layer.window + ubatch)))
        total += layer.state_bytes + count * (row_bytes(layer.key, kv) + row_bytes(layer.value, kv))
    return total


def _width(header: Header) -> int | None:
    embedding, heads = header.number("embedding_length"), header.number("attention.head_count", 0)
    return embedding // heads if embedding and heads else None


def _windows(header: Header) -> list[int | None]:
    """For each layer its window, in tokens, or None."""
    arch, count, window = header.architecture, header.layers or 0, header.number("attention.sliding_window")
    pattern = header.metadata.get(f"{arch}.attention.sliding_window_pattern")
    if arch not in WINDOWS and arch not in STATED_WINDOWS:
        return [None] * count
    every, first, fixed = WINDOWS.get(arch, (0, False, None))
    if arch == "llama4" and window is None:
        window = fixed
    if not window:
        return [None] * count
    window = fixed or window
    if isinstance(pattern, list):
        return [window if i < len(pattern) and pattern[i] else None for i in range(count)]
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        every = pattern
    if not every:
        raise UnknownCache(f"{arch}: the header does not say which layers have a window")
    full = 0 if first else every - 1
    return [None if i % every == full else window for i in range(count)]


def _recurrent(header: Header, layer: int) -> bool:
    if header.number("attention.head_count_kv", layer) == 0:
        return True
    names = header.of_layer(layer)
    return any(n.startswith(("ssm_", "shortconv")) for n in names) and not any(n.startswith("attn_k") for n in names)


def _state(header: Header, names: Collection[str]) -> int:
    """Bytes of a recurrent layer's state. Raises UnknownCache."""
    if any(n.startswith("shortconv") for n in names):
        cells = header.number("shortconv.l_cache")
        if cells is not None:
            return (header.number("embedding_length") or 0) * (cells - 1) * STATE_BYTES
    if any(n.startswith("ssm_") for n in names):
        numbers = [header.number(f"ssm.{k}") for k in ("conv_kernel", "inner_size", "group_count", "state_size")]
        kernel, inner, groups, state = (n or 0 for n in numbers)
        if kernel and inner and state:
            return ((kernel - 1) * (inner + 2 * groups * state) + state * inner) * STATE_BYTES
    if not any(n.startswith(("ssm_", "shortconv", "time_mix", "attn_")) for n in names):
        return 0  # a layer of a feed-forward network alone
    raise UnknownCache(f"{header.architecture}: the state of its recurrent layers is not told by the header")
