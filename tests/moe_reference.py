"""The two architectures in plain numpy, a token and an expert at a time, as llama.cpp's graphs read: slow, and written
apart from the torch models that it is compared with. And a tokenizer small enough to be made by hand."""

import json
import re

import numpy as np
from recipes import BEGIN, RMS_EPS, ROPE_BASE, Shape

TINY = {
    "phimoe": Shape("phimoe", 2, 0, 64, 64, 64, 6, 2, 0, 4, 1, 320, 128, 128),
    "deepseek": Shape("deepseek", 3, 1, 64, 96, 32, 6, 3, 2, 2, 2, 320, 128),
}
LETTERS = "etaoinsr"
SPLIT = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
"""GPT-2's rule for ASCII."""


def log_probs(shape, w, ids):
    """Log-probabilities (tokens, vocabulary) after each of `ids`, by the weights `w` of GGUF's names."""
    w = {name: np.asarray(v, np.float64) for name, v in w.items()}
    x = w["token_embd.weight"][ids]
    for i in range(shape.block_count):
        b = {name.removeprefix(f"blk.{i}."): v for name, v in w.items() if name.startswith(f"blk.{i}.")}
        x = x + _attention(shape, b, _norm(b, "attn_norm", x))
        y = _norm(b, "ffn_norm", x)
        if i < shape.leading_dense_block_count:
            x = x + _gated(y, b["ffn_gate.weight"], b["ffn_up.weight"], b["ffn_down.weight"])
        else:
            x = x + np.array([_experts(shape, b, token) for token in y])
    logits = _linear(w, "output", _norm(w, "output_norm", x))
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def _norm(w, name, x):
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + RMS_EPS) * w[f"{name}.weight"]
    return x + w.get(f"{name}.bias", 0)


def _linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def _silu(x):
    return x / (1 + np.exp(-x))


def _gated(x, gate, up, down):
    return (_silu(x @ gate.T) * (x @ up.T)) @ down.T


def _experts(shape, b, token):
    logits = b["ffn_gate_inp.weight"] @ token
    p = np.exp(logits - logits.max())
    p /= p.sum()
    chosen = np.argsort(-p, kind="stable")[: shape.expert_used_count]
    weights = p[chosen] / (p[chosen].sum() if shape.architecture == "phimoe" else 1)
    banks = [b[f"ffn_{part}_exps.weight"] for part in ("gate", "up", "down")]
    out = sum(weight * _gated(token, *(bank[e] for bank in banks)) for e, weight in zip(chosen, weights, strict=True))
    if shape.expert_shared_count:
        out = out + _gated(token, *(b[f"ffn_{part}_shexp.weight"] for part in ("gate", "up", "down")))
    return out


def _attention(shape, b, x):
    n, heads, of = len(x), shape.head_count, shape.head_count // shape.head_count_kv
    q, k, v = (_linear(b, f"attn_{part}", x).reshape(n, -1, shape.head_length) for part in "qkv")
    q, k = (np.array([[_turn(shape, h, at) for h in token] for at, token in enumerate(y)]) for y in (q, k))
    out = np.zeros((n, heads, shape.head_length))
    for h in range(heads):
        scores = q[:, h] @ k[:, h // of].T / np.sqrt(shape.head_length)
        scores[np.triu_indices(n, 1)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = p / p.sum(-1, keepdims=True) @ v[:, h // of]
    return _linear(b, "attn_output", out.reshape(n, -1))


def _turn(shape, head, at):
    half = len(head) // 2
    angles = at * ROPE_BASE ** (-np.arange(half) / half)
    pairs = (head[:half] + 1j * head[half:]) if shape.architecture == "phimoe" else head[::2] + 1j * head[1::2]
    turned = pairs * np.exp(1j * angles)
    if shape.architecture == "phimoe":
        return np.concatenate([turned.real, turned.imag])
    return np.stack([turned.real, turned.imag], -1).ravel()


def weights(shape, plan, seed=0):
    """Random weights for the tensors of `plan`, wide enough that routers and attention decide something."""
    random = np.random.default_rng(seed)
    made = {}
    for t in plan:
        dims = t.shape[::-1]
        if len(dims) == 1:
            made[t.name] = random.normal(1.0 if t.name.endswith("norm.weight") else 0.0, 0.1, dims)
        else:
            wide = 1.0 if t.name == "token_embd.weight" else (3.0 if "gate_inp" in t.name else 1.0) / np.sqrt(dims[-1])
            made[t.name] = random.normal(0, wide, dims)
    return made


def alphabet():
    """GPT-2's characters for the 256 bytes, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def tokenizer(size):
    """A `tokenizer.json` of byte-level BPE with `size` tokens: bytes, then pairs of LETTERS."""
    pairs = [(a, b) for a in LETTERS for b in LETTERS][: size - 257]
    vocab = {"<|endoftext|>": BEGIN}
    for token in [*alphabet(), *(a + b for a, b in pairs)]:
        vocab[token] = len(vocab)
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "added_tokens": [{"id": BEGIN, "content": "<|endoftext|>", "special": True}],
        "model": {"type": "BPE", "vocab": vocab, "merges": [list(p) for p in pairs]},
    }


def encode(made, text):
    """The ids of ASCII `text` by merging pairs, the first of the list first."""
    ranks = {tuple(m): i for i, m in enumerate(made["model"]["merges"])}
    characters, ids = alphabet(), []
    for word in SPLIT.findall(text):
        parts = [characters[b] for b in word.encode()]
        while len(parts) > 1:
            found = min(range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), 1 << 30))
            if (parts[found], parts[found + 1]) not in ranks:
                break
            parts[found : found + 2] = ["".join(parts[found : found + 2])]
        ids += [made["model"]["vocab"][p] for p in parts]
    return ids


def save_tokenizer(path, size):
    made = tokenizer(size)
    path.write_text(json.dumps(made), encoding="utf-8")
    return made
