"""Files of log-probabilities as llama-perplexity writes them, and a text to score, for tests."""

import struct

import numpy as np

from moelib.quality import logprobs

PROSE = "It was a bright cold day, and the clocks were striking; nobody in the long street knew {} from {}. "


def prose(words=4000):
    """A text that does not repeat, of about `words` words."""
    return "".join(PROSE.format(i * 7919 % 1000, i * 104729 % 1000) for i in range(words // 18))


def pack(tokens, logits, context):
    """The bytes of a file: tokens [chunks, context], logits [chunks, scored, vocabulary]."""
    chunks, _, vocabulary = logits.shape
    out = [logprobs.MAGIC, struct.pack("<iii", context, vocabulary, chunks), tokens.astype("<i4").tobytes()]
    for row in logits.reshape(-1, vocabulary).astype(np.float32):
        most = row.max()
        least = max(row.min(), most - 16)
        normaliser = most + np.log(np.exp(row - most).sum())
        scale = np.float32((most - least) / 65535)
        out.append(struct.pack("<ff", scale, least - normaliser))
        steps = np.rint((np.maximum(row, least) - least) / scale) if scale else np.zeros(vocabulary)
        out.append(steps.astype("<u2").tobytes() + bytes(2 * (vocabulary % 2)))
    return b"".join(out)


def write(path, seed=0, noise=0.0, chunks=4, context=16, vocabulary=33, spread=1.5):
    """Random logits at `path`; with `noise`, those of the same seed disturbed. Returns (tokens, log-probabilities)."""
    chance = np.random.default_rng(seed)
    tokens = chance.integers(0, vocabulary, (chunks, context))
    logits = chance.normal(0, spread, (chunks, logprobs.scored(context), vocabulary))
    logits = logits + noise * np.random.default_rng(seed + 1).normal(0, 1, logits.shape)
    path.write_bytes(pack(tokens, logits, context))
    most = logits.max(-1, keepdims=True)
    return tokens, logits - most - np.log(np.exp(logits - most).sum(-1, keepdims=True))
