"""What quantising costs in what a model says, by the study's comparisons with the unquantised file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from moelib.audit.record import Record
from moelib.base import stats
from moelib.base.stats import Estimate
from moelib.quality import score, wanted
from moelib.quality.comparison import Comparison, Found
from moelib.study.study import Study

GOOD = 1.02
"""Perplexity, as a multiple of the unquantised file's, up to which a quant's quality is called good."""


@dataclass(frozen=True)
class Loss:
    """What one quant of a model lost over one text."""

    comparison: Comparison

    @property
    def model(self) -> str:
        return self.comparison.spec.model

    @property
    def quant(self) -> str:
        return self.comparison.spec.other.quant

    @property
    def corpus(self) -> str:
        return self.comparison.spec.corpus

    @property
    def found(self) -> Found:
        if self.comparison.found is None:
            raise ValueError(f"{self.comparison.run_id} found nothing")
        return self.comparison.found

    @cached_property
    def divergence(self) -> Estimate:
        """Mean Kullback-Leibler divergence from the unquantised file, in nats a token."""
        return score.divergence(self.found.chunks)

    @cached_property
    def perplexity_ratio(self) -> Estimate:
        return score.perplexity_ratio(self.found.chunks)

    def tail(self, name: str) -> Estimate:
        t = self.found.tails[name]
        return Estimate(t.value, t.low, t.high, len(self.found.chunks.kld))

    @property
    def is_good(self) -> bool | None:
        """Whether its perplexity is within `GOOD` times the unquantised file's; None where that cannot be told."""
        e = self.perplexity_ratio
        if e.low is None or e.high is None:
            return None
        return True if e.high <= GOOD else False if e.low > GOOD else None

    @property
    def sources(self) -> dict[str, str]:
        return self.comparison.cited


def losses(study: Study, corpus: str | None = None) -> list[Loss]:
    """Of every quant with a valid comparison with the unquantised file, model by model, in the study's order."""
    asked = study.parameters.quality
    order = {
        (m, q): (i, j) for i, m in enumerate(study.parameters.models) for j, q in enumerate(study.parameters.quants)
    }
    texts = {name: i for i, name in enumerate(asked.corpora)} if asked else {}
    found = [
        Loss(c)
        for c in study.comparisons
        if c.done and c.spec.kind == "quality" and corpus in (None, c.spec.corpus) and c.spec.corpus in texts
    ]
    return sorted(found, key=lambda x: (texts[x.corpus], *order.get((x.model, x.quant), (0, 0))))


def floors(study: Study, corpus: str) -> list[Loss]:
    """Every unquantised file against itself, its tokens taken in smaller batches: what rounding alone changes, where it
    changes most. Over the chunks that placements are compared over, of the study's first text."""
    most: dict[str, Loss] = {}
    for c in study.comparisons:
        if c.done and (c.spec.kind, c.spec.base.quant, c.spec.corpus) == ("floor", wanted.SOURCE, corpus):
            one, known = Loss(c), most.get(c.spec.model)
            if known is None or one.divergence.value > known.divergence.value:
                most[c.spec.model] = one
    return sorted(most.values(), key=lambda x: study.parameters.models.index(x.model))


def written(study: Study, placement: str) -> Iterator[tuple[Record, str, str]]:
    """(run, workload, text) of each file's first requests at a placement, in the first round."""
    for r in study.used:
        if not r.spec.block and r.spec.placement == placement:
            for q in r.observation.requests:
                if q.index == 0 and q.text is not None:
                    yield r, q.workload, q.text


def first_text(study: Study) -> str | None:
    """The corpus by which quants are compared; None where the study has none."""
    return study.parameters.quality.corpora[0] if study.parameters.quality else None


def differs(a: Loss, b: Loss) -> Estimate:
    """By how much the mean divergence of `b` is above that of `a`, in nats, paired by chunk of the same text."""
    if (a.found.tokens_sha256, len(a.found.chunks.kld)) != (b.found.tokens_sha256, len(b.found.chunks.kld)):
        raise ValueError(f"{a.comparison.run_id} and {b.comparison.run_id} are not of the same text")
    return stats.mean([y - x for x, y in zip(a.found.chunks.kld, b.found.chunks.kld, strict=True)])


def by_file(study: Study) -> dict[tuple[str, str], Loss]:
    """(model, quant) -> what it lost over the study's first text."""
    return {(x.model, x.quant): x for x in losses(study, first_text(study))}
