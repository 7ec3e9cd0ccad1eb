"""Paired comparisons of learning runs: differences by seed, with bootstrap intervals.

Arms share seeds (the model behind the cold start, the problems, the sampler's key), so that what
they have in common cancels in the difference by seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its bounds."""

    estimate: float
    low: float
    high: float

    @property
    def clears_zero(self) -> bool:
        """Whether the whole interval is on one side of 0."""
        return self.low > 0.0 or self.high < 0.0

    def __str__(self) -> str:
        return f"{self.estimate:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired_bootstrap(
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile interval of `statistic(mean of ours, mean of theirs)`.

    Args:
        ours, theirs: For each task the values by seed, in the same order of seeds.  A resample
            draws seeds with replacement within each task, the same ones for both; the mean is over
            tasks of the means over seeds, so that each task weighs the same.
        statistic: Works on arrays, element by element.
        resamples: How many.
        seed: Of the resampling alone.
    """
    rng = np.random.default_rng(seed)
    means = []
    for one, other in zip(ours, theirs, strict=True):
        pairs = np.array([one, other], dtype=float)
        if pairs.shape[1] < 2:
            raise ValueError("an interval needs at least two seeds per task")
        draws = rng.integers(pairs.shape[1], size=(resamples, pairs.shape[1]))
        means.append(np.concatenate([pairs[:, draws].mean(2), pairs.mean(1, keepdims=True)], 1))
    one, other = np.mean(means, axis=0)
    values = statistic(one, other)
    low, high = np.quantile(values[:-1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values[-1]), float(low), float(high))


def difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Interval:
    """Ours minus theirs."""
    return paired_bootstrap(ours, theirs, lambda one, other: one - other)


def relative_gain(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Interval:
    """Ours over theirs, minus 1: +0.03 is the form in which papers say "+3%"."""
    return paired_bootstrap(ours, theirs, lambda one, other: one / np.maximum(other, 1e-9) - 1.0)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of one arm over its seeds."""
    return paired_bootstrap([values], [values], lambda one, _: one)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of no difference, by all sign flips: exact, and at least 2 / 2^n with n pairs.

    With five pairs it cannot fall below 0.06: the bootstrap's interval is narrower than it ought to
    be with few seeds, and this says so.
    """
    values = np.array(differences, dtype=float)
    if values.size > 20:
        raise ValueError("at most 20 pairs: all sign flips are tried")
    flips = (np.arange(2**values.size)[:, None] >> np.arange(values.size)) & 1
    sums = np.abs(((1 - 2 * flips) * values).sum(axis=1))
    return float((sums >= abs(values.sum()) - 1e-12).mean())


def area(tokens: Sequence[float], values: Sequence[float], budget: float) -> float:
    """Mean height of the curve over [0, budget] tokens (trapezoids; flat beyond its last point)."""
    inside = [t for t in tokens if t < budget]
    grid = [*inside, budget]
    heights = np.interp(grid, tokens, values)
    return float(np.trapezoid(heights, grid) / budget)
