"""The objective: values by hand, gradients, clipping, and exactness under any split."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.ops.losses import (
    Objective,
    finish_metrics,
    merge_metrics,
    normaliser,
    objective_sum,
    token_weights,
)

AGGREGATIONS = ["token_mean", "sequence_mean", "turn_mean", "constant"]
LEVELS = ["token", "turn", "sequence"]

# trajectory 5 has turns 50 (3 tokens) and 51 (1); trajectory 2 has turn 20 (2); 9 has 90, 91, 92
TURN = torch.tensor([50, 50, 50, 51, 20, 20, 90, 91, 91, 92])
TRAJECTORY = torch.tensor([5, 5, 5, 5, 2, 2, 9, 9, 9, 9])


def tokens(seed: int = 0, spread: float = 0.4) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(10, generator=g, dtype=torch.float64)

    anchor = -draw().abs() - 0.5
    return {
        "learner_logprobs": (anchor + spread * draw()).requires_grad_(),
        "anchor_logprobs": anchor,
        "sampling_logprobs": anchor + spread * draw(),
        "advantages": draw(),
        "turn": TURN,
        "trajectory": TRAJECTORY,
        "ref_logprobs": anchor + spread * draw(),
        "entropy": draw().abs().requires_grad_(),
    }


def for_objective(objective: Objective, batch: dict[str, Tensor]) -> dict[str, Any]:
    return {k: v for k, v in batch.items() if k != "ref_logprobs" or objective.kl_coeff}


def make(aggregation: str = "token_mean", **options: Any) -> Objective:
    constant = 7.0 if aggregation == "constant" else None
    return Objective(aggregation=aggregation, constant=constant, **options)  # type: ignore[arg-type]


def one_token(log_ratio: float, advantage: float, **options: Any) -> tuple[float, float, Any]:
    """Loss, gradient and metrics of a single token."""
    learner = torch.tensor([log_ratio - 1.0], dtype=torch.float64, requires_grad=True)
    anchor, row = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([0])
    loss, metrics = objective_sum(
        Objective(**options),
        learner_logprobs=learner,
        anchor_logprobs=anchor,
        sampling_logprobs=anchor,
        advantages=torch.tensor([advantage], dtype=torch.float64),
        turn=row,
        trajectory=row,
    )
    loss.backward()
    assert learner.grad is not None
    return loss.item(), learner.grad.item(), metrics


def test_defaults() -> None:
    """What training uses unless told otherwise: a change of these changes everybody's runs."""
    assert Objective() == Objective(
        ratio_level="token",
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=None,
        kl_coeff=0.0,
        kl_estimator="k3",
        aggregation="token_mean",
        constant=None,
        importance_sampling="off",
        importance_cap=2.0,
        entropy_coeff=0.0,
    )


# --- the clip ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, None),
        (1.2, 2.0, -2.4, -2.4, None),
        (1.5, 2.0, -2.56, 0.0, "clip/high_frac"),  # good and already likely enough
        (1.5, -2.0, 3.0, 3.0, None),  # bad and grown: push back, unclipped
        (0.5, -2.0, 1.6, 0.0, "clip/low_frac"),  # bad and already unlikely enough
        (0.5, 2.0, -1.0, -1.0, None),  # good and shrunk: pull back, unclipped
        (0.9, -2.0, 1.8, 1.8, None),
    ],
)
def test_clip(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: str | None
) -> None:
    got_loss, got_gradient, metrics = one_token(math.log(ratio), advantage)
    assert got_loss == pytest.approx(loss)
    assert got_gradient == pytest.approx(gradient)
    for name in ("clip/high_frac", "clip/low_frac"):
        assert metrics[name].item() == (name == clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "stopped"),
    [
        (5.0, -2.0, 6.0, 0.0, 1),  # bounded at 3 * 2
        (2.0, -2.0, 4.0, 4.0, 0),
        (5.0, 2.0, -2.56, 0.0, 0),  # not for positive advantages
    ],
)
def test_dual_clip(
    ratio: float, advantage: float, loss: float, gradient: float, stopped: int
) -> None:
    got_loss, got_gradient, metrics = one_token(math.log(ratio), advantage, dual_clip=3.0)
    assert got_loss == pytest.approx(loss)
    assert got_gradient == pytest.approx(gradient)
    assert metrics["clip/dual_frac"].item() == stopped


def test_extreme_ratios_stay_finite() -> None:
    for log_ratio in (-1e4, 1e4):
        for advantage in (-1.0, 0.0, 1.0):
            loss, gradient, metrics = one_token(log_ratio, advantage)
            assert math.isfinite(loss) and math.isfinite(gradient)
            assert metrics["ratio/max_abs_log"].item() == 1e4


