"""Traces and records of experts made by hand, and what the engine would have counted beside them."""

from dataclasses import replace

import factory
import numpy as np

from moelib.routing import checks, routed
from moelib.routing.passes import Experts
from moelib.routing.routed import Found, Routed, Spec
from moelib.routing.trace import Trace


def spec_of(**change):
    usual = Spec(
        study="s",
        model="deepseek-moe-16b",
        quant="F16",
        weights="twin",
        scale="nano",
        corpus="words",
        corpus_sha256="0" * 64,
        context=64,
        chunks=3,
        tokens=12,
        device="none",
        placement="baseline,threads=1",
        load_mode="mmap",
    )
    return replace(usual, **change)


def of_rows(*layers, experts):
    return Trace(tuple(np.array(rows, np.int32) for rows in layers), (experts,) * len(layers))


def shape_of(t):
    n = len(t.experts)
    return Experts(tuple(range(n)), tuple(r.shape[1] for r in t.experts), t.of)


def found_of(t, spec):
    """What could have been found beside a trace."""
    shape, n = shape_of(t), spec.context * spec.chunks
    used = shape.used[0]
    counts = tuple(tuple(n * used // e for _ in range(e)) for e in t.of)
    return Found(shape, counts, t.selections, (("llama-imatrix",),), 1.0)


def made(folder, spec, t, found=None, **change):
    """A record that was written, valid unless it is changed."""
    found = found or found_of(t, spec)
    name = routed.run_id(spec, 1)
    r = Routed(
        run_id=name,
        attempt=1,
        status="valid",
        reasons=(),
        message=None,
        spec=spec,
        sheet=factory.MANIFEST,
        engine=factory.ENGINE,
        device=factory.DEVICE,
        host=factory.HOST,
        started_utc="2026-11-27T00:00:00+00:00",
        found=found,
        audit=checks.of(spec, found, t),
        raw=routed.keep_trace(folder, name, t, found.experts),
    )
    return routed.write(folder, r.model_copy(update=change))


def sample(tokens=12, layers=3, experts=16, used=2, seed=0, skew=0.0, stay=0.0):
    """A trace whose experts are the more popular the lower `skew` puts them, and stay for a while with `stay`."""
    chance, every = np.random.default_rng(seed), []
    for _ in range(layers):
        weights = chance.permutation((1 + np.arange(experts)) ** -skew)
        rows = []
        for _ in range(tokens):
            again = rows and chance.random() < stay
            new = rows[-1] if again else np.sort(chance.choice(experts, used, False, weights / weights.sum()))
            rows.append(new)
        every.append(rows)
    return of_rows(*every, experts=experts)
