"""Files of log-probabilities read, and two of them compared, against hand calculations."""

import math
import struct

import numpy as np
import pytest
import texts

from moelib.base import stats
from moelib.quality import logprobs, score
from moelib.quality.logprobs import LogProbs, LogProbsError


def everything(file):
    return np.stack([np.concatenate([rows for _, rows in file.rows(c)]) for c in range(file.chunks)])


@pytest.mark.parametrize("vocabulary", [33, 64])
def test_a_file_is_read_as_it_was_written(tmp_path, vocabulary):
    tokens, wrote = texts.write(tmp_path / "a", vocabulary=vocabulary)
    file = LogProbs.read(tmp_path / "a")
    assert (file.context, file.vocabulary, file.chunks) == (16, vocabulary, 4)
    assert (tmp_path / "a").stat().st_size == logprobs.bytes_of(16, vocabulary, 4)
    assert (file.tokens == tokens).all()
    assert (file.targets(2) == tokens[2, 9:]).all()
    read = everything(file)
    assert read.shape == wrote.shape == (4, 7, vocabulary)
    assert np.abs(read - wrote).max() < 16 / 65535
    other = LogProbs.read(tmp_path / "a")
    assert file.sha256_of_tokens == other.sha256_of_tokens


def test_what_is_unlikely_is_stored_as_the_least(tmp_path):
    logits = np.zeros((1, 7, 8))
    logits[..., 3] = 40.0
    (tmp_path / "a").write_bytes(texts.pack(np.zeros((1, 16), int), logits, 16))
    (row, *_) = everything(LogProbs.read(tmp_path / "a"))[0]
    assert row[3] == pytest.approx(0, abs=1e-3)
    assert row[0] == pytest.approx(-16, abs=1e-3)


def damage(data, how):
    if how == "cut short":
        return data[:-1]
    if how == "nothing":
        return b""
    if how == "head":
        return data[:15]
    if how == "magic":
        return b"_LOGITS_" + data[8:]
    if how == "counts":
        return data[:8] + struct.pack("<iii", 16, 33, -4) + data[20:]
    return data + b"x"


@pytest.mark.parametrize("how", ["cut short", "nothing", "head", "magic", "counts", "longer"])
def test_a_file_that_is_not_whole_is_refused(tmp_path, how):
    texts.write(tmp_path / "a")
    (tmp_path / "a").write_bytes(damage((tmp_path / "a").read_bytes(), how))
    with pytest.raises(LogProbsError, match="a "):
        LogProbs.read(tmp_path / "a")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(LogProbsError, match="cannot be read"):
        LogProbs.read(tmp_path / "a")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", [0, 4])
def test_values_that_are_no_numbers_are_refused(tmp_path, value, field):
    texts.write(tmp_path / "a")
    data = bytearray((tmp_path / "a").read_bytes())
    start = 20 + 4 * 4 * 16 + field
    data[start : start + 4] = struct.pack("<f", value)
    (tmp_path / "a").write_bytes(data)
    file = LogProbs.read(tmp_path / "a")
    with pytest.raises(LogProbsError, match="no numbers"):
        everything(file)


def test_probabilities_above_one_and_ids_beyond_the_vocabulary_are_refused(tmp_path):
    texts.write(tmp_path / "a")
    data = bytearray((tmp_path / "a").read_bytes())
    data[20:24] = struct.pack("<i", 33)
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(LogProbsError, match="outside its vocabulary"):
        _ = LogProbs.read(tmp_path / "a").tokens
    start = 20 + 4 * 4 * 16 + 4
    data[start : start + 4] = struct.pack("<f", 1.0)
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(LogProbsError, match="above 1"):
        everything(LogProbs.read(tmp_path / "a"))


def compared(tmp_path, **how):
    tokens, p = texts.write(tmp_path / "a", **{k: v for k, v in how.items() if k != "noise"})
    _, q = texts.write(tmp_path / "b", **how)
    return tokens, p, q, score.compare(LogProbs.read(tmp_path / "a"), LogProbs.read(tmp_path / "b"))


def test_scores_are_those_of_a_hand_calculation(tmp_path):
    tokens, p, q, s = compared(tmp_path, noise=0.5)
    for c in range(4):
        for i in range(7):
            target, row = tokens[c, 9 + i], (p[c, i], q[c, i])
            assert s.base_nll[c, i] == pytest.approx(-row[0][target], abs=5e-4)
            assert s.nll[c, i] == pytest.approx(-row[1][target], abs=5e-4)
            kld = sum(math.exp(a) * (a - b) for a, b in zip(*row, strict=True))
            assert s.kld[c, i] == pytest.approx(kld, abs=5e-4)
            assert s.same_top[c, i] == (int(np.argmax(row[0])) == int(np.argmax(row[1])))
            centred = [r - r.mean() for r in row]
            assert s.error[c, i] == pytest.approx(((centred[0] - centred[1]) ** 2).sum(), abs=2e-2)
            assert s.power[c, i] == pytest.approx((centred[0] ** 2).sum(), rel=1e-3)
    chunks = score.Chunks.of(s)
    assert score.perplexity(chunks).value == pytest.approx(math.exp(s.nll.mean()))
    ratio = math.exp((s.nll - s.base_nll).mean())
    assert score.perplexity_ratio(chunks).value == pytest.approx(ratio)
    assert score.divergence(chunks).value == pytest.approx(s.kld.mean())
    assert score.same_top(chunks).value == pytest.approx(s.same_top.mean())
    assert score.rms_p_diff(chunks).value == pytest.approx(math.sqrt((s.p_diff**2).mean()))
    assert score.nmse(chunks).value == pytest.approx(s.error.sum() / s.power.sum())
    assert score.tails(s)["kld_99"].value == pytest.approx(np.quantile(s.kld, 0.99))
    assert score.tails(s)["kld_max"].value == s.kld.max()


def test_a_file_has_no_distance_from_itself(tmp_path):
    _, _, _, s = compared(tmp_path)
    assert not s.kld.any()
    assert not s.error.any()
    assert s.same_top.all()
    assert (s.nll == s.base_nll).all()


@pytest.mark.parametrize("how", [{"seed": 1}, {"chunks": 3}, {"context": 18}, {"vocabulary": 34}])
def test_files_of_other_texts_are_not_compared(tmp_path, how):
    texts.write(tmp_path / "a")
    texts.write(tmp_path / "b", **how)
    with pytest.raises(LogProbsError, match="not of the text of a"):
        score.compare(LogProbs.read(tmp_path / "a"), LogProbs.read(tmp_path / "b"))


def test_intervals_know_that_tokens_of_a_chunk_are_not_independent():
    """Chunks with a common part of their own: the nominal 95 % over chunks covers, that over tokens by far does not."""
    chance, covered, naive, n = np.random.default_rng(7), 0, 0, 400
    for _ in range(n):
        tokens = 1 + 0.3 * chance.normal(size=(12, 1)) + 0.3 * chance.normal(size=(12, 100))
        e = stats.mean([float(v) for v in tokens.mean(1)])
        covered += e.low <= 1 <= e.high
        half = 1.96 * tokens.std() / math.sqrt(tokens.size)
        naive += abs(tokens.mean() - 1) <= half
    assert 0.93 <= covered / n <= 0.97
    assert naive / n < 0.5


def test_one_chunk_has_no_interval(tmp_path):
    _, _, _, s = compared(tmp_path, noise=0.1, chunks=1)
    assert score.divergence(score.Chunks.of(s)).low is None
    assert score.tails(s)["kld_99"].low is None