def test_ratios_are_bounded_at_e_to_the_20() -> None:
    loss, gradient, metrics = one_token(1e4, -1.0)
    assert loss == pytest.approx(math.exp(20))
    assert gradient == 0.0
    assert metrics["ratio/mean"].item() == pytest.approx(math.exp(20))
    assert one_token(19.0, -1.0)[1] == pytest.approx(math.exp(19))


def test_without_anchor_the_ratio_is_one() -> None:
    batch = for_objective(make(), tokens())
    batch["anchor_logprobs"] = None
    loss, metrics = objective_sum(make(), **batch)
    assert loss.item() == pytest.approx(-batch["advantages"].sum().item())
    (gradient,) = torch.autograd.grad(loss, batch["learner_logprobs"])
    torch.testing.assert_close(gradient, -batch["advantages"])
    assert metrics["ratio/max_abs_log"].item() == 0.0


# --- ratio levels, importance sampling, KL, entropy: by hand -----------------------------------

TWO_TURNS = {
    "turn": torch.tensor([0, 0, 1]),
    "trajectory": torch.tensor([0, 0, 0]),
    "advantages": torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64),
}


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("level", "ratios"),
    [
        ("token", [math.exp(0.1), math.exp(-0.3), math.exp(0.05)]),
        ("turn", [math.exp(-0.1), math.exp(-0.1), math.exp(0.05)]),
        ("sequence", [math.exp(-0.05)] * 3),
    ],
)
def test_ratio_levels(level: str, ratios: list[float]) -> None:
    loss, metrics = objective_sum(
        Objective(ratio_level=level, clip_low=0.9, clip_high=9.0),  # type: ignore[arg-type]
        learner_logprobs=f64(-0.9, -1.3, -0.95),
        anchor_logprobs=f64(-1, -1, -1),
        sampling_logprobs=f64(-1, -1, -1),
        **TWO_TURNS,
    )
    assert loss.item() == pytest.approx(-ratios[0] - ratios[1] + ratios[2])
    assert metrics["ratio/mean"].item() == pytest.approx(sum(ratios))


@pytest.mark.parametrize(
    ("level", "cap", "weights", "truncated"),
    [
        ("off", 1.5, [1, 1, 1], None),
        ("token", 1.5, [1.5, 0.9, 0.25], 1),
        ("turn", 1.5, [1.5, 1.5, 0.25], 2),
        ("turn", 4.0, [1.8, 1.8, 0.25], 0),  # the product 2 * 0.9, not its root
        ("sequence", 1.5, [0.45, 0.45, 0.45], 0),
    ],
)
def test_importance_sampling(
    level: str, cap: float, weights: list[float], truncated: int | None
) -> None:
    anchor = f64(-1, -1, -1)
    learner = anchor.clone().requires_grad_()
    loss, metrics = objective_sum(
        Objective(importance_sampling=level, importance_cap=cap),  # type: ignore[arg-type]
        learner_logprobs=learner,
        anchor_logprobs=anchor,
        sampling_logprobs=anchor - f64(2.0, 0.9, 0.25).log(),
        **TWO_TURNS,
    )
    (gradient,) = torch.autograd.grad(loss, learner)
    torch.testing.assert_close(gradient, f64(-weights[0], -weights[1], weights[2]))
    assert ("mismatch/truncated_frac" in metrics) == (truncated is not None)
    if truncated is not None:
        assert metrics["mismatch/truncated_frac"].item() == truncated


def test_mismatch_kl_is_always_logged() -> None:
    batch = for_objective(make(), tokens())
    metrics = objective_sum(make(), **batch)[1]
    gap = batch["anchor_logprobs"] - batch["sampling_logprobs"]
    assert metrics["mismatch/kl"].item() == pytest.approx((gap.exp() - 1 - gap).sum().item())
    assert metrics["mismatch/max_abs_log_ratio"].item() == pytest.approx(gap.abs().max().item())
    assert metrics["tokens"].item() == 10


@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [
        ("k1", 0.2, 1.0),
        ("k2", 0.02, 0.2),
        ("k3", math.exp(-0.2) - 1 + 0.2, 1 - math.exp(-0.2)),
    ],
)
def test_kl(kind: str, value: float, gradient: float) -> None:
    learner, row = f64(-1.0).requires_grad_(), torch.tensor([0])
    loss, metrics = objective_sum(
        Objective(kl_coeff=0.5, kl_estimator=kind),  # type: ignore[arg-type]
        learner_logprobs=learner,
        sampling_logprobs=f64(-1),
        advantages=f64(0),
        turn=row,
        trajectory=row,
        ref_logprobs=f64(-1.2),
    )
    assert loss.item() == pytest.approx(0.5 * value)
    assert metrics["ref/kl"].item() == pytest.approx(value)
    (got,) = torch.autograd.grad(loss, learner)
    assert got.item() == pytest.approx(0.5 * gradient)


