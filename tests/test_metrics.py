"""Rollout metrics by hand: exact ratios over everything, never means of means."""

from __future__ import annotations

import pytest

from rllib_gtpo.metrics import nested, rollout_metrics
from rllib_gtpo.types import Group, StopReason, ToolError, ToolResult, Trajectory, Turn


def turn(index, tokens, results=(), **rewards):
    return Turn(
        index,
        [0, 0],
        [0] * tokens,
        [0.0] * tokens,
        rewards=rewards,
        results=[ToolResult("add", "", error) for error in results],
    )


def groups():
    """A group of two, one of which solves it with a tool, and a group of one that fails."""
    good = Trajectory(
        {},
        turns=[turn(0, 3, [None, ToolError.RAISED], format=0.0), turn(1, 2, accuracy=1.0)],
        stop_reason=StopReason.ANSWER,
        correct=True,
    )
    bad = Trajectory({}, turns=[turn(0, 4, format=-0.1)], stop_reason=StopReason.MAX_TOKENS)
    other = Trajectory(
        {},
        turns=[turn(0, 1, [ToolError.INVALID], format=-0.1, accuracy=0.0)],
        stop_reason=StopReason.MAX_TURNS,
    )
    return [Group(0, {}, [good, bad]), Group(1, {}, [other])]


def test_by_hand():
    found = rollout_metrics(groups())
    expected = {
        "accuracy": 1 / 3,
        "turn/per_trajectory": 4 / 3,
        "turn/tokens": 10 / 4,
        "turn/reward": 0.8 / 4,
        "trajectory/tokens": (9 + 6 + 3) / 3,
        "trajectory/truncated_frac": 2 / 3,
        "tool/calls_per_trajectory": 1.0,
        "tool/invalid_rate": 1 / 4,
        "tool/error_rate": 1 / 2,
        "tool/timeout_rate": 0.0,
        "tool/used_frac": 1 / 3,
        "tool/used_frac_solved": 1.0,
        "group/solved_frac": 0.0,
        "group/failed_frac": 1 / 2,
        "reward/accuracy": 1 / 3,
        "reward/format": -0.2 / 3,
    }
    for reason in StopReason:
        expected[f"stop/{reason}"] = 0.0
    for reason in ("answer", "max_tokens", "max_turns"):
        expected[f"stop/{reason}"] = 1 / 3
    assert found == pytest.approx(expected)


def test_discarded_rollouts_count_in_why_rollouts_stop_and_nowhere_else():
    broken = [
        Trajectory({}, turns=[turn(0, 9, accuracy=0.0)], stop_reason=StopReason.ENV_TIMEOUT),
        Trajectory({}, stop_reason=StopReason.ENV_ERROR),
    ]
    plain, found = rollout_metrics(groups()), rollout_metrics(groups(), broken)
    changed = {name for name in plain if plain[name] != found[name]}
    assert {name.split("/")[0] for name in changed} == {"stop"}
    assert found["stop/env_timeout"] == found["stop/env_error"] == found["stop/answer"] == 1 / 5


def test_nothing_sampled_is_zero():
    assert set(rollout_metrics([]).values()) == {0.0}


def test_nested_names():
    assert nested({"a/b": 1.0, "a/c/d": 2.0, "e": 3.0}) == {
        "a": {"b": 1.0, "c": {"d": 2.0}},
        "e": 3.0,
    }
