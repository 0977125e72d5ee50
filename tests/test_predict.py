"""What times of slices say of a whole: exact where linear, intervals that hold, nothing where they are mute."""

import math
import random

import pytest

from moelib.forecast import predict
from moelib.forecast.predict import Layers, Sample

REST, ON_GPU, ON_CPU = 0.8e-3, 0.07e-3, 0.55e-3
WHOLE = [Layers(27 - n, n) for n in range(28)]


def seconds(layers):
    return REST + layers.on_gpu * ON_GPU + layers.on_cpu * ON_CPU


def slices(noise=0.0, rounds=3, dice=None, on_gpu=True):
    dice = dice or random.Random(1)
    at = [Layers(0, n) for n in (2, 8)] + ([Layers(n, 0) for n in (2, 8)] if on_gpu else [])
    return [Sample(a, seconds(a) * math.exp(dice.gauss(0, noise))) for a in at * rounds]


def test_what_is_linear_is_recovered():
    fit = predict.fit(slices())
    assert fit.coefficients == pytest.approx((REST, ON_GPU, ON_CPU))
    for at in WHOLE:
        told = fit.at(at)
        assert (told.value, told.low, told.high) == pytest.approx((seconds(at),) * 3, rel=1e-6)


@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_the_interval_holds_a_run_of_the_whole_19_times_of_20(noise):
    dice, held, tries = random.Random(7), 0, 0
    for _ in range(400):
        fit = predict.fit(slices(noise, dice=dice))
        for at in (WHOLE[0], WHOLE[12], WHOLE[27]):
            told = fit.at(at)
            held += told is not None and told.low <= seconds(at) * math.exp(dice.gauss(0, noise)) <= told.high
            tries += 1
    assert 0.93 < held / tries < 0.97


def test_an_interval_grows_with_the_spread_and_with_the_distance():
    wide, narrow = (predict.fit(slices(noise)).at(WHOLE[27]) for noise in (0.04, 0.01))
    assert wide.high / wide.low > narrow.high / narrow.low > 1.02
    fit = predict.fit(slices(0.04))
    near, far = fit.at(Layers(0, 5)), fit.at(Layers(0, 60))
    assert far.high / far.low > near.high / near.low


def test_what_no_slice_shows_is_not_predicted():
    fit = predict.fit(slices(0.01, on_gpu=False))
    assert fit.at(Layers(1, 26)) is None
    assert fit.at(Layers(0, 27)).value == pytest.approx(seconds(Layers(0, 27)), rel=0.05)
    backwards = [Sample(Layers(0, n), t) for n, t in ((2, 2.0), (8, 1.9), (2, 2.1), (8, 1.8))]
    assert predict.fit(backwards).at(Layers(0, 27)) is None


@pytest.mark.parametrize(
    "samples",
    [
        [],
        slices(rounds=1)[:2],  # as many as there are coefficients
        [Sample(Layers(0, 4), t) for t in (1.0, 1.1, 0.9)],  # one length
        [Sample(Layers(27 - n, n), 1.0 + n) for n in (0, 4, 8, 14, 27)],  # one model: what is the rest?
        [*slices(), Sample(Layers(0, 2), 0.0)],
        [*slices(), Sample(Layers(0, 2), math.nan)],
        [*slices(), Sample(Layers(0, math.inf), 1.0)],
    ],
)
def test_samples_that_tell_nothing_are_refused(samples):
    with pytest.raises(ValueError, match="samples"):
        predict.fit(samples)


# ms per token at --n-cpu-moe N, by llama-bench on one H100 with 16 cores: DeepSeek-MoE-16B's twin, Q4_K_M, of whose 28
# layers the first is dense. Read by hand, not audited.
SWEEP = {0: 2.77, 4: 4.22, 8: 6.60, 14: 9.58, 20: 12.9, 24: 16.3, 28: 18.0}


def test_decode_on_a_gpu_is_linear_in_the_layers_on_the_cpu():
    def sample(n):
        return Sample(Layers(0, max(0, n - 1)), SWEEP[n] / 1000)

    ends = predict.fit([sample(0), sample(28)] * 2)
    for n in SWEEP:
        assert abs(predict.off(ends.at(sample(n).layers).value, [SWEEP[n] / 1000])) < 0.07
    lower = predict.fit([sample(n) for n in (0, 4, 8)])  # an extension to 3.4 times as many layers
    told = lower.at(sample(28).layers)
    assert told.low < SWEEP[28] / 1000 < told.high
    assert abs(predict.off(told.value, [SWEEP[28] / 1000])) < 0.1


def test_a_rate_turns_the_interval_round():
    told = predict.rate(predict.fit(slices(0.02)).at(WHOLE[27]))
    assert told.low < told.value < told.high
    assert predict.rate(None) is None
