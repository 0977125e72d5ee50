"""Which experts a text uses, as a study's document shows it: trained weights beside random ones."""

from __future__ import annotations

from collections.abc import Sequence

from moelib.answers import experts
from moelib.answers.experts import Used
from moelib.base import stats
from moelib.base.neutral import markdown as neutral
from moelib.evidence.table import Table, Text, heading
from moelib.study.study import Study

HALF = "hits of 1/2"
COLUMNS = ("model", "quant", "weights", "experts", "evenness", "busiest", "unused", HALF)


def followed(study: Study) -> list[Used]:
    """What `moelib experts` has found of the study's files, and holds; empty where nobody asked."""
    return experts.used(study.path)


def used(every: Sequence[Used]) -> list[Table | Text]:
    """How evenly experts are used, and what a cache of half of them would hit; nothing where nobody asked."""
    if not every:
        return []
    told = experts.rows(every)
    rows = [{k: neutral(v) for k, v in row.items() if k in COLUMNS} for row in told]
    texts = sorted({row["text"] for row in told})
    tokens = stats.span([float(u.routed.spec.tokens) for u in every], lambda n: f"{n:,.0f}")
    note = f"Text {neutral('; '.join(texts))}; hits over its first {tokens} tokens, one by one. {experts.NOTE}"
    table = Table("experts", rows, [u.routed.cited for u in every], note, COLUMNS[4:])
    return [heading("h-experts", "Which experts are used", 2), table, *_cache(every)]


def sources(every: Sequence[Used]) -> dict[str, str]:
    """The records, path -> digest."""
    return {k: v for u in every for k, v in u.routed.cited.items()}


def _cache(every: Sequence[Used]) -> list[Text]:
    """What a cache of half of the experts would save, and how much of that is due to the order of the tokens."""
    lines = []
    for u in every:
        if (c := u.curve) is None:
            continue
        i = c.at(experts.SIZES["1/2"])
        gain = 100 * (c.lru[i] - c.shuffled[i])
        lines.append(
            f"- {neutral(u.name)}: {c.k[i]} of {c.k[-1]} experts of each layer would serve {c.lru[i]:.0%} of all "
            f"accesses, {gain:+.1f} points by what neighbouring tokens have in common."
        )
    if not lines:
        return []
    text = "\n".join(["What a cache of hot experts (LRU, half of each layer's) would hit, simulated:", "", *lines])
    return [Text("experts-cache", text, sources(every))]
