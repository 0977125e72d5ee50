"""A committed study as if its weights were real and what its files say had been compared; none of it is written."""

from dataclasses import replace

import numpy as np
import real_weights

from moelib.catalogue import corpora, params
from moelib.quality import checks, comparison, score
from moelib.quality.comparison import Comparison, Found, Side, Spec
from moelib.study.study import Study

CHUNKS, SCORED = 12, 50


def scores(divergence, ratio, seed=0):
    """Tokens whose divergence is about `divergence` nats, and whose perplexity is `ratio` times the base's."""
    chance, shape = np.random.default_rng(seed), (CHUNKS, SCORED)
    base = chance.gamma(2, 1.0, shape)
    kld = divergence * chance.gamma(1, 1.0, shape)
    same, power = chance.random(shape) > divergence, np.full(shape, 50.0)
    return score.Scores(base, base + np.log(ratio), kld, same, power * divergence / 10, power)


def found(s, quality=True):
    made = Found(
        tokens_sha256="0" * 64,
        vocabulary=32_000,
        scored=SCORED,
        chunks=score.Chunks.of(s),
        tails=score.tails(s),
        tool=None,
        argv=(),
        seconds=1.0,
    )
    return replace(made, tool=checks.own(made)) if quality else made


def compared(study, base, other, s, corpus="prose"):
    """A valid comparison of `base` with `other`, (model, quant, placement) each."""
    model, quant, placement = other
    text = corpora.corpus(corpus)
    manifest = next(m for m in study.manifests if (m.model, m.quant) == (model, quant))
    unquantised = manifest.model_copy(update={"quant": "F16", "tensor_types": {"F16": 9, "F32": 9}})
    record = next(r for r in study.records if (r.spec.model, r.spec.quant) == (model, quant))
    spec = Spec(
        study=study.name,
        model=model,
        weights=study.parameters.weights,
        scale=study.parameters.scale,
        corpus=corpus,
        corpus_sha256=text.sha256,
        context=2 * SCORED + 2,
        chunks=CHUNKS,
        device="cuda",
        base=Side(*base, "mmap"),
        other=Side(quant, placement, "mmap"),
    )
    return Comparison(
        run_id=comparison.run_id(spec, 1),
        attempt=1,
        status="valid",
        reasons=(),
        message=None,
        spec=spec,
        base=unquantised if base[0] == "F16" else manifest,
        other=manifest,
        engine=record.engine,
        device=record.device,
        host=record.host,
        started_utc=record.started_utc,
        found=found(s, base[0] != quant),
        audit=(),
        raw={},
        digest=f"{abs(hash(comparison.run_id(spec, 1))):064x}"[:64],
    )


def with_quality(study, lost, corpora_named=("prose",)):
    """`study` of real weights, with a comparison for each (model, quant) -> (divergence, perplexity ratio)."""
    study = real_weights.real(study)
    parameters = study.parameters.model_copy(update={"quality": params.Quality(corpora=corpora_named, chunks=CHUNKS)})
    made = [
        compared(study, ("F16", "baseline"), (model, quant, "baseline"), scores(*how), corpus)
        for (model, quant), how in lost.items()
        for corpus in corpora_named
    ]
    for model, quant in lost:
        for placement, off in (("baseline,ubatch=8", 1e-4), ("cpu-moe", 2e-4)):
            made.append(compared(study, (quant, "baseline"), (model, quant, placement), scores(off, 1.0)))
    plan = study.plan.model_copy(update={"study": parameters})
    return Study(study.path, plan, replace(study.contents, comparisons=tuple(made)))
