"""The line of an iteration."""

from __future__ import annotations

import pytest

from rllib_gtpo.summary import summary_line


def result(**group):
    return {
        "training_iteration": 3,
        "accuracy": 0.5,
        "reward": {"accuracy": 0.5, "format": -0.1},
        "turn": {"per_trajectory": 2.5},
        "tool": {"error_rate": 0.1, "invalid_rate": 0.2},
        "group": {"zero_std_frac": 0.25, "failed_frac": 0.0, "solved_frac": 0.0, **group},
        "mismatch": {"kl": 1e-7},
        "policy": {"entropy": 0.8},
        "tokens": {"per_s": 100.0},
        "time": {"rollout_s": 1.0, "update_s": 0.5, "sync_s": 0.1},
    }


def test_one_line_while_there_is_something_to_learn():
    line = summary_line(result())
    assert line.startswith("iter   3  acc 0.500  reward: accuracy +0.500 format -0.100  turns 2.50")
    assert "no-signal 0.25" in line and "\n" not in line and "held-out" not in line
    held_out = summary_line(result() | {"evaluation": {"accuracy": 0.75}})
    assert held_out == line + "  held-out 0.750"


@pytest.mark.parametrize(
    "group, remedy",
    [
        ({"failed_frac": 1.0}, "every rollout failed: try a cold_start"),
        ({"solved_frac": 1.0}, "every rollout is right: try harder tasks"),
        ({"failed_frac": 0.5, "solved_frac": 0.5}, "every advantage is 0"),
    ],
)
def test_what_to_do_when_nothing_has_a_signal(group, remedy):
    _, line = summary_line(result(zero_std_frac=1.0, **group)).split("\n")
    assert line.strip().startswith(f"nothing to learn from, {remedy}")
