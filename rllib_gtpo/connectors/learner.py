"""Connector pieces on the learner: groups to turn credit, trajectories to token sequences.

They run in each learner, on its device, over whole groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ray.rllib.connectors.connector_v2 import ConnectorV2
from torch import Tensor

from rllib_gtpo.episodes import groups_of
from rllib_gtpo.ops.advantages import ESTIMATORS, TurnCredit, turn_credit
from rllib_gtpo.packing import token_sequences
from rllib_gtpo.types import Group, Trajectory, flat_turns

GROUPS = "groups"
DROPPED = "dropped"  # how many groups `uniform_groups` left out
TRAJECTORIES = "trajectories"
CREDIT = "turn_credit"
SEQUENCES = "token_sequences"


class GroupTurnAdvantages(ConnectorV2):
    """Episodes -> the groups that are trained on, their trajectories, and the credit of every
    turn."""

    def __init__(
        self,
        *args: Any,
        estimator: str,
        gamma: float,
        options: dict[str, Any],
        uniform_groups: str,
        device: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._estimator, self._gamma, self._options = estimator, gamma, options
        self._uniform_groups = uniform_groups
        self._device = device or "cpu"

    def __call__(
        self,
        *,
        batch: dict[str, Any],
        episodes: list[Any],
        shared_data: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        sampled = groups_of(episodes)
        groups = [g for g in sampled if keeps_signal(g, self._uniform_groups)]
        all_reduce = (shared_data or {}).get("all_reduce")
        batch[GROUPS] = groups
        batch[DROPPED] = len(sampled) - len(groups)
        batch[TRAJECTORIES] = [t for g in groups for t in g.trajectories]
        batch[CREDIT] = credit_of(
            groups, self._estimator, self._gamma, self._options, self._device, all_reduce
        )
        return batch


class TokenSequences(ConnectorV2):
    """Trajectories -> token sequences whose turn rows are the rows of the credit."""

    def __call__(self, *, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        batch[SEQUENCES] = token_sequences(batch[TRAJECTORIES])
        return batch


def keeps_signal(group: Group, uniform_groups: str) -> bool:
    """Whether a group is trained on: "keep" all, drop solved ones, or drop all without a
    contrast."""
    solved = sum(t.correct for t in group.trajectories)
    if uniform_groups == "keep":
        return True
    if uniform_groups == "drop_solved":
        return solved < len(group.trajectories)
    return 0 < solved < len(group.trajectories)


def outcome_of(trajectory: Trajectory, estimator: str) -> float:
    """The scalar that trajectory-level estimators take.

    grpo: min(accuracy, format), where format is 1 if no turn was penalised for it.  mt_grpo:
        accuracy.
    """
    if not trajectory.turns:
        return 0.0
    accuracy = trajectory.turns[-1].rewards.get("accuracy", 0.0)
    if estimator != "grpo":
        return accuracy
    well_formed = all(t.rewards.get("format", 0.0) >= 0.0 for t in trajectory.turns)
    return min(accuracy, float(well_formed))


def credit_of(
    groups: list[Group],
    estimator: str,
    gamma: float,
    options: dict[str, Any],
    device: Any = "cpu",
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> TurnCredit:
    """The credit of every turn of `groups`, in the order of `flat_turns`."""
    trajectories = [t for g in groups for t in g.trajectories]
    sizes = [len(t.turns) for t in trajectories]
    counts = torch.tensor(sizes, dtype=torch.long, device=device)

    def per_turn(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device).repeat_interleave(counts)

    member_group = [index for index, g in enumerate(groups) for _ in g.trajectories]
    turns = flat_turns(groups)
    chosen = ESTIMATORS[estimator]
    extra: dict[str, Any] = dict(options)
    if "gamma" in chosen.options:
        extra["gamma"] = gamma
    if "outcome" in chosen.inputs:
        extra["outcome"] = per_turn([outcome_of(t, estimator) for t in trajectories], torch.float64)
    if "anchor" in chosen.inputs:
        states = [hash(tuple(turn.prompt_ids)) for turn in turns]  # what the policy was last told
        extra["anchor"] = torch.tensor(states, dtype=torch.long, device=device)
    return turn_credit(
        torch.tensor([t.reward for t in turns], dtype=torch.float64, device=device),
        per_turn(list(range(len(trajectories))), torch.long),
        per_turn(member_group, torch.long),
        estimator=estimator,
        all_reduce=all_reduce,
        **extra,
    )
