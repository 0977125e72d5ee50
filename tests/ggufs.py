"""Small GGUFs for tests, built byte by byte: any metadata and any tensors, right or wrong."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from moelib.gguf import gguf_file, twin

U32, F32, BOOL, STRING, ARRAY, I64 = 4, 6, 7, 8, 9, 11


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: object) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return (U32 if 0 <= value < 1 << 32 else I64), struct.pack("<I" if 0 <= value < 1 << 32 else "<q", value)
    if isinstance(value, float):
        return F32, struct.pack("<f", value)
    if isinstance(value, str | bytes):
        return STRING, text(value)
    items = [_value(v) for v in value]
    return ARRAY, struct.pack("<IQ", items[0][0] if items else U32, len(items)) + b"".join(raw for _, raw in items)


def build(
    metadata: dict[str, object],
    tensors: dict[str, tuple[int, ...]],
    kind: str | Callable[[str, tuple[int, ...]], str] = "F16",
    filling: int = 0,
) -> bytes:
    """A GGUF whose tensors are of type `kind`, or of what it says of a name and shape; every byte of them is `filling`.

    A shape's fastest dimension comes first.
    """
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        of, raw = _value(value)
        out += [text(key), struct.pack("<I", of), raw]
    at = 0
    for name, shape in tensors.items():
        its = kind if isinstance(kind, str) else kind(name, shape)
        number = gguf.GGMLQuantizationType[its]
        out += [text(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, at)]
        at += -(-gguf_file.tensor_bytes(shape, its) // 32) * 32
    head = b"".join(out)
    return head + bytes(-len(head) % 32) + bytes([filling]) * at


def moe(arch: str = "qwen3moe", layers: int = 3, dense: int = 0, nextn: int = 0, experts: int = 4, **change: object):
    """(metadata, tensors) of a small mixture-of-experts model; `change`: metadata of the architecture."""
    facts = {"block_count": layers + nextn, "expert_count": experts, "expert_used_count": 2, **change}
    facts |= {"nextn_predict_layers": nextn} if nextn else {}
    metadata = {"general.architecture": arch, **{f"{arch}.{k}": v for k, v in facts.items() if v is not None}}
    tensors = {"token_embd.weight": (32, 8), "output.weight": (32, 8), "output_norm.weight": (32,)}
    for i in range(layers + nextn):
        tensors[f"blk.{i}.attn_q.weight"] = (32, 4)
        if i >= dense:
            tensors |= {f"blk.{i}.ffn_{k}_exps.weight": (32, 8, experts) for k in ("gate", "up", "down")}
    return metadata, tensors


def write_nextn(path: Path, width: int = 256, layers: int = 3, experts: int = 8, vocab: int = 512) -> Path:
    """A whole GLM-4-MoE that llama.cpp loads: a dense layer, layers of experts, and a block that predicts a token more,
    which it does not load. Weights are random."""
    n, ff, head = width, 512, 64
    w = gguf.GGUFWriter(path, "glm4moe")
    counts = {"block_count": layers + 1, "context_length": 4096, "embedding_length": n, "feed_forward_length": ff}
    counts |= {"head_count": 4, "head_count_kv": 2, "key_length": head, "value_length": head, "vocab_size": vocab}
    counts |= {"expert_count": experts, "expert_used_count": 2, "expert_feed_forward_length": n}
    counts |= {"expert_shared_count": 1, "leading_dense_block_count": 1, "nextn_predict_layers": 1}
    counts |= {"rope_dimension_count": head, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4}
    counts |= {"expert_weights_scale": 1.0, "expert_weights_norm": True}
    tokens, scores, types = twin.vocabulary(vocab)
    counts |= {"expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID, "tokenizer_model": "llama"}
    counts |= {"token_list": tokens, "token_scores": scores, "token_types": types, "bos_token_id": 1, "eos_token_id": 2}
    for name, value in counts.items():
        getattr(w, f"add_{name}")(value)
    shapes = {"token_embd.weight": (vocab, n), "output.weight": (vocab, n), "output_norm.weight": (n,)}
    for i in range(layers + 1):
        b = {"attn_q.weight": (4 * head, n), "attn_k.weight": (2 * head, n), "attn_v.weight": (2 * head, n)}
        b |= {"attn_q.bias": (4 * head,), "attn_k.bias": (2 * head,), "attn_v.bias": (2 * head,)}
        b |= {"attn_output.weight": (n, 4 * head), "attn_norm.weight": (n,), "post_attention_norm.weight": (n,)}
        if i == 0:
            b |= {"ffn_gate.weight": (ff, n), "ffn_up.weight": (ff, n), "ffn_down.weight": (n, ff)}
        else:
            b |= {f"ffn_{k}_exps.weight": (experts, n, n) for k in ("gate", "up", "down")}
            b |= {f"ffn_{k}_shexp.weight": (n, n) for k in ("gate", "up", "down")}
            b |= {"ffn_gate_inp.weight": (experts, n), "exp_probs_b.bias": (experts,)}
        if i == layers:
            b |= {"nextn.eh_proj.weight": (n, 2 * n), "nextn.enorm.weight": (n,), "nextn.hnorm.weight": (n,)}
            b |= {"nextn.shared_head_norm.weight": (n,)}
        shapes |= {f"blk.{i}.{k}": s for k, s in b.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        small = len(shape) == 1 or "gate_inp" in name
        data = np.ones(shape) if name.endswith("norm.weight") else random.standard_normal(shape) * 0.05
        w.add_tensor(name, data.astype(np.float32 if small else np.float16))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
