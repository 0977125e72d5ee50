"""Least squares for laws that are linear in their coefficients, and intervals that allow for what a round shares.

Errors are relative: a run counts by its share of the measured time, as runs of 5 ms and of 50 ms scatter by the same
percentage. Runs of a round are slow or quick together (by 4 to 10 % in the committed records), so that they are not
independent; rounds are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moelib.base import stats
from moelib.base.stats import Estimate

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Round = tuple[str, int]
"""A machine, and a round of it."""

TELLS = 0.02
"""Of the largest singular value of a design with columns of one length: what is below it is noise. Two columns whose
ratio is the same within 9 % are below."""


class Untold(ValueError):
    """The samples do not tell the coefficients apart."""


def solve(rows: Array, measured: Array) -> Array:
    """The coefficients that make `rows @ coefficients` nearest to `measured`, by relative errors.

    rows: (samples, coefficients), measured: (samples), above 0. A coefficient that no sample has is NaN. Raises Untold
    where the samples do not tell the others apart.
    """
    weighted = rows / measured[:, None]
    there = weighted.any(axis=0)
    used = weighted[:, there]
    lengths = np.linalg.norm(used, axis=0)
    if len(used) < used.shape[1] or not used.size:
        raise Untold(f"{len(used)} runs do not tell {used.shape[1]} coefficients")
    singular = np.linalg.svd(used / lengths, compute_uv=False)
    if singular[-1] < TELLS * singular[0]:
        raise Untold("the runs differ in nothing that would tell the coefficients apart")
    found, *_ = np.linalg.lstsq(used / lengths, np.ones(len(used)), rcond=None)
    coefficients = np.full(rows.shape[1], np.nan)
    coefficients[there] = found / lengths
    return coefficients


def predict(rows: Array, coefficients: Array) -> float | None:
    """Mean of what is predicted for the rows; None where one of them takes a coefficient that is not known."""
    if np.isnan(coefficients[rows.any(axis=0)]).any():
        return None
    return float((rows @ np.nan_to_num(coefficients)).mean())


def spread(rows: Array, measured: Array, coefficients: Array) -> float | None:
    """Standard deviation of a run from the law, as a share of its time; None where no run is left to tell it."""
    freedom = len(rows) - rows.shape[1]
    if freedom < 1:
        return None
    return math.sqrt(float(((rows @ coefficients / measured - 1) ** 2).sum()) / freedom)


def estimates(rows: Array, measured: Array, rounds: Sequence[Round], cells: Sequence[Mask] = ()) -> list[Estimate]:
    """Every coefficient with its 95 % interval, by a jackknife: the fit is repeated without each round of each machine.

    cells: which samples a law that is shared by several models or quants can do without, a mask for each of them. The
    fit is then repeated without each of these too, and the wider of both intervals taken: a speed that models differ in
    is not known as well as its repetition. Student's t, with Satterthwaite's degrees of freedom. No interval where
    leaving out a round leaves a coefficient untold, as one round does not show how rounds differ. What other days and
    machines change is in none. Raises Untold as `solve` does.
    """
    values = solve(rows, measured)
    machines = np.array([machine for machine, _ in rounds])
    numbers = np.array([n for _, n in rounds])
    strata = [
        [(machines == m) & (numbers == n) for n in np.unique(numbers[machines == m])] for m in np.unique(machines)
    ]
    variance, freedom = _jackknife(rows, measured, strata)
    of_cells, its_freedom = _jackknife(rows, measured, [cells])
    wider = np.nan_to_num(of_cells) > variance
    variance, freedom = np.where(wider, of_cells, variance), np.where(wider, its_freedom, freedom)
    return [_estimate(*each, len(rows)) for each in zip(values, variance, freedom, strict=True)]


def _jackknife(rows: Array, measured: Array, strata: Sequence[Sequence[Mask]]) -> tuple[Array, Array]:
    """(variance, degrees of freedom) of the coefficients by leaving out one mask of one stratum at a time; NaN where
    that cannot be told."""
    variance, squares = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    for masks in strata:
        try:
            left = np.array([solve(rows[~mask], measured[~mask]) for mask in masks])
        except Untold:
            left = np.empty(0)
        if len(left) < 2:
            return np.full_like(variance, np.nan), np.full_like(variance, np.nan)
        part = (len(left) - 1) * left.var(axis=0)
        variance, squares = variance + part, squares + part**2 / (len(left) - 1)
    return variance, np.divide(variance**2, squares, out=np.ones_like(variance), where=squares != 0)


def _estimate(value: float, variance: float, freedom: float, n: int) -> Estimate:
    if math.isnan(variance):
        return Estimate(float(value), None, None, n)
    half = stats.student(freedom) * math.sqrt(variance)
    return Estimate(float(value), float(value) - half, float(value) + half, n)
