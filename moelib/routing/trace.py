"""Which experts each token used, in order: told from the engine's counts over the first 1, 2, ... T tokens of a text.

No tool of llama.cpp says which experts a token used. But what t tokens used and t - 1 did not is what token t used, if
no token before it chose otherwise in between. Tokens are computed one at a time here, as they are in generating: each
is then computed alike however many follow, and seen was no choice that moved. (With the prompt computed at once, other
kernels take other lengths, and one choice in 128 moved.)
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moelib.base.bar import tqdm
from moelib.engine.engine import Engine
from moelib.gguf.gguf_header import Header
from moelib.routing.passes import Experts, How, Pass, Selections, count

NONE = -1
COLUMNS = ("token", "layer", "experts")


@dataclass(frozen=True, eq=False)
class Trace:
    """The experts of each token in each MoE layer."""

    experts: tuple[NDArray[np.int32], ...]
    """Of each layer: [tokens, used], each row in order; a row of NONE where it could not be told (unsettled)."""
    of: tuple[int, ...]
    """Of each layer, experts that there are."""

    @property
    def tokens(self) -> int:
        return len(self.experts[0])

    @property
    def unsettled(self) -> int:
        """Tokens of layers, counted once each, whose experts could not be told."""
        return sum(int((rows[:, 0] == NONE).sum()) for rows in self.experts)

    @property
    def settled(self) -> tuple[NDArray[np.int32], ...]:
        """Of each layer, the rows that are told."""
        return tuple(rows[rows[:, 0] != NONE] for rows in self.experts)

    @property
    def selections(self) -> Selections:
        """How many of its tokens used each expert."""
        counted = zip(self.settled, self.of, strict=True)
        return tuple(tuple(np.bincount(rows.ravel(), minlength=n).tolist()) for rows, n in counted)


def told(prefixes: Iterable[Selections], experts: Experts) -> Trace:
    """The trace whose first t tokens were counted in the t-th of `prefixes`."""
    before = [np.zeros(n, np.int64) for n in experts.of]
    rows: list[list[NDArray[np.int32]]] = [[] for _ in experts.layers]
    for selections in prefixes:
        for layer, counts in enumerate(selections):
            now, used = np.array(counts, np.int64), experts.used[layer]
            new = now - before[layer]
            chosen = np.flatnonzero(new == 1).astype(np.int32)
            alone = len(chosen) == used and np.count_nonzero(new) == used
            rows[layer].append(chosen if alone else np.full(used, NONE, np.int32))
            before[layer] = now
    return Trace(
        tuple(np.array(r, np.int32).reshape(len(r), u) for r, u in zip(rows, experts.used, strict=True)), experts.of
    )


def follow(llama: Engine, header: Header, how: How, tokens: int) -> tuple[Trace, Pass]:
    """The trace of a text's first tokens, and the last pass, which was over all of them. Raises as `count` does.

    It takes a start of the engine for each token, and is done again if it was stopped.
    """
    experts = Experts.in_file(header)
    last: list[Pass] = []

    def prefixes() -> Iterator[Selections]:
        for t in tqdm(range(1, tokens + 1), desc="following", unit="token", disable=None, leave=False):
            last[:] = [count(llama, header, how, t, ubatch=1, name="trace")]
            yield last[0].selections

    return told(prefixes(), experts), last[0]


def written(trace: Trace, layers: Sequence[int]) -> str:
    """As CSV: a row for each token and layer, with its experts, or with none where it is unsettled."""
    text = io.StringIO()
    text.write(",".join(COLUMNS) + "\n")
    for t in range(trace.tokens):
        for layer, rows in zip(layers, trace.experts, strict=True):
            chosen = "" if rows[t, 0] == NONE else " ".join(map(str, rows[t]))
            text.write(f"{t},{layer},{chosen}\n")
    return text.getvalue()


def read(text: str, experts: Experts, tokens: int) -> Trace:
    """The trace that `written` wrote. Raises ValueError for any other text."""
    head, *lines = text.splitlines()
    expected = [(t, layer) for t in range(tokens) for layer in range(len(experts.layers))]
    if head != ",".join(COLUMNS) or len(lines) != len(expected):
        raise ValueError(f"it has other columns, or {len(lines)} rows and not {len(expected)}")
    rows = [np.full((tokens, used), NONE, np.int32) for used in experts.used]
    for line, (t, layer) in zip(lines, expected, strict=True):
        token, named, chosen = line.split(",")
        ids = [int(e) for e in chosen.split()]
        fits = not ids or len(set(ids)) == experts.used[layer] == len(ids)
        if (int(token), int(named)) != (t, experts.layers[layer]) or not fits or ids != sorted(ids):
            raise ValueError(f"row {line!r:.60} is not that of token {t} in layer {experts.layers[layer]}")
        if ids and not 0 <= ids[0] <= ids[-1] < experts.of[layer]:
            raise ValueError(f"row {line!r:.60} names an expert that the layer does not have")
        if ids:
            rows[layer][t] = ids
    return Trace(tuple(rows), experts.of)
