"""The plan's four questions, each answered by code from records: a verdict, and the numbers for it.

They are those of the public plan that this study follows: does CPU offload work equally well at all quants, is there a
sweet spot, how does the penalty change with the quant, how little VRAM is enough. What was not measured stays open, and
the verdict says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from moelib.answers import contrasts, points, quality
from moelib.answers.contrasts import MARGIN, Contrast
from moelib.base import stats
from moelib.base.neutral import markdown as neutral
from moelib.base.stats import number, percent, size
from moelib.catalogue.placement import REFERENCE
from moelib.study import frames
from moelib.study.frames import Comparison
from moelib.study.study import Study

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["yes", "no", "undecided", "supported", "refuted", "met", "not met", "open"]
OPEN = "quality of the published weights was not measured"
SHARED = "Runs shared their host (`exclusive: device`): their times are also those of what ran beside them."
"""Why no question about time is answered."""


@dataclass(frozen=True)
class Answer:
    """A question or claim, the verdict on it, and why."""

    asked: str
    verdict: Verdict
    because: tuple[str, ...]
    """Sentences with numbers."""
    sources: dict[str, str] = field(default_factory=dict)
    says: str = ""
    """The verdict in words, where yes or no would not answer."""

    @property
    def headline(self) -> str:
        return self.says or f"{self.verdict[0].upper()}{self.verdict[1:]}."


def merged(of: Iterable[Comparison | Contrast | points.Point]) -> dict[str, str]:
    return {k: v for one in of for k, v in one.sources.items()}


def offloads(study: Study, column: str) -> list[Comparison]:
    """All experts on the CPU against the baseline, in the baseline's load mode."""
    compared = frames.comparisons(study.runs, column, frames.in_one_load_mode)
    return [c for c in compared if c.ratio and c.against[0] == REFERENCE and c.side[0] == "cpu-moe"]


def _models(of: Iterable[Comparison]) -> list[str]:
    return list(dict.fromkeys(c.model for c in of))


def _by_size(study: Study) -> dict[str, float]:
    """Quant -> its bits per weight, the mean over models; infinite, so that it comes last, without a manifest."""
    bits: dict[str, list[float]] = {}
    for m in study.manifests:
        bits.setdefault(m.quant, []).append(m.bits_per_weight)
    mean = {quant: sum(of) / len(of) for quant, of in bits.items()}
    quants = sorted(study.parameters.quants, key=lambda quant: mean.get(quant, math.inf))
    return {quant: mean.get(quant, math.inf) for quant in quants}


def equally_well(study: Study) -> Answer:
    """1. Whether offload keeps the same share of the speed, and saves the same share of VRAM, at every quant."""
    asked = "Does CPU offload work equally well across all quants?"
    if study.host_shared:
        return Answer(asked, "open", (SHARED,))
    workload = study.parameters.workloads[-1]
    rate = offloads(study, column := f"tokens_per_s/{workload}")
    vram = offloads(study, "vram_bytes")
    judged = contrasts.of_ratios(study.runs, column, rate[0].side) if rate else []
    if not judged or not vram:
        return Answer(asked, "undecided", ("No model has two quants with a baseline and all experts on the CPU.",))
    sentences = []
    for model in _models(rate):
        kept = ", ".join(f"{percent(c.ratio.value)} at {c.quant}" for c in rate if c.model == model and c.ratio)
        saved = ", ".join(f"{percent(1 - c.ratio.value)}" for c in vram if c.model == model and c.ratio)
        pairs = [c for c in judged if c.model == model]
        sentences.append(
            f"{neutral(model)}: decoding kept {kept} of the baseline's tokens/s; {_counted(pairs)}. VRAM saved: "
            f"{saved}."
        )
    outcomes = {c.outcome for c in judged}
    verdict: Verdict = "no" if "different" in outcomes else "undecided" if "undecided" in outcomes else "yes"
    sentences.append(
        f"Equal means within {100 * MARGIN:.0f} % by two one-sided tests at 5 %, different at 5 % after Holm's "
        f"correction for {len(judged)} pairs."
    )
    return Answer(asked, verdict, tuple(sentences), merged([*rate, *vram, *judged]))


def _counted(pairs: Sequence[Contrast]) -> str:
    """`Q2_K against Q8_0 2.10 [2.00, 2.20], different; ...`."""
    return "; ".join(
        f"{neutral(c.first)} / {neutral(c.second)} {stats.estimate(c.ratio)}, {c.outcome}"
        f"{' (on different machines)' if c.apart else ''}"
        for c in pairs
    )


