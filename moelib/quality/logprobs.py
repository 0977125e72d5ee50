"""The file of log-probabilities that `llama-perplexity --kl-divergence-base` writes, read chunk by chunk.

Its layout (llama.cpp b11434, tools/perplexity): 8 bytes of magic; context, vocabulary and number of chunks as 32-bit
integers; the chunks' token ids; then, for each token of a chunk's second half but the last, a row of 16-bit integers:
two 32-bit floats, scale and smallest log-probability, and one integer per token id, so that log p = scale * integer +
smallest. What is less likely than e^-16 of the likeliest token is stored as that.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moelib.base import files
from moelib.base.schema import UserError

MAGIC = b"_logits_"
HEAD_BYTES = 20
MAX = 1 << 30  # of any count in the head: far above any model, and far below what would overflow
ROWS = 64  # looked at together: 26 MB at a vocabulary of 102,400


class LogProbsError(UserError):
    """The file is not what a whole pass writes; the message says why."""


def bytes_of(context: int, vocabulary: int, chunks: int) -> int:
    """Size in bytes of the file of a whole pass."""
    return HEAD_BYTES + chunks * (4 * context + scored(context) * _row_bytes(vocabulary))


def scored(context: int) -> int:
    """Tokens of a chunk that are predicted: those of its second half, which have a context of their own, but the
    first."""
    return context - 1 - context // 2


def _row_bytes(vocabulary: int) -> int:
    return 2 * (2 * ((vocabulary + 1) // 2) + 4)


@dataclass(frozen=True)
class LogProbs:
    """A whole file."""

    path: Path
    context: int
    vocabulary: int
    chunks: int

    @classmethod
    def read(cls, path: Path) -> "LogProbs":
        """Raises LogProbsError if it is not there, cut short, or of another form."""
        try:
            head, size = files.head(path, HEAD_BYTES), path.stat().st_size
        except OSError as err:
            raise LogProbsError(f"{path.name} cannot be read ({err.strerror or err})") from None
        if len(head) < HEAD_BYTES or not head.startswith(MAGIC):
            raise LogProbsError(f"{path.name} does not begin as a file of log-probabilities does: it was cut short")
        context, vocabulary, chunks = (int(n) for n in np.frombuffer(head[len(MAGIC) :], "<i4"))
        if not (4 <= context < MAX and 2 <= vocabulary < MAX and 1 <= chunks < MAX):
            raise LogProbsError(f"{path.name} tells of {chunks} chunks of {context} tokens out of {vocabulary}")
        if size != (whole := bytes_of(context, vocabulary, chunks)):
            raise LogProbsError(
                f"{path.name} has {size:,} bytes instead of {whole:,}: it was cut short, or is no such file"
            )
        return cls(path, context, vocabulary, chunks)

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """The text: ids, [chunks, context]. Raises LogProbsError for one outside the vocabulary."""
        count = self.chunks * self.context
        ids = np.fromfile(self.path, "<i4", count, offset=HEAD_BYTES).reshape(self.chunks, self.context)
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise LogProbsError(f"{self.path.name} has token ids outside its vocabulary")
        return ids

    def targets(self, chunk: int) -> NDArray[np.int32]:
        """The ids that a chunk's rows predict, [scored]."""
        return self.tokens[chunk, self.context - scored(self.context) :]

    @cached_property
    def sha256_of_tokens(self) -> str:
        """Of all ids, as little-endian 32-bit integers: two files of the same are of the same text, cut alike."""
        return hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()

    def rows(self, chunk: int) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """(which of the chunk's scored tokens, their log-probabilities [rows, vocabulary]).

        Raises LogProbsError for values that are no log-probabilities.
        """
        n, width = scored(self.context), _row_bytes(self.vocabulary) // 2
        start = HEAD_BYTES + 4 * self.chunks * self.context + 2 * chunk * n * width
        held = np.memmap(self.path, "<u2", "r", start, (n, width))
        for first in range(0, n, ROWS):
            part = np.asarray(held[first : first + ROWS])
            scale, least = part[:, :4].copy().view("<f4").T
            if not (np.isfinite(scale).all() and np.isfinite(least).all() and (scale >= 0).all()):
                raise LogProbsError(f"{self.path.name} has values that are no numbers: the file's weights may hold NaN")
            values = part[:, 4 : 4 + self.vocabulary] * scale[:, None] + least[:, None]
            if (values > 1e-3).any() or not math.isfinite(float(values.min())):
                raise LogProbsError(f"{self.path.name} has probabilities above 1")
            yield slice(first, first + len(part)), values.astype(np.float32)