def test_entropy_bonus_lowers_the_loss() -> None:
    batch = tokens()
    batch.pop("ref_logprobs")
    plain, metrics = objective_sum(make(), **batch)
    bonus, _ = objective_sum(make(entropy_coeff=0.01), **batch)
    total = batch["entropy"].sum().item()
    assert (bonus - plain).item() == pytest.approx(-0.01 * total)
    assert metrics["policy/entropy"].item() == pytest.approx(total)
    (gradient,) = torch.autograd.grad(bonus, batch["entropy"])
    torch.testing.assert_close(gradient, torch.full((10,), -0.01, dtype=torch.float64))


# --- weights and normalisers -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregation", "weights", "total"),
    [
        ("token_mean", [1.0] * 10, 10),
        ("sequence_mean", [1 / 4] * 4 + [1 / 2] * 2 + [1 / 4] * 4, 3),
        ("turn_mean", [1 / 3] * 3 + [1.0] + [1 / 2] * 2 + [1.0, 1 / 2, 1 / 2, 1.0], 6),
        ("constant", [1.0] * 10, 7),
    ],
)
def test_weights_and_normaliser(aggregation: str, weights: list[float], total: float) -> None:
    got = token_weights(aggregation, TURN, TRAJECTORY)  # type: ignore[arg-type]
    torch.testing.assert_close(got, torch.tensor(weights, dtype=torch.float64), rtol=0, atol=1e-16)
    assert normaliser(make(aggregation), TURN, TRAJECTORY).item() == total


def test_normaliser_over_learners() -> None:
    def by_value(tensor: Tensor) -> Tensor:
        return tensor + 90

    def in_place(tensor: Tensor) -> None:
        tensor += 90

    for all_reduce in (by_value, in_place):
        got = normaliser(make("sequence_mean"), TURN, TRAJECTORY, all_reduce)
        assert got.item() == 93
    none = torch.zeros(0, dtype=torch.long)
    assert normaliser(make("turn_mean"), none, none, by_value).item() == 90
    assert normaliser(make("turn_mean"), none, none).item() == 1  # a step without tokens: 0 / 1
    assert normaliser(make("constant"), TURN, TRAJECTORY, by_value).item() == 7


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", [[[5], [2], [9]], [[9, 5], [2]], [[2], [], [5, 9]]])
def test_any_split_gives_the_same_loss_gradient_and_metrics(
    aggregation: str, level: str, split: list[list[int]]
) -> None:
    objective = make(
        aggregation,
        ratio_level=level,
        importance_sampling=level,
        kl_coeff=0.1,
        entropy_coeff=0.01,
        dual_clip=1.5,
    )
    batch = tokens()
    divisor = normaliser(objective, TURN, TRAJECTORY)
    leaves = [batch["learner_logprobs"], batch["entropy"]]
    whole, whole_metrics = objective_sum(objective, **batch)
    expected = torch.autograd.grad(whole / divisor, leaves)
    total, sums, parts = 0.0, [torch.zeros(10, dtype=torch.float64) for _ in leaves], []
    for members in split:
        keep = torch.isin(TRAJECTORY, torch.tensor(members, dtype=torch.long))
        loss, metrics = objective_sum(objective, **{k: v[keep] for k, v in batch.items()})
        for into, gradient in zip(sums, torch.autograd.grad(loss / divisor, leaves), strict=True):
            into += gradient
        total += (loss / divisor).item()
        parts.append(metrics)
    assert total == pytest.approx((whole / divisor).item(), abs=1e-12)
    torch.testing.assert_close(tuple(sums), expected)
    merged = finish_metrics(merge_metrics(parts))
    assert merged == pytest.approx(finish_metrics(whole_metrics), abs=1e-12)
    assert merged["tokens"] == 10


def test_means_are_means() -> None:
    """With ratio 1 the loss is minus the advantage, averaged as the aggregation says."""
    batch = for_objective(make(), tokens())
    batch["anchor_logprobs"] = None
    advantages = batch["advantages"]
    by_trajectory = [advantages[t == TRAJECTORY].mean() for t in (5, 2, 9)]
    by_turn = [advantages[t == TURN].mean() for t in (50, 51, 20, 90, 91, 92)]
    for aggregation, expected in [
        ("token_mean", -advantages.mean()),
        ("sequence_mean", -torch.stack(by_trajectory).mean()),
        ("turn_mean", -torch.stack(by_turn).mean()),
        ("constant", -advantages.sum() / 7),
    ]:
        loss, _ = objective_sum(make(aggregation), **batch)
        got = loss / normaliser(make(aggregation), TURN, TRAJECTORY)
        assert got.item() == pytest.approx(expected.item(), rel=1e-12)


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_gradient_equals_finite_differences(level: str, aggregation: str, kind: str) -> None:
    objective = make(
        aggregation,
        ratio_level=level,
        importance_sampling="turn",
        kl_coeff=0.3,
        kl_estimator=kind,
        entropy_coeff=0.02,
        dual_clip=2.0,
    )
    batch = tokens(seed=3)

    def loss(learner: Tensor, entropy: Tensor) -> Tensor:
        return objective_sum(
            objective, **{**batch, "learner_logprobs": learner, "entropy": entropy}
        )[0]

    assert torch.autograd.gradcheck(loss, (batch["learner_logprobs"], batch["entropy"]))


