"""avg@k, pass@k and maj@k over groups of rollouts, with 95% intervals.

Every number is a mean over tasks of one value per task, so that tasks weigh the same:

    avg@k   the share of k rollouts that are correct
    pass@k  the chance that one of k rollouts is correct: 1 - C(n - c, k) / C(n, k) for c correct
            ones of n, unbiased (Chen et al. 2021, arXiv 2107.03374, equation 1)
    maj@k   whether the answer that most of k rollouts give is right (self-consistency, Wang et al.
            2022, arXiv 2203.11171).  Ties count by the share of the tied answers that are right.
            A rollout without an answer has no vote; without any vote the task is failed.

The interval says how far the mean might be from that of all tasks of the kind: Wilson's where every
task's value is 0 or 1, otherwise percentiles of the bootstrap over tasks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from rllib_gtpo.types import Group, Task, Trajectory

SameAnswer = Callable[[str, str, Task], bool]

Z = 1.959963984540054  # 97.5% of a normal distribution lie below
RESAMPLES = 2000


def compute_pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of the chance that at least one of k samples is correct."""
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {correct} correct ones among {samples} is not defined")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def compute_majority(
    answers: Sequence[str | None], correct: Sequence[bool], same: Callable[[str, str], bool]
) -> float:
    """How right the most frequent answer is: 1, 0, or a share where answers tie.

    same: Whether two texts are the same answer; texts that are equal always are.
    """
    votes: dict[str, list[bool]] = {}
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(right)
    merged: dict[str, list[bool]] = {}
    for answer, rights in votes.items():
        kept = next((other for other in merged if same(answer, other)), answer)
        merged.setdefault(kept, []).extend(rights)
    most = max(map(len, merged.values()), default=0)
    leaders = [sum(rights) / most for rights in merged.values() if len(rights) == most]
    return sum(leaders) / len(leaders) if leaders else 0.0


def compute_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95% interval of a mean over tasks; see the module."""
    if set(values) <= {0.0, 1.0}:
        return compute_wilson(round(sum(values)), len(values))
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = [array[rng.integers(len(array), size=len(array))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def compute_wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion."""
    if not trials:
        return 0.0, 1.0
    share, spread = successes / trials, Z * Z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def compute_at_k(groups: Sequence[Group], same: SameAnswer) -> dict[str, float]:
    """The metrics of groups with n rollouts each: avg@n, maj@n, and pass@k for k = 2, 4, ... n.

    Each has a mean (`avg@8`) and the ends of its interval (`avg@8_low`, `avg@8_high`).  With one
    rollout each there is avg@1 alone, which the others would repeat.
    """
    samples = min((len(group.trajectories) for group in groups), default=0)
    if not samples:
        return {}
    several = {1 << power for power in range(1, samples.bit_length())} | {samples}
    values: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        members = group.trajectories[:samples]
        correct = sum(t.correct for t in members)
        values[f"avg@{samples}"].append(correct / samples)
        if samples > 1:
            values[f"maj@{samples}"].append(_majority(members, group.task, same))
            for k in sorted(several):
                values[f"pass@{k}"].append(compute_pass_at_k(samples, correct, k))
    metrics: dict[str, float] = {"tasks": float(len(groups))}
    for name, each in values.items():
        metrics[name] = sum(each) / len(each)
        metrics[f"{name}_low"], metrics[f"{name}_high"] = compute_interval(each)
    return metrics


def _majority(members: Sequence[Trajectory], task: Task, same: SameAnswer) -> float:
    answers, correct = [t.answer for t in members], [t.correct for t in members]
    return compute_majority(answers, correct, lambda one, other: same(one, other, task))
