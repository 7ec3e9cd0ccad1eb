"""Mean and variance of an estimator's update: exact over all groups, or sampled.

The update of a group is (1/G) * sum over members and turns of A * grad log pi(action | state), with
A from the package's own `turn_credit`.  Aggregation over tokens is no part of it: each turn counts
once.

Shape suffixes: `_C` groups, `_CG` their members, `_N` flat turns, `_S` steps, `_D` logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bias.paths import Paths
from bias.process import Process
from bias.variants import Variant
from rllib_gtpo.connectors.learner import CreditRule, outcome_of
from rllib_gtpo.ops.advantages import ESTIMATORS, turn_credit
from rllib_gtpo.types import Group, Trajectory, Turn

BLOCKS = 20


@dataclass(frozen=True)
class Problem:
    """A process under one policy, and its trajectories."""

    process: Process
    policy: str
    logits_D: Tensor
    paths: Paths


@dataclass(frozen=True)
class Moments:
    """Of the update that one sample (a group, or a step of several) gives.

    `noise` is the standard error of `mean_D` (norm over all components), 0 if exact.  `blocks`:
    the same from the sample without each of its twentieths, for standard errors of figures.
    """

    mean_D: Tensor
    variance: float  # trace of the covariance, times the trajectories per sample
    noise: float = 0.0
    blocks: list[Moments] = field(default_factory=list)


def all_groups(problem: Problem, group_size: int) -> tuple[Tensor, Tensor]:
    """Every multiset of `group_size` paths of one prompt, and its probability: [C, G], [C]."""
    paths = problem.paths
    probability_M = paths.probability_M(problem.process, problem.logits_D)
    members, weights = [], []
    for prompt, share in enumerate(problem.process.prompts.values()):
        mine = (paths.prompt_M == prompt).nonzero()[:, 0]
        chosen_CG = torch.combinations(mine, group_size, with_replacement=True)
        # Orders of a multiset: G! over the product of its multiplicities' factorials.  Since equal
        # members are adjacent, that product is the product of their ranks among their equals.
        ranks = torch.ones_like(chosen_CG)
        for member in range(1, group_size):
            same = chosen_CG[:, member] == chosen_CG[:, member - 1]
            ranks[:, member] += torch.where(same, ranks[:, member - 1], 0)
        orders_C = math.factorial(group_size) / ranks.prod(1).double()
        members.append(chosen_CG)
        weights.append(share * orders_C * probability_M[chosen_CG].prod(1))
    return torch.cat(members), torch.cat(weights)


def sample_groups(problem: Problem, count: int, group_size: int, seed: int) -> Tensor:
    """Independent groups [C, G] of independent members."""
    paths, shares = problem.paths, problem.process.prompts
    generator = torch.Generator().manual_seed(seed)
    probability_M = paths.probability_M(problem.process, problem.logits_D)
    share = torch.tensor(list(shares.values()), dtype=torch.float64)
    prompt_C = torch.multinomial(share, count, replacement=True, generator=generator)
    members_CG = torch.zeros(count, group_size, dtype=torch.long)
    for prompt in range(len(shares)):
        mine_C = prompt_C == prompt
        weight_M = torch.where(paths.prompt_M == prompt, probability_M, 0.0)
        drawn = int(mine_C.sum()) * group_size
        if drawn:
            picked = torch.multinomial(weight_M, drawn, replacement=True, generator=generator)
            members_CG[mine_C] = picked.view(-1, group_size)
    return members_CG


def trajectories_of(paths: Paths) -> list[Trajectory]:
    """The paths as the package knows trajectories, with their rewards by component."""
    rows = [
        {"accuracy": accuracy, "format": format_}
        for accuracy, format_ in zip(
            paths.accuracy_R.tolist(), paths.format_R.tolist(), strict=True
        )
    ]
    found = []
    for start, length in zip(paths.start_M.tolist(), paths.length_M.tolist(), strict=True):
        turns = [
            Turn(index, rewards=rewards)
            for index, rewards in enumerate(rows[start : start + length])
        ]
        found.append(Trajectory({}, turns=turns, correct=turns[-1].rewards["accuracy"] >= 1.0))
    return found


def kept(paths: Paths, members_CG: Tensor, variant: Variant) -> Tensor:
    """The numbers of the groups that the package's own filter keeps."""
    if variant.uniform_groups == "keep":
        return torch.arange(len(members_CG))
    options = {k: v for k, v in variant.options.items() if k not in ("estimator", "gamma")}
    rule = CreditRule(variant.estimator, variant.gamma, options, variant.uniform_groups)
    member_M = trajectories_of(paths)
    earned_M = [tuple(tuple(turn.rewards.values()) for turn in t.turns) for t in member_M]
    answers: dict[tuple[Any, ...], bool] = {}  # the filter sees rewards only, so ask once for each
    keep = []
    for members in members_CG.tolist():
        key = tuple(sorted(earned_M[m] for m in members))
        if key not in answers:
            answers[key] = rule.keeps(Group(0, {}, [member_M[m] for m in members]))
        keep.append(answers[key])
    return torch.tensor(keep).nonzero()[:, 0]


