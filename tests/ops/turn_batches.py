"""Batches of turns for the tests of estimators: by hand, and drawn by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from rllib_gtpo.ops.advantages import ESTIMATORS, TurnCredit, turn_credit
from tests.ops import reference

MODES = ["group", "turn_index", "batch", "first_return", "leave_one_out", "none"]
VARIANTS: list[dict[str, Any]] = [
    *({"estimator": "gtpo", "normalize": mode} for mode in MODES),
    *(
        {"estimator": "gtpo", "normalize": mode, "use_std": False}
        for mode in ("group", "turn_index", "batch", "first_return")
    ),
    *(
        {"estimator": "gtpo", "normalize": mode, "weight_trajectories": True}
        for mode in ("group", "batch", "leave_one_out")
    ),
    *(
        {"normalize": mode, "use_std": False, "weight_trajectories": True, "estimator": "gtpo"}
        for mode in ("group", "batch")
    ),
    *({"estimator": e} for e in ("grpo", "grpo_sum", "dr_grpo", "rloo", "reinforce_pp")),
    {"estimator": "mt_grpo"},
    {"estimator": "mt_grpo", "lambda_": 0.3},
    {"estimator": "gigpo"},
    {"estimator": "gigpo", "use_std": True, "omega": 0.5},
]


def name_of(variant: dict[str, Any]) -> str:
    return "-".join(str(value) for value in variant.values())


each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=name_of)


@dataclass
class Batch:
    """A ragged batch as lists: one entry per turn."""

    rewards: list[float]
    trajectory: list[int]
    group: list[int]
    outcome: list[float]
    anchor: list[int]

    def credit(self, dtype: torch.dtype = torch.float64, **options: Any) -> TurnCredit:
        return turn_credit(
            torch.tensor(self.rewards, dtype=dtype),
            torch.tensor(self.trajectory, dtype=torch.long),
            torch.tensor(self.group, dtype=torch.long),
            outcome=torch.tensor(self.outcome, dtype=dtype),
            anchor=torch.tensor(self.anchor, dtype=torch.long),
            **options,
        )

    def with_rewards(self, rewards: list[float]) -> Batch:
        return replace(self, rewards=rewards)

    def rows(self, keep: list[int]) -> Batch:
        columns = (self.rewards, self.trajectory, self.group, self.outcome, self.anchor)
        return Batch(*([column[i] for i in keep] for column in columns))  # type: ignore[arg-type]

    def expected(self, estimator: str, **options: Any) -> list[float]:
        for name in ESTIMATORS[estimator].inputs:
            options[name] = getattr(self, name)
        function = reference.ESTIMATORS[estimator]
        return function(self.rewards, self.trajectory, self.group, **options)


@st.composite
def batches(draw: st.DrawFn, max_len: int = 4) -> Batch:
    """Ragged groups whose members are interleaved, with arbitrary ids and few distinct rewards."""
    groups = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    owners = draw(st.permutations([g for g, members in enumerate(groups) for _ in range(members)]))
    group_ids = draw(
        st.lists(
            st.integers(-(2**62), 2**62), min_size=len(groups), max_size=len(groups), unique=True
        )
    )
    ids = draw(
        st.lists(st.integers(-50, 50), min_size=len(owners), max_size=len(owners), unique=True)
    )
    batch = Batch([], [], [], [], [])
    for trajectory, owner in zip(ids, owners, strict=True):
        outcome = draw(st.sampled_from([0.0, 1.0]))
        for _ in range(draw(st.integers(1, max_len))):
            batch.rewards.append(draw(st.sampled_from([-0.5, 0.0, 0.25, 1.0])))
            batch.trajectory.append(trajectory)
            batch.group.append(group_ids[owner])
            batch.outcome.append(outcome)
            batch.anchor.append(draw(st.integers(-1, 2)))
    return batch


def assert_near(got: Tensor, expected: Any, atol: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=got.dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def solved(correct: int, members: int = 8, turns: int = 4) -> Batch:
    rewards = [[0.0] * (turns - 1) + [float(m < correct)] for m in range(members)]
    flat = [r for member in rewards for r in member]
    owner = [m for m in range(members) for _ in range(turns)]
    outcome = [float(m < correct) for m in owner]
    return Batch(flat, owner, [5] * len(flat), outcome, [0] * len(flat))


# One small example for all.
# Group 1: trajectory 10 = rewards [0, 1], trajectory 11 = [0.5], trajectory 12 = [0, 0];
# group 2: trajectory 20 = [1] alone.  gamma 0.5: returns 0.5 1 | 0.5 | 0 0 | 1, sums 1 .5 0 | 1.
# Outcomes 1 0 0 | 1.  Anchors: the first turns of 10, 11 and 12 share one state.

HAND = Batch(
    [0, 1, 0.5, 0, 0, 1],
    [10, 10, 11, 12, 12, 20],
    [1, 1, 1, 1, 1, 2],
    [1, 1, 0, 0, 0, 1],
    [7, 8, 7, 7, 9, 7],
)
