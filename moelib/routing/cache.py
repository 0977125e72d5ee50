"""What a cache of k experts a layer would hit, by a trace.

It is a simulation of accesses of one text, not of time: what a hit saves, what a miss costs, and what a cache itself
takes are not in it.

An access is one expert that one token uses in one layer. It is a hit if the expert is in the layer's cache when the
token comes to the layer: all experts of a token are needed together. Every cache begins empty, but for the static one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moelib.routing.trace import Trace

DRAWS, SEED = 20, 0
Rows = NDArray[np.int32]
Hits = NDArray[np.int64]
"""Of a layer: hits of a cache of 1, 2, ... all experts, up to where it is all of them."""


@dataclass(frozen=True)
class Curve:
    """Share of accesses that hit, over all layers, by the size of each layer's cache."""

    k: tuple[int, ...]
    """Experts that each layer's cache holds: from those that a token uses to all."""
    lru: tuple[float, ...]
    """The least recently used expert makes room."""
    shuffled: tuple[float, ...]
    """The same with the tokens in random order, mean of DRAWS: what the experts' popularity gives an LRU cache. The
    difference to `lru` is what the order of the tokens gives."""
    static: tuple[float, ...]
    """The k that this very text uses most, in the cache from the start and never replaced: popularity known in
    hindsight."""

    def at(self, share: float) -> int:
        """Index of the smallest cache of at least this share of all experts."""
        return next(i for i, k in enumerate(self.k) if k >= share * self.k[-1] - 1e-9)


def curve(trace: Trace) -> Curve:
    """Raises ValueError where no token is told, or layers differ in how many experts they have or use."""
    layers = trace.settled
    used, of = {rows.shape[1] for rows in layers}, set(trace.of)
    if len(used) > 1 or len(of) > 1:
        raise ValueError("layers differ in how many experts they have: there is no size of cache for all of them")
    if not sum(rows.size for rows in layers):
        raise ValueError("no token's experts are told")
    chance = np.random.default_rng(SEED)
    drawn = [_share(layers, trace.of, lambda r, n: lru(chance.permutation(r), n)) for _ in range(DRAWS)]
    sizes = slice(used.pop() - 1, None)
    shares = _share(layers, trace.of, lru), np.mean(drawn, axis=0), _share(layers, trace.of, static)
    return Curve(tuple(range(1, of.pop() + 1))[sizes], *(tuple(map(float, s[sizes])) for s in shares))


def _share(layers: tuple[Rows, ...], of: tuple[int, ...], hits: Callable[[Rows, int], Hits]) -> NDArray[np.float64]:
    every = [hits(rows, n) for rows, n in zip(layers, of, strict=True)]
    return np.sum(every, axis=0) / sum(rows.size for rows in layers)


def lru(rows: Rows, of: int) -> Hits:
    """Hits of LRU caches of 1 to `of` experts over the tokens of a layer, in one go (Mattson's stack distances).

    Experts of one token are equally recent; of these the one with the lowest number stays longest, so that a larger
    cache always holds what a smaller one does. Below the number that a token uses, a size means little.
    """
    at = np.zeros(of, np.int64)
    last = np.full(of, -1)
    for t, row in enumerate(rows):
        order = np.lexsort((np.arange(of), -last))  # the most recent first
        rank = np.empty(of, np.int64)
        rank[order] = np.arange(of)
        for expert in row:
            if last[expert] >= 0:
                at[rank[expert]] += 1
        last[row] = t
    return np.cumsum(at)


def static(rows: Rows, of: int) -> Hits:
    """Hits of caches that hold the 1 to `of` most used experts throughout."""
    return np.cumsum(np.sort(np.bincount(rows.ravel(), minlength=of))[::-1])


def cold(trace: Trace) -> float:
    """Share of accesses that are an expert's first: what no cache that begins empty can hit."""
    layers = trace.settled
    return sum(len(np.unique(rows)) for rows in layers) / sum(rows.size for rows in layers)