def updates(
    problem: Problem,
    members_CG: Tensor,
    variant: Variant,
    groups_per_step: int,
    bonus_CG: Tensor | None = None,
) -> Tensor:
    """The update of each step, [S, D].  `bonus_CG` is added to each member's last turn.

    Steps matter only to estimators of the whole step; for the others all groups go through one
    call.  A dropped group still counts in the mean, with an update of 0.
    """
    process, paths, group_size = problem.process, problem.paths, members_CG.shape[1]
    kept_C = kept(paths, members_CG, variant)
    path_T = members_CG[kept_C].reshape(-1)  # of each trajectory
    length_T = paths.length_M[path_T]
    trajectory_N = torch.arange(len(path_T)).repeat_interleave(length_T)
    first_T = length_T.cumsum(0) - length_T
    position_N = torch.arange(len(trajectory_N)) - first_T[trajectory_N]
    row_N = paths.start_M[path_T][trajectory_N] + position_N
    group_N = kept_C.repeat_interleave(group_size)[trajectory_N]
    rewards_N = (paths.accuracy_R + paths.format_R)[row_N]
    if bonus_CG is not None:
        rewards_N[first_T + length_T - 1] += bonus_CG[kept_C].reshape(-1)
    pair_N = paths.pair_R[row_N]

    data = {}
    needed = ESTIMATORS[variant.estimator].inputs
    if "outcome" in needed:
        scalars = [outcome_of(t, variant.estimator) for t in trajectories_of(paths)]
        data["outcome"] = torch.tensor(scalars, dtype=torch.float64)[path_T][trajectory_N]
    if "anchor" in needed:
        data["anchor"] = process.state_D[pair_N]
    step_N = group_N // groups_per_step
    calls = torch.bincount(step_N).tolist() if variant.whole_step else [len(step_N)]
    inputs = [part.split(calls) for part in (rewards_N, trajectory_N, group_N, *data.values())]
    advantages_N = torch.cat(
        [
            turn_credit(*rows, **dict(zip(data, more, strict=True)), **variant.options).advantages
            for *rows, more in ((*part[:3], part[3:]) for part in zip(*inputs, strict=True))
        ]
    )
    steps = len(members_CG) // groups_per_step
    update_SD = score_sum(problem, step_N, pair_N, advantages_N, steps)
    return update_SD / (groups_per_step * group_size)


def score_sum(
    problem: Problem, step_N: Tensor, pair_N: Tensor, advantages_N: Tensor, steps: int
) -> Tensor:
    """Sum of A * grad log pi(a | s) over the rows of each step: [S, D].

    The gradient is 1 at (s, a), less pi(. | s) on all actions of s.
    """
    process, pairs = problem.process, len(problem.logits_D)
    weight = torch.zeros(steps * pairs, dtype=torch.float64)
    weight_SD = weight.index_add(0, step_N * pairs + pair_N, advantages_N).view(steps, pairs)
    of_state = weight_SD.new_zeros(steps, len(process.actions))
    of_state = of_state.index_add(1, process.state_D, weight_SD)
    policy_D = process.log_policy_D(problem.logits_D).exp()
    return weight_SD - policy_D * of_state[:, process.state_D]


def exact(
    problem: Problem, variant: Variant, group_size: int, bonus_CG: Tensor | None = None
) -> Moments:
    """Over all groups.  Not for estimators of the whole step."""
    if variant.whole_step:
        raise ValueError(f"{variant.label} depends on the whole step: sample it")
    members_CG, weight_C = all_groups(problem, group_size)
    update_CD = updates(problem, members_CG, variant, 1, bonus_CG)
    mean_D = weight_C @ update_CD
    variance = float(weight_C @ ((update_CD - mean_D) ** 2).sum(1))
    return Moments(mean_D, group_size * variance)


