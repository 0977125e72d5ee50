"""What a model's file is, from its header alone: its layers and experts, their bytes, and what each N moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import groupby
from math import prod
from typing import Any

from moelib.base import neutral
from moelib.base.stats import number, percent, size
from moelib.catalogue.placement import UBATCH
from moelib.gguf.gguf_header import LONE_EXPERT, Header, Tensor
from moelib.planner import cache

PER_TOKENS = 1024
STEP = ("--n-cpu-moe", "moves", "in all", "on the GPU")
"""What a step's columns are called."""
DENSE = (
    "a dense model, without experts to offload, so that --cpu-moe moves nothing; put whole layers on the CPU (-ngl N), "
    "or take a mixture-of-experts model"
)


@dataclass(frozen=True)
class Part:
    """Some of the weights that the engine loads."""

    nbytes: int
    weights: int
    types: dict[str, int]
    """Type -> bytes, most first."""

    @property
    def bits_per_weight(self) -> float | None:
        return 8 * self.nbytes / self.weights if self.weights else None

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Part:
        types: Counter[str] = Counter()
        weights = 0
        for t in tensors:
            types[t.type] += t.nbytes
            weights += prod(t.shape)
        return cls(types.total(), weights, dict(types.most_common()))


@dataclass(frozen=True)
class Step:
    """What `--n-cpu-moe N` moves that N - 1 does not."""

    n: int
    nbytes: int
    moved_bytes: int
    """By N in all."""
    device_bytes: int
    """Weights that stay on the device, with all layers offloaded to it."""


