"""The graph that the engine reserves memory for: one batch of a prompt through a decoder, as tensors without content.

Built from what the header lists: which tensors a layer has says which steps it takes. Follows `llm_graph_context` and
its models (llama.cpp b11434): the order of the nodes matters, as the allocator takes them in order. Layers of one kind
and placement repeat, so that three in a row stand for any number.
"""

from __future__ import annotations

from itertools import groupby
from math import prod

from moelib.catalogue.placement import KV, UBATCH, Placement
from moelib.gguf import gguf_header
from moelib.gguf.gguf_header import Header
from moelib.planner import cache
from moelib.planner.allocate import DEVICE, HOST, Tensor

OFFLOADED_TOKENS = 32
"""From so many tokens on, the device computes with weights that lie on the host, copied for it (op-offload)."""
SHARED = "ffn_{}_shexp"
FUSED_CHOICES = {*(1 << i for i in range(10)), 288, 576}
"""Numbers of experts among which CUDA chooses and weighs in one operation."""
FUSED_EXPERTS = 15
"""CUDA weighs and adds up the results of up to so many experts at once."""
UNNORMED = {"deepseek", "olmoe", "qwen2moe"}
"""Architectures whose experts' weights are not made to add up to one, unless the file says so."""
WEIGHTS_LAST = {"gpt-oss"}
"""Architectures that choose experts first, and weigh those chosen."""
ROW_PAD = 512
"""The device's rows of quantised weights end on a multiple of so many elements."""


