"""How evenly a layer's experts are used. Both numbers are 1 where all are used alike, whatever their number.

Of few tokens, even chance looks uneven: with n uses of E experts, evenness is about (E - 1) / (2 n log E) below 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from moelib.routing.passes import Selections


def evenness(counts: Sequence[int]) -> float:
    """Entropy of the experts' shares of all uses, over that of even shares (Pielou's evenness): 1 where all are used
    alike, 0 where one takes all. Raises ValueError where nothing was used, or there is one expert alone."""
    n = sum(counts)
    if not n or len(counts) < 2:
        raise ValueError(f"{n} uses of {len(counts)} experts have no evenness")
    return -sum(c / n * math.log(c / n) for c in counts if c) / math.log(len(counts))


def busiest(counts: Sequence[int]) -> float:
    """Uses of the most used expert, over the mean of all: 1 where all are used alike, which is the least."""
    if not sum(counts):
        raise ValueError("no expert was used")
    return max(counts) * len(counts) / sum(counts)


@dataclass(frozen=True)
class Balance:
    """Of a layer; or of all, each layer counting the same, as its experts are no other layer's."""

    evenness: float
    busiest: float
    dead: int
    """Experts that no token used."""
    experts: int


def of_layer(counts: Sequence[int]) -> Balance:
    return Balance(evenness(counts), busiest(counts), sum(c == 0 for c in counts), len(counts))


def of_layers(selections: Selections) -> tuple[Balance, ...]:
    return tuple(map(of_layer, selections))


def overall(selections: Selections) -> Balance:
    """Means over layers of evenness and of the busiest expert, and all dead experts."""
    every = of_layers(selections)
    return Balance(
        fmean(b.evenness for b in every),
        fmean(b.busiest for b in every),
        sum(b.dead for b in every),
        sum(b.experts for b in every),
    )
