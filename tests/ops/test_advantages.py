"""Credit of turns: values by hand, the slow reference, learners, refusals, the registry."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.ops.advantages import (
    ESTIMATORS,
    TurnCredit,
    Turns,
    register_estimator,
    turn_advantages,
    turn_credit,
)
from tests.ops import reference
from tests.ops.turn_batches import (
    HAND,
    Batch,
    assert_near,
    batches,
    each_variant,
    name_of,
    solved,
)

# --- the golden table -------------------------------------------------------------------------


GOLDEN = [
    (2, [1.37, 1.58, 1.82, 2.09], -0.57),
    (4, [0.69, 0.87, 1.08, 1.31], -0.99),
    (6, [0.22, 0.43, 0.67, 0.93], -1.69),
    (7, [-0.08, 0.19, 0.49, 0.83], -2.51),
    (8, [-1.29, -0.49, 0.40, 1.39], None),
]


@pytest.mark.parametrize(("correct", "winner", "loser"), GOLDEN)
def test_golden_table(correct: int, winner: list[float], loser: float | None) -> None:
    credit = solved(correct).credit()
    assert [round(a, 2) for a in credit.advantages[:4].tolist()] == winner
    for a in credit.advantages[4 * correct :].tolist():
        assert round(a, 2) == loser

    values = [0.9**3, 0.9**2, 0.9, 1.0] * correct + [0.0] * (4 * (8 - correct))
    mean = sum(values) / 32
    std = (sum(v * v for v in values) / 32 - mean**2) ** 0.5
    assert_near(credit.advantages, [(v - mean) / (std + 1e-6) for v in values])
    assert_near(credit.returns, values)
    assert_near(credit.baseline, [mean] * 32)
    assert_near(credit.scale, [std + 1e-6] * 32)


# --- by hand ------------------------------------------------------------------------------------

S6 = 1 / 6**0.5  # std of sums 1, .5, 0 (variance 1/6) is S6
HAND_VALUES: list[tuple[dict[str, Any], list[float]]] = [
    ({"normalize": "none", "gamma": 0.5}, [0.5, 1, 0.5, 0, 0, 1]),
    # mean .4, variance (.01 + .36 + .01 + .16 + .16) / 5 = .14
    ({"normalize": "group", "gamma": 0.5, "use_std": False}, [0.1, 0.6, 0.1, -0.4, -0.4, 0]),
    (
        {"normalize": "group", "gamma": 0.5},
        [0.1 / 0.14**0.5, 0.6 / 0.14**0.5, 0.1 / 0.14**0.5, *[-0.4 / 0.14**0.5] * 2, 0],
    ),
    # trajectory means .75, .5, 0
    (
        {"normalize": "group", "gamma": 0.5, "use_std": False, "weight_trajectories": True},
        [0.5 - 1.25 / 3, 1 - 1.25 / 3, 0.5 - 1.25 / 3, -1.25 / 3, -1.25 / 3, 0],
    ),
    # in twelfths: returns 6 12 | 6 | 0 0, mean 5, variance (1/2 + 49/2 + 1 + 25/2 + 25/2) / 3 = 17
    (
        {"normalize": "group", "gamma": 0.5, "weight_trajectories": True},
        [1 / 17**0.5, 7 / 17**0.5, 1 / 17**0.5, -5 / 17**0.5, -5 / 17**0.5, 0],
    ),
    # turn 1: .5 .5 0 (mean 1/3); turn 2: 1 0 (mean .5)
    (
        {"normalize": "turn_index", "gamma": 0.5, "use_std": False},
        [1 / 6, 0.5, 1 / 6, -1 / 3, -0.5, 0],
    ),
    ({"normalize": "turn_index", "gamma": 0.5}, [0.5**0.5, 1, 0.5**0.5, -(2**0.5), -1, 0]),
    ({"normalize": "batch", "gamma": 0.5, "use_std": False}, [0, 0.5, 0, -0.5, -0.5, 0.5]),
    # six rows, mean .5, variance 4 * .25 / 6
    (
        {"normalize": "batch", "gamma": 0.5},
        [0, 1.5**0.5, 0, -(1.5**0.5), -(1.5**0.5), 1.5**0.5],
    ),
    # in sixteenths: returns 8 16 | 8 | 0 0 | 16, mean (12 + 8 + 0 + 16) / 4 = 9,
    # variance (1/2 + 49/2 + 1 + 81/2 + 81/2 + 49) / 4 = 39
    (
        {"normalize": "batch", "gamma": 0.5, "weight_trajectories": True},
        [-1 / 39**0.5, 7 / 39**0.5, -1 / 39**0.5, -9 / 39**0.5, -9 / 39**0.5, 7 / 39**0.5],
    ),
    (
        {"normalize": "batch", "gamma": 0.5, "weight_trajectories": True, "use_std": False},
        [-1 / 16, 7 / 16, -1 / 16, -9 / 16, -9 / 16, 7 / 16],
    ),
    # first returns .5 .5 0: mean 1/3, std sqrt(1/18)
    (
        {"normalize": "first_return", "gamma": 0.5, "use_std": False},
        [1 / 6, 2 / 3, 1 / 6, -1 / 3, -1 / 3, 0],
    ),
    (
        {"normalize": "first_return", "gamma": 0.5},
        [0.5**0.5, 8**0.5, 0.5**0.5, -(2**0.5), -(2**0.5), 0],
    ),
    # others of 10: .5 0 0; of 11: .5 1 0 0; of 12: .5 1 .5
    (
        {"normalize": "leave_one_out", "gamma": 0.5},
        [1 / 3, 5 / 6, 0.125, -2 / 3, -2 / 3, 0],
    ),
    # trajectory means .75, .5, 0
    (
        {"normalize": "leave_one_out", "gamma": 0.5, "weight_trajectories": True},
        [0.25, 0.75, 0.125, -0.625, -0.625, 0],
    ),
    # 1, 0, 0: mean 1/3, std sqrt(2)/3
    ({"estimator": "grpo"}, [2**0.5, 2**0.5, *[-(0.5**0.5)] * 3, 0]),
    ({"estimator": "grpo_sum"}, [0.5 / S6, 0.5 / S6, 0, -0.5 / S6, -0.5 / S6, 0]),
    ({"estimator": "dr_grpo"}, [0.5, 0.5, 0, -0.5, -0.5, 0]),
    ({"estimator": "rloo"}, [0.75, 0.75, 0, -0.75, -0.75, 0]),
    # centred sums .5 0 -.5 | 0 over four trajectories: variance 1/8
    ({"estimator": "reinforce_pp"}, [2**0.5, 2**0.5, 0, -(2**0.5), -(2**0.5), 0]),
    # turn 1 rewards 0 .5 0: (0 - 1/6) / (sqrt(2)/6) = -sqrt(.5); trajectory 11 ends there
    (
        {"estimator": "mt_grpo"},
        [2**0.5 - 0.5**0.5, 2**0.5, -(0.5**0.5), -(2**0.5), -(0.5**0.5), 0],
    ),
    (
        {"estimator": "mt_grpo", "lambda_": 0.5},
        [2**0.5 - 0.5**1.5, 2**0.5, -(0.5**0.5), -(0.5**0.5) - 0.5**1.5, -(0.5**0.5), 0],
    ),
    # state 7 in group 1: returns .5 .5 0, mean 1/3
    (
        {"estimator": "gigpo", "gamma": 0.5},
        [0.5 / S6 + 1 / 6, 0.5 / S6, 1 / 6, -0.5 / S6 - 1 / 3, -0.5 / S6, 0],
    ),
    # std sqrt(1/18): sqrt(.5) sqrt(.5) -sqrt(2)
    (
        {"estimator": "gigpo", "gamma": 0.5, "use_std": True, "omega": 0.5},
        [0.5 / S6 + 0.5**1.5, 0.5 / S6, 0.5**1.5, -0.5 / S6 - 0.5**0.5, -0.5 / S6, 0],
    ),
]


@pytest.mark.parametrize(
    ("options", "expected"), HAND_VALUES, ids=[name_of(v) for v, _ in HAND_VALUES]
)
def test_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    assert_near(HAND.credit(**options).advantages, expected, atol=2e-5)


def test_what_is_recorded_next_to_the_advantages() -> None:
    loo = HAND.credit(estimator="rloo")
    assert_near(loo.returns, [1, 1, 0.5, 0, 0, 1])
    assert_near(loo.baseline, [0.25, 0.25, 0.5, 0.75, 0.75, 1])
    assert_near(loo.scale, [1.0] * 6)
    raw = HAND.credit(normalize="none", gamma=0.5)
    assert_near(raw.baseline, [0.0] * 6)
    assert_near(raw.scale, [1.0] * 6)
    step = HAND.credit(estimator="reinforce_pp")
    assert_near(step.baseline, [0.5] * 5 + [1.0])
    assert_near(step.scale, [0.125**0.5 + 1e-6] * 6)


# --- against the slow reference ----------------------------------------------------------------


@each_variant
@settings(max_examples=40, deadline=None)
@given(batch=batches(), gamma=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_equals_reference(variant: dict[str, Any], batch: Batch, gamma: float) -> None:
    options = dict(variant)
    if "gamma" in ESTIMATORS[options["estimator"]].options:
        options["gamma"] = gamma
    credit = batch.credit(**options)
    assert_near(credit.advantages, batch.expected(**options))
    if options["estimator"] not in ("mt_grpo", "gigpo"):
        spread = credit.advantages != 0
        form = (credit.returns - credit.baseline) / credit.scale
        assert_near(form[spread], credit.advantages[spread])


@each_variant
def test_float32_in_float32_out(variant: dict[str, Any]) -> None:
    low, high = HAND.credit(torch.float32, **variant), HAND.credit(torch.float64, **variant)
    for name in ("returns", "baseline", "scale", "advantages"):
        assert getattr(low, name).dtype == torch.float32
        assert_near(getattr(low, name), getattr(high, name).float(), atol=1e-6)


def test_float32_is_only_the_outside() -> None:
    # around 4096 float32 has steps of 5e-4, so a float32 mean or square would be useless
    rewards = torch.tensor([4096.0, 4096.0005, 4096.001, 4096.0])
    rows = torch.arange(4)
    got = turn_advantages(rewards, rows, torch.zeros(4, dtype=torch.long))
    expected = reference.gtpo(rewards.tolist(), rows.tolist(), [0] * 4)
    assert_near(got, expected, atol=1e-4)
    assert got.abs().max() > 1


@each_variant
def test_inputs_are_not_written_to(variant: dict[str, Any]) -> None:
    columns = {
        "rewards": torch.tensor(HAND.rewards, dtype=torch.float64),
        "trajectory": torch.tensor(HAND.trajectory),
        "group": torch.tensor(HAND.group),
        "outcome": torch.tensor(HAND.outcome, dtype=torch.float64),
        "anchor": torch.tensor(HAND.anchor),
    }
    before = {name: column.clone() for name, column in columns.items()}
    turn_credit(**columns, **variant)
    assert all(torch.equal(columns[name], before[name]) for name in columns)


@each_variant
def test_no_rows(variant: dict[str, Any]) -> None:
    credit = Batch([], [], [], [], []).credit(torch.float32, **variant)
    for name in ("returns", "baseline", "scale", "advantages"):
        assert getattr(credit, name).shape == (0,)
        assert getattr(credit, name).dtype == torch.float32


# --- learners ----------------------------------------------------------------------------------


def on_learners(shards: list[Batch], **options: Any) -> list[TurnCredit]:
    """Each shard on its own thread, with a sum over all of them that hangs up on a missing one."""
    barrier, posted = threading.Barrier(len(shards)), [torch.zeros(0)] * len(shards)
    results: list[Any] = [None] * len(shards)

    def reducer(rank: int) -> Callable[[Tensor], Tensor | None]:
        def all_reduce(tensor: Tensor) -> Tensor | None:
            posted[rank] = tensor.clone()
            barrier.wait(timeout=10)
            total = torch.stack(posted).sum(0)
            barrier.wait(timeout=10)
            if rank % 2 == 0:
                return total  # by value
            tensor.copy_(total)
            return None  # in place, as torch.distributed does

        return all_reduce

    def work(rank: int) -> None:
        results[rank] = shards[rank].credit(all_reduce=reducer(rank), **options)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@each_variant
def test_learners_agree_with_one(variant: dict[str, Any]) -> None:
    more = Batch([0.25, 0, 0, 1], [30, 31, 31, 31], [3] * 4, [1, 0, 0, 0], [0] * 4)
    whole = Batch(*(a + b for a, b in zip(vars(HAND).values(), vars(more).values(), strict=True)))
    parts = on_learners([HAND, Batch([], [], [], [], []), more], **variant)
    got = torch.cat([part.advantages for part in parts])
    assert_near(got, whole.credit(**variant).advantages, atol=1e-9)


# --- what is refused -----------------------------------------------------------------------------


def refused(message: str, **options: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        HAND.credit(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "gtop"}, "unknown estimator 'gtop'; did you mean 'gtpo'"),
        ({"gama": 0.9}, "'gama' is unknown; did you mean 'gamma'"),
        ({"estimator": "gigpo", "omga": 1.0}, "did you mean 'omega'"),
        ({"normalize": "grup"}, "'normalize' is 'grup'; did you mean 'group'"),
        ({"omega": 1.0}, "'omega' is not used"),
        ({"estimator": "grpo", "gamma": 0.9}, "'gamma' is not used"),
        ({"estimator": "rloo", "use_std": False}, "'use_std' is not used"),
        ({"estimator": "gigpo", "normalize": "group"}, "'normalize' is not used"),
        ({"estimator": "mt_grpo", "weight_trajectories": True}, "'weight_trajectories' is not"),
        ({"normalize": "none", "use_std": True}, "'use_std' is not used with normalize='none'"),
        ({"normalize": "none", "weight_trajectories": False}, "'weight_trajectories' is not used"),
        ({"normalize": "leave_one_out", "use_std": False}, "'use_std' is not used with"),
        ({"normalize": "turn_index", "weight_trajectories": True}, "'weight_trajectories' is not"),
        ({"normalize": "first_return", "weight_trajectories": True}, "'weight_trajectories' is"),
        ({"use_std": "no"}, "'use_std' must be True or False"),
        ({"gamma": "0.9"}, "'gamma' must be a finite number"),
        ({"estimator": "mt_grpo", "lambda_": float("nan")}, "'lambda_' must be a finite number"),
    ],
)
def test_refuses_options(options: dict[str, Any], message: str) -> None:
    refused(message, **options)


def test_three_dots_leave_the_default() -> None:
    got = HAND.credit(estimator="grpo_sum", gamma=..., normalize=..., use_std=...)
    assert_near(got.advantages, HAND.credit(estimator="grpo_sum").advantages)


@pytest.mark.parametrize(
    ("estimator", "missing"), [("grpo", "outcome"), ("mt_grpo", "outcome"), ("gigpo", "anchor")]
)
def test_missing_inputs_are_named(estimator: str, missing: str) -> None:
    rows = torch.arange(2)
    with pytest.raises(ConfigError, match=f"needs '{missing}'"):
        turn_credit(torch.zeros(2), rows, rows, estimator=estimator)


def changed(**columns: list[Any]) -> Batch:
    return Batch(**{**vars(HAND), **columns})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (changed(rewards=[0, 1, 0, float("nan"), 0, 1]), "row 3: rewards is nan"),
        (changed(rewards=[0, 1, 0, 0, 0, float("inf")]), "row 5: rewards is inf"),
        (changed(rewards=[0, 1, 0, 0, 0]), "row 5"),
        (changed(group=[1, 1, 1, 1, 2, 2]), "row 4: group is 2 where .* belongs to one group"),
        (changed(group=[1, 1, 1, 1, 1]), "group has 5 rows .* row 5"),
        (changed(trajectory=[10, 10, 11, 12, 12, 10]), "row 5: trajectory 10 starts again"),
        (changed(outcome=[1, 1, 0, 0, 1, 1]), "row 4: outcome is 1.0"),
        (changed(outcome=[1, 1, float("nan"), 0, 0, 1]), "row 2: outcome is nan"),
        (changed(anchor=[0, 0, 0]), "row 3"),
    ],
)
def test_refuses_rows(batch: Batch, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch.credit()


def test_refuses_types_and_shapes() -> None:
    rows = torch.arange(2)
    with pytest.raises(ValueError, match="group must hold integer ids"):
        turn_credit(torch.zeros(2), rows, rows.float())
    with pytest.raises(ValueError, match="rewards must be floating point"):
        turn_credit(rows, rows, rows)
    with pytest.raises(ValueError, match="rewards must be a tensor of shape"):
        turn_credit(torch.zeros(1, 2), rows, rows)


# --- the registry ------------------------------------------------------------------------------


@pytest.fixture
def clean_registry() -> Any:
    before = dict(ESTIMATORS)
    yield
    ESTIMATORS.clear()
    ESTIMATORS.update(before)


@pytest.mark.usefixtures("clean_registry")
def test_third_party_estimator() -> None:
    @register_estimator("shifted", no_effect={"double": {True: ("shift",)}})  # type: ignore[dict-item]
    def shifted(
        turns: Turns, *, outcome: Tensor, shift: float = 0.5, double: bool = False
    ) -> TurnCredit:
        one = torch.ones_like(outcome)
        baseline = shift * one
        return TurnCredit(outcome, baseline, one, (outcome - baseline) * (2 if double else 1))

    got = HAND.credit(torch.float32, estimator="shifted", shift=0.25).advantages
    assert got.tolist() == [0.75, 0.75, -0.25, -0.25, -0.25, 0.75]
    assert got.dtype == torch.float32
    refused("did you mean 'shift'", estimator="shifted", shft=1.0)
    refused("'gamma' is not used", estimator="shifted", gamma=0.9)
    refused("'shift' is not used with double=True", estimator="shifted", shift=1.0, double=True)
    with pytest.raises(ConfigError, match="already registered"):
        register_estimator("shifted")(shifted)


@pytest.mark.usefixtures("clean_registry")
def test_registration_refuses_what_it_cannot_call() -> None:
    def positional(turns: Turns, shift: float = 0.0) -> TurnCredit:
        raise AssertionError

    def unknown_input(turns: Turns, *, value: Tensor) -> TurnCredit:
        raise AssertionError

    def wrong_shape(turns: Turns) -> TurnCredit:
        return TurnCredit(*(torch.zeros(1) for _ in range(4)))

    with pytest.raises(TypeError, match="keyword-only"):
        register_estimator("a")(positional)
    with pytest.raises(TypeError, match="needs a default"):
        register_estimator("b")(unknown_input)
    with pytest.raises(TypeError, match="needs a name"):
        register_estimator(wrong_shape)  # type: ignore[arg-type]
    register_estimator("c")(wrong_shape)
    with pytest.raises(ValueError, match="'c' gave returns of shape"):
        HAND.credit(estimator="c")


# --- speed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["group", "turn_index", "batch", "leave_one_out"])
def test_a_million_turns_in_ten_thousand_groups(normalize: str) -> None:
    lengths = torch.randint(1, 26, (80_000,), generator=torch.Generator().manual_seed(0))
    trajectory = torch.arange(80_000).repeat_interleave(lengths)
    rewards = torch.rand(len(trajectory))
    start = time.perf_counter()
    turn_advantages(rewards, trajectory, trajectory // 8, normalize=normalize)
    assert time.perf_counter() - start < 3.0  # 0.2 s on one core; a loop over groups takes minutes