def sweet_spot(study: Study) -> Answer:
    """2. Which files and placements no other one beats in VRAM, tokens/s and TTFT."""
    asked = "Is there a sweet spot for local use?"
    if study.host_shared:
        return Answer(asked, "open", (SHARED,))
    found = points.measured(study, study.parameters.workloads[-1])
    if len(found) < 2:
        return Answer(asked, "undecided", ("Fewer than two files and placements were measured.",))
    sentences, bits = [], _by_size(study)
    for model in dict.fromkeys(p.model for p in found):
        judged = points.front([p for p in found if p.model == model])
        on_it = sorted((p for p, by in judged.items() if by is None), key=lambda p: p.vram_bytes)
        away = [p for p in on_it if not p.placement.is_baseline]
        sentences.append(
            f"{neutral(model)}: of {len(judged)} files and placements no other one beats these in VRAM, tokens/s"
            f"{', TTFT and quality' if any(p.divergence for p in on_it) else ' and TTFT'}: {_listed(on_it)}."
        )
        quants = {p.quant for p in away}
        if len(bits) > 1 and quants == {next(iter(bits))} and not quality.by_file(study):
            sentences.append(
                f"With experts on the CPU only {away[0].quant}, the smallest, is among them: it is the sweet spot if "
                "its text is good enough."
            )
    verdict, says, told, sources = _good_enough(study)
    return Answer(asked, verdict, (*sentences, *told), merged(found) | sources, says)


def _good_enough(study: Study) -> tuple[Verdict, str, list[str], dict[str, str]]:
    """(verdict, in words, sentences, records) on the smallest quant of each model whose quality is good."""
    lost = quality.by_file(study)
    if not lost:
        says = "Open for quality; for speed and VRAM see below."
        return "open", says, [f"Speed and VRAM alone do not make a sweet spot: {OPEN}."], {}
    chosen: dict[str, str | None] = {}
    sentences = []
    for model in dict.fromkeys(m for m, _ in lost):
        of = [lost[model, q] for q in _by_size(study) if (model, q) in lost]
        chosen[model] = next((x.quant for x in of if x.is_good), None)
        told = ", ".join(f"{stats.close(x.perplexity_ratio)} at {neutral(x.quant)}" for x in of)
        sentences.append(f"{neutral(model)}: perplexity against that of the unquantised file {told}.")
    allowed = f"perplexity at most {percent(quality.GOOD - 1)} above that of the unquantised file"
    sentences.append(
        f"Good means {allowed}, with 95 % confidence, over the text {neutral(quality.first_text(study) or '')}."
    )
    quants = set(chosen.values())
    sources = {k: v for x in lost.values() for k, v in x.sources.items()}
    if None in quants:
        some = [neutral(m) for m, q in chosen.items() if q is None]
        return "no", f"No quant of {', '.join(some)} is the smallest of good quality: none has it.", sentences, sources
    if len(quants) == 1:
        return "yes", f"{neutral(quants.pop() or '')} is the smallest file of good quality.", sentences, sources
    each = "; ".join(f"{neutral(q or '')} for {neutral(m)}" for m, q in chosen.items())
    return "yes", f"By model, the smallest file of good quality: {each}.", sentences, sources


def _listed(some: Sequence[points.Point]) -> str:
    return "; ".join(
        f"{p.quant} {p.placement.label} ({size(p.vram_bytes)}, {number(p.rate.value)} tokens/s"
        f"{f', {number(p.divergence.value)} nats lost' if p.divergence else ''})"
        for p in some
    )


def penalty(study: Study) -> Answer:
    """3. How many times slower decoding is with all experts on the CPU, by quant, and what it follows."""
    asked = "How does the speed penalty change with the quant?"
    if study.host_shared:
        return Answer(asked, "open", (SHARED,))
    workload = study.parameters.workloads[-1]
    rate = offloads(study, f"tokens_per_s/{workload}")
    if not rate:
        return Answer(asked, "undecided", ("No quant has both a baseline and all experts on the CPU.",))
    order, sentences = list(_by_size(study)), []
    pairs = contrasts.of_ratios(study.runs, f"tokens_per_s/{workload}", rate[0].side)
    for model in _models(rate):
        of = sorted((c for c in rate if c.model == model and c.ratio), key=lambda c: order.index(c.quant))
        times = ", ".join(f"{stats.estimate(stats.inverse(c.ratio))} times at {c.quant}" for c in of if c.ratio)
        sentences.append(f"{neutral(model)}: decoding was slower by {times}.")
        sentences += _why(of)
    steps = [_step(c, order) for c in pairs]
    if not steps:
        return Answer(asked, "undecided", ("No two quants were measured side by side.", *sentences), merged(rate))
    grown = f"{steps.count('grows')} of {len(steps)} pairs of quants"
    if "falls" in steps:
        verdict: Verdict = "no"
        says = "It does not grow with every bit per weight: at some quant with more of them it is smaller."
    elif steps and set(steps) == {"grows"}:
        verdict, says = "yes", f"It grows with the bits per weight, in each of {len(steps)} pairs of quants."
    else:
        verdict, says = "undecided", f"It grows with the bits per weight in {grown}; in the others it cannot be told."
    return Answer(asked, verdict, tuple(sentences), merged([*rate, *pairs]), says)


