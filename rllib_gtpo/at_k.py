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
from dataclasses import dataclass

from rllib_gtpo.intervals import compute_interval
from rllib_gtpo.types import Group, Task

SameAnswer = Callable[[str, str, Task], bool]


@dataclass(frozen=True)
class TaskScore:
    """What the rollouts of one task come to.

    majority: How right their most frequent answer is; see `compute_majority`.
    """

    samples: int
    correct: int
    majority: float

    @property
    def average(self) -> float:
        """The share of correct ones."""
        return self.correct / self.samples

    def pass_at(self, k: int) -> float:
        """The chance that one of k is correct."""
        return compute_pass_at_k(self.samples, self.correct, k)


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


def score_task(group: Group, same: SameAnswer, samples: int | None = None) -> TaskScore:
    """The score of the first `samples` rollouts of a group, or of all.

    same: Whether two answers to the task are one in the vote.
    """
    members = group.trajectories[:samples]
    answers, correct = [t.answer for t in members], [bool(t.correct) for t in members]
    majority = compute_majority(answers, correct, lambda a, b: same(a, b, group.task))
    return TaskScore(len(members), sum(correct), majority)


def compute_at_k(groups: Sequence[Group], same: SameAnswer) -> dict[str, float]:
    """The metrics of groups: each of as many rollouts as the smallest group has."""
    samples = min((len(group.trajectories) for group in groups), default=0)
    return mean_scores([score_task(group, same, samples) for group in groups] if samples else [])


def mean_scores(scores: Sequence[TaskScore]) -> dict[str, float]:
    """The metrics of tasks with n rollouts each: avg@n, maj@n, and pass@k for k = 2, 4, ... n.

    Each has a mean (`avg@8`) and the ends of its interval (`avg@8_low`, `avg@8_high`).  With one
    rollout each there is avg@1 alone, which the others would repeat.
    """
    if not scores:
        return {}
    samples = scores[0].samples
    several = {1 << power for power in range(1, samples.bit_length())} | {samples}
    values: dict[str, list[float]] = defaultdict(list)
    for score in scores:
        values[f"avg@{samples}"].append(score.average)
        if samples > 1:
            values[f"maj@{samples}"].append(score.majority)
            for k in sorted(several):
                values[f"pass@{k}"].append(score.pass_at(k))
    metrics: dict[str, float] = {"tasks": float(len(scores))}
    for name, each in values.items():
        metrics[name] = sum(each) / len(each)
        metrics[f"{name}_low"], metrics[f"{name}_high"] = compute_interval(each)
    return metrics
