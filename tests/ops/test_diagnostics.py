"""Two groups worked out by hand, and the sums of two learners against those of one."""

from __future__ import annotations

import math

import pytest
import torch

from rllib_gtpo.ops.diagnostics import (
    CreditedTurns,
    diagnostic_sums,
    finish_diagnostics,
    merge_sums,
)


def turns(**changes):
    """Group 0: a correct trajectory of 2 turns, failed ones of 1 and 3; group 1: one of 1 turn."""
    values = {
        "advantages_N": [1.0, 2.0, -1.0, -2.0, 0.0, 4.0, 1e-7],
        "unshaped_N": [1.0, 2.0, -1.0, -2.0, 0.0, 4.0, 0.5],
        "trajectory_N": [0, 0, 1, 2, 2, 2, 3],
        "tokens_N": [10, 20, 30, 40, 50, 60, 70],
        "trained_N": [True] * 7,
        "group_S": [0, 0, 0, 1],
        "correct_S": [True, False, False, False],
        "shaping_S": [0.0, 0.1, 0.5, 0.0],
        "shaped_S": [False, True, True, False],
        **changes,
    }
    kinds = {"advantages_N": torch.float64, "unshaped_N": torch.float64, "shaping_S": torch.float64}
    tensors = {name: torch.tensor(value, dtype=kinds.get(name)) for name, value in values.items()}
    return CreditedTurns(**tensors, groups=2, dropped=1)


def nobody():
    empty = torch.zeros(0, dtype=torch.float64)
    none, flags = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool)
    return CreditedTurns(empty, empty, none, none, flags, none, flags, empty, flags, 0, 2)


def report(*rows):
    return finish_diagnostics(merge_sums(map(diagnostic_sums, rows)))


def pearson(one, other):
    n = len(one)
    a, b = sum(one) / n, sum(other) / n
    covariance = sum((x - a) * (y - b) for x, y in zip(one, other, strict=True))
    spread = sum((x - a) ** 2 for x in one) * sum((y - b) ** 2 for y in other)
    return covariance / math.sqrt(spread)


def test_by_hand():
    found = report(turns())
    advantages = [1.0, 2.0, -1.0, -2.0, 0.0, 4.0, 1e-7]
    expected = {
        "group/zero_std_frac": 2 / 3,  # group 1 and the dropped one
        "group/dropped_frac": 1 / 3,
        "group/signal_frac": 1 / 3,
        "group/signal_frac_unshaped": 2 / 3,
        "advantage/abs_mean": (10 + 1e-7) / 7,
        "advantage/dead_frac": 2 / 7,
        "advantage/outcome_corr": pearson(advantages, [1, 1, 0, 0, 0, 0, 0]),
        "advantage/turn_tokens_corr": pearson(advantages, [10, 20, 30, 40, 50, 60, 70]),
        "advantage/trajectory_tokens_corr": pearson(advantages, [30, 30, 30, 150, 150, 150, 70]),
        "advantage/turns_corr": pearson(advantages, [2, 2, 1, 3, 3, 3, 1]),
        "advantage/by_turn/0": (1 - 1 - 2 + 1e-7) / 4,
        "advantage/by_turn/1": 1.0,
        "advantage/by_turn/2": 4.0,
        **{f"advantage/by_turn/{n}": 0.0 for n in (3, 4, 5, 6, 7, "rest")},
        "shaping/mean": 0.3,
        "shaping/variance": 0.04,
        "shaping/turns_corr": 1.0,  # 0.1 with 1 turn, 0.5 with 3
        "overlong/masked_frac": 0.0,
        "overlong/masked_tokens_frac": 0.0,
    }
    assert found == pytest.approx(expected, abs=1e-12)


def test_masked_turns_teach_nothing():
    found = report(turns(trained_N=[True, True, True, False, False, False, True]))
    assert found["overlong/masked_frac"] == 0.25
    assert found["overlong/masked_tokens_frac"] == pytest.approx(150 / 280)
    assert found["advantage/abs_mean"] == pytest.approx((4 + 1e-7) / 4)
    assert found["advantage/by_turn/2"] == 0.0
    assert found["advantage/turns_corr"] == pytest.approx(pearson([1, 2, -1, 1e-7], [2, 2, 1, 1]))
    assert found["group/signal_frac"] == pytest.approx(1 / 3)
    silent = report(turns(trained_N=[False] * 6 + [True]))
    assert silent["group/signal_frac"] == 0.0
    assert silent["group/signal_frac_unshaped"] == pytest.approx(1 / 3)


