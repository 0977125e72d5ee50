"""What a graph of tensors needs of a device's memory, by llama.cpp's own way of placing them.

The engine reserves its compute buffers once, for the largest batch: its scheduler cuts the graph into splits where the
backend changes and copies what a split needs from elsewhere (`ggml-backend.cpp`); its allocator then walks over the
nodes, reuses a parent's place where an operation may work in place, and else takes the smallest free block that is
large enough (`ggml-alloc.c`). Both are followed here step by step (b11434), as sizes alone: nothing is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

ALIGNMENT = 128  # CUDA's; 64 on a CPU, a difference of some kB
IN_PLACE = frozenset({"add", "add_id", "clamp", "div", "mul", "rms_norm", "rope", "scale", "soft_max", "unary"})
"""Operations that may write over an operand (`ggml_op_can_inplace`; LayerNorm's first step may not)."""
DEVICE, HOST = "device", "host"


@dataclass(eq=False, slots=True)
class Tensor:
    """A node of the graph, an input or a weight."""

    shape: tuple[int, ...]
    op: str
    sources: tuple[Tensor, ...] = ()
    place: str = DEVICE
    item: int = 4
    """Bytes of an element."""
    view_of: Tensor | None = None
    external: bool = False
    """Weights and caches lie in buffers of their own."""
    size: int = 0
    """Bytes, where they are not those of the elements: of a quantised weight, or with room beside the result."""

    @property
    def nbytes(self) -> int:
        return self.size or prod(self.shape) * self.item


class Free:
    """Free blocks of one buffer, by address; the last one has no end."""

    def __init__(self) -> None:
        self._blocks = [(0, 1 << 62)]
        self.peak = 0

    def take(self, nbytes: int) -> tuple[int, int]:
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        fits = [(length, -i) for i, (_, length) in enumerate(self._blocks[:-1]) if length >= size]
        i = -min(fits)[1] if fits else len(self._blocks) - 1
        at, length = self._blocks.pop(i)
        if length > size:
            self._blocks.insert(i, (at + size, length - size))
        self.peak = max(self.peak, at + size)
        return at, size

    def give(self, at: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._blocks, (at, size)]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                start, length = merged[-1][0], merged.pop()[1] + length
            merged.append((start, length))
        self._blocks = merged


def scheduled(nodes: Iterable[Tensor]) -> list[Tensor]:
    """The nodes in splits, each split's copies of what lies elsewhere before it.

    A weight that has to be copied starts a split of its own, so that the place of the one before is free again.
    """
    ordered: list[Tensor] = []
    copies: list[Tensor] = []
    split: list[Tensor] = []
    known: dict[tuple[int, str], Tensor] = {}
    place = None
    for node in nodes:
        if node.op == "view":
            split.append(node)
            continue
        another = copies and any(s.op == "weight" and s.place != place for s in node.sources)
        if node.place != place or another:
            ordered += [*copies, *split]
            copies, split, place = [], [], node.place
        sources = []
        for source in node.sources:
            if source.place != place:
                key = id(source), place
                if key not in known:
                    known[key] = Tensor(source.shape, "copy", (), place, source.item, size=source.size)
                    # the original is held until it was copied, and no longer for this split's sake
                    copies += [Tensor((), "copied", (source,), source.place, external=True), known[key]]
                source = known[key]
            sources.append(source)
        node.sources = tuple(sources)
        split.append(node)
    return [*ordered, *copies, *split]


def peaks(nodes: Sequence[Tensor], inputs: Sequence[Tensor] = ()) -> dict[str, int]:
    """Place -> bytes of the compute buffer that the nodes need there, in their order; `inputs` come before them all."""
    order = scheduled(nodes)
    uses = Counter(s for node in order for s in node.sources)
    views = Counter(node.view_of for node in order if node.view_of is not None)
    free = {DEVICE: Free(), HOST: Free()}
    held: dict[Tensor, tuple[int, int]] = {}
    done: set[Tensor] = set()

    def allocate(t: Tensor) -> None:
        if t in done or t.external or t.view_of is not None:
            return
        done.add(t)
        for parent in t.sources if t.op in IN_PLACE else ():
            alike = parent.shape == t.shape and parent.item == t.item and parent.place == t.place
            if alike and uses[parent] == 1 and not views[parent] and parent in held:  # a view is never in `held`
                at, size = held.pop(parent)
                need = -(-t.nbytes // ALIGNMENT) * ALIGNMENT
                if size > need:
                    free[t.place].give(at + need, size - need)
                held[t] = at, min(size, need)
                return
        held[t] = free[t.place].take(t.nbytes)

    def release(t: Tensor) -> None:
        if t in held:
            free[t.place].give(*held.pop(t))

    for given in inputs:
        allocate(given)
    for node in order:
        for source in node.sources:
            allocate(source)
        allocate(node)
        for source in node.sources:
            uses[source] -= 1
            if uses[source] or views[source]:
                continue
            owner = source.view_of
            if owner is None:
                release(source)
                continue
            views[owner] -= 1
            if not views[owner] and not uses[owner]:
                release(owner)
    return {place: blocks.peak for place, blocks in free.items()}
