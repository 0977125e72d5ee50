"""What the times of small slices of a model say of the whole: a fixed rest and a time for each kind of layer.

time = rest + (layers on the GPU) x a + (layers with experts on the CPU) x b, for a token as for a prompt. Embedding,
output, sampling, the first dense layers and the engine's own work are the rest: slices have them as the whole does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moelib.base import stats
from moelib.base.stats import Estimate


@dataclass(frozen=True)
class Layers:
    """The layers of a model in one placement; the first dense ones, which any slice has too, are not counted."""

    on_gpu: float
    """Layers that are on the GPU as a whole."""
    on_cpu: float
    """Layers with their experts on the CPU, in mean such layers of the whole model: types and sizes differ."""


@dataclass(frozen=True)
class Sample:
    """What one run showed."""

    layers: Layers
    seconds: float
    """Of a token, or of a prompt."""


@dataclass(frozen=True)
class Fit:
    """The rest and the times of a layer, fitted to the samples by least squares of relative errors."""

    coefficients: tuple[float, ...]
    """Seconds: the rest; of a layer on the GPU; of one with its experts on the CPU. 0 for what no sample has."""
    known: tuple[bool, bool, bool]
    """Which of them the samples tell."""
    spread: float
    """Standard deviation of a run from the fit, as a share of its time: of repetitions, and of what is not linear."""
    inverse: NDArray[np.float64]
    """(known, known): the coefficients' covariance over `spread` squared."""
    freedom: int
    """Samples beyond the number of known coefficients."""

    def at(self, layers: Layers) -> Estimate | None:
        """Seconds that one run of the whole will take, with the 95 % interval of such a prediction.

        The interval comes from the spread of the samples, the distance over which they are extended (the leverage) and
        the spread of the predicted run itself, by Student's t, on a logarithmic scale. What bends beyond the slices
        (memory that gets slower with its use, a hotter machine) is not in it. None where the samples do not tell: no
        slice has such layers, or more of them do not take longer.
        """
        wanted = (1.0, layers.on_gpu, layers.on_cpu)
        if any(n and (not told or c <= 0) for n, told, c in zip(wanted[1:], self.known[1:], self.coefficients[1:])):  # noqa: B905
            return None
        value = sum(n * c for n, c in zip(wanted, self.coefficients, strict=True))
        if value <= 0:
            return None
        x = np.array([n for n, told in zip(wanted, self.known, strict=True) if told])
        relative = self.spread * math.sqrt(1 + float(x @ self.inverse @ x) / value**2)
        factor = math.exp(min(stats.student(self.freedom) * relative, 50.0))
        return Estimate(value, value / factor, value * factor, self.freedom + sum(self.known))


def fit(samples: Sequence[Sample]) -> Fit:
    """The fit to the samples of at least two slices. Raises ValueError where they do not tell a rest from layers."""
    rows = np.array([[1.0, s.layers.on_gpu, s.layers.on_cpu] for s in samples]).reshape(-1, 3)
    seconds = np.array([s.seconds for s in samples])
    if not len(samples) or not np.isfinite(rows).all() or not (np.isfinite(seconds) & (seconds > 0)).all():
        raise ValueError("a fit needs samples, all of a positive, finite time")
    known = (True, *(bool(column.any()) for column in rows.T[1:]))
    told = [i for i, is_known in enumerate(known) if is_known]
    weighted = rows[:, told] / seconds[:, None]  # each sample counts by its relative error
    freedom = len(samples) - len(told)
    if freedom < 1 or np.linalg.matrix_rank(weighted) < len(told):
        raise ValueError(f"{len(samples)} samples do not tell a rest from the layers: slices of two lengths are needed")
    solved, *_ = np.linalg.lstsq(weighted, np.ones(len(samples)), rcond=None)
    spread = math.sqrt(float(((weighted @ solved - 1) ** 2).sum()) / freedom)
    values = dict(zip(told, map(float, solved), strict=True))
    inverse = np.linalg.inv(weighted.T @ weighted)
    return Fit(tuple(values.get(i, 0.0) for i in range(3)), (True, known[1], known[2]), spread, inverse, freedom)


def rate(seconds: Estimate | None) -> Estimate | None:
    """An estimate of seconds as one of how often in a second."""
    if seconds is None:
        return None
    low, high = (None if s is None else 1 / s for s in (seconds.high, seconds.low))
    return Estimate(1 / seconds.value, low, high, seconds.n)


def off(predicted: float, measured: Iterable[float]) -> float:
    """How far a prediction is from the mean of what was measured, as a share of it."""
    return predicted / stats.mean(list(measured)).value - 1
