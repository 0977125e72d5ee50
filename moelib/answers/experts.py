"""Which experts texts use: balance and what a cache would hit, of every record that holds by the present rules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moelib.routing import balance, cache, checks, routed
from moelib.routing.balance import Balance
from moelib.routing.cache import Curve
from moelib.routing.passes import Selections
from moelib.routing.routed import Found, Routed
from moelib.routing.trace import Trace

SIZES = {"1/4": 0.25, "1/2": 0.5, "3/4": 0.75}
"""Of a cache, as shares of all experts of a layer."""
TWIN = "geometry twin"
NOTE = (
    "*Evenness*: entropy of the experts' shares of all uses over that of even shares, mean over layers and the least; "
    "*busiest*: uses of the most used expert over the mean, mean over layers and the most; both are 1 where all are "
    "used alike. *Unused*: experts that no token of the text used. *Hits*: share of accesses that a cache of so many "
    "of each layer's experts would hit over the trace: LRU, beginning empty / LRU over the same tokens in random "
    "order, which is what popularity alone gives / the most used experts of this very text, never replaced. A "
    "simulation of accesses on one text: it tells nothing of time, and a text of another kind may use other experts."
)


@dataclass(frozen=True)
class Used:
    """The use of a file's experts over a text."""

    routed: Routed
    found: Found
    trace: Trace

    @property
    def is_twin(self) -> bool:
        return self.routed.spec.weights == "twin"

    @property
    def name(self) -> str:
        s = self.routed.spec
        return f"{s.model} {s.quant}{f' ({TWIN})' if self.is_twin else ''}"

    @property
    def counts(self) -> Selections:
        return self.found.counts

    @cached_property
    def layers(self) -> tuple[Balance, ...]:
        return balance.of_layers(self.counts)

    @cached_property
    def overall(self) -> Balance:
        return balance.overall(self.counts)

    @cached_property
    def curve(self) -> Curve | None:
        """None where layers differ in how many experts they have or use: no size is one for all of them."""
        try:
            return cache.curve(self.trace)
        except ValueError:
            return None


def used(folder: Path, keys: Collection[str] | None = None) -> list[Used]:
    """What stands in a study's folder and holds, or of that what was asked under `keys`, twins last."""
    known = routed.standing(routed.read_all(folder)[0])
    held = [r for k, r in known.items() if (keys is None or k in keys) and not checks.again(folder, r)]
    every = [Used(r, r.found, routed.trace(folder, r)) for r in held if r.found]
    return sorted(every, key=lambda u: (u.routed.spec.model, u.is_twin, u.routed.run_id))


def rows(every: Sequence[Used]) -> list[dict[str, str]]:
    """Of a table, one for each."""
    return [_row(u) for u in every]


def _row(u: Used) -> dict[str, str]:
    spec, experts = u.routed.spec, u.found.experts
    each = sorted({f"{used} of {n}" for used, n in zip(experts.used, experts.of, strict=True)})
    row = {
        "model": spec.model,
        "quant": spec.quant,
        "weights": TWIN if u.is_twin else "trained",
        "text": f"{spec.corpus}, {spec.chunks * spec.context:,} tokens",
        "layers": str(len(experts.layers)),
        "experts": ", ".join(each),
        "evenness": f"{u.overall.evenness:.3f}, least {min(b.evenness for b in u.layers):.3f}",
        "busiest": f"{u.overall.busiest:.1f}, most {max(b.busiest for b in u.layers):.1f}",
        "unused": f"{u.overall.dead} of {u.overall.experts}",
        "trace": f"{spec.tokens} tokens",
    }
    for name, share in SIZES.items():
        row[f"hits of {name}"] = "n/a" if u.curve is None else _hits(u.curve, share)
    return row


def _hits(c: Curve, share: float) -> str:
    i = c.at(share)
    return f"{c.lru[i]:.0%} / {c.shuffled[i]:.0%} / {c.static[i]:.0%} (k = {c.k[i]})"
