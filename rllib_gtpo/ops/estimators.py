"""The estimators: each is a few lines on float64 rows, without a loop over turns or groups.

Shape suffixes: `_N` flat turns (rows).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rllib_gtpo.ops.registry import TurnCredit, Turns, register_estimator
from rllib_gtpo.ops.returns import discounted_sum
from rllib_gtpo.ops.segments import Segments

EPSILON = 1e-6


def spread_N(values_N: Tensor, weight_N: Tensor, sets: Segments) -> tuple[Tensor, Tensor]:
    """Weighted mean and population standard deviation of each row's set."""
    total_N = sets.total(weight_N)
    mean_N = sets.total(weight_N * values_N) / total_N
    return mean_N, (sets.total(weight_N * (values_N - mean_N) ** 2) / total_N).sqrt()


def spread_over_step(turns: Turns, values_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and population standard deviation over all learners' rows, repeated on rows."""
    sums = turns.sum_over_learners(torch.stack([weight_N.sum(), (weight_N * values_N).sum()]))
    total, mean = sums[0].clamp_min(1e-300), sums[1] / sums[0].clamp_min(1e-300)
    square = turns.sum_over_learners((weight_N * (values_N - mean) ** 2).sum())
    return mean.expand_as(values_N), (square / total).sqrt().expand_as(values_N)


def standardised(values_N: Tensor, mean_N: Tensor, std_N: Tensor, use_std: bool) -> TurnCredit:
    """(values - mean) / (std + 1e-6), or values - mean; 0 where std < 1e-6."""
    scale_N = std_N + EPSILON if use_std else torch.ones_like(std_N)
    advantages_N = torch.where(std_N < EPSILON, 0.0, (values_N - mean_N) / scale_N)
    return TurnCredit(values_N, mean_N, scale_N, advantages_N)


def leave_one_out(turns: Turns, values_N: Tensor, weight_N: Tensor) -> TurnCredit:
    """values - weighted mean over the rows of the group's other trajectories.

    0 without others, and exactly 0 in a group without spread.
    """
    own = turns.rows.segments
    mean_N, std_N = spread_N(values_N, weight_N, turns.group)
    total_N = turns.group.total(weight_N)
    others_N = mean_N * total_N - own.total(weight_N * values_N)
    weights_N = total_N - own.total(weight_N)
    alone_N = turns.group.total(turns.first_N) < 1.5
    baseline_N = torch.where(alone_N, values_N, others_N / torch.where(alone_N, 1.0, weights_N))
    advantages_N = torch.where(std_N < EPSILON, 0.0, values_N - baseline_N)
    return TurnCredit(values_N, baseline_N, torch.ones_like(values_N), advantages_N)


@register_estimator(
    "gtpo",
    no_effect={
        "normalize": {
            "turn_index": ("weight_trajectories",),
            "first_return": ("weight_trajectories",),
            "leave_one_out": ("use_std",),
            "none": ("use_std", "weight_trajectories"),
        }
    },
)
def gtpo(
    turns: Turns,
    *,
    gamma: float = 0.9,
    normalize: Literal[
        "group", "turn_index", "batch", "first_return", "leave_one_out", "none"
    ] = "group",
    use_std: bool = True,
    weight_trajectories: bool = False,
) -> TurnCredit:
    """Discounted return of the turn, normalised over a set (GTPO, arXiv 2511.14846).

    `normalize` names the set: all turns of the prompt, turn k of the prompt's trajectories (so does
    "turn_index"; each has one row there, hence no weighting), all turns of the step over all
    learners, the prompt's first returns, the prompt's other trajectories, or nothing.  With
    "first_return" later turns are not in the set that divides them: where first returns hardly
    differ, their advantages have no bound.

    Degenerate case: a set of one row, or of equal returns, gives 0; with gamma < 1 a solved group
    is not such a set, and still prefers fewer turns.
    """
    returns_N = discounted_sum(turns.rewards_N, turns.rows, gamma)
    one_N = torch.ones_like(returns_N)
    weight_N = 1.0 / turns.rows.segments.size() if weight_trajectories else one_N
    if normalize == "none":
        return TurnCredit(returns_N, torch.zeros_like(returns_N), one_N, returns_N)
    if normalize == "leave_one_out":
        return leave_one_out(turns, returns_N, weight_N)
    if normalize == "batch":
        mean_N, std_N = spread_over_step(turns, returns_N, weight_N)
    elif normalize == "turn_index":
        same_turn = Segments.of(turns.group.index_N, turns.rows.position_N)
        mean_N, std_N = spread_N(returns_N, one_N, same_turn)
    else:
        weight_N = turns.first_N if normalize == "first_return" else weight_N
        mean_N, std_N = spread_N(returns_N, weight_N, turns.group)
    return standardised(returns_N, mean_N, std_N, use_std)


def among_members(turns: Turns, scalar_N: Tensor, use_std: bool) -> TurnCredit:
    """A trajectory's scalar normalised over the trajectories of its prompt."""
    return standardised(scalar_N, *spread_N(scalar_N, turns.first_N, turns.group), use_std)


@register_estimator("grpo")
def grpo(turns: Turns, *, outcome: Tensor) -> TurnCredit:
    """`outcome`, e.g. min(accuracy, format), standardised in the group (GRPO, arXiv 2402.03300).

    Degenerate case: a group whose members all have one outcome, or one member, gives 0.
    """
    return among_members(turns, outcome, use_std=True)


@register_estimator("grpo_sum")
def grpo_sum(turns: Turns) -> TurnCredit:
    """GRPO (arXiv 2402.03300) on the summed turn rewards: GTPO's reward without its credit.

    Degenerate case: a group of equal sums, or of one member, gives 0.
    """
    return among_members(turns, turns.sums(), use_std=True)


@register_estimator("dr_grpo")
def dr_grpo(turns: Turns) -> TurnCredit:
    """Summed reward minus the group's mean, not divided by its std (Dr. GRPO, arXiv 2503.20783).

    Degenerate case: a group of equal sums, or of one member, gives 0.
    """
    return among_members(turns, turns.sums(), use_std=False)


@register_estimator("rloo")
def rloo(turns: Turns) -> TurnCredit:
    """Summed reward minus the mean of the other members' (RLOO, arXiv 2402.14740).

    Degenerate case: a group of equal sums, or of one member, gives 0.
    """
    return leave_one_out(turns, turns.sums(), turns.first_N)


@register_estimator("reinforce_pp")
def reinforce_pp(turns: Turns) -> TurnCredit:
    """Summed reward centred in the group, over the step's std (REINFORCE++, arXiv 2501.03262).

    The std is that of the *centred* sums of all learners' trajectories, each counted once.

    Degenerate case: a group of equal sums, or of one member, gives 0.
    """
    centred = dr_grpo(turns)
    std_N = spread_over_step(turns, centred.advantages, turns.first_N)[1]
    scaled = standardised(centred.advantages, torch.zeros_like(std_N), std_N, use_std=True)
    return TurnCredit(centred.returns, centred.baseline, scaled.scale, scaled.advantages)


@register_estimator("mt_grpo")
def mt_grpo(turns: Turns, *, outcome: Tensor, lambda_: float = 1.0) -> TurnCredit:
    """GRPO on `outcome` (accuracy) plus `lambda_` times the turn's own reward (arXiv 2505.11821).

    The turn's own reward is normalised over turn k of the prompt's trajectories, and is not added
    on a trajectory's last turn.

    Degenerate case: without spread in the outcomes, or in turn k, that term alone is 0.
    """
    credit = grpo(turns, outcome=outcome)
    same_turn = Segments.of(turns.group.index_N, turns.rows.position_N)
    one_N = torch.ones_like(turns.rewards_N)
    own = standardised(turns.rewards_N, *spread_N(turns.rewards_N, one_N, same_turn), True)
    own_N = torch.where(turns.rows.remaining_N == 0, 0.0, own.advantages)
    advantages_N = credit.advantages + lambda_ * own_N
    return TurnCredit(credit.returns, credit.baseline, credit.scale, advantages_N)


@register_estimator("gigpo")
def gigpo(
    turns: Turns,
    *,
    anchor: Tensor,
    gamma: float = 0.9,
    omega: float = 1.0,
    use_std: bool = False,
) -> TurnCredit:
    """`grpo_sum` plus `omega` times the return among turns of one state (GiGPO, arXiv 2505.10978).

    The second term's set is the prompt's turns with the same `anchor`, of any trajectory and turn
    index; `use_std` is about this term only.

    Degenerate case: a state that was seen once adds 0, so all-distinct anchors give `grpo_sum`.
    """
    credit = grpo_sum(turns)
    returns_N = discounted_sum(turns.rewards_N, turns.rows, gamma)
    same_state = Segments.of(turns.group.index_N, anchor)
    spread = spread_N(returns_N, torch.ones_like(returns_N), same_state)
    step_N = standardised(returns_N, *spread, use_std).advantages
    return TurnCredit(
        credit.returns, credit.baseline, credit.scale, credit.advantages + omega * step_N
    )
