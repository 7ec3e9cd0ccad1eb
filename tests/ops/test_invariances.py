"""What must and must not matter to an estimator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_gtpo.ops.advantages import turn_advantages
from tests.ops import reference
from tests.ops.turn_batches import (
    HAND,
    VARIANTS,
    Batch,
    assert_near,
    batches,
    each_variant,
    name_of,
)

ACROSS_GROUPS = [v for v in VARIANTS if "batch" in v.values() or "reinforce_pp" in v.values()]
WITHIN_GROUPS = [v for v in VARIANTS if v not in ACROSS_GROUPS]
each_within = pytest.mark.parametrize("variant", WITHIN_GROUPS, ids=name_of)

# --- who else is there -------------------------------------------------------------------------


@each_variant
@settings(max_examples=10, deadline=None)
@given(batch=batches(), data=st.data())
def test_order_of_groups_and_members_does_not_matter(
    variant: dict[str, Any], batch: Batch, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(sorted(set(batch.trajectory))))
    keep = [i for t in order for i, owner in enumerate(batch.trajectory) if owner == t]
    got = batch.rows(keep).credit(**variant).advantages
    assert_near(got, batch.credit(**variant).advantages[keep], atol=1e-9)


@each_within
@settings(max_examples=10, deadline=None)
@given(batch=batches())
def test_a_group_does_not_see_the_others(variant: dict[str, Any], batch: Batch) -> None:
    together = batch.credit(**variant).advantages
    for group in set(batch.group):
        keep = [i for i, owner in enumerate(batch.group) if owner == group]
        assert_near(batch.rows(keep).credit(**variant).advantages, together[keep])


@pytest.mark.parametrize("variant", ACROSS_GROUPS, ids=name_of)
def test_a_group_does_see_the_others_where_it_should(variant: dict[str, Any]) -> None:
    alone = HAND.rows([0, 1, 2, 3, 4])
    tripled = HAND.with_rewards([0, 1, 0.5, 0, 0, 3])
    if variant["estimator"] == "reinforce_pp":  # a fourth trajectory, at its group's mean
        got, expected = alone.credit(**variant).advantages, HAND.credit(**variant).advantages[:5]
        assert_near(got, expected * (3 / 4) ** 0.5, atol=1e-5)
    else:
        change = tripled.credit(**variant).advantages - HAND.credit(**variant).advantages
        assert change[:5].abs().min() > 0.05


@pytest.mark.parametrize(
    "variant",
    [v for v in VARIANTS if v["estimator"] != "rloo" and v.get("normalize") != "leave_one_out"],
    ids=name_of,
)
@settings(max_examples=10, deadline=None)
@given(batch=batches())
def test_twice_the_same_members_change_nothing(variant: dict[str, Any], batch: Batch) -> None:
    """With the population's std, not the sample's; leaving one out does notice."""
    twins = Batch(
        batch.rewards * 2,
        batch.trajectory + [t + 1000 for t in batch.trajectory],
        batch.group * 2,
        batch.outcome * 2,
        batch.anchor * 2,
    )
    got = twins.credit(**variant).advantages[: len(batch.rewards)]
    assert_near(got, batch.credit(**variant).advantages)


# --- single turns, gamma 0 ---------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(batch=batches(max_len=1))
def test_single_turns_make_gtpo_grpo(batch: Batch) -> None:
    expected = batch.credit(estimator="grpo_sum").advantages
    for mode in ("group", "turn_index", "first_return"):
        assert_near(batch.credit(normalize=mode).advantages, expected, atol=1e-9)
    rloo = batch.credit(estimator="rloo").advantages
    assert_near(batch.credit(normalize="leave_one_out").advantages, rloo, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(batch=batches())
def test_gamma_zero_normalises_the_rewards_themselves(batch: Batch) -> None:
    credit = batch.credit(gamma=0.0)
    assert credit.returns.tolist() == batch.rewards
    every_turn_alone = Batch(
        batch.rewards, list(range(len(batch.rewards))), batch.group, batch.outcome, batch.anchor
    )
    expected = every_turn_alone.credit(gamma=0.9).advantages
    assert_near(credit.advantages, expected, atol=1e-9)


# --- scale and shift ---------------------------------------------------------------------------


def without_std(variant: dict[str, Any]) -> bool:
    return (
        variant["estimator"] in ("dr_grpo", "rloo")
        or variant.get("normalize") in ("leave_one_out", "none")
        or variant.get("use_std") is False
    )


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v != {"estimator": "gigpo"}], ids=name_of
)
@settings(max_examples=15, deadline=None)
@given(batch=batches())
def test_scale(variant: dict[str, Any], batch: Batch) -> None:
    """Without a std the advantages scale with rewards and outcomes; with one they do not notice."""
    tripled = Batch(
        [3 * r for r in batch.rewards],
        batch.trajectory,
        batch.group,
        [3 * o for o in batch.outcome],
        batch.anchor,
    )
    before, after = batch.credit(**variant).advantages, tripled.credit(**variant).advantages
    expected = before * (3 if without_std(variant) else 1)
    # returns that differ at all do so by 2.5e-4 or more, where 1e-6 beside their std is below 2%
    torch.testing.assert_close(after, expected, rtol=0.02, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(batch=batches())
def test_scale_of_gigpo_is_that_of_its_terms(batch: Batch) -> None:
    tripled = batch.with_rewards([3 * r for r in batch.rewards])
    episode = batch.credit(estimator="grpo_sum").advantages
    step = batch.credit(estimator="gigpo").advantages - episode
    got = tripled.credit(estimator="gigpo").advantages
    assert_near(got, episode + 3 * step, atol=1e-3)


@pytest.mark.parametrize("normalize", ["group", "turn_index", "batch", "first_return"])
@settings(max_examples=15, deadline=None)
@given(batch=batches(max_len=1), shift=st.floats(-5, 5))
def test_shift_of_single_turn_rewards(normalize: str, batch: Batch, shift: float) -> None:
    got = batch.with_rewards([r + shift for r in batch.rewards]).credit(normalize=normalize)
    assert_near(got.advantages, batch.credit(normalize=normalize).advantages, atol=1e-6)


def at_the_end(batch: Batch, shift: float) -> Batch:
    """Each trajectory's last turn gets `shift` more."""
    ends = [*(a != b for a, b in zip(batch.trajectory, batch.trajectory[1:], strict=False)), True]
    return batch.with_rewards([r + shift * e for r, e in zip(batch.rewards, ends, strict=True)])


