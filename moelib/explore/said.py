"""What the files of a study say: what each quant lost, and what each wrote after the same prompt, side by side."""

from __future__ import annotations

import pandas as pd

from moelib.answers import quality
from moelib.base.schema import UserError
from moelib.base.stats import Estimate
from moelib.evidence.table import reference
from moelib.explore.view import View
from moelib.quality import score, wanted


class NothingSaid(UserError):
    """The study has nothing of what its files say; the message says why."""


def lost(view: View) -> pd.DataFrame:
    """A row for each text and quant: perplexity against the unquantised file's, divergence from it in nats a token (its
    mean, and what one token in a thousand exceeds), and the share of tokens with the same likeliest one; each with its
    95 % interval over chunks. Raises NothingSaid."""
    rows = []
    for x in quality.losses(view.study):
        if x.model == view.model and x.quant in view.quants:
            row: dict[str, object] = {"text": x.corpus, "quant": x.quant, "chunks": len(x.found.chunks.kld)}
            for name, e in {
                "perplexity ratio": x.perplexity_ratio,
                "mean KLD": x.divergence,
                "99.9 % KLD": x.tail("kld_999"),
                "same top": score.same_top(x.found.chunks),
            }.items():
                row |= _with_interval(name, e)
            rows.append(row)
    if not rows:
        twin = view.study.parameters.weights == "twin"
        raise NothingSaid(
            wanted.TWIN if twin else f"no quality of {view.model} was measured: `moelib quality NAME` does"
        )
    return pd.DataFrame(rows)


def written(view: View) -> pd.DataFrame:
    """A row for each prompt of text, a column for each quant: what its file wrote in the first request of the first
    round, with most of it on the GPU. Raises NothingSaid."""
    if view.study.parameters.weights == "twin":
        raise NothingSaid("what random weights write is noise")
    told = {
        (workload, r.spec.quant): " ".join(text.split())
        for r, workload, text in quality.written(view.study, reference(view.study))
        if r.spec.model == view.model and r.spec.quant in view.quants
    }
    prompts = {name: w.text for name, w in view.study.workloads.items() if w.text is not None}
    rows: list[dict[str, str | None]] = [
        {"prompt": text, **{q: told.get((name, q)) for q in view.quants}}
        for name, text in prompts.items()
        if any((name, q) in told for q in view.quants)
    ]
    if not rows:
        raise NothingSaid("its records keep no text")
    return pd.DataFrame(rows)


def _with_interval(name: str, e: Estimate) -> dict[str, float | None]:
    return {name: _short(e.value), f"{name}, low": _short(e.low), f"{name}, high": _short(e.high)}


def _short(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.4g}")
