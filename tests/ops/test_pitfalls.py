"""What is easily got wrong about turn-level credit, and has been published: each as an example."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import pytest

from tests.ops.turn_batches import Batch, assert_near, solved


def group(*members: list[float]) -> Batch:
    """One prompt's members by the rewards of their turns, none of them correct."""
    rewards = [r for member in members for r in member]
    owner = [i for i, member in enumerate(members) for _ in member]
    n = len(rewards)
    return Batch(rewards, owner, [0] * n, [0.0] * n, list(range(n)))


def test_a_nearly_solved_group_pushes_down_the_start_of_correct_trajectories() -> None:
    advantages = solved(7).credit().advantages
    assert advantages[0] < 0 < advantages[1]  # though the first turn led to a right answer
    assert advantages[28:].max() < -2.5
    assert solved(7).credit(estimator="grpo").advantages[:28].min() > 0


def test_a_solved_group_still_trains_towards_fewer_turns() -> None:
    assert solved(8).credit().advantages.abs().max() > 1
    for silent in ({"estimator": "grpo"}, {"estimator": "grpo_sum"}, {"gamma": 1.0}):
        assert solved(8).credit(**silent).advantages.abs().max() == 0
    short_and_long = group([1], [0, 0, 1]).credit().advantages
    assert short_and_long[0] > 0 > short_and_long[1]


def test_long_trajectories_weigh_more_unless_asked_otherwise() -> None:
    batch = group([1], [0, 0, 0, 0])
    assert_near(batch.credit().baseline, [0.2] * 5)
    assert_near(batch.credit(weight_trajectories=True).baseline, [0.5] * 5)
    # the short one's success looks twice as rare in units of std
    assert_near(batch.credit().advantages, [2.0, *[-0.5] * 4], atol=1e-5)
    balanced = batch.credit(weight_trajectories=True).advantages
    assert_near(balanced, [1.0, *[-1.0] * 4], atol=1e-5)
    over_turns = batch.credit(normalize="leave_one_out").baseline
    assert_near(over_turns, [0, 1, 1, 1, 1])


def test_leaving_one_out_weighs_the_others_as_asked() -> None:
    batch = group([0.5], [1], [0, 0, 0])
    assert_near(batch.credit(normalize="leave_one_out").baseline[:1], [0.25])
    weighted = batch.credit(normalize="leave_one_out", weight_trajectories=True)
    assert_near(weighted.baseline[:1], [0.5])


def test_first_returns_that_hardly_differ_blow_up_the_later_turns() -> None:
    """Their std divides what they do not bound; over all turns |advantage| < sqrt(rows)."""
    batch = group([-0.4999, 0.25, -0.25 / 0.9, 0], [-0.5])
    assert batch.credit(normalize="first_return").advantages.abs().max() > 1000
    assert batch.credit().advantages.abs().max() < 5**0.5


@pytest.mark.parametrize(
    ("estimator", "speaks"),
    [("gtpo", True), ("grpo_sum", True), ("dr_grpo", True), ("grpo", False)],
)
def test_format_penalties_train_a_group_without_a_correct_member(
    estimator: str, speaks: bool
) -> None:
    penalised = group([-0.1, 0], [0, 0])  # outcome min(accuracy, format) is 0 for both
    advantages = penalised.credit(estimator=estimator).advantages
    assert (advantages[0] < 0) == speaks
    assert (advantages.abs().max() > 0) == speaks


def test_shaping_makes_late_turns_of_a_wrong_trajectory_look_better_than_early_ones() -> None:
    wrong = group([0, 0, 0.4], [0, 0, 1]).credit().advantages[:3]
    assert wrong[0] < wrong[1] < wrong[2]
    unshaped = group([0, 0, 0], [0, 0, 1]).credit().advantages[:3]
    assert unshaped[0] == unshaped[1] == unshaped[2] < 0


def test_a_turn_that_only_one_member_reached_is_worth_nothing_per_index() -> None:
    """Going on is a choice; compared with nobody, neither a win nor a loss after it counts."""
    for final in (1.0, -5.0):
        batch = group([0.2], [0.2], [0, final])
        per_index = batch.credit(normalize="turn_index").advantages
        assert per_index[3] == 0
        assert (batch.credit().advantages[3] > 0) == (final > 0)


# A policy that may stop: it goes on with probability P, else it stops with reward STOP; if it goes
# on, it takes with probability Q the action that is worth 1, else one that is worth 0.
P, Q, STOP = 0.5, 0.5, 0.25
WAYS = [  # probability, rewards, d log-probability of each turn by the logits of P and Q
    (1 - P, [STOP], [(-P, 0.0)]),
    (P * Q, [0.0, 1.0], [(1 - P, 0.0), (0.0, 1 - Q)]),
    (P * (1 - Q), [0.0, 0.0], [(1 - P, 0.0), (0.0, -Q)]),
]
GRADIENT = (P * (1 - P) * (Q - STOP), P * Q * (1 - Q))  # of P * Q + (1 - P) * STOP


def expected_gradient(**options: Any) -> tuple[float, float]:
    """Of the policy-gradient estimate from two rollouts, over all that they can be."""
    by_p, by_q = 0.0, 0.0
    for ways in product(WAYS, repeat=2):
        chance = prod(way[0] for way in ways)
        credit = group(*(way[1] for way in ways)).credit(gamma=1.0, **options)
        scores = [score for way in ways for score in way[2]]
        for advantage, score in zip(credit.advantages.tolist(), scores, strict=True):
            by_p += chance * advantage * score[0] / 2
            by_q += chance * advantage * score[1] / 2
    return by_p, by_q


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"normalize": "leave_one_out"}, (1, 1)),
        ({"normalize": "none"}, (1, 1)),
        # a mean that holds the member itself shrinks both by the same (G - 1) / G: no bias
        ({"normalize": "first_return", "use_std": False}, (1 / 2, 1 / 2)),
        # the second turn's mean has two rows only if the other went on too: the choice to go on
        # decides how strongly the turn after it is trained
        ({"normalize": "turn_index", "use_std": False}, (1 / 2, P / 2)),
    ],
    ids=["leave_one_out", "none", "first_return", "turn_index"],
)
def test_normalising_per_turn_index_is_biased_where_the_policy_may_stop(
    options: dict[str, Any], share: tuple[float, float]
) -> None:
    assert GRADIENT == (0.0625, 0.125)
    expected = [g * s for g, s in zip(GRADIENT, share, strict=True)]
    assert list(expected_gradient(**options)) == pytest.approx(expected)
