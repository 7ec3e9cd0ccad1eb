"""Connector pieces on the learner: groups to turn credit, trajectories to token sequences.

They run in each learner, on its device, over whole groups.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ray.rllib.connectors.connector_v2 import ConnectorV2
from torch import Tensor

from rllib_gtpo.episodes import groups_of
from rllib_gtpo.ops.advantages import ESTIMATORS, TurnCredit, turn_credit
from rllib_gtpo.ops.diagnostics import DEAD, CreditedTurns, diagnostic_sums
from rllib_gtpo.packing import TokenSequence, token_sequences
from rllib_gtpo.rewards.shaping import SHAPING, can_be_shaped
from rllib_gtpo.types import Group, StopReason, Trajectory, flat_turns

GROUPS = "groups"
DROPPED = "dropped"  # how many groups `uniform_groups` left out
TRAJECTORIES = "trajectories"
CREDIT = "turn_credit"
CREDIT_S = "credit_s"  # how long the credit took
DIAGNOSTICS = "diagnostics"  # this learner's sums for rllib_gtpo.ops.diagnostics
SEQUENCES = "token_sequences"

CUT_OFF = (StopReason.TURN_TRUNCATED, StopReason.MAX_TOKENS)  # for want of tokens


@dataclass(frozen=True)
class CreditRule:
    """How whole groups become credit, and which groups and trajectories are trained on.

    estimator, gamma, options: See `turn_credit`.
    uniform_groups: See `keeps`.
    overlong: With "mask", trajectories that were cut off are part of their group's statistics, but
        the loss leaves out all of their tokens; see `trains`.
    """

    estimator: str
    gamma: float
    options: dict[str, Any]
    uniform_groups: str = "keep"
    overlong: str = "keep"

    def keeps(self, group: Group) -> bool:
        """Whether a group is trained on; each choice drops what the one before drops, and more.

        "keep": All are.
        "drop_solved": Not those that every member solved.
        "drop": Nor those that cannot tell their members apart: all have the same summed reward
            (format penalties and shaping included) and the same outcome, or the advantage of every
            turn that is trained is 0.  So an all-failed group stays if its members were penalised
            differently and the estimator takes account of it.
        """
        members = group.trajectories
        if self.uniform_groups == "keep":
            return True
        if all(t.correct for t in members):
            return False
        if self.uniform_groups == "drop_solved":
            return True
        scores = [(t.reward, outcome_of(t, self.estimator)) for t in members]
        if all(math.dist(score, scores[0]) < DEAD for score in scores):
            return False
        advantages = self.credit([group]).advantages
        trained = torch.tensor([self.trains(t) for t in members for _ in t.turns])
        return bool((advantages[trained].abs() >= DEAD).any())

    def trains(self, trajectory: Trajectory) -> bool:
        """Whether a trajectory's tokens are trained on.

        One that ran out of turns is, even under "mask": it is made of complete turns, and the limit
        is part of the task.  Where tokens ran out, the last turn is a fragment, and what it would
        have led to is unknown.
        """
        if not trajectory.turns:
            return False
        return self.overlong != "mask" or trajectory.stop_reason not in CUT_OFF

    def credit(self, groups: list[Group], **options: Any) -> TurnCredit:
        """`credit_of` with this rule's estimator."""
        return credit_of(groups, self.estimator, self.gamma, self.options, **options)


class GroupTurnAdvantages(ConnectorV2):
    """Episodes -> the groups that are trained on, their trajectories, and the credit of every
    turn."""

    def __init__(self, *args: Any, rule: CreditRule, device: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rule = rule
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
        groups = [g for g in sampled if self._rule.keeps(g)]
        where = {"device": self._device, "all_reduce": (shared_data or {}).get("all_reduce")}
        began = time.perf_counter()
        credit = self._rule.credit(groups, **where)
        batch[CREDIT_S] = time.perf_counter() - began
        unshaped = self._rule.credit(groups, without=SHAPING, **where)
        batch[GROUPS] = groups
        batch[DROPPED] = len(sampled) - len(groups)
        batch[TRAJECTORIES] = [t for g in groups for t in g.trajectories]
        batch[CREDIT] = credit
        batch[DIAGNOSTICS] = diagnostic_sums(
            credited_turns(
                groups,
                credit.advantages,
                unshaped.advantages,
                [self._rule.trains(t) for t in batch[TRAJECTORIES]],
                batch[DROPPED],
            )
        )
        return batch


class TokenSequences(ConnectorV2):
    """Trajectories -> token sequences whose turn rows are the rows of the credit.

    A trajectory that is not trained on has an empty one.
    """

    def __init__(self, *args: Any, rule: CreditRule, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rule = rule

    def __call__(self, *, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        trajectories = batch[TRAJECTORIES]
        batch[SEQUENCES] = [
            sequence if self._rule.trains(t) else TokenSequence([], [], [])
            for t, sequence in zip(trajectories, token_sequences(trajectories), strict=True)
        ]
        return batch


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
    without: str = "",
) -> TurnCredit:
    """The credit of every turn of `groups`, in the order of `flat_turns`.

    without: A reward component to leave out.
    """
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
    rewards = [sum(v for name, v in t.rewards.items() if name != without) for t in turns]
    return turn_credit(
        torch.tensor(rewards, dtype=torch.float64, device=device),
        per_turn(list(range(len(trajectories))), torch.long),
        per_turn(member_group, torch.long),
        estimator=estimator,
        all_reduce=all_reduce,
        **extra,
    )


def credited_turns(
    groups: list[Group],
    advantages: Tensor,
    unshaped: Tensor,
    trained: list[bool],
    dropped: int = 0,
) -> CreditedTurns:
    """The credit of `groups` as the diagnostics take it; `trained` is per trajectory."""
    device = advantages.device
    members = [(index, t) for index, g in enumerate(groups) for t in g.trajectories]
    filled = [(index, t, on) for (index, t), on in zip(members, trained, strict=True) if t.turns]
    solvable = [any(t.correct for t in g.trajectories) for g in groups]
    counts = torch.tensor([len(t.turns) for _, t, _ in filled], dtype=torch.long, device=device)
    last = [t.turns[-1].rewards for _, t, _ in filled]

    def column(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return CreditedTurns(
        advantages.double(),
        unshaped.double(),
        torch.arange(len(filled), device=device).repeat_interleave(counts),
        column([len(turn.token_ids) for turn in flat_turns(groups)], torch.long),
        column([on for _, _, on in filled], torch.bool).repeat_interleave(counts),
        column([index for index, _, _ in filled], torch.long),
        column([t.correct for _, t, _ in filled], torch.bool),
        column([rewards.get(SHAPING, 0.0) for rewards in last], torch.float64),
        column(
            [
                SHAPING in rewards and solvable[index] and can_be_shaped(t)
                for (index, t, _), rewards in zip(filled, last, strict=True)
            ],
            torch.bool,
        ),
        len(groups),
        dropped,
    )
