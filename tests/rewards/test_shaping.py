"""Shaping: who gets how much for looking like a correct sibling, with values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rllib_gtpo.errors import ConfigError, EmbedderError, RewardError
from rllib_gtpo.rewards.shaping import Shaping
from rllib_gtpo.types import Group, ToolCall, ToolResult, Trajectory, Turn

# Unit vectors in the plane, so that every cosine is known.
VECTORS = {
    "right": (1.0, 0.0),
    "right too": (0.0, 1.0),
    "near": (0.8, 0.6),
    "opposite": (-1.0, 0.0),
}


class Known:
    """Embeds known texts; everything else fails for good."""

    identity = "known"

    def __init__(self):
        self.calls = []

    def embed(self, texts):
        self.calls.append(list(texts))
        return [
            np.array(VECTORS[t], dtype=np.float32) if t in VECTORS else EmbedderError(f"no {t!r}")
            for t in texts
        ]


def member(code, correct=False, turns=2, accuracy=None):
    """A trajectory whose code is on its first turn."""
    first = Turn(0, calls=[ToolCall("python", {"code": code})] if code else [])
    rest = [Turn(index) for index in range(1, turns)]
    trajectory = Trajectory({}, turns=[first, *rest], correct=correct)
    trajectory.turns[-1].rewards["accuracy"] = float(correct) if accuracy is None else accuracy
    return trajectory


def shaped(*members, embedder=None, group_id=7, **options):
    """What each member's last turn got, after checking that no other turn got anything."""
    group = Group(group_id, {}, list(members))
    unshaped = Shaping(embedder or Known(), **options).score_groups([group])
    for t in members:
        assert all("shaping" not in turn.rewards for turn in t.turns[:-1])
    got = [t.turns[-1].rewards.get("shaping") if t.turns else None for t in members]
    return got, unshaped


def test_mean_over_the_correct_siblings_divided_by_their_number_once():
    got, _ = shaped(member("near"), member("right", True), member("right too", True))
    assert got == pytest.approx([0.5 * (0.8 + 0.6) / 2, 0.0, 0.0])


def test_max_takes_the_nearest():
    got, _ = shaped(member("near"), member("right", True), member("right too", True), mode="max")
    assert got == pytest.approx([0.5 * 0.8, 0.0, 0.0])


def test_a_copy_gets_alpha_and_an_opposite_nothing():
    got, _ = shaped(member("right"), member("opposite"), member("right", True), alpha=0.3)
    assert got == pytest.approx([0.3, 0.0, 0.0])


def test_two_copies_of_one_trajectory_both_get_it():
    got, _ = shaped(member("near"), member("near"), member("right", True))
    assert got == pytest.approx([0.4, 0.4, 0.0])


@pytest.mark.parametrize("correct", [False, True])
def test_without_a_contrast_nothing_is_given_or_embedded(correct):
    embedder = Known()
    got, _ = shaped(member("near", correct), member("right", correct), embedder=embedder)
    assert got == [0.0, 0.0]
    assert embedder.calls == []


def test_who_wrote_no_code_gets_nothing_and_counts_as_unlike():
    got, _ = shaped(member(""), member("right"), member("right", True), member("", True))
    assert got == pytest.approx([0.0, 0.25, 0.0, 0.0])


def test_no_code_in_the_whole_group():
    assert shaped(member(""), member("", True))[0] == [0.0, 0.0]


def test_a_partial_accuracy_of_its_own_is_kept():
    got, _ = shaped(member("right", accuracy=0.2), member("right"), member("right", True))
    assert got == pytest.approx([0.0, 0.5, 0.0])


def test_a_task_that_calls_wrong_minus_1():
    got, _ = shaped(member("near", accuracy=-1.0), member("right", True))
    assert got == pytest.approx([0.4, 0.0])


@pytest.mark.parametrize("mode", ["mean", "max", "constant", "shuffled"])
def test_failed_members_without_code_ask_nobody(mode):
    embedder = Known()
    got, _ = shaped(member(""), member(""), member("right", True), embedder=embedder, mode=mode)
    assert got == [0.0, 0.0, 0.0]
    assert embedder.calls == []


def test_a_member_without_turns_is_left_alone():
    empty = Trajectory({})
    assert shaped(empty, member("right"), member("right", True))[0] == [None, 0.5, 0.0]


def test_invalid_calls_are_not_code():
    invalid = member("")
    invalid.turns[0].calls = [ToolCall("python", {"code": "right"}, error="not closed")]
    assert shaped(invalid, member("right", True))[0] == [0.0, 0.0]


def test_constant_is_the_mean_of_what_the_writers_would_have_got():
    got, _ = shaped(
        member("near"), member("right"), member(""), member("right", True), mode="constant"
    )
    assert got == pytest.approx([0.45, 0.45, 0.0, 0.0])


def test_shuffled_deals_the_same_values_to_the_writers():
    members = [member(c) for c in ("near", "right", "opposite", "")] + [member("right", True)]
    deals = {
        tuple(np.round(shaped(*map(_fresh, members), mode="shuffled", group_id=i)[0], 6))
        for i in range(40)
    }
    assert {tuple(sorted(deal[:3])) for deal in deals} == {(0.0, 0.4, 0.5)}
    assert {deal[3:] for deal in deals} == {(0.0, 0.0)}
    assert len(deals) == 6
    again = [shaped(*map(_fresh, members), mode="shuffled", group_id=3)[0] for _ in range(2)]
    assert again[0] == again[1]


def _fresh(trajectory):
    return member(trajectory.code, trajectory.correct)


def test_the_whole_trajectory_includes_what_tools_said():
    wrong, right = member("x"), member("y", True)
    wrong.turns[0].text, wrong.turns[0].results = "ne", [ToolResult("python", "ar")]
    right.turns[0].text = "right"
    embedder = Known()
    with pytest.raises(EmbedderError):
        shaped(wrong, right, embedder=embedder, compared="trajectory")
    assert embedder.calls == [["ne\nar", "right"]]


def test_each_text_is_embedded_once_for_all_groups():
    embedder = Known()
    groups = [Group(i, {}, [member("near"), member("near"), member("right", True)]) for i in (0, 1)]
    Shaping(embedder).score_groups(groups)
    assert embedder.calls == [["near", "right"]]


@pytest.mark.parametrize("mode", ["none", "nearest"])
def test_a_mode_that_shapes_nothing_is_refused(mode):
    with pytest.raises(ConfigError, match=f"{mode}.*mean, max, constant, shuffled"):
        Shaping(Known(), mode)


class TestFailures:
    def test_stop_says_what_and_how_to_go_on(self):
        with pytest.raises(EmbedderError, match=r"1 of 3 .*no 'odd'.*on_embedder_failure='skip'"):
            shaped(member("odd"), member("near"), member("right", True))

    def test_skip_leaves_out_the_whole_group_and_counts_it(self):
        bad = Group(0, {}, [member("odd"), member("near"), member("right", True)])
        good = Group(1, {}, [member("near"), member("right", True)])
        assert Shaping(Known(), on_failure="skip").score_groups([bad, good]) == 1
        assert all("shaping" not in t.turns[-1].rewards for t in bad.trajectories)
        assert good.trajectories[0].turns[-1].rewards["shaping"] == pytest.approx(0.4)

    def test_a_component_of_that_name_is_not_overwritten(self):
        taken = member("near")
        taken.turns[-1].rewards["shaping"] = 1.0
        with pytest.raises(RewardError, match="already taken"):
            shaped(taken, member("right", True))