class Graph:
    """Nodes in the order in which the engine computes them.

    cuda: with what CUDA's backend does of its own: it computes large batches with the host's weights (op-offload), has
    room for a quantised cache in F16 beside attention's result, and holds what fused operations read until they end.
    """

    def __init__(self, header: Header, placement: Placement, context: int, cuda: bool = True):
        self.nodes: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self._header, self._placement, self._cuda = header, placement, cuda
        self._embedding = header.number("embedding_length") or 0
        self._tokens = tokens = min(placement.ubatch or UBATCH, cache.padded(context))
        self._seen = cache.padded(context)
        self._caches = cache.layers(header)
        self._windowed = any(c.window for c in self._caches)
        self._tensors: dict[str, gguf_header.Tensor] = {}
        self._position, self._rows = self._input(4), self._input(4, 1)
        self._asked: dict[int | None, tuple[Tensor, Tensor, Tensor]] = {}
        self._turns: dict[str, Tensor] = {}
        self._kv = placement.kv or KV
        self._quantised_cache = cache.row_bytes(1 << 10, self._kv) < 2 << 10
        self._build(tokens)

    def _input(self, item: int, *shape: int) -> Tensor:
        self.inputs.append(Tensor(shape or (self._tokens,), "input", (), HOST, item))
        return self.inputs[-1]

    def _op(self, op: str, shape: tuple[int, ...], *sources: Tensor, place: str = DEVICE, item: int = 4) -> Tensor:
        self.nodes.append(Tensor(shape, op, sources, place, item))
        return self.nodes[-1]

    def _view(self, source: Tensor, shape: tuple[int, ...]) -> Tensor:
        view = Tensor(shape, "view", (source,), source.place, source.item, source.view_of or source)
        self.nodes.append(view)
        return view

    def _weight(self, nbytes: int = 1, place: str = DEVICE) -> Tensor:
        return Tensor((1,), "weight", (), place, external=True, size=nbytes)

    def _biased(self, x: Tensor, name: str) -> Tensor:
        return self._op("add", x.shape, x, self._weight()) if f"{name}.bias" in self._tensors else x

    def _norm(self, x: Tensor, name: str) -> Tensor:
        if f"{name}.weight" not in self._tensors:
            return x
        layer_norm = f"{name}.bias" in self._tensors
        x = self._op("norm" if layer_norm else "rms_norm", x.shape, x)
        return self._biased(self._op("mul", x.shape, x, self._weight()), name)

    def _project(self, x: Tensor, name: str) -> Tensor:
        width = self._tensors[f"{name}.weight"].shape[1]
        return self._biased(self._op("mul_mat", (width, *x.shape[1:]), self._weight(), x), name)

    def _build(self, tokens: int) -> None:
        shape = self._embedding, tokens
        # ids, vectors, or both mixed may come in: all three are reserved, and the mixed one's result is never freed
        x = self._op("get_rows", shape, self._input(4), place=HOST)
        self._input(4, *shape)
        rows = self._op("get_rows", shape, self._input(4), place=HOST)
        mixed = self._op("dup", shape, self._input(4, *shape))
        self.nodes.append(Tensor(shape, "set_rows", (rows, self._input(8)), external=True, view_of=mixed))
        for layer, kind in self._layers():
            self._tensors = self._header.of_layer(layer)
            self._last = kind == "last"
            x = self._layer(layer, x)
        self._tensors = self._header.of_layer(None)
        x = self._norm(x, "output_norm")
        name = "output" if "output.weight" in self._tensors else "token_embd"
        self._project(x, name)

    def _layers(self) -> list[tuple[int, str]]:
        """The layers to go through: of each run of equal ones the first three, and the model's last."""
        count = self._header.layers or 0

        def signature(layer: int) -> object:
            tensors = self._header.of_layer(layer)
            listed = tuple(sorted((n, t.shape, t.type) for n, t in tensors.items()))
            return listed, self._placement.moves(layer), self._caches[layer]

        kept: list[tuple[int, str]] = []
        for _, run in groupby(range(count - 1), signature):
            kept += [(layer, "") for layer in list(run)[:3]]
        return [*kept, (count - 1, "last")]

    def _layer(self, layer: int, x: Tensor) -> Tensor:
        residual, names = x, self._tensors
        normed = self._norm(x, "attn_norm")
        if "attn_kv_a_mqa.weight" in names:
            out = self._latent(normed, layer)
        elif any(n.startswith(("attn_k.", "attn_qkv.")) for n in names) and self._caches[layer].key:
            out = self._attention(normed, layer)
        else:
            out = self._mixer(normed)
        if self._last:
            shape = self._embedding, 1  # only the batch's last token is asked for
            out, residual = (self._op("get_rows", shape, t, self._rows) for t in (out, residual))
        before_ffn = "ffn_norm.weight" in names
        if "post_attention_norm.weight" in names and before_ffn:
            out = self._norm(out, "post_attention_norm")
        inner = self._op("add", out.shape, out, residual)
        normed = self._norm(inner, "ffn_norm" if before_ffn else "post_attention_norm")
        if any(n.startswith(("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps")) for n in names):
            out = self._experts(normed, layer)
        elif any(n.startswith("ffn_") for n in names):
            out = self._dense(normed, "ffn_{}")
        else:
            return inner
        return self._op("add", inner.shape, self._norm(out, "post_ffw_norm"), inner)

    def _heads(self, layer: int) -> tuple[int, int, int, int]:
        """(heads, heads of keys and values, elements of a key's head, of a value's)."""
        header, kept = self._header, self._caches[layer]
        heads = header.number("attention.head_count", layer) or header.number("attention.head_count", 0) or 1
        few = header.number("attention.head_count_kv", layer) or heads
        return heads, few, kept.key // few, kept.value // few

    def _of_cache(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of attention in a layer: where keys and values go in its cache, and what each token may see of it."""
        window = self._caches[layer].window
        if window not in self._asked:
            seen = self._seen if window is None else min(self._seen, cache.padded(window + self._tokens))
            self._asked[window] = self._input(8), self._input(8), self._input(2, seen, self._tokens)
        return self._asked[window]

    def _store(self, x: Tensor, where: Tensor) -> None:
        flat = self._view(x, (x.shape[0] * x.shape[1], x.shape[2]))
        self.nodes.append(Tensor(flat.shape, "set_rows", (flat, where), external=True))

    def _attention(self, x: Tensor, layer: int) -> Tensor:
        heads, few, key, value = self._heads(layer)
        n, names = self._tokens, self._tensors
        widths = {"q": (heads, key), "k": (few, key), "v": (few, value)}
        joined = "attn_qkv.weight" in names and self._project(x, "attn_qkv")
        parts: dict[str, Tensor] = {}
        for part in "qkv" if self._windowed else "qvk":  # the order in which the engine expands them
            count, width = widths[part]
            if joined:
                parts[part] = self._view(joined, (width, count, n))
            else:
                parts[part] = self._view(self._project(x, f"attn_{part}"), (width, count, n))
            if part != "v":
                parts[part] = self._norm(parts[part], f"attn_{part}_norm")
                parts[part] = self._op("rope", parts[part].shape, parts[part], self._position)
            parts[part] = self._turned(parts[part], "v" if part == "v" else "k", width)
        keys, values, mask = self._of_cache(layer)
        self._store(parts["k"], keys)
        self._store(parts["v"], values)
        q = self._view(self._view(parts["q"], parts["q"].shape), parts["q"].shape)
        out = self._flash_attention((value, heads, n), q, mask, few * (key + value))
        out = self._turned(out, "v", value)
        return self._project(self._view(out, (value * heads, n)), "attn_output")

    def _flash_attention(self, shape: tuple[int, ...], q: Tensor, mask: Tensor, kept: int) -> Tensor:
        """`kept`: elements of a token in the layer's cache."""
        out = self._op("flash_attn", shape, q, mask)
        if self._cuda and self._kv != KV:
            out.size = out.nbytes + 2 * kept * mask.shape[0]
        return out

    def _turned(self, x: Tensor, part: str, width: int) -> Tensor:
        """Rows of a quantised cache are turned by a Hadamard matrix first, where a head's width is a multiple of 64."""
        if not self._quantised_cache or width % 64:
            return x
        if part not in self._turns:
            side = 64 if part == "v" else width & -width
            self._turns[part] = self._input(4, side, side)
        side = self._turns[part].shape[0]
        flat = self._view(x, (side, prod(x.shape) // side))
        return self._view(self._op("mul_mat", flat.shape, self._turns[part], flat), x.shape)

    def _latent(self, x: Tensor, layer: int) -> Tensor:
        """Multi-head latent attention: keys and values are parts of one compressed row."""
        header, names, n = self._header, self._tensors, self._tokens
        heads = header.number("attention.head_count", layer) or 1
        rank, turned = header.number("attention.kv_lora_rank") or 0, header.number("rope.dimension_count") or 0
        q = x
        if "attn_q_a.weight" in names:
            q = self._norm(self._project(x, "attn_q_a"), "attn_q_a_norm")
        q = self._project(q, "attn_q_b" if "attn_q_b.weight" in names else "attn_q")
        if "attn_k_b.weight" not in names:
            raise cache.UnknownCache(f"{header.architecture}: an old conversion, whose keys are not stored compressed")
        plain = self._view(q, (q.shape[0] // heads - turned, n, heads))
        absorbed = self._op("mul_mat", (rank, n, heads), self._weight(), plain)
        turn = self._op("rope", (turned, heads, n), self._view(q, (turned, heads, n)), self._position)
        q = self._op("concat", (rank + turned, heads, n), self._view(absorbed, (rank, heads, n)), turn)
        row = self._project(x, "attn_kv_a_mqa")
        packed = self._norm(self._view(row, (rank, n)), "attn_kv_a_norm")
        turn = self._op("rope", (turned, 1, n), self._view(row, (turned, 1, n)), self._position)
        k = self._op("concat", (rank + turned, 1, n), self._view(packed, (rank, 1, n)), turn)
        keys, _, mask = self._of_cache(layer)
        self._store(k, keys)
        out = self._flash_attention((rank, heads, n), self._view(q, (rank + turned, n, heads)), mask, rank + turned)
        value = header.number("attention.value_length_mla") or 0
        out = self._op("mul_mat", (value, n, heads), self._weight(), self._view(out, (rank, n, heads)))
        out = self._op("cont", (value, heads, n), self._view(out, (value, heads, n)))
        return self._project(self._view(out, (value * heads, n)), "attn_output")

    def _mixer(self, x: Tensor) -> Tensor:
        """A recurrent or convolutional layer: its widest projection in and out stand for it."""
        names = self._tensors
        inward = [n for n in ("ssm_in", "shortconv.in_proj", "attn_qkv") if f"{n}.weight" in names]
        outward = [n for n in ("ssm_out", "shortconv.out_proj", "attn_output") if f"{n}.weight" in names]
        if not inward or not outward:
            return x
        wide = self._project(x, inward[0])
        convolved = self._op("conv", (wide.shape[0], self._tokens), wide)
        narrow = names[f"{outward[0]}.weight"].shape[0]
        return self._project(self._op("scan", (narrow, self._tokens), convolved), outward[0])

    def _dense(self, x: Tensor, pattern: str) -> Tensor:
        return self._project(self._inner(x, pattern), pattern.format("down"))

    def _inner(self, x: Tensor, pattern: str) -> Tensor:
        """Up and gate of a feed-forward network, joined."""
        up, gate, down = (pattern.format(part) for part in ("up", "gate", "down"))
        wide = self._tensors[f"{up}.weight"].shape[1]
        if f"{gate}.weight" in self._tensors:
            gated = self._project(x, gate)
            return self._op("glu", gated.shape, gated, self._project(x, up))
        joined, narrow = self._project(x, up), self._tensors[f"{down}.weight"].shape[0]
        return self._op("unary" if narrow == wide else "glu", (narrow, *x.shape[1:]), joined)

    def _beside_experts(self, layer: int) -> bool:
        """Whether CUDA computes a shared expert in one go with the others: it is one of their size and type."""
        routed, shared = (self._tensors.get(f"ffn_up_{kind}.weight") for kind in ("exps", "shexp"))
        gated = "ffn_gate_exps.weight" in self._tensors
        if not (self._cuda and routed and shared and gated) or self._placement.moves(layer):
            return False
        alike = routed.shape[:2] == shared.shape[:2] and routed.type == shared.type
        return alike and routed.type not in gguf_header.UNQUANTISED

    def _copied(self, name: str, layer: int) -> Tensor:
        """An expert weight, on the host if the placement keeps it there."""
        t = self._tensors[f"{name}.weight"]
        if not self._placement.moves(layer):
            return self._weight()
        rest = -t.shape[0] % ROW_PAD if t.type not in gguf_header.UNQUANTISED else 0
        padding = rest * t.nbytes // max(1, t.shape[0] * t.shape[1] * t.shape[2])
        return self._weight(t.nbytes + padding, HOST)

    def _routed(self, x: Tensor, used: int) -> tuple[Tensor, Tensor]:
        """(ids, weights) of the experts that each token uses."""
        header, n = self._header, x.shape[1]
        logits = self._project(x, "ffn_gate_inp")
        experts, late = logits.shape[0], header.architecture in WEIGHTS_LAST
        scores = logits if late else self._op("soft_max", logits.shape, logits)
        flat = self._view(scores, (1, experts, n))
        biased = "exp_probs_b.bias" in self._tensors
        chosen = self._op("add", scores.shape, scores, self._weight()) if biased else scores
        order = self._op("argsort", chosen.shape, chosen)
        ids = self._view(order, (used, n))
        picked = self._op("get_rows", (1, used, n), flat, ids)
        steps, weights = [logits, scores, chosen, order, picked], self._view(picked, (used, n))
        if late:
            weights = self._op("soft_max", weights.shape, weights)
        elif header.metadata.get(f"{header.architecture}.expert_weights_norm", header.architecture not in UNNORMED):
            whole = self._op("sum_rows", (1, n), weights)
            least = self._op("clamp", (1, n), whole)
            weights = self._op("div", (used, n), weights, least)
            steps += [whole, least]
        if self._cuda and not late and experts in FUSED_CHOICES:
            self.nodes.append(Tensor((), "held", tuple(dict.fromkeys(steps)), external=True))  # one fused operation
        return ids, self._view(weights, (1, used, n))

    def _experts(self, x: Tensor, layer: int) -> Tensor:
        header, names, e = self._header, self._tensors, self._embedding
        used, n = header.number("expert_used_count", layer) or 1, x.shape[1]
        offloaded = self._cuda and self._placement.op_offload and n >= OFFLOADED_TOKENS
        on_host = self._placement.moves(layer) and not offloaded
        place = HOST if on_host else DEVICE

        ids, weights = self._routed(x, used)

        def expert(source: Tensor, name: str) -> Tensor:
            wide = names[f"{name}.weight"].shape[1]
            out = self._op("mul_mat_id", (wide, used, n), self._copied(name, layer), source, ids, place=place)
            if f"{name}.bias" in names:
                out = self._op("add_id", out.shape, out, self._weight(place=place), ids, place=place)
            return out

        rows = self._view(x, (e, 1, n))
        if "ffn_gate_up_exps.weight" in names:
            joined = expert(rows, "ffn_gate_up_exps")
            half = joined.shape[0] // 2, used, n
            gate, up = self._view(joined, half), self._view(joined, half)
        elif "ffn_gate_exps.weight" in names:
            gate, up = expert(rows, "ffn_gate_exps"), expert(rows, "ffn_up_exps")
        else:
            gate = up = expert(rows, "ffn_up_exps")
        if gate is up:
            inner = self._op("unary", up.shape, up, place=place)
        else:
            inner = self._op("glu", up.shape, gate, up, place=place)
        shared = self._inner(x, SHARED) if self._beside_experts(layer) else None
        if shared is not None:
            self.nodes.append(Tensor((), "held", (rows, ids), external=True))
        down = expert(inner, "ffn_down_exps")
        weighted = self._op("mul", down.shape, down, weights)
        slices = [self._view(weighted, (down.shape[0], n, -1)) for _ in range(used)]
        total = slices[0]
        for one in slices[1:]:
            total = self._op("add", (down.shape[0], n), total, one)
        if self._cuda and 2 <= used <= FUSED_EXPERTS:
            self.nodes.append(Tensor((), "held", (down, weights), external=True))
        if used == 1:
            total = self._op("cont", (down.shape[0], n), total)
        if "ffn_up_shexp.weight" in names:
            shared = self._project(self._inner(x, SHARED) if shared is None else shared, SHARED.format("down"))
            if "ffn_gate_inp_shexp.weight" in names:
                share = self._op("unary", (1, n), self._op("mul_mat", (1, n), self._weight(), x))
                shared = self._op("mul", shared.shape, shared, share)
            total = self._op("add", total.shape, total, shared)
        return total
