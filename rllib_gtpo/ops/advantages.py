"""Credit of turns: the one entry point to every estimator.

The estimators are in `estimators`, and how to add one is in `registry`; both are re-exported here.

Shape suffixes: `_N` flat turns (rows), `_S` trajectories.
"""

from __future__ import annotations

from dataclasses import fields
from types import EllipsisType
from typing import Any

from torch import Tensor

from rllib_gtpo.errors import ConfigError, did_you_mean
from rllib_gtpo.ops import estimators  # noqa: F401  registers the estimators
from rllib_gtpo.ops.registry import (
    ESTIMATORS,
    AllReduce,
    TurnCredit,
    Turns,
    register_estimator,
)
from rllib_gtpo.ops.segments import Segments, TrajectoryRows, check_constant, check_rows

__all__ = [
    "ESTIMATORS",
    "TurnCredit",
    "Turns",
    "register_estimator",
    "turn_advantages",
    "turn_credit",
]


def turn_credit(
    rewards: Tensor,
    trajectory: Tensor,
    group: Tensor,
    *,
    estimator: str = "gtpo",
    gamma: float | EllipsisType = ...,
    normalize: str | EllipsisType = ...,
    use_std: bool | EllipsisType = ...,
    weight_trajectories: bool | EllipsisType = ...,
    outcome: Tensor | None = None,
    anchor: Tensor | None = None,
    all_reduce: AllReduce | None = None,
    **estimator_options: Any,
) -> TurnCredit:
    """Credit of every turn, computed in float64 and returned in the dtype of `rewards`.

    Args:
        rewards: Float [N], the summed reward of each turn.
        trajectory: Int [N], any ids, unique over the whole batch; a trajectory's turns are adjacent
            and in order.
        group: Int [N], any ids; a group's trajectories need not be adjacent.
        estimator: A key of `ESTIMATORS`.
        gamma: `...` (as for the next three) means the estimator's own default.  Passing an option
            that the estimator or its mode does not use raises.
        normalize: Which set mean and std run over; see `gtpo`.
        use_std: Whether to divide by the standard deviation.
        weight_trajectories: Whether long trajectories weigh as much as short ones in mean and std.
        outcome: Float [N], the trajectory's scalar repeated on its rows.  Checked, and otherwise
            ignored by estimators that do not need it; so is `anchor`.
        anchor: Int [N], the anchor state of each turn.
        all_reduce: Sums a tensor over learners, in place or by returning it.  Only "batch" and
            reinforce_pp call it; then a learner without rows must call this function too.
        **estimator_options: Options of the estimator beyond the four above.

    Raises:
        ConfigError: For an unknown estimator or option, an unused option, or a missing input.
        ValueError: Naming the row, for bad shapes, NaN, a split trajectory or one in two groups.
    """
    if estimator not in ESTIMATORS:
        raise ConfigError(f"unknown estimator {estimator!r}{did_you_mean(estimator, ESTIMATORS)}")
    chosen = ESTIMATORS[estimator]
    common = dict(
        gamma=gamma, normalize=normalize, use_std=use_std, weight_trajectories=weight_trajectories
    )
    given = {name: value for name, value in common.items() if value is not ...}
    options = chosen.resolve({**given, **estimator_options})
    turns, data = checked_turns(rewards, trajectory, group, outcome, anchor, all_reduce)
    for name in chosen.inputs:
        if name not in data:
            raise ConfigError(f"estimator {estimator!r} needs {name!r}, a tensor of shape [N]")
        options[name] = data[name]
    credit = chosen.compute(turns, **options)
    parts = {f.name: getattr(credit, f.name) for f in fields(TurnCredit)}
    for name, part in parts.items():
        if part.shape != rewards.shape:
            raise ValueError(f"estimator {estimator!r} gave {name} of shape {tuple(part.shape)}")
    return TurnCredit(**{name: part.to(rewards.dtype) for name, part in parts.items()})


def turn_advantages(rewards: Tensor, trajectory: Tensor, group: Tensor, **options: Any) -> Tensor:
    """`turn_credit(...).advantages`, with the same arguments."""
    return turn_credit(rewards, trajectory, group, **options).advantages


def checked_turns(
    rewards: Tensor,
    trajectory: Tensor,
    group: Tensor,
    outcome: Tensor | None,
    anchor: Tensor | None,
    all_reduce: AllReduce | None,
) -> tuple[Turns, dict[str, Tensor]]:
    """The arguments of `turn_credit` as an estimator gets them, or a ValueError naming the row."""
    check_rows("rewards", rewards, integer=False)
    check_rows("trajectory", trajectory, rewards, integer=True)
    check_rows("group", group, rewards, integer=True)
    rows = TrajectoryRows.of(trajectory)
    check_constant("group", group, rows, "a trajectory belongs to one group")
    members = Segments.of(group[rows.start_S])
    group_rows = Segments(members.index_N[rows.segments.index_N], members.count)
    data = {}
    if outcome is not None:
        check_rows("outcome", outcome, rewards, integer=False)
        check_constant("outcome", outcome, rows, "repeat the trajectory's scalar on its rows")
        data["outcome"] = outcome.detach().double()
    if anchor is not None:
        check_rows("anchor", anchor, rewards, integer=True)
        data["anchor"] = anchor
    return Turns(rewards.detach().double(), rows, group_rows, all_reduce), data
