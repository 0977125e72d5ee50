"""What is believed of a comparison: the invariants that it must hold, and what it says of a placement.

A placement is judged by what rounding alone does to the same file, so that neither rounding is called a defect nor a
defect rounding.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moelib.audit.record import Check, RecordError
from moelib.gguf.gguf_header import UNQUANTISED
from moelib.quality import comparison, score
from moelib.quality.comparison import Comparison, Found, Spec
from moelib.quality.score import Chunks, Scores

AGREE = {"perplexity": 1e-4, "base_perplexity": 1e-4, "kld": 0.01, "kld_99": 0.01, "kld_999": 0.01, "rms_p_diff": 0.01}
"""How far, as a share, the tool's own figures may be from those computed here: it rounds what it prints, and writes
log-probabilities with 16 bits."""
ROUNDED = {"kld": 2e-5, "kld_99": 1e-4, "kld_999": 1e-4, "rms_p_diff": 1e-4, "same_top": 0.005}
"""The same, absolutely."""
DEPTH = 16.0
"""Nats below the likeliest token at which llama-perplexity cuts off what it writes."""
LEAST_KLD = -DEPTH / 65535 / 2
"""Of a chunk, in nats: half a step of the 16 bits that a log-probability is written with, as rounding may leave where
nothing diverges; -1.5e-5 was seen of F16 on an H100, in batches of 8 tokens."""
MOST_DEEPER = 10.0
"""Nats by which such tokens may be deeper, in the mean: 2.2 was seen."""
OWN_TOLERANCE = 5e-4
"""NMSE up to which llama.cpp's own tests take two backends' results of a matrix product for the same: the limit where
nothing shows what rounding does to a file."""
TIMES_FLOOR, LEAST_LIMIT = 3.0, 1e-5
"""Of the NMSE that other batches make, 1e-6 to 3e-6 for F16: at most 1.6 times was seen of experts computed by the CPU
instead of an H100 (docs/QUALITY.md), and 0.4 times on loopback."""
Verdict = Literal["identical", "rounding", "differs"]


def of(spec: Spec, found: Found, base_types: Sequence[str], scores: Scores | None) -> tuple[Check, ...]:
    """The checks of a comparison; `scores`: its tokens, where they are at hand."""
    return tuple(_each(spec, found, base_types, scores))


def _each(spec: Spec, found: Found, base_types: Sequence[str], scores: Scores | None) -> Iterator[Check]:
    n = len(found.chunks.kld)
    yield Check("all-chunks", n == spec.chunks, f"{n} of {spec.chunks} chunks of {found.scored} scored tokens")
    least, most = min(found.chunks.kld), max(found.chunks.same_top)
    possible = least >= LEAST_KLD and 0 <= min(found.chunks.same_top) <= most <= 1 and min(found.chunks.nll) > 0
    yield Check(
        "possible", possible, f"smallest mean divergence of a chunk {least:.2g} nats, same top at most {most:.3f}"
    )
    if spec.kind == "quality":
        wrong = sorted(set(base_types) - UNQUANTISED)
        said = f"{spec.base.quant} has {', '.join(sorted(set(base_types)))}"
        yield Check("base-unquantised", not wrong, said)
        base = score.base_perplexity(found.chunks).value
        yield Check(
            "base-knows-the-text",
            base < found.vocabulary / 2,
            f"perplexity of the base {base:.4g}, of chance {found.vocabulary}",
        )
        yield _accounts(found, scores)
    if scores is not None:
        yield _recomputed(found, scores)


def again(folder: Path, c: Comparison) -> list[str]:
    """What does not hold of a valid comparison by the checks of today, from its record and its tokens; empty if all
    does."""
    if c.found is None:
        return ["it found nothing"]
    try:
        scores = comparison.tokens(folder, c)
    except RecordError as err:
        return [str(err)]
    return [f"{k.id}: {k.measured}" for k in of(c.spec, c.found, tuple(c.base.tensor_types), scores) if k.failed]


def own(found: Found) -> dict[str, float]:
    """What is computed here, by the names of what the tool tells."""
    c = found.chunks
    return {
        "perplexity": score.perplexity(c).value,
        "base_perplexity": score.base_perplexity(c).value,
        "kld": score.divergence(c).value,
        "kld_99": found.tails["kld_99"].value,
        "kld_999": found.tails["kld_999"].value,
        "rms_p_diff": score.rms_p_diff(c).value,
        "same_top": score.same_top(c).value,
    }


def deeper(s: Scores) -> float:
    """Nats by which the mean over all tokens may be more than is told of them, as some are cut off; 0 where none is."""
    return MOST_DEEPER * float((s.nll > DEPTH - 0.01).mean())


def _accounts(found: Found, scores: Scores | None) -> Check:
    """The tool computes the same, from its own logits of the other file, which are neither rounded to 16 bits nor cut
    off: a token that lies deeper than DEPTH is as deep as it is in its perplexity, and DEPTH deep in what it writes."""
    if found.tool is None:
        return Check("two-accounts", False, "llama-perplexity's own comparison is missing")
    here, tool, deep = own(found), found.tool, 0.0 if scores is None else deeper(scores)

    def agrees(name: str, value: float) -> bool:
        most = AGREE.get(name, 0) * abs(value) + ROUNDED.get(name, 0)
        above = value * math.expm1(deep) if name == "perplexity" else 0.0
        return name in tool and -most <= tool[name] - value <= most + above

    off = {name: (tool.get(name), value) for name, value in here.items() if not agrees(name, value)}
    told = ", ".join(
        f"{name} {a} by the tool, {b:.6g} here"
        for name, (a, b) in (off or {"kld": (tool.get("kld"), here["kld"])}).items()
    )
    return Check("two-accounts", not off, told)


def _recomputed(found: Found, scores: Scores) -> Check:
    """The stored means are those of the stored tokens."""
    again, off = Chunks.of(scores), 0.0
    for name in Chunks.__dataclass_fields__:
        for a, b in zip(getattr(again, name), getattr(found.chunks, name), strict=True):
            off = max(off, abs(a - b) / max(abs(b), 1e-3))
    return Check("tokens-fit", off < 1e-3, f"chunk means from the stored tokens are within {off:.1g} of those recorded")


@dataclass(frozen=True)
class Sameness:
    """One file at two placements: whether both say the same."""

    comparison: Comparison
    verdict: Verdict
    nmse: float
    """Of the logits."""
    limit: float
    """Up to which it is rounding."""
    floors: tuple[Comparison, ...]
    """The same file in other batches."""

    @property
    def sources(self) -> dict[str, str]:
        return {name: digest for c in (self.comparison, *self.floors) for name, digest in c.cited.items()}

    @property
    def line(self) -> str:
        s = self.comparison.spec
        return (
            f"{s.model}, {s.other} against {s.base}: {self.verdict}, NMSE of the logits {self.nmse:.2g} "
            f"(rounding up to {self.limit:.2g})"
        )


def sameness(comparisons: Sequence[Comparison]) -> list[Sameness]:
    """Every placement that was compared with the same file all on the device, judged by what rounding alone does."""
    done = [c for c in comparisons if c.done]
    floors: dict[tuple[str, str], list[Comparison]] = {}
    for c in done:
        if c.spec.kind == "floor":
            floors.setdefault((c.spec.model, c.spec.other.quant), []).append(c)
    return [
        _judged(c, tuple(floors.get((c.spec.model, c.spec.other.quant), ())))
        for c in done
        if c.spec.kind == "placement"
    ]


def _judged(placement: Comparison, floors: tuple[Comparison, ...]) -> Sameness:
    limit = max(LEAST_LIMIT, TIMES_FLOOR * max(map(nmse, floors))) if floors else OWN_TOLERANCE
    value = nmse(placement)
    return Sameness(
        placement, "identical" if value == 0 else "rounding" if value <= limit else "differs", value, limit, floors
    )


def nmse(c: Comparison) -> float:
    """Error of the logits, as a share of their variance."""
    if c.found is None:
        raise ValueError(f"{c.run_id} found nothing")
    return score.nmse(c.found.chunks).value