@dataclass(frozen=True)
class Control:
    """An estimator whose mean is known exactly, to take noise out of a sample of another one."""

    variant: Variant
    mean_D: Tensor


def sampled(
    problem: Problem,
    members_CG: Tensor,
    variant: Variant,
    groups_per_step: int,
    bonus_CG: Tensor | None = None,
    control: Control | None = None,
) -> Moments:
    """From a sample of groups; in steps of one group unless the variant needs more."""
    per_step = groups_per_step if variant.whole_step else 1
    update_SD = updates(problem, members_CG, variant, per_step, bonus_CG)
    error_SD = torch.zeros_like(update_SD)
    if control is not None:
        error_SD = updates(problem, members_CG, control.variant, per_step) - control.mean_D
        error_SD *= ((update_SD - update_SD.mean(0)) * error_SD).sum() / (error_SD**2).sum()
    return moments_of(update_SD, error_SD, per_step * members_CG.shape[1], BLOCKS)


def moments_of(update_SD: Tensor, error_SD: Tensor, trajectories: int, blocks: int) -> Moments:
    """Moments of independent updates, each the mean over so many trajectories.

    `error_SD` has expectation 0 and is like the updates' own error, so it is taken off the mean.
    """
    clean_SD = update_SD - error_SD
    mean_D, count = clean_SD.mean(0), len(update_SD)
    variance = float(((update_SD - update_SD.mean(0)) ** 2).sum() / (count - 1))
    rest = float(((clean_SD - mean_D) ** 2).sum() / (count - 1))
    parts = []
    for block in range(blocks):
        keep = torch.arange(count) % blocks != block
        parts.append(moments_of(update_SD[keep], error_SD[keep], trajectories, 0))
    return Moments(mean_D, trajectories * variance, math.sqrt(rest / count), parts)


def angle(one_D: Tensor, other_D: Tensor) -> float:
    """Degrees between two vectors, exact also where they are nearly parallel; 90 if one is 0."""
    if not one_D.norm() or not other_D.norm():
        return 90.0
    a, b = one_D / one_D.norm(), other_D / other_D.norm()
    return math.degrees(2.0 * math.atan2(float((a - b).norm()), float((a + b).norm())))


def gain(moments: Moments, target_D: Tensor, batch: int) -> float:
    """What a step of fixed (root mean square) length gains with `batch` trajectories, at most 1.

    E[u . g] / (sqrt(E |u|^2) |g|): the cosine to the gradient, shrunk by the noise of the batch.
    """
    signal = float(moments.mean_D.norm()) ** 2 - moments.noise**2
    length = math.sqrt(max(signal, 0.0) + moments.variance / batch)
    aligned = float(moments.mean_D @ target_D / target_D.norm())
    return aligned / length if length else 0.0


def trajectories_per_signal(moments: Moments) -> float:
    """How many trajectories make the mean update as long as its noise; inf without a signal."""
    signal = float(moments.mean_D.norm()) ** 2 - moments.noise**2
    return moments.variance / signal if signal > 1e-24 else math.inf


def jackknife(values: list[float]) -> float:
    """Standard error of a figure from its values without each block."""
    if not all(math.isfinite(value) for value in values):
        return math.inf
    center = sum(values) / len(values)
    square = sum((value - center) ** 2 for value in values)
    return math.sqrt(square * (len(values) - 1) / len(values))


def figures(moments: Moments, target_D: Tensor, batches: Sequence[int]) -> dict[str, float]:
    """Bias and variance against one target; with standard errors (`_se`) if sampled.

    Those of angle and bias are upper bounds: the sample's noise in all directions, not only across.
    """
    mean_D, size = moments.mean_D, float(target_D.norm())
    degrees = angle(mean_D, target_D)
    found = {
        "angle": degrees,
        "bias": float((mean_D - target_D).norm()) / size,
        "bias_scaled": math.sin(math.radians(degrees)) if degrees < 90.0 else 1.0,
    }
    if moments.blocks:
        found["angle_se"] = math.degrees(math.atan2(moments.noise, float(mean_D.norm())))
        found["bias_se"] = moments.noise / size

    def noisy(part: Moments) -> dict[str, float]:
        gains = {f"gain_{batch}": gain(part, target_D, batch) for batch in batches}
        return {"trajectories": trajectories_per_signal(part), **gains}

    without = [noisy(part) for part in moments.blocks]
    for name, value in noisy(moments).items():
        found[name] = value
        if without:
            found[f"{name}_se"] = jackknife([figure[name] for figure in without])
    return found
