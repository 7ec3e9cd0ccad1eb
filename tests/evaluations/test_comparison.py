"""Paired comparisons, by hand; and what cannot be compared."""

from __future__ import annotations

import pytest

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.evaluations import Results, compare
from rllib_gtpo.evaluations.comparison import differing_settings


def results(*correct, split="test", samples=4, **about):
    """One task for each number of correct samples."""
    rows = [
        {
            "split": split,
            "position": position,
            "task_id": f"{split}-{position}",
            "prompt": f"{position}?",
            "samples": samples,
            "correct": count,
            "avg": count / samples,
            "maj": float(2 * count > samples),
        }
        for position, count in enumerate(correct)
    ]
    return Results({"source": "x", **about}, rows)


OURS, THEIRS = results(4, 3, 2, 0, 1), results(1, 3, 0, 1, 0)


def test_the_average_by_hand():
    [c] = compare(OURS, THEIRS)
    assert (c.split, c.metric, c.tasks) == ("test", "avg@4", 5)
    assert (c.ours, c.theirs) == (pytest.approx(10 / 20), pytest.approx(5 / 20))
    assert c.difference.estimate == pytest.approx(5 / 20)
    assert c.difference.low < 0.25 < c.difference.high
    assert (c.better, c.worse, c.equal) == (3, 1, 1)
    # Of 3, 2, -1, 1 with all signs, the sum is at least 5 in size for +++-, +++ +, ++-+ and
    # their opposites: 7 and 5 and 5, so 6 of 16.
    assert c.p == pytest.approx(6 / 16)
    assert [(change.task_id, change.ours, change.theirs) for change in c.changed] == [
        ("test-0", 1.0, 0.25),
        ("test-2", 0.5, 0.0),
        ("test-3", 0.0, 0.25),
        ("test-4", 0.25, 0.0),
    ]


def test_other_metrics_by_hand():
    [c] = compare(OURS, THEIRS, "pass@2")
    assert c.ours == pytest.approx((1 + 1 + 5 / 6 + 0 + 1 / 2) / 5)
    assert c.theirs == pytest.approx((1 / 2 + 1 + 0 + 1 / 2 + 0) / 5)
    [c] = compare(OURS, THEIRS, "maj")
    assert (c.metric, c.better, c.worse, c.equal) == ("maj@4", 1, 0, 4)
    assert c.p == 1.0  # one pair that differs says nothing


def test_a_policy_against_itself():
    [c] = compare(OURS, OURS)
    assert (c.p, c.better, c.worse, c.equal, c.changed) == (1.0, 0, 0, 5, [])
    assert (c.difference.estimate, c.difference.low, c.difference.high) == (0, 0, 0)


def test_it_is_antisymmetric():
    [one], [other] = compare(OURS, THEIRS), compare(THEIRS, OURS)
    assert one.p == other.p
    assert one.difference.estimate == -other.difference.estimate
    assert (one.better, one.worse) == (other.worse, other.better)


def test_each_split_for_itself():
    ours = Results({}, OURS.rows + results(4, 4, split="hard").rows)
    theirs = Results({}, results(0, 0, split="hard").rows + THEIRS.rows)
    assert [(c.split, c.difference.estimate) for c in compare(ours, theirs)] == [
        ("test", pytest.approx(0.25)),
        ("hard", 1.0),
    ]


def other_prompt():
    changed = results(1, 3, 0, 1, 0)
    changed.rows[2]["prompt"] = "another"
    return changed


@pytest.mark.parametrize(
    ("theirs", "metric", "message"),
    [
        (results(1, 2, samples=2), "avg", "4 samples of each task cannot be compared with 2"),
        (results(1, 2, split="hard"), "avg", "results on test cannot be compared with .* hard"),
        (results(1, 3, 0), "avg", "2 tasks, test-3 for one, .* 5 and 3 tasks"),
        (other_prompt(), "avg", "task 2 is test-2 .'2.'. in one .*'another'"),
        (THEIRS, "pass@8", "pass@8 needs 8 samples of each task, and there are 4"),
        (THEIRS, "pass@0", "pass@0 needs 0 samples"),
        (THEIRS, "pas@2", "use avg, maj, or pass@K"),
    ],
)
def test_what_cannot_be_compared(theirs, metric, message):
    with pytest.raises(ConfigError, match=message):
        compare(OURS, theirs, metric)


def test_other_settings_are_told():
    one = results(1, settings={"temperature": 1.0, "max_turns": 8, "samples_per_task": 4})
    other = results(1, settings={"temperature": 0.6, "max_turns": 8, "samples_per_task": 2})
    assert differing_settings(one, other) == ["temperature is 1.0 and 0.6"]
