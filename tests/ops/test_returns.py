"""Returns of turns."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_gtpo.ops.returns import turn_returns
from tests.ops import reference


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_by_hand() -> None:
    got = turn_returns(f64(0, 0, 1, 1, -0.1, 0), ids(7, 7, 7, 3, -5, -5), 0.9)
    torch.testing.assert_close(got, f64(0.81, 0.9, 1.0, 1.0, -0.1, 0.0))


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [(0.0, [1.0, 2.0, 4.0, 8.0]), (1.0, [7.0, 6.0, 4.0, 8.0]), (0.5, [3.0, 4.0, 4.0, 8.0])],
)
def test_discounts(gamma: float, expected: list[float]) -> None:
    got = turn_returns(f64(1, 2, 4, 8), ids(0, 0, 0, 1), gamma)
    assert got.tolist() == expected


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 19), min_size=1, max_size=6),
    gamma=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_equals_reference(lengths: list[int], gamma: float, seed: int) -> None:
    trajectory = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) * 17 - 40
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(trajectory), generator=generator, dtype=torch.float64)
    expected = reference.returns(rewards.tolist(), trajectory.tolist(), gamma)
    got = turn_returns(rewards, trajectory, gamma)
    torch.testing.assert_close(got, f64(*expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 1e-200, 0.9, 0.999999, 1.0])
def test_long_trajectory_stays_finite_and_exact(gamma: float) -> None:
    n = 100_000
    got = turn_returns(torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.long), gamma)
    # geometric series, in the form that is exact also next to gamma = 1
    first = float(n) if gamma == 1 else -math.expm1(n * math.log(gamma or 5e-324)) / (1 - gamma)
    assert got[0].item() == pytest.approx(first, rel=1e-9)
    assert got[-1].item() == 1.0
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_kept_and_the_sum_is_float64(dtype: torch.dtype) -> None:
    n = 10_000
    rewards = torch.full((n,), 0.5, dtype=dtype)
    got = turn_returns(rewards, torch.zeros(n, dtype=torch.int32), 1.0)
    assert got.dtype == dtype
    assert got[0] == torch.tensor(n / 2, dtype=dtype)  # a running bfloat16 sum would stall at 128


def test_no_rows_and_no_gradient() -> None:
    empty = turn_returns(torch.zeros(0), torch.zeros(0, dtype=torch.long), 0.9)
    assert empty.shape == (0,)
    assert empty.dtype == torch.float32
    rewards = torch.ones(2, requires_grad=True)
    got = turn_returns(rewards, ids(0, 0), 0.9)
    assert not got.requires_grad
    assert rewards.tolist() == [1.0, 1.0]  # not written to


@pytest.mark.parametrize(
    ("rewards", "trajectory", "gamma", "message"),
    [
        (f64(0, 1), ids(0, 0, 0), 0.9, "row 2"),
        (f64(0, 1, 2), ids(0, 0), 0.9, "row 2"),
        (f64(0, 1, 2).reshape(1, 3), ids(0, 0, 0), 0.9, "rewards must be a tensor of shape"),
        (f64(0, 1), ids(0, 0).reshape(2, 1), 0.9, "trajectory must be a tensor of shape"),
        (f64(0, 1, 2, 3), ids(4, 9, 9, 4), 0.9, "row 3: trajectory 4 starts again"),
        (f64(0, 1, math.nan), ids(0, 0, 0), 0.9, "row 2: rewards is nan"),
        (f64(0, -math.inf, 0), ids(0, 0, 0), 0.9, "row 1: rewards is -inf"),
        (f64(0, 1), f64(0, 0), 0.9, "trajectory must hold integer ids"),
        (ids(0, 1), ids(0, 0), 0.9, "rewards must be floating point"),
        (f64(0, 1), ids(0, 0), 1.01, "gamma must be in"),
        (f64(0, 1), ids(0, 0), -0.1, "gamma must be in"),
        (f64(0, 1), ids(0, 0), math.nan, "gamma must be in"),
    ],
)
def test_refuses(
    rewards: torch.Tensor, trajectory: torch.Tensor, gamma: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        turn_returns(rewards, trajectory, gamma)


def test_a_million_turns_take_well_under_two_seconds() -> None:
    trajectory = torch.arange(80_000).repeat_interleave(13)
    rewards = torch.rand(len(trajectory))
    start = time.perf_counter()
    turn_returns(rewards, trajectory, 0.9)
    assert time.perf_counter() - start < 2.0
