"""What is believed of counts and a trace: the invariants that they must hold, asked again whenever they are shown."""

from collections.abc import Iterator
from pathlib import Path

from moelib.audit.record import Check, RecordError
from moelib.routing import routed
from moelib.routing.passes import Experts, Selections, total
from moelib.routing.routed import Found, Routed, Spec
from moelib.routing.trace import Trace

MOST_UNSETTLED = 0.02
"""Of a trace's tokens and layers: none was seen in 3,584, of twins of both models at four quants, on the CPU and on
loopback."""
MOST_MOVED = 0.05
"""Uses of experts that may be another one's in batches than one token at a time, by rounding: where two experts score
nearly alike, either may be taken. In the same twins 0 to 0.8 %."""


def of(spec: Spec, found: Found, trace: Trace) -> tuple[Check, ...]:
    return tuple(_each(spec, found, trace))


def _each(spec: Spec, found: Found, trace: Trace) -> Iterator[Check]:
    for name, counts, tokens in (
        ("all-counted", found.counts, spec.context * spec.chunks),
        ("whole-counted", found.whole, spec.tokens),
    ):
        wrong = _wrong(counts, found.experts, tokens)
        each = f"{tokens} tokens use {' or '.join(map(str, sorted(set(found.experts.used))))} experts a layer"
        yield Check(name, not wrong, f"{each}; layers that do not: {wrong}" if wrong else each)
    rows = spec.tokens * len(found.experts.layers)
    fits = trace.tokens == spec.tokens and trace.of == found.experts.of
    yield Check("trace-of-its-tokens", fits, f"{trace.tokens} of {spec.tokens} tokens in {len(trace.of)} layers")
    unsettled = trace.unsettled
    said = f"{unsettled} of {rows} tokens of layers are not told (at most {MOST_UNSETTLED:.0%})"
    yield Check("trace-settled", unsettled <= MOST_UNSETTLED * rows, said)
    moved, uses = _moved(trace.selections, found.whole), total([found.whole])
    said = f"{moved} of {uses} uses were another expert's in one batch (at most {MOST_MOVED:.0%})"
    yield Check("two-accounts", moved <= MOST_MOVED * uses, said)


def _wrong(counts: Selections, experts: Experts, tokens: int) -> list[int]:
    """Layers in which not every token used as many experts as it does, or one expert twice."""
    if [len(c) for c in counts] != list(experts.of):
        return list(experts.layers)
    each = zip(counts, experts.used, experts.layers, strict=True)
    return [n for c, used, n in each if sum(c) != tokens * used or max(c) > tokens]


def _moved(some: Selections, others: Selections) -> int:
    """Uses that the one counts for another expert than the other, or not at all."""
    if [len(c) for c in some] != [len(c) for c in others]:
        return total([some, others])
    more = [a - b for one, other in zip(some, others, strict=True) for a, b in zip(one, other, strict=True)]
    return max(sum(d for d in more if d > 0), -sum(d for d in more if d < 0))


def again(folder: Path, r: Routed) -> tuple[str, ...]:
    """What speaks against a record by the present rules, its trace read anew; empty for one that can be shown."""
    if r.found is None or not r.done:
        return (r.message or ", ".join(r.reasons) or r.status,)
    try:
        return tuple(f"{c.id}: {c.measured}" for c in of(r.spec, r.found, routed.trace(folder, r)) if c.failed)
    except RecordError as err:
        return (str(err),)