def test_late_turns_share_one_number():
    many = turns(
        advantages_N=[float(i) for i in range(12)],
        unshaped_N=[0.0] * 12,
        trajectory_N=[0] * 12,
        tokens_N=[1] * 12,
        trained_N=[True] * 12,
        group_S=[0],
        correct_S=[True],
        shaping_S=[0.0],
        shaped_S=[False],
    )
    found = report(many)
    assert [found[f"advantage/by_turn/{i}"] for i in range(8)] == list(range(8))
    assert found["advantage/by_turn/rest"] == 9.5


def test_what_is_undefined_is_zero():
    found = report(nobody())
    assert found.keys() == report(turns()).keys()
    assert found.pop("group/zero_std_frac") == found.pop("group/dropped_frac") == 1.0
    assert set(found.values()) == {0.0}


def test_nothing_correlates_with_a_constant():
    """The sums of a constant such as 0.1 leave a variance that is rounding, not 0."""
    found = report(
        turns(advantages_N=[0.1] * 7, shaping_S=[0.0, 0.1, 0.1, 0.0], shaped_S=[False] + [True] * 3)
    )
    for name in ("outcome", "turn_tokens", "trajectory_tokens", "turns"):
        assert found[f"advantage/{name}_corr"] == 0.0
    assert report(turns(shaping_S=[0.1] * 4))["shaping/turns_corr"] == 0.0
    assert report(turns(shaping_S=[0.1] * 4))["shaping/variance"] == pytest.approx(0.0, abs=1e-15)


def test_a_group_with_one_shaped_member_has_no_variance():
    found = report(turns(shaped_S=[False, True, False, True], shaping_S=[0.0, 0.4, 0.0, 0.2]))
    assert found["shaping/variance"] == 0.0
    assert found["shaping/mean"] == pytest.approx(0.3)


def test_two_learners_are_one():
    """Averages of averages would be off: the groups differ in size."""
    generator = torch.Generator().manual_seed(0)

    def batch(sizes_of_groups):
        sizes = [size for group in sizes_of_groups for size in group]
        turns = torch.tensor(sizes)
        n, s = sum(sizes), len(sizes)
        draw = torch.rand(2 * n + s, generator=generator, dtype=torch.float64)
        return CreditedTurns(
            advantages_N=draw[:n] - 0.3,
            unshaped_N=(draw[n : 2 * n] - 0.5).round(),
            trajectory_N=torch.arange(s).repeat_interleave(turns),
            tokens_N=torch.randint(1, 50, (n,), generator=generator),
            trained_N=(torch.arange(s) % 4 != 1).repeat_interleave(turns),
            group_S=torch.tensor([i for i, g in enumerate(sizes_of_groups) for _ in g]),
            correct_S=torch.arange(s) % 3 == 0,
            shaping_S=draw[2 * n :],
            shaped_S=torch.arange(s) % 3 != 0,
            groups=len(sizes_of_groups),
            dropped=len(sizes_of_groups) - 1,
        )

    def together(one, other):
        offsets = {"trajectory_N": len(one.group_S), "group_S": one.groups}
        parts = {
            name: torch.cat([getattr(one, name), getattr(other, name) + offsets.get(name, 0)])
            if name in offsets
            else torch.cat([getattr(one, name), getattr(other, name)])
            for name in CreditedTurns.__dataclass_fields__
            if name not in ("groups", "dropped")
        }
        return CreditedTurns(
            **parts, groups=one.groups + other.groups, dropped=one.dropped + other.dropped
        )

    one, other = batch([[1, 2, 3], [2, 9, 10, 1]]), batch([[5, 1, 1, 4]])
    assert report(one, other) == pytest.approx(report(together(one, other)), rel=1e-9)
    assert report(one)["advantage/abs_mean"] != pytest.approx(report(other)["advantage/abs_mean"])
    assert report(one, nobody())["advantage/turns_corr"] == report(one)["advantage/turns_corr"]
