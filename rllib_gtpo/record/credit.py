"""What a learner did with each trajectory: the credit of its turns, and its tokens' ratios."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rllib_gtpo.ops.losses import Objective, token_ratios
from rllib_gtpo.ops.registry import TurnCredit
from rllib_gtpo.packing import TokenBatch
from rllib_gtpo.types import Trajectory


@dataclass(frozen=True)
class TokenTraining:
    """Of each trained token of a trajectory, in order.

    anchor_logprobs: Of the learner before the update.
    ratios, clipped: At the last optimizer step of the update that trained the trajectory.
    """

    anchor_logprobs: np.ndarray[Any, Any]
    ratios: np.ndarray[Any, Any]
    clipped: np.ndarray[Any, Any]


@dataclass(frozen=True)
class LearnedCredit:
    """One trajectory's rows of the learner's TurnCredit, in their own precision.

    turns: "return", "baseline", "scale" and "advantage" of every turn.
    tokens: None if the loss left the trajectory out.
    """

    group_id: int
    member: int
    turns: dict[str, np.ndarray[Any, Any]]
    tokens: TokenTraining | None


class TokenTrace:
    """Keeps the log-probabilities that an update computes anyway; they stay on their device."""

    def __init__(self) -> None:
        self._steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, batch: TokenBatch, logprobs: Tensor, anchor: Tensor | None) -> None:
        """The trained tokens of one micro-batch; without an anchor the ratios are 1."""
        now = logprobs.detach()
        self._steps.append(
            (batch.sequences_N, batch.turns_N, now, now if anchor is None else anchor)
        )

    def learned_credit(
        self,
        objective: Objective,
        credit: TurnCredit,
        trajectories: Sequence[Trajectory],
        group_ids: set[int],
    ) -> list[LearnedCredit]:
        """The credit of the trajectories of some groups; `credit` has the rows of all."""
        columns = {
            "return": credit.returns.cpu().numpy(),
            "baseline": credit.baseline.cpu().numpy(),
            "scale": credit.scale.cpu().numpy(),
            "advantage": credit.advantages.cpu().numpy(),
        }
        chosen = {i for i, t in enumerate(trajectories) if t.group_id in group_ids}
        tokens = dict(self._tokens(objective, credit.advantages.float().cpu(), chosen))
        learned, row = [], 0
        for index, t in enumerate(trajectories):
            rows = slice(row, row := row + len(t.turns))
            if index in chosen:
                turns = {name: column[rows] for name, column in columns.items()}
                learned.append(LearnedCredit(t.group_id, t.member, turns, tokens.get(index)))
        return learned

    def _tokens(
        self, objective: Objective, advantages: Tensor, chosen: set[int]
    ) -> Iterator[tuple[int, TokenTraining]]:
        """Of each chosen sequence that was trained, by its index."""
        last: dict[int, tuple[Tensor, ...]] = {}
        for step in self._steps:
            sequences, *rest = (part.cpu() for part in step)
            found, counts = torch.unique_consecutive(sequences, return_counts=True)
            parts = zip(*(part.split(counts.tolist()) for part in rest), strict=True)
            last.update(
                (index, part)
                for index, part in zip(found.tolist(), parts, strict=True)
                if index in chosen
            )
        if not last:
            return
        counts = torch.tensor([len(turns) for turns, _, _ in last.values()])
        turns, now, anchor = (torch.cat(parts) for parts in zip(*last.values(), strict=True))
        ratios, clipped = token_ratios(
            objective,
            learner_logprobs=now.float(),
            anchor_logprobs=anchor.float(),
            advantages=advantages[turns],
            turn=turns,
            trajectory=torch.arange(len(last)).repeat_interleave(counts),
        )
        columns = (part.numpy() for part in (anchor.float(), ratios, clipped))
        ends = np.cumsum(counts.numpy())[:-1]
        parts = zip(*(np.split(column, ends) for column in columns), strict=True)
        for index, part in zip(last, parts, strict=True):
            yield index, TokenTraining(*part)
