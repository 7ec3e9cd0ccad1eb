"""How far a mean may be from what it stands for, and whether two sets of paired results differ.

A pair is what two arms did with the same thing: the same task, or the same seed.  What they have in
common cancels in the difference of a pair, so the intervals of differences are narrow where those
of the arms overlap (Miller 2024, arXiv 2411.00640, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

LEVEL = 0.95
Z = 1.959963984540054  # 97.5% of a normal distribution lie below
RESAMPLES = 10_000
_TASK_RESAMPLES = 2000
_FEW = 20  # pairs of which all sign flips are tried
_LARGEST_DENOMINATOR = 10_000
_LARGEST_SUM = 200_000_000  # additions that an exact test may take
_FLIPS = 100_000


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


# One mean over tasks.


def compute_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95% interval of a mean over tasks: Wilson's where every value is 0 or 1, otherwise that
    of the bootstrap."""
    if set(values) <= {0.0, 1.0}:
        return compute_wilson(round(sum(values)), len(values))
    return compute_bootstrap(values, seed)


def compute_bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Percentiles of the mean over resampled values."""
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    count = len(array)
    means = [array[rng.integers(count, size=count)].mean() for _ in range(_TASK_RESAMPLES)]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def compute_wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion."""
    if not trials:
        return 0.0, 1.0
    share, spread = successes / trials, Z * Z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


# Pairs.


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


def sign_flip_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of no difference between paired results, by flips of the differences' signs.

    If two policies are alike on a task, its two results are exchangeable, whatever their
    distribution and however tasks differ: Fisher's randomisation test for pairs (The Design of
    Experiments, 1935, section 21).  Of differences of -1, 0 and 1, one sample a task, it is the
    exact test of McNemar (1947).  With n pairs that differ p is at least 2 / 2^n: with five it
    cannot fall below 0.06.

    It is exact for few pairs, and for any number if the differences are multiples of one unit, as
    those of k samples are of 1 / k.  Otherwise it is over 100,000 random flips and the observed
    one, which keeps p from being too small (Phipson and Smyth 2010, arXiv 1603.05766).

    Args:
        differences: Of each pair.
        seed: Of the random flips.
    """
    values = np.array([d for d in differences if d != 0], dtype=float)
    observed = abs(values.sum()) - 1e-12
    if values.size <= _FEW:
        flips = (np.arange(2**values.size)[:, None] >> np.arange(values.size)) & 1
        return float((np.abs(((1 - 2 * flips) * values).sum(axis=1)) >= observed).mean())
    units = _in_units(values)
    if units is not None:
        return _exact_p(units)
    rng = np.random.default_rng(seed)
    sums = [abs((rng.integers(2, size=values.size) * 2 - 1) @ values) for _ in range(_FLIPS)]
    return float((1 + np.sum(np.array(sums) >= observed)) / (1 + _FLIPS))


def _in_units(values: np.ndarray) -> list[int] | None:
    """The values as multiples of a common unit, if there is one and the sums are few enough."""
    parts = [Fraction(value).limit_denominator(_LARGEST_DENOMINATOR) for value in values.tolist()]
    if any(abs(float(part) - value) > 1e-9 for part, value in zip(parts, values, strict=True)):
        return None
    common = math.lcm(*(part.denominator for part in parts))
    units = [int(part * common) for part in parts]
    return units if len(units) * sum(map(abs, units)) <= _LARGEST_SUM else None


def _exact_p(units: Sequence[int]) -> float:
    """By the distribution of the sum of those whose sign is positive: each is with chance 1/2."""
    sizes, observed = [abs(unit) for unit in units], abs(sum(units))
    total = sum(sizes)
    chances = np.zeros(total + 1)
    chances[0], reached = 1.0, 0
    for size in sizes:
        reached += size
        moved = chances[: reached - size + 1] / 2
        chances[: reached - size + 1] /= 2
        chances[size : reached + 1] += moved
    sums = np.abs(2 * np.arange(total + 1) - total)
    return min(1.0, float(chances[sums >= observed].sum()))