@pytest.mark.parametrize("estimator", ["grpo_sum", "dr_grpo", "rloo", "reinforce_pp"])
@settings(max_examples=15, deadline=None)
@given(batch=batches(), shift=st.floats(-5, 5))
def test_shift_of_every_sum(estimator: str, batch: Batch, shift: float) -> None:
    got = at_the_end(batch, shift).credit(estimator=estimator).advantages
    assert_near(got, batch.credit(estimator=estimator).advantages, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(batch=batches(), shift=st.floats(-5, 5))
def test_shift_of_every_outcome(batch: Batch, shift: float) -> None:
    moved = Batch(
        batch.rewards,
        batch.trajectory,
        batch.group,
        [o + shift for o in batch.outcome],
        batch.anchor,
    )
    for estimator in ("grpo", "mt_grpo"):
        expected = batch.credit(estimator=estimator).advantages
        assert_near(moved.credit(estimator=estimator).advantages, expected, atol=1e-6)


@each_variant
def test_shift_of_every_turn(variant: dict[str, Any]) -> None:
    """A constant bonus per turn pays for more turns, except where each index has its own mean."""
    moved = HAND.with_rewards([r + 1 for r in HAND.rewards])
    change = (moved.credit(**variant).advantages - HAND.credit(**variant).advantages).abs()
    if variant["estimator"] in ("grpo", "mt_grpo"):  # an outcome and turns of one index
        assert change.max() < 1e-9
    else:
        assert change.max() > 0.1


def test_shift_of_every_turn_of_equally_long_trajectories() -> None:
    batch = Batch([0, 1, 0.5, 0, 0.25, 0.25], [1, 1, 2, 2, 3, 3], [0] * 6, [0] * 6, [0] * 6)
    moved = batch.with_rewards([r + 1 for r in batch.rewards])
    for normalize, matters in [("turn_index", False), ("group", True), ("none", True)]:
        change = moved.credit(normalize=normalize).advantages
        change = change - batch.credit(normalize=normalize).advantages
        assert (change.abs().max() > 0.1) == matters, normalize


# --- no contrast -------------------------------------------------------------------------------


@each_within
@settings(max_examples=20, deadline=None)
@given(
    value=st.floats(-3, 3),
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=7),
)
def test_equal_members_get_exactly_zero(
    variant: dict[str, Any], value: float, lengths: list[int]
) -> None:
    """Also beside a group with contrast: the metric of silent groups counts exact zeros."""
    if variant.get("normalize") == "none":
        return
    gtpo = variant["estimator"] == "gtpo"
    batch = Batch([], [], [], [], [])
    for member, length in enumerate(lengths if gtpo else [2] * len(lengths)):
        batch.rewards += [value] * length
        batch.trajectory += [member] * length
    n = len(batch.rewards)
    batch.group, batch.outcome, batch.anchor = [0] * n, [value] * n, list(range(n))
    options = {**variant, "gamma": 0.0} if gtpo else variant
    assert batch.credit(**options).advantages.tolist() == [0.0] * n


