"""Discounted returns of turns: R_k = sum_{m>=k} gamma^(m-k) r_m.

Shape suffixes: `_N` flat turns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rllib_gtpo.ops.segments import TrajectoryRows, check_rows


def turn_returns(rewards: Tensor, trajectory: Tensor, gamma: float) -> Tensor:
    """Discounted return of every turn, within its own trajectory.

    Args:
        rewards: Float [N], the summed reward of each turn.
        trajectory: Int [N], any ids; the turns of a trajectory are adjacent and in order.
        gamma: Discount per turn in [0, 1].  0 gives the rewards, 1 the reward to go.

    Returns:
        [N] in the dtype and on the device of `rewards`; computed in float64, without gradient.

    Raises:
        ValueError: Naming the row, for bad shapes, NaN, infinity or a split trajectory.

    Example:
        ```python
        rewards [0, 0, 1 | 1], trajectory [7, 7, 7 | 3], gamma 0.9  ->  [0.81, 0.9, 1 | 1]
        ```
    """
    check_rows("rewards", rewards, integer=False)
    check_rows("trajectory", trajectory, rewards, integer=True)
    rows = TrajectoryRows.of(trajectory)
    return discounted_sum(rewards.detach().double(), rows, gamma).to(rewards.dtype)


def discounted_sum(rewards_N: Tensor, rows: TrajectoryRows, gamma: float) -> Tensor:
    """`turn_returns` on checked float64 rows.

    Doubling: once R_N holds the sum of the next `step` rewards, adding gamma^step times R_N `step`
    rows on gives the next 2 * step.  So log2(longest trajectory) passes and only multiplications
    with powers of gamma: nothing overflows or divides, also for gamma 0 and long trajectories.
    """
    if isinstance(gamma, bool) or not math.isfinite(gamma) or not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    returns_N = rewards_N.clone()
    longest = int(rows.remaining_N.max()) + 1 if rewards_N.numel() else 0
    step = 1
    while step < longest and gamma**step > 0.0:
        inside_N = rows.remaining_N[:-step] >= step
        later_N = torch.where(inside_N, returns_N[step:], 0.0)
        returns_N[:-step].add_(later_N, alpha=gamma**step)
        step *= 2
    return returns_N