def _step(c: Contrast, order: Sequence[str]) -> str:
    """Whether the penalty grows or falls from the quant with fewer bits per weight to the one with more."""
    if not c.is_told:
        return "unknown"
    first_keeps_more, first_is_smaller = c.ratio.value > 1, order.index(c.first) < order.index(c.second)
    return "grows" if first_keeps_more == first_is_smaller else "falls"


def _why(of: Sequence[Comparison]) -> Iterator[str]:
    """What a token takes longer, and what of the experts it reads from RAM for that."""
    parts, speeds = [], []
    for c in of:
        if c.baseline and c.value:
            extra, read = 1 / c.value.value - 1 / c.baseline.value, float(c.after["ram_read_bytes"].iloc[0])
            parts.append(f"{number(extra, 1e3)} ms for {size(read)} at {neutral(c.quant)}")
            speeds.append(read / extra / 1e9)
    if parts:
        yield (
            f"A token took longer by {', '.join(parts)} of experts that it reads from RAM: "
            f"{stats.span(speeds, number)} GB/s."
        )


def least_vram(study: Study) -> Answer:
    """4. How little VRAM is enough for each quant with all experts on the CPU."""
    asked = "What is the minimum VRAM needed for each quant with offload?"
    runs = study.runs
    away = runs[runs["moved_bytes"] > 0]
    if away.empty:
        return Answer(asked, "undecided", ("No run has its experts on the CPU.",))
    away = away[away["vram_needed_bytes"].notna()]
    if away.empty:
        return Answer(asked, "open", ("VRAM was not measured: no run has a device.",), frames.sources(runs))
    sentences, least = [], []
    for model, of_model in away.groupby("model", sort=False):
        needed, sentence = _needed(of_model)
        least += needed
        sentences.append(f"{neutral(model)}: {sentence}.")
    sentences.append("The cache's share is the engine's buffer over its context: a cache with windows grows less.")
    says = f"{stats.span(least, size)}{', by model and quant' if len(least) > 1 else ''}."
    return Answer(asked, "yes", tuple(sentences), frames.sources(away), says)


def _needed(runs: pd.DataFrame) -> tuple[list[float], str]:
    """(least bytes of each quant of a model, what each needs at each context and what more context takes)."""
    least: list[float] = []
    told: dict[tuple[int, str, str], list[str]] = {}
    longer: dict[str, list[str]] = {}
    for quant, of_file in runs.groupby("quant", sort=False):
        sides = of_file.groupby(["context_tokens", "placement", "load_mode"], sort=False)
        most, grows = sides[["vram_needed_bytes", "vram_cache_bytes"]].max(), 0.0
        for context, of_context in most.groupby("context_tokens"):
            at = of_context["vram_needed_bytes"].idxmin()
            needed, cache = map(float, of_context.loc[at])
            told.setdefault((int(context), *at[1:]), []).append(f"{size(needed)} at {neutral(quant)}")
            grows = max(grows, cache / float(context) * 1024)
        least.append(float(most["vram_needed_bytes"].min()))
        if grows > 0:
            longer.setdefault(size(grows), []).append(neutral(quant))
    needs = "; ".join(
        f"{', '.join(of)} with {context:,} tokens of context ({placement}, {mode})"
        for (context, placement, mode), of in sorted(told.items())
    )
    several = len(longer) > 1
    more = [f"{grows} more" + f" ({', '.join(of)})" * several for grows, of in longer.items()]
    return least, f"{needs}; {' or '.join(more)} for each 1,024 tokens of context" if more else needs


ANSWERS = (equally_well, sweet_spot, penalty, least_vram)
