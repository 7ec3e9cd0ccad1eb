"""avg@k, pass@k, maj@k and their intervals, against numbers that a person can compute."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rllib_gtpo.at_k import compute_at_k, compute_majority, compute_pass_at_k
from rllib_gtpo.intervals import compute_interval, compute_wilson
from rllib_gtpo.types import Group, Trajectory


def equal(a, b):
    return a == b


@pytest.mark.parametrize(
    ("samples", "correct", "k", "expected"),
    [
        (4, 0, 2, 0.0),
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (4, 2, 2, 5 / 6),  # 1 - 1/6
        (5, 2, 3, 9 / 10),  # 1 - C(3,3)/C(5,3) = 1 - 1/10
        (4, 3, 2, 1.0),  # two of four cannot both be the only wrong one
        (1, 1, 1, 1.0),
        (200, 1, 100, 1 / 2),
    ],
)
def test_pass_at_k(samples, correct, k, expected):
    assert compute_pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.integers(1, 7))
def test_pass_at_k_is_the_share_of_all_subsets_with_a_correct_one(correct, k):
    k = min(k, len(correct))
    subsets = [any(subset) for subset in combinations(correct, k)]
    got = compute_pass_at_k(len(correct), sum(correct), k)
    assert got == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_of_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="pass@5 of 1 correct ones among 4"):
        compute_pass_at_k(4, 1, 5)


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        (["7", "7", "5"], "7", 1.0),
        (["5", "5", "7"], "7", 0.0),
        (["5", "7"], "7", 1 / 2),  # a tie of a right and a wrong answer
        (["1", "2", "7"], "7", 1 / 3),
        ([None, None, "7"], "7", 1.0),  # no answer, no vote
        ([None, None], "7", 0.0),
        (["7"], "7", 1.0),
    ],
)
def test_majority(answers, right, expected):
    correct = [answer == right for answer in answers]
    assert compute_majority(answers, correct, equal) == pytest.approx(expected)


def test_answers_that_are_the_same_vote_together():
    answers = ["1/2", "2", "0.5", "2", "\\frac{1}{2}"]
    correct = [True, False, True, False, True]
    value = {"1/2": 0.5, "0.5": 0.5, "\\frac{1}{2}": 0.5, "2": 2.0}
    asked = []

    def same(a, b):
        asked.append((a, b))
        return value[a] == value[b]

    assert compute_majority(answers, correct, equal) == 0.0
    assert compute_majority(answers, correct, same) == 1.0
    assert ("2", "2") not in asked  # equal texts need no question


def test_wilson():
    """n = 10: centre (p + z^2/20) / (1 + z^2/10), with z^2 = 3.8415."""
    low, high = compute_wilson(5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    low, high = compute_wilson(0, 10)
    assert (low, high) == (0.0, pytest.approx(3.8415 / 13.8415, abs=1e-4))
    low, high = compute_wilson(10, 10)
    assert (low, high) == (pytest.approx(1 - 3.8415 / 13.8415, abs=1e-4), pytest.approx(1.0))


def test_the_interval_of_zeros_and_ones_is_wilsons():
    assert compute_interval([1.0] * 5 + [0.0] * 5) == compute_wilson(5, 10)


def test_the_bootstrap_covers_the_mean_and_shrinks_with_more_tasks():
    few = compute_interval([0.25, 0.5, 0.75] * 4)
    many = compute_interval([0.25, 0.5, 0.75] * 400)
    for count, (low, high) in ((12, few), (1200, many)):
        # The standard deviation of the values is sqrt(1/24) = 0.2041.
        half = 1.96 * 0.2041 / count**0.5
        assert (low, high) == (
            pytest.approx(0.5 - half, rel=0.12),
            pytest.approx(0.5 + half, rel=0.12),
        )
    assert compute_interval([0.25, 0.5, 0.75] * 4) == few
    assert compute_interval([0.5] * 3) == (0.5, 0.5)


def group(id, *answers):
    members = [Trajectory({"answer": "7"}, answer=a, correct=a == "7") for a in answers]
    return Group(id, {"answer": "7"}, members)


def test_all_of_them_by_hand():
    groups = [group(0, "7", "7", "5"), group(1, "5", "5", "7"), group(2, "1", None, "2")]
    metrics = compute_at_k(groups, lambda a, b, task: a == b)
    assert metrics["tasks"] == 3
    assert metrics["avg@3"] == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert metrics["pass@2"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert metrics["pass@3"] == pytest.approx(2 / 3)
    assert metrics["maj@3"] == pytest.approx((1 + 0 + 0) / 3)
    assert (metrics["maj@3_low"], metrics["maj@3_high"]) == compute_wilson(1, 3)
    assert metrics["avg@3_low"] < metrics["avg@3"] < metrics["avg@3_high"]
    names = {"avg@3", "maj@3", "pass@2", "pass@3"}
    ends = {f"{name}_{end}" for name in names for end in ("low", "high")}
    assert set(metrics) == {"tasks", *names, *ends}
    assert compute_at_k([], lambda a, b, task: True) == {}


def test_one_rollout_of_each_task():
    metrics = compute_at_k([group(0, "7"), group(1, "5")], lambda a, b, task: a == b)
    low, high = compute_wilson(1, 2)
    assert metrics == {"tasks": 2, "avg@1": 0.5, "avg@1_low": low, "avg@1_high": high}


def test_the_environment_says_what_is_the_same_and_knows_the_task():
    tasks = []

    def same(a, b, task):
        tasks.append(task)
        return True

    groups = [group(0, "5", "07", "7")]
    assert compute_at_k(groups, same)["maj@3"] == pytest.approx(1 / 3)  # one group of all three
    assert tasks == [{"answer": "7"}] * 2