@dataclass(frozen=True)
class Description:
    """The facts of a model's file. What the header does not say is None."""

    name: str
    title: str | None
    architecture: str
    file_bytes: int
    layers: int | None
    """Without those that only predict further tokens."""
    dense_layers: tuple[int, ...]
    """Those without experts, from 0."""
    experts: int | None
    """In a layer; the most where layers differ."""
    experts_used: int | None
    """For each token."""
    experts_shared: int | None
    shared_bytes: int
    """Of the experts that every token uses, which no placement moves."""
    experts_differ: bool
    """Whether their number is another in another layer."""
    context_length: int | None
    expert: Part
    """What --cpu-moe moves."""
    rest: Part
    not_loaded: Part
    """Layers that only predict further tokens (NextN, MTP)."""
    whole: Part
    device_bytes: int
    """Weights on the device, with all layers offloaded and no experts moved."""
    kv_bytes: int | None
    """Of the cache in F16, for each further 1,024 tokens of context."""
    kv_fixed_bytes: int | None
    """Of the cache besides, at most: full sliding windows, and the states of recurrent layers."""
    kv_unknown: str | None
    """Why the cache's size is not known."""
    steps: tuple[Step, ...]
    """For each N that moves something more."""
    fault: str | None
    """Why --cpu-moe does not work with the file, with what would; None if it does."""

    @property
    def is_moe(self) -> bool:
        return bool(self.steps)

    @property
    def answer(self) -> str:
        """What the file is and how much of it can be offloaded, as one sentence."""
        name, layers = neutral.plain(self.name), "" if self.layers is None else f", {self.layers} layers"
        shape = f"{neutral.plain(self.architecture)}{layers}"
        if not self.is_moe:
            return f"{name}, {size(self.file_bytes)} ({shape}): {neutral.plain(self.fault)}"
        offload = f"{size(self.expert.nbytes)} ({percent(self.expert.nbytes / self.file_bytes)}) can be offloaded"
        left = f"with --cpu-moe, {size(self.steps[-1].device_bytes)} of weights stay on the GPU"
        answer = f"{name}, {size(self.file_bytes)}: a mixture-of-experts model ({shape}), of which {offload}; {left}"
        return f"{answer}; but {neutral.plain(self.fault)}" if self.fault else answer

    def rows(self) -> list[tuple[str, str]]:
        """(label, value) of the other facts, for people."""
        weights = self.whole.weights
        scaled = f"{number(weights, 1e-9)} billion" if weights >= 1e9 else f"{number(weights, 1e-6)} million"
        context = "not said" if self.context_length is None else f"up to {self.context_length:,} tokens"
        rows = [("model", f"{neutral.plain(self.title or 'without a name')}, {scaled} weights")]
        rows += [("layers", self._layers()), ("context", context)]
        if self.is_moe:
            rows += [("experts", self._experts()), ("expert bytes", _part(self.expert)), ("the rest", _part(self.rest))]
        if self.not_loaded.nbytes:
            rows.append(("not loaded", f"{_part(self.not_loaded)}: layers that only predict further tokens"))
        return [*rows, ("whole file", _part(self.whole)), ("KV cache", self._kv())]

    def text(self) -> str:
        """All of it: the answer first."""
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        lines = [self.answer, *(f"  {label:<{width}}  {value}" for label, value in rows)]
        table = [STEP, *map(_step, self.steps)] if self.steps else []
        lines += ["".join(f"  {value:>11}" for value in row) for row in table]
        return "\n".join(lines)

    def facts(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        parts = ("expert", "rest", "not_loaded", "whole")
        bits = {part: {"bits_per_weight": getattr(self, part).bits_per_weight} for part in parts}
        values = asdict(self)
        return values | {part: values[part] | bits[part] for part in parts} | {"is_moe": self.is_moe}

    def __repr__(self) -> str:
        return f"<{self.answer}>"

    def _repr_html_(self) -> str:
        facts = "".join(f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in self.rows())
        html = f"<b>{escape(self.answer)}</b><table>{facts}</table>"
        if not self.steps:
            return html
        head = "".join(f"<th>{label}</th>" for label in STEP)
        body = "".join("<tr>" + "".join(f"<td>{value}</td>" for value in _step(s)) + "</tr>" for s in self.steps)
        return f"{html}<table><tr>{head}</tr>{body}</table>"

    def _layers(self) -> str:
        if self.layers is None:
            return "not said"
        dense = f", {len(self.dense_layers)} of them without experts: {_spans(self.dense_layers)}"
        return f"{self.layers}{dense if self.is_moe and self.dense_layers else ''}"

    def _experts(self) -> str:
        used = "not said how many" if self.experts_used is None else str(self.experts_used)
        text = f"{'up to ' if self.experts_differ else ''}{self.experts} a layer, {used} used for each token"
        if self.shared_bytes:
            shared = f"{self.experts_shared} shared" if self.experts_shared else "and shared ones"
            text += f", {shared} ({size(self.shared_bytes)}, which stay on the GPU)"
        return text

    def _kv(self) -> str:
        if self.kv_bytes is None:
            return f"not known: {neutral.plain(self.kv_unknown)}"
        fixed = f", and up to {size(self.kv_fixed_bytes)} for windows and states" if self.kv_fixed_bytes else ""
        return f"{size(self.kv_bytes)} for each {PER_TOKENS:,} tokens in F16{fixed}"


def describe(header: Header) -> Description:
    """The facts of a model's file."""
    moved = header.moved("cpu-moe")
    names, loaded = {t.name for t in moved}, {t.name for t in header.loaded}
    by_layer: Counter[int] = Counter()
    for t in moved:
        by_layer[t.block or 0] += t.nbytes
    counts = {t.shape[-1] for t in moved if "_chexps" not in t.name}
    used = [n for layer in by_layer if (n := header.number("expert_used_count", layer)) is not None]
    shared = [t for t in header.loaded if "shexp" in t.name]
    kv, fixed, unknown = _cache(header)
    title = header.metadata.get("general.name")
    return Description(
        name=header.path.name,
        title=title if isinstance(title, str) else None,
        architecture=header.architecture,
        file_bytes=header.file_bytes,
        layers=header.layers,
        dense_layers=tuple(i for i in range(header.layers or 0) if i not in by_layer),
        experts=max(counts, default=None),
        experts_used=max(used, default=None),
        experts_shared=header.number("expert_shared_count") if shared else None,
        shared_bytes=sum(t.nbytes for t in shared),
        experts_differ=len(counts) > 1 or len(set(used)) > 1,
        context_length=header.number("context_length"),
        expert=Part.of(moved),
        rest=Part.of(t for t in header.loaded if t.name not in names),
        not_loaded=Part.of(t for t in header.tensors if t.name not in loaded),
        whole=Part.of(header.tensors),
        device_bytes=header.device_bytes("baseline"),
        kv_bytes=kv,
        kv_fixed_bytes=fixed,
        kv_unknown=unknown,
        steps=_steps(header.device_bytes("baseline"), by_layer),
        fault=_fault(header),
    )


def _steps(device_bytes: int, by_layer: Counter[int]) -> tuple[Step, ...]:
    steps, total = [], 0
    for layer in sorted(by_layer):
        total += by_layer[layer]
        steps.append(Step(layer + 1, by_layer[layer], total, device_bytes - total))
    return tuple(steps)


def _fault(header: Header) -> str | None:
    if header.moved("cpu-moe") or any(LONE_EXPERT.match(t.name) for t in header.tensors):
        return header.fault()
    return DENSE


def _cache(header: Header) -> tuple[int | None, int | None, str | None]:
    """(bytes for each 1,024 tokens, bytes besides, why they are not known) of the cache."""
    if header.layers is None:
        return None, None, "the header does not say how many layers there are"
    try:
        layers = cache.layers(header)
        widest = max((layer.window or 0 for layer in layers), default=0)
        context = -(-(cache.padded(widest + UBATCH)) // PER_TOKENS) * PER_TOKENS  # from here on all windows are full
        first, second = (cache.nbytes(header, n) for n in (context, context + PER_TOKENS))
    except cache.UnknownCache as err:
        return None, None, str(err)
    return second - first, first - (second - first) * (context // PER_TOKENS), None


def _step(step: Step) -> tuple[str, ...]:
    return str(step.n), *(size(n) for n in (step.nbytes, step.moved_bytes, step.device_bytes))


def _part(part: Part) -> str:
    types = ", ".join(f"{kind} {size(nbytes)}" for kind, nbytes in part.types.items())
    bits = "" if part.bits_per_weight is None else f", {part.bits_per_weight:.2f} bits per weight"
    return f"{size(part.nbytes)}{bits} ({types})"


def _spans(numbers: Sequence[int], most: int = 6) -> str:
    """`0 to 2, 5` for 0, 1, 2, 5; cut after `most` of them."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(numbers), lambda at: at[1] - at[0])]
    texts = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(texts[:most]) + (" ..." if len(texts) > most else "")
