"""Two files of log-probabilities of one text, compared token by token; and what the tokens say together.

Tokens of one chunk share a context, so that they are not independent: every interval here takes a chunk as one
observation. Treating each token as one gives intervals that are several times too narrow.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moelib.base import stats
from moelib.base.bar import tqdm
from moelib.base.files import stored
from moelib.base.stats import Estimate
from moelib.quality.logprobs import LogProbs, LogProbsError, scored

UNLIKELY = -16.0
"""Log-probability up to which a token of the base counts for nothing in the divergence, as for llama-perplexity."""
DRAWS, SEED = 1000, 0  # of chunks, for the intervals of tails


@dataclass(frozen=True)
class Scores:
    """Of each scored token, [chunks, scored]; logarithms are natural, so that divergences are in nats."""

    base_nll: NDArray[np.float64]
    """-log p of the token that follows, by the base."""
    nll: NDArray[np.float64]
    kld: NDArray[np.float64]
    """Kullback-Leibler divergence of the other from the base: what it loses in bits of the base's distribution."""
    same_top: NDArray[np.bool_]
    """Whether both find the same token the likeliest."""
    error: NDArray[np.float64]
    """Squared differences of the logits, which are the log-probabilities but for a constant, less their mean."""
    power: NDArray[np.float64]
    """Squares of the base's logits, less their mean."""

    @property
    def p_diff(self) -> NDArray[np.float64]:
        """By how much the probability of the token that follows grew."""
        return np.exp(-self.nll) - np.exp(-self.base_nll)


def compare(base: LogProbs, other: LogProbs) -> Scores:
    """Raises LogProbsError if they are not of the same text, cut alike, or hold what is no log-probability."""
    for name in ("context", "vocabulary", "chunks", "sha256_of_tokens"):
        if getattr(base, name) != getattr(other, name):
            raise LogProbsError(f"{other.path.name} is not of the text of {base.path.name}: their {name} differ")
    shape = (base.chunks, scored(base.context))
    floats = [np.empty(shape) for _ in range(5)]
    base_nll, nll, kld, error, power = floats
    same = np.empty(shape, bool)
    for chunk in tqdm(range(base.chunks), desc="comparing", unit="chunk", delay=2, disable=None, leave=False):
        targets = base.targets(chunk)
        for (rows, p), (_, q) in zip(base.rows(chunk), other.rows(chunk), strict=True):
            at = np.arange(len(p)), targets[rows]
            base_nll[chunk, rows], nll[chunk, rows] = -p[at], -q[at]
            counted = p > UNLIKELY
            kld[chunk, rows] = np.where(counted, np.exp(p, dtype=np.float64) * (p - q), 0).sum(1)
            same[chunk, rows] = p.argmax(1) == q.argmax(1)
            centred, off = p - p.mean(1, keepdims=True), (p - q) - (p - q).mean(1, keepdims=True)
            error[chunk, rows] = np.square(off, dtype=np.float64).sum(1)
            power[chunk, rows] = np.square(centred, dtype=np.float64).sum(1)
    for values in floats:
        if not np.isfinite(values).all():
            raise LogProbsError(f"{other.path.name} has scores that are no numbers")
    return Scores(base_nll, nll, kld, same, error, power)


@stored
class Chunks:
    """Means over the scored tokens of each chunk, which are what is observed."""

    base_nll: tuple[float, ...]
    nll: tuple[float, ...]
    kld: tuple[float, ...]
    same_top: tuple[float, ...]
    p_diff_squared: tuple[float, ...]
    error: tuple[float, ...]
    power: tuple[float, ...]

    @classmethod
    def of(cls, s: Scores) -> "Chunks":
        own = {name: getattr(s, name) for name in ("base_nll", "nll", "kld", "same_top", "error", "power")}
        means = {k: v.mean(1) for k, v in (own | {"p_diff_squared": np.square(s.p_diff)}).items()}
        return cls(**{k: tuple(float(x) for x in v) for k, v in means.items()})


@stored
class Tail:
    """A quantile of all tokens, with its interval from chunks drawn anew; no interval of one chunk."""

    value: float
    low: float | None
    high: float | None


def tails(s: Scores) -> dict[str, Tail]:
    """The divergence that one token in a hundred, and one in a thousand, exceeds; and the largest."""
    return {"kld_99": _tail(s.kld, 0.99), "kld_999": _tail(s.kld, 0.999), "kld_max": _tail(s.kld, 1)}


def _tail(values: NDArray[np.float64], share: float) -> Tail:
    value, n = float(np.quantile(values, share)), len(values)
    if n < 2:
        return Tail(value, None, None)
    chance = np.random.default_rng(SEED)
    drawn = [np.quantile(values[chance.integers(0, n, n)], share) for _ in range(DRAWS)]
    low, high = np.quantile(drawn, [(1 - stats.LEVEL) / 2, (1 + stats.LEVEL) / 2])
    return Tail(value, float(low), float(high))


def perplexity(c: Chunks) -> Estimate:
    return _exp(stats.mean(c.nll))


def base_perplexity(c: Chunks) -> Estimate:
    return _exp(stats.mean(c.base_nll))


def perplexity_ratio(c: Chunks) -> Estimate:
    """Of the other to the base."""
    return _exp(stats.mean([q - p for p, q in zip(c.base_nll, c.nll, strict=True)]))


def divergence(c: Chunks) -> Estimate:
    """Mean, in nats."""
    return stats.mean(c.kld)


def rms_p_diff(c: Chunks) -> Estimate:
    e = stats.mean(c.p_diff_squared)
    low, high = (None if x is None else math.sqrt(max(0.0, x)) for x in (e.low, e.high))
    return Estimate(math.sqrt(e.value), low, high, e.n)


def same_top(c: Chunks) -> Estimate:
    """Share of tokens of which both find the same one the likeliest."""
    e = stats.mean(c.same_top)
    low, high = (None if x is None else min(1.0, max(0.0, x)) for x in (e.low, e.high))
    return Estimate(e.value, low, high, e.n)


def nmse(c: Chunks) -> Estimate:
    """Error of the logits as a share of their variance, with the interval of its linear approximation."""
    parts, wholes = np.array(c.error), np.array(c.power)
    if not wholes.mean():
        raise ValueError("all logits of the base are alike")
    value = float(parts.mean() / wholes.mean())
    spread = stats.mean([float(v) for v in value + (parts - value * wholes) / wholes.mean()])
    return Estimate(value, None if spread.low is None else max(0.0, spread.low), spread.high, len(parts))


def _exp(e: Estimate) -> Estimate:
    low, high = (None if x is None else math.exp(x) for x in (e.low, e.high))
    return Estimate(math.exp(e.value), low, high, e.n)