@settings(max_examples=40, deadline=None)
@given(value=st.floats(-3, 3), members=st.integers(1, 7))
def test_an_equal_group_gets_exactly_zero_from_reinforce_pp(value: float, members: int) -> None:
    rewards = [0.0, 1.0, *[value] * members]
    n = len(rewards)
    batch = Batch(rewards, list(range(n)), [0, 0, *[1] * members], [0] * n, [0] * n)
    advantages = batch.credit(estimator="reinforce_pp").advantages.tolist()
    assert advantages[2:] == [0.0] * members
    assert advantages[0] < 0 < advantages[1]


@pytest.mark.parametrize("estimator", [e for e in reference.ESTIMATORS if e != "gtpo"])
def test_one_member_or_equal_members_give_zero(estimator: str) -> None:
    alone = Batch([0.1, 0.7], [0, 0], [0, 0], [0.3, 0.3], [1, 2])
    equal = Batch([0.1, 0.7] * 3, [0, 0, 1, 1, 2, 2], [0] * 6, [0.3] * 6, [1, 2] * 3)
    for batch in (alone, equal):
        assert batch.credit(estimator=estimator).advantages.abs().max() == 0.0


@pytest.mark.parametrize("normalize", ["turn_index", "leave_one_out", "first_return"])
def test_gtpo_with_one_member(normalize: str) -> None:
    advantages = Batch([0.7], [0], [0], [0], [0]).credit(normalize=normalize).advantages
    assert advantages.tolist() == [0.0]
    longer = Batch([0.1, 0.7], [0, 0], [0, 0], [0, 0], [0, 0]).credit(normalize=normalize)
    assert longer.advantages.tolist() == [0.0, 0.0]


def test_spread_below_the_threshold_is_none() -> None:
    rows = torch.arange(2)
    below = torch.tensor([0.5, 0.5 + 1.9e-6], dtype=torch.float64)
    above = torch.tensor([0.5, 0.5 + 2.1e-6], dtype=torch.float64)
    group = torch.zeros(2, dtype=torch.long)
    assert turn_advantages(below, rows, group).tolist() == [0.0, 0.0]
    assert_near(turn_advantages(above, rows, group), [-1.05 / 2.05, 1.05 / 2.05])
