"""Monitoring switched on and off within one generation, by lot: neighbouring half seconds are compared with each other,
as a process differs from the next by more than monitoring costs."""

import itertools
import random
from collections.abc import Iterable, Iterator

from moelib.engine.client import Request

SLOT_S = 0.5  # of watching or not: a few readings, and short beside what changes a machine's speed
FILLED = 0.7  # of a slot, at the least: a step that crosses into the next belongs to neither


def _slot(t_s: float) -> int:
    return int(t_s // SLOT_S)


def watched(t_s: float) -> bool:
    """Whether the monitors are on at this time of a toggled run: in one of each two neighbouring slots, by lot."""
    pair, second = divmod(_slot(t_s), 2)
    return (random.Random(pair).random() < 0.5) is bool(second)


def by_slots(requests: Iterable[Request]) -> Iterator[tuple[float, float]]:
    """(watched, unwatched) tokens per second of each two neighbouring slots of a toggled run's requests. The time from
    one token to the next counts where both came in the same slot, and a slot where it fills most of it: a generation
    begins and ends within one."""
    for r in requests:
        slots: dict[int, tuple[int, float]] = {}
        arrived = [(r.started_s + t, n) for t, n in zip(r.token_s, r.token_n, strict=True)]
        for (a, n), (b, m) in itertools.pairwise(arrived):
            if (slot := _slot(b)) == _slot(a):
                tokens, took = slots.get(slot, (0, 0.0))
                slots[slot] = (tokens + m - n, took + b - a)
        whole = {s for s, (_, took) in slots.items() if took >= FILLED * SLOT_S}
        for slot in sorted(s for s in whole if s % 2 == 0 and s + 1 in whole):
            first, second = (slots[s][0] / slots[s][1] for s in (slot, slot + 1))
            yield (first, second) if watched(slot * SLOT_S) else (second, first)
