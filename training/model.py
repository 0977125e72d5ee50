"""The models in torch, as llama.cpp computes them. Names of parameters are those of the tensors in the GGUF.

Two things differ from the papers and are llama.cpp's: phimoe's norms are RMS norms, with a bias, and its router is a
softmax over all experts whose two largest are divided by their sum.
"""

from typing import Any

import torch
import torch.nn.functional as F
from recipes import RMS_EPS, ROPE_BASE, ROUTER_SUM_LEAST, Shape
from torch import Tensor, nn


class Norm(nn.Module):
    """RMS norm with a weight, and a bias if asked for; computed in float32. (..., n) to (..., n)."""

    def __init__(self, n: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.bias = nn.Parameter(torch.zeros(n)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS) * self.weight
        return x if self.bias is None else x + self.bias


class Bank(nn.Module):
    """The matrices of a layer's experts, (experts, out, in)."""

    def __init__(self, experts: int, n_out: int, n_in: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, n_out, n_in))


def angles(tokens: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (tokens, n / 2) by which RoPE turns the pairs of a head of `n` elements, at each position."""
    speeds = ROPE_BASE ** (-torch.arange(0, n, 2, device=device).float() / n)
    angle = torch.arange(tokens, device=device)[:, None].float() * speeds
    return angle.cos(), angle.sin()


def rope(x: Tensor, turns: tuple[Tensor, Tensor], halves: bool) -> Tensor:
    """Turn pairs of elements of `x` (batch, heads, tokens, n) by `angles`."""
    cos, sin = turns
    a, b = x.float().chunk(2, -1) if halves else x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = (a * cos - b * sin, a * sin + b * cos)
    return torch.cat(turned, -1) if halves else torch.stack(turned, -1).flatten(-2)


class Block(nn.Module):
    """Attention, then experts or one dense network; each adds to its input."""

    def __init__(self, s: Shape, dense: bool, dropout: float):
        super().__init__()
        self.shape, self.dense, self.dropout = s, dense, dropout
        n, fx, b = s.embedding_length, s.expert_feed_forward_length, s.has_biases
        kv = s.head_length * s.head_count_kv
        self.attn_norm, self.ffn_norm = Norm(n, b), Norm(n, b)
        self.attn_q, self.attn_output = nn.Linear(n, n, bias=b), nn.Linear(n, n, bias=b)
        self.attn_k, self.attn_v = nn.Linear(n, kv, bias=b), nn.Linear(n, kv, bias=b)
        if dense:
            self.ffn_gate, self.ffn_up = (nn.Linear(n, s.feed_forward_length, bias=False) for _ in range(2))
            self.ffn_down = nn.Linear(s.feed_forward_length, n, bias=False)
            return
        self.ffn_gate_inp = nn.Linear(n, s.expert_count, bias=False)
        self.ffn_gate_exps, self.ffn_up_exps = (Bank(s.expert_count, fx, n) for _ in range(2))
        self.ffn_down_exps = Bank(s.expert_count, n, fx)
        if shared := fx * s.expert_shared_count:
            self.ffn_gate_shexp, self.ffn_up_shexp = (nn.Linear(n, shared, bias=False) for _ in range(2))
            self.ffn_down_shexp = nn.Linear(shared, n, bias=False)

    def attention(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """(batch, tokens, n) to the same; each token sees those before it and itself."""
        s = self.shape
        q, k, v = (
            f(x).unflatten(-1, (-1, s.head_length)).transpose(1, 2) for f in (self.attn_q, self.attn_k, self.attn_v)
        )
        q, k = (rope(y, turns, s.rope_pairs_halves).to(v.dtype) for y in (q, k))
        group = s.head_count // s.head_count_kv
        k, v = (y[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for y in (k, v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attn_output(seen.transpose(1, 2).flatten(-2))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits (tokens, experts), the experts chosen and their weights (tokens, used), in float32."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.ffn_gate_inp.weight.float())
            weights, chosen = logits.softmax(-1).topk(self.shape.expert_used_count)
            if self.shape.router_sums_to_one:
                weights = weights / weights.sum(-1, keepdim=True).clamp(min=ROUTER_SUM_LEAST)
        return logits, chosen, weights

    def all_experts(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The experts' weighted sum for `x` (tokens, n), by three products over all experts.

        Most of it is multiplied by 0, which a GPU does faster than it would pick; no kernel of its own is needed.
        """
        gate, up, down = self.ffn_gate_exps.weight, self.ffn_up_exps.weight, self.ffn_down_exps.weight
        share = torch.zeros(len(x), len(gate), device=x.device).scatter(1, chosen, weights)
        hidden = F.silu(F.linear(x, gate.flatten(0, 1))) * F.linear(x, up.flatten(0, 1))
        hidden = hidden.unflatten(-1, (len(gate), -1)) * share[..., None].to(hidden.dtype)
        return F.linear(hidden.flatten(-2), down.transpose(0, 1).flatten(1))

    def chosen_experts(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The same sum, expert by expert of the tokens that chose it, as is best on a CPU."""
        banks = (self.ffn_gate_exps.weight, self.ffn_up_exps.weight, self.ffn_down_exps.weight)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.shape.expert_count).tolist()
        own = x.index_select(0, order // chosen.shape[1]).split(counts)
        each = zip(own, *(bank.unbind() for bank in banks), strict=True)
        made = [F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down) for y, gate, up, down in each]
        return (torch.cat(made)[order.argsort()].unflatten(0, chosen.shape) * weights[..., None]).sum(1)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, tokens, n) to the same, and what the router did: its losses and each expert's share of the load."""
        x = x + F.dropout(self.attention(self.attn_norm(x), turns), self.dropout, self.training)
        y = self.ffn_norm(x)
        if self.dense:
            return x + F.dropout(
                self.ffn_down(F.silu(self.ffn_gate(y)) * self.ffn_up(y)), self.dropout, self.training
            ), {}
        flat = y.flatten(0, 1)
        logits, chosen, weights = self.route(flat)
        mixed = (self.all_experts if flat.is_cuda else self.chosen_experts)(flat, chosen, weights)
        made = mixed.unflatten(0, y.shape[:2])
        if self.shape.expert_shared_count:
            made = made + self.ffn_down_shexp(F.silu(self.ffn_gate_shexp(y)) * self.ffn_up_shexp(y))
        load = F.one_hot(chosen, self.shape.expert_count).float().mean((0, 1))
        routed = {"load": load, "z": logits.logsumexp(-1).square().mean()}
        routed["balance"] = self.shape.expert_count * (load * logits.softmax(-1).mean(0)).sum()
        return x + F.dropout(made, self.dropout, self.training), routed


class Transformer(nn.Module):
    """A model of shape `s`. Token ids (batch, tokens) to logits (batch, tokens, vocabulary) in float32."""

    def __init__(self, s: Shape, dropout: float = 0.0):
        super().__init__()
        self.shape = s
        self.token_embd = nn.Embedding(s.vocab_size, s.embedding_length)
        self.blk = nn.ModuleList(Block(s, i < s.leading_dense_block_count, dropout) for i in range(s.block_count))
        self.output_norm = Norm(s.embedding_length, s.has_biases)
        self.output = nn.Linear(s.embedding_length, s.vocab_size, bias=s.has_biases)

    def begin(self, seed: int) -> None:
        """Fill all weights from `seed` alone: normal, as wide as keeps a signal's size, or narrower where they add to
        the stream; biases are 0."""
        random = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            with torch.no_grad():
                if p.ndim < 2:
                    p.fill_(float(name.endswith("norm.weight")))
                    continue
                adds = any(part in name for part in ("attn_output", "ffn_down"))
                wide = 0.02 if name == "token_embd.weight" else p.shape[-1] ** -0.5
                p.copy_(torch.randn(p.shape, generator=random) * wide / (2 * len(self.blk)) ** (0.5 * adds))

    def forward(self, ids: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        x = self.token_embd(ids)
        turns = angles(ids.shape[1], self.shape.head_length, ids.device)
        routed = []
        for block in self.blk:
            x, did = block(x, turns)
            if did:
                routed.append(did)
        return self.output(self.output_norm(x)).float(), routed

    def weights(self) -> dict[str, Any]:
        """Name -> values as numpy arrays in float32."""
        return {name: p.detach().float().cpu().numpy() for name, p in self.named_parameters()}


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats a token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