@settings(max_examples=60, deadline=None)
@given(log_ratio=st.floats(-2, 2), advantage=st.floats(-3, 3))
def test_gradient_never_pushes_past_the_clip(log_ratio: float, advantage: float) -> None:
    _, gradient, _ = one_token(log_ratio, advantage)
    ratio = math.exp(log_ratio)
    if (advantage > 0 and ratio > 1.2801) or (advantage < 0 and ratio < 0.7999):
        assert gradient == 0.0
    elif (advantage > 0 and ratio < 1.2799) or (advantage < 0 and ratio > 0.8001):
        assert gradient == pytest.approx(-ratio * advantage)


def test_no_tokens_have_a_gradient_path() -> None:
    learner = torch.zeros(0, requires_grad=True)
    none, rows = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    for level in LEVELS:
        for aggregation in AGGREGATIONS:
            objective = make(aggregation, ratio_level=level, importance_sampling=level)
            loss, metrics = objective_sum(
                objective,
                learner_logprobs=learner,
                sampling_logprobs=none,
                advantages=none,
                turn=rows,
                trajectory=rows,
            )
            loss.backward()
            assert loss.item() == 0.0
            assert all(v.item() == 0.0 for v in metrics.values())
            assert finish_metrics(metrics)["mismatch/kl"] == 0.0


def test_only_the_learner_gets_a_gradient() -> None:
    objective = make(kl_coeff=0.1, importance_sampling="token")
    batch = {**tokens(), "entropy": None}
    others = ["anchor_logprobs", "sampling_logprobs", "advantages", "ref_logprobs"]
    for name in others:
        batch[name] = batch[name].requires_grad_()  # type: ignore[union-attr]
    loss, metrics = objective_sum(objective, **batch)  # type: ignore[arg-type]
    loss.backward()
    assert all(batch[name].grad is None for name in others)  # type: ignore[union-attr]
    assert not any(v.requires_grad for v in metrics.values())


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio_level": "tokens"}, "did you mean 'token'"),
        ({"aggregation": "token-mean"}, "did you mean 'token_mean'"),
        ({"kl_estimator": "k4"}, "kl_estimator is 'k4'"),
        ({"importance_sampling": "sequences"}, "did you mean 'sequence'"),
        ({"clip_low": 1.5}, "clip_low must be in"),
        ({"clip_high": -0.1}, "clip_high must be at least 0"),
        ({"clip_high": float("inf")}, "clip_high"),
        ({"dual_clip": 1.0}, "dual_clip must be None or above 1"),
        ({"importance_cap": 0.0}, "importance_cap must be above 0"),
        ({"kl_coeff": float("nan")}, "kl_coeff"),
        ({"aggregation": "constant"}, "constant is None"),
        ({"constant": 5.0}, "constant is 5.0 with aggregation 'token_mean'"),
        ({"aggregation": "constant", "constant": 0.0}, "constant must be None or above 0"),
    ],
)
def test_refuses_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Objective(**options)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"advantages": torch.zeros(3)}, "advantages has shape"),
        ({}, {"advantages": f64(*[0] * 9, math.nan)}, "row 9: advantages is nan"),
        (
            {},
            {"sampling_logprobs": f64(0, -math.inf, *[0] * 8)},
            "row 1: sampling_logprobs is -inf",
        ),
        (
            {},
            {"advantages": torch.zeros(10, dtype=torch.long)},
            "advantages must be floating point",
        ),
        ({}, {"ref_logprobs": torch.zeros(10)}, "kl_coeff is 0.0: ref_logprobs"),
        ({"kl_coeff": 0.1}, {}, "kl_coeff is 0.1: ref_logprobs"),
        ({"entropy_coeff": 0.1}, {"entropy": None}, "entropy must be given"),
        ({"entropy_coeff": 0.1}, {"entropy": torch.zeros(10)}, "with gradient"),
    ],
)
def test_refuses_inputs(options: dict[str, Any], change: dict[str, Any], message: str) -> None:
    batch = {**tokens(), "ref_logprobs": None, **change}
    with pytest.raises(ValueError, match=message):
        objective_sum(Objective(**options), **batch)  # type: ignore[arg-type]
