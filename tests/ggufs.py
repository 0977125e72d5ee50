"""Small GGUFs for tests, built byte by byte: any metadata and any tensors, right or wrong."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from moelib.gguf import gguf_file, outline, twin

U32, I32, F32, BOOL, STRING, ARRAY, I64 = 4, 5, 6, 7, 8, 9, 11


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: object) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, np.int32):
        return I32, struct.pack("<i", value)
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


def loadable(arch: str, layers: int = 4, experts: int = 8, vocab: int = 512):
    """(metadata, tensors) of a small model that llama.cpp loads, with the biases, norms and lists by layer that its
    converter writes; arch: qwen3 (dense), qwen3moe, qwen2moe, olmoe, gpt-oss or lfm2moe."""
    e, heads, head, ff = 256, 4, 64, 256
    kv = heads if arch == "olmoe" else 2
    conv = [arch == "lfm2moe" and i % 2 == 0 for i in range(layers)]
    counts = {"block_count": layers, "context_length": 4096, "embedding_length": e, "feed_forward_length": ff}
    counts |= {"attention.head_count": heads, "attention.head_count_kv": kv, "vocab_size": vocab}
    counts |= {"attention.key_length": head, "attention.value_length": head, "rope.dimension_count": head}
    counts |= {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4}
    if experts and arch != "qwen3":
        counts |= {"expert_count": experts, "expert_used_count": 2, "expert_feed_forward_length": ff}
    if arch == "gpt-oss":
        counts |= {"attention.sliding_window": 128, "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0}
        counts |= {"rope.scaling.original_context_length": 4096}
    if arch == "lfm2moe":
        counts |= {"attention.head_count_kv": [0 if c else kv for c in conv], "shortconv.l_cache": 3}
        counts |= {"leading_dense_block_count": 1, "expert_gating_func": 2}
    tokens, scores, types = twin.vocabulary(vocab)
    metadata = {"general.architecture": arch, "general.name": "Phi-3 original", "general.author": "someone"}
    metadata |= {f"{arch}.{k}": v for k, v in counts.items()}
    metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores}
    metadata |= {
        "tokenizer.ggml.token_type": [np.int32(t) for t in types],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    metadata |= {"tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": True}
    tensors = {"token_embd.weight": (e, vocab)}
    if arch == "lfm2moe":
        tensors["token_embd_norm.weight"] = (e,)
    else:
        tensors |= {"output.weight": (e, vocab), "output_norm.weight": (e,)}
    for i in range(layers):
        b = {"attn_norm.weight": (e,)}
        if conv[i]:
            b |= {"shortconv.conv.weight": (3, e), "shortconv.in_proj.weight": (e, 3 * e)}
            b |= {"shortconv.out_proj.weight": (e, e)}
        else:
            b |= {"attn_q.weight": (e, heads * head), "attn_output.weight": (heads * head, e)}
            b |= {"attn_k.weight": (e, kv * head), "attn_v.weight": (e, kv * head)}
            if arch == "gpt-oss":
                b |= {"attn_q.bias": (heads * head,), "attn_k.bias": (kv * head,), "attn_v.bias": (kv * head,)}
                b |= {"attn_output.bias": (e,), "attn_sinks.weight": (heads,)}
            elif arch == "qwen2moe":
                b |= {"attn_q.bias": (heads * head,), "attn_k.bias": (kv * head,), "attn_v.bias": (kv * head,)}
            else:
                widths = (heads * head, kv * head) if arch == "olmoe" else (head, head)
                b |= {"attn_q_norm.weight": widths[:1], "attn_k_norm.weight": widths[1:]}
        b["post_attention_norm.weight" if arch == "gpt-oss" else "ffn_norm.weight"] = (e,)
        if arch == "qwen3" or (arch == "lfm2moe" and i == 0):
            b |= {"ffn_gate.weight": (e, ff), "ffn_down.weight": (ff, e), "ffn_up.weight": (e, ff)}
        else:
            b |= {"ffn_gate_inp.weight": (e, experts), "ffn_gate_exps.weight": (e, ff, experts)}
            b |= {"ffn_down_exps.weight": (ff, e, experts), "ffn_up_exps.weight": (e, ff, experts)}
            if arch == "gpt-oss":
                b |= {"ffn_gate_inp.bias": (experts,), "ffn_gate_exps.bias": (ff, experts)}
                b |= {"ffn_up_exps.bias": (ff, experts), "ffn_down_exps.bias": (e, experts)}
            if arch == "qwen2moe":  # a gate of one row, which may not be zero
                b |= {f"ffn_{k}_shexp.weight": (e, e) for k in ("gate", "up", "down")}
                b["ffn_gate_inp_shexp.weight"] = (e,)
            if arch == "lfm2moe":
                b["exp_probs_b.bias"] = (experts,)
        tensors |= {f"blk.{i}.{k}": shape for k, shape in b.items()}
    return metadata, tensors


def typed(arch, experts, rest, layers=4):
    """An outline of a loadable model, its matrices of two types."""
    metadata, tensors = loadable(arch, layers)
    raw = build(metadata, tensors)
    whole = outline.from_bytes([(raw, len(raw))], f"{arch}.gguf")
    small = re.compile(r"gate_inp|shortconv\.conv|\.bias$")
    types = {
        t.name: "F32" if len(t.shape) == 1 or small.search(t.name) else experts if "_exps" in t.name else rest
        for t in whole.tensors
    }
    return whole.with_types(types)


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
