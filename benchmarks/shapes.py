"""Shapes of published mixture-of-experts models, as the header of a quantised file of each: no weights, no download.

Numbers are those of the models' own configurations; names are llama.cpp's. Tokenizers are made up, of the right size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from moelib.catalogue import params
from moelib.gguf import outline, twin
from moelib.gguf.gguf_reader import tensor_bytes

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Published:
    """One model: lengths in elements, fastest dimension first."""

    title: str
    arch: str
    layers: int
    width: int
    heads: int
    heads_kv: int
    head: int
    experts: int
    used: int
    expert: int
    vocabulary: int
    context: int
    dense: int = 0
    """The first layers with one feed-forward network, of `feed_forward`."""
    feed_forward: int = 0
    shared: int = 0
    """Width of the shared experts together."""
    kind: str = "Q4_K"
    """Type of the experts' gate and up; down has `down`."""
    down: str = "Q6_K"
    rest: str = "Q4_K"
    more: dict[str, Any] = field(default_factory=dict)
    """Further metadata of the architecture."""


MODELS = {
    "qwen3-30b-a3b": Published(
        "Qwen3 30B A3B", "qwen3moe", 48, 2048, 32, 4, 128, 128, 8, 768, 151936, 40960, feed_forward=6144
    ),
    "mixtral-8x7b": Published("Mixtral 8x7B", "llama", 32, 4096, 32, 8, 128, 8, 2, 14336, 32000, 32768),
    "gpt-oss-20b": Published(
        "gpt-oss 20B", "gpt-oss", 24, 2880, 64, 8, 64, 32, 4, 2880, 201088, 131072,
        kind="MXFP4", down="MXFP4", rest="Q8_0", more={"attention.sliding_window": 128},
    ),
    "deepseek-v2-lite": Published(
        "DeepSeek-V2-Lite 16B", "deepseek2", 27, 2048, 16, 1, 576, 64, 6, 1408, 102400, 163840,
        dense=1, feed_forward=10944, shared=2816, kind="Q4_K", down="Q5_0",
        more={
            "attention.kv_lora_rank": 512, "attention.value_length": 512, "attention.key_length_mla": 192,
            "attention.value_length_mla": 128, "rope.dimension_count": 64, "expert_weights_scale": 1.0,
        },
    ),
    "glm-4.5-air": Published(
        "GLM-4.5-Air 106B", "glm4moe", 46, 4096, 96, 8, 128, 128, 8, 1408, 151552, 131072,
        dense=1, feed_forward=10944, shared=1408, down="Q5_0",
        more={"expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 1.0},
    ),
    "olmoe-1b-7b": Published("OLMoE 1B 7B", "olmoe", 16, 2048, 16, 16, 128, 64, 8, 1024, 50304, 4096),
    "ernie-4.5-21b-a3b": Published(
        "ERNIE 4.5 21B A3B", "ernie4_5-moe", 28, 2560, 20, 4, 128, 64, 6, 1536, 103424, 131072,
        dense=1, feed_forward=12288, shared=3072, more={"interleave_moe_layer_step": 1},
    ),
    "lfm2-8b-a1b": Published(
        "LFM2 8B A1B", "lfm2moe", 24, 2048, 32, 8, 64, 32, 4, 1792, 65536, 128000,
        dense=2, feed_forward=7168, more={"shortconv.l_cache": 3, "expert_gating_func": 2},
    ),
}  # fmt: skip


def attends(m: Published, layer: int) -> bool:
    """Whether a layer has attention: in LFM2 most have a short convolution instead."""
    return m.arch != "lfm2moe" or layer in (2, 6, 10, 14, 18, 21)


def tensors(m: Published) -> Shapes:
    """Name -> shape of every tensor."""
    n = m.width
    out: Shapes = {"token_embd.weight": (n, m.vocabulary)}
    if m.arch != "lfm2moe":
        out["output.weight"] = (n, m.vocabulary)
    out["token_embd_norm.weight" if m.arch == "lfm2moe" else "output_norm.weight"] = (n,)
    for i in range(m.layers):
        out |= {f"blk.{i}.{name}": shape for name, shape in (_mixer(m, i) | _feed_forward(m, i)).items()}
    return out


def _mixer(m: Published, layer: int) -> Shapes:
    n, q, kv = m.width, m.heads * m.head, m.heads_kv * m.head
    out: Shapes = {"attn_norm.weight": (n,)}
    if not attends(m, layer):
        return out | {
            "shortconv.conv.weight": (3, n),
            "shortconv.in_proj.weight": (n, 3 * n),
            "shortconv.out_proj.weight": (n, n),
        }
    if m.arch == "deepseek2":
        rank, turned, plain, value = 512, 64, 128, 128
        return out | {
            "attn_q.weight": (n, m.heads * (plain + turned)),
            "attn_kv_a_mqa.weight": (n, rank + turned),
            "attn_kv_a_norm.weight": (rank,),
            "attn_k_b.weight": (plain, rank, m.heads),
            "attn_v_b.weight": (rank, value, m.heads),
            "attn_output.weight": (m.heads * value, n),
        }
    out |= {"attn_q.weight": (n, q), "attn_k.weight": (n, kv), "attn_v.weight": (n, kv), "attn_output.weight": (q, n)}
    if m.arch in ("gpt-oss", "glm4moe"):
        out |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if m.arch == "gpt-oss":
        out |= {"attn_output.bias": (n,), "attn_sinks.weight": (m.heads,)}
    if m.arch in ("qwen3moe", "lfm2moe"):
        out |= {"attn_q_norm.weight": (m.head,), "attn_k_norm.weight": (m.head,)}
    if m.arch == "olmoe":
        out |= {"attn_q_norm.weight": (q,), "attn_k_norm.weight": (kv,)}
    return out


def _feed_forward(m: Published, layer: int) -> Shapes:
    n, ff, fx, x = m.width, m.feed_forward, m.expert, m.experts
    before = "post_attention_norm" if m.arch in ("gpt-oss", "glm4moe") else "ffn_norm"
    out: Shapes = {f"{before}.weight": (n,)}
    if layer < m.dense:
        return out | {"ffn_gate.weight": (n, ff), "ffn_up.weight": (n, ff), "ffn_down.weight": (ff, n)}
    out |= {"ffn_gate_inp.weight": (n, x), "ffn_down_exps.weight": (fx, n, x)}
    out |= {f"ffn_{part}_exps.weight": (n, fx, x) for part in ("gate", "up")}
    if m.arch == "gpt-oss":
        out |= {"ffn_gate_inp.bias": (x,), "ffn_down_exps.bias": (n, x)}
        out |= {f"ffn_{part}_exps.bias": (fx, x) for part in ("gate", "up")}
    if m.arch in ("glm4moe", "ernie4_5-moe", "lfm2moe"):
        out["exp_probs_b.bias"] = (x,)
    if m.shared:
        out |= {f"ffn_{part}_shexp.weight": (n, m.shared) for part in ("gate", "up")}
        out["ffn_down_shexp.weight"] = (m.shared, n)
    return out


def kind_of(m: Published, name: str, shape: tuple[int, ...]) -> str:
    """The type of a tensor, with the fall-back of llama-quantize where rows do not divide."""
    if len(shape) == 1 or name.endswith((".bias", "ffn_gate_inp.weight", "shortconv.conv.weight")):
        return "F32"
    kind = m.down if "down_exps" in name else m.kind if "_exps" in name else m.rest
    kind = "Q6_K" if name == "output.weight" and m.rest == "Q4_K" else kind
    if shape[0] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0:
        return kind
    return "Q8_0" if shape[0] % 32 == 0 else "F16"


def head(name: str) -> tuple[bytes, int]:
    """(the header of a file of the model, bytes of the whole file)."""
    m = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.gguf"
        w = GGUFWriter(path, m.arch)
        _metadata(w, m)
        total = 0
        for tensor, shape in tensors(m).items():
            kind = GGMLQuantizationType[kind_of(m, tensor, shape)]
            nbytes = tensor_bytes(shape, kind.name)
            rows = shape[::-1]
            if kind.name not in ("F32", "F16"):
                rows = quants.quant_shape_to_byte_shape(rows, kind)
            w.add_tensor_info(tensor, rows, np.dtype(np.float32 if kind.name == "F32" else np.uint8), nbytes, kind)
            total += -(-nbytes // 32) * 32
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_ti_data_to_file()
        w.close()
        first = path.read_bytes()
    first += bytes(-len(first) % 32)
    return first, len(first) + total


def outline_of(name: str, quant: str) -> tuple[outline.Outline, str | None]:
    """(what the file of a model says, the quant to give it): of a published one, whose file has its types, or of one of
    the catalogue, to be given the types of `quant`."""
    if name in MODELS:
        return outline.from_bytes([head(name)], f"{name}.gguf"), None
    entry = params.model(name)
    return outline.of_geometry(entry.at_scale("full"), entry.title, f"{name}-F16.gguf"), quant


def _metadata(w: GGUFWriter, m: Published) -> None:
    w.add_name(m.title)
    w.add_file_type(38 if m.kind == "MXFP4" else 15)
    w.add_quantization_version(2)
    heads_kv = [m.heads_kv if attends(m, i) else 0 for i in range(m.layers)]
    facts: dict[str, Any] = {
        "block_count": m.layers, "context_length": m.context, "embedding_length": m.width, "vocab_size": m.vocabulary,
        "feed_forward_length": m.feed_forward or m.expert, "attention.head_count": m.heads,
        "attention.head_count_kv": heads_kv if m.arch == "lfm2moe" else m.heads_kv,
        "attention.key_length": m.head, "attention.value_length": m.head, "rope.dimension_count": m.head,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0, "expert_count": m.experts,
        "expert_used_count": m.used, "expert_feed_forward_length": m.expert,
    }  # fmt: skip
    if m.dense:
        facts["leading_dense_block_count"] = m.dense
    if m.shared:
        facts |= {"expert_shared_count": m.shared // m.expert, "expert_shared_feed_forward_length": m.shared}
    for key, value in (facts | m.more).items():
        kinds: dict[type, Callable[[str, Any], None]]
        kinds = {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, list: w.add_array}
        kinds[type(value)](f"{m.arch}.{key}", value)
    tokens, scores, types = twin.vocabulary(m.vocabulary)
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores(scores)
    w.add_token_types(types)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
