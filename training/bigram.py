"""The baseline that a model must beat: a bigram model of token ids with interpolated Kneser-Ney smoothing."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bigram:
    """p(w | v) = max(c(v w) - d, 0) / c(v) + d n(v) / c(v) p(w), where n(v) counts the words seen after v.

    p(w) is the share of different words that w was seen after, plus one for each w, so that none has probability 0.
    """

    counts: Floats
    """(vocabulary, vocabulary): how often the column's token followed the row's."""
    discount: float

    @property
    def continuation(self) -> Floats:
        """p(w), (vocabulary,)."""
        before = (self.counts > 0).sum(0) + 1.0
        return before / before.sum()

    def log_probs(self, first: npt.NDArray[np.integer], second: npt.NDArray[np.integer]) -> Floats:
        """Natural logarithm of p(second | first), element by element."""
        back = self.continuation
        total, kinds = self.counts.sum(1), (self.counts > 0).sum(1)
        known = np.maximum(self.counts[first, second] - self.discount, 0.0)
        seen = total[first]
        with np.errstate(divide="ignore", invalid="ignore"):
            mixed = (known + self.discount * kinds[first] * back[second]) / seen
        return np.log(np.where(seen > 0, mixed, back[second]))


def fit(ids: npt.NDArray[np.integer], vocab: int) -> Bigram:
    """Count `ids`; the discount is n1 / (n1 + 2 n2), of pairs seen once and twice. Raises ValueError for no pair."""
    if len(ids) < 2:
        raise ValueError("a bigram model needs two tokens at least")
    flat = ids[:-1].astype(np.int64) * vocab + ids[1:]
    counts = np.bincount(flat, minlength=vocab * vocab).reshape(vocab, vocab)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice) if once else 0.5
    return Bigram(counts.astype(np.float64), float(discount))
