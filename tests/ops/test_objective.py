"""The whole objective against the slow reference, for every combination of its options."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rllib_gtpo.ops.losses import (
    Objective,
    finish_metrics,
    merge_metrics,
    normaliser,
    objective_sum,
)
from tests.ops import reference_objective as reference

LEVELS = ["token", "turn", "sequence"]
AGGREGATIONS = ["token_mean", "sequence_mean", "turn_mean", "constant"]
KLS = [None, "k1", "k2", "k3"]
CORRECTIONS = ["off", "token", "turn", "sequence"]
DUALS = [None, 1.4]

# Steps of 1/64, and none of the bounds is e to such a number: no draw lies on a kink.
small = st.integers(-40, 40).map(lambda k: (k + 0.5) / 64)


@st.composite
def ragged_tokens(draw: st.DrawFn) -> reference.Tokens:
    """Turns of 1 to 3 tokens, trajectories of 1 to 3 turns; advantages may differ within a turn."""
    tokens = reference.Tokens([], [], [], [], [], [], [], [])
    for trajectory in draw(st.permutations(range(draw(st.integers(1, 3))))):
        for turn in range(draw(st.integers(1, 3))):
            for _ in range(draw(st.integers(1, 3))):
                anchor = draw(st.floats(-4, -1))
                tokens.anchor.append(anchor)
                tokens.learner.append(anchor + draw(small))
                tokens.sampling.append(anchor - draw(small))
                tokens.ref.append(anchor + draw(small))
                tokens.entropy.append(draw(st.floats(0, 3)))
                tokens.advantage.append(draw(st.sampled_from([-2.0, -0.7, 0.0, 0.4, 1.5])))
                tokens.turn.append(100 * trajectory - turn)
                tokens.trajectory.append(7 * trajectory - 3)
    return tokens


def build(
    level: str,
    aggregation: str,
    kl: str | None,
    correction: str,
    dual: float | None,
    **options: Any,
) -> Objective:
    if kl is not None:
        options |= {"kl_coeff": 0.3, "kl_estimator": kl}
    return Objective(
        ratio_level=level,  # type: ignore[arg-type]
        aggregation=aggregation,  # type: ignore[arg-type]
        constant=7.0 if aggregation == "constant" else None,
        importance_sampling=correction,  # type: ignore[arg-type]
        importance_cap=1.3,
        dual_clip=dual,
        entropy_coeff=0.05,
        **options,
    )


def tensors(objective: Objective, tokens: reference.Tokens) -> dict[str, Any]:
    def f64(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return {
        "learner_logprobs": f64(tokens.learner).requires_grad_(),
        "anchor_logprobs": f64(tokens.anchor),
        "sampling_logprobs": f64(tokens.sampling),
        "ref_logprobs": f64(tokens.ref) if objective.kl_coeff else None,
        "entropy": f64(tokens.entropy).requires_grad_(),
        "advantages": f64(tokens.advantage),
        "turn": torch.tensor(tokens.turn),
        "trajectory": torch.tensor(tokens.trajectory),
    }


def assert_equals_reference(objective: Objective, tokens: reference.Tokens) -> None:
    batch = tensors(objective, tokens)
    total, sums = objective_sum(objective, **batch)
    divisor = normaliser(objective, batch["turn"], batch["trajectory"])
    loss = total / divisor
    assert loss.item() == pytest.approx(reference.loss(objective, tokens), rel=1e-12, abs=1e-12)
    got, entropy = torch.autograd.grad(loss, [batch["learner_logprobs"], batch["entropy"]])
    expected = reference.gradient(objective, tokens)
    assert got.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    n = len(tokens.turn)
    bonus = [-0.05 * reference.share(objective, tokens, t) for t in range(n)]
    assert entropy.tolist() == pytest.approx(bonus, rel=1e-12)
    metrics = finish_metrics(merge_metrics([sums]))
    assert metrics == pytest.approx(reference.metrics(objective, tokens), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@settings(max_examples=60, deadline=None)
@given(
    tokens=ragged_tokens(),
    kl=st.sampled_from(KLS),
    correction=st.sampled_from(CORRECTIONS),
    dual=st.sampled_from(DUALS),
    clips=st.sampled_from([(0.2, 0.28), (0.0, 0.4), (1.0, 0.1)]),
)
def test_equals_reference(
    level: str,
    aggregation: str,
    tokens: reference.Tokens,
    kl: str | None,
    correction: str,
    dual: float | None,
    clips: tuple[float, float],
) -> None:
    clip_low, clip_high = clips
    objective = build(
        level, aggregation, kl, correction, dual, clip_low=clip_low, clip_high=clip_high
    )
    assert_equals_reference(objective, tokens)


FIXED = reference.Tokens(
    learner=[-1.0, -2.5, -1.2, -0.4, -3.0, -1.1, -0.1, -2.0, -1.6, -0.5],
    anchor=[-1.5, -2.1, -1.2, -0.8, -2.4, -1.9, -0.6, -2.3, -1.1, -1.0],
    sampling=[-1.2, -2.6, -1.3, -0.5, -2.4, -2.5, -0.9, -2.2, -1.0, -1.4],
    ref=[-1.1, -2.0, -1.9, -0.4, -2.8, -1.6, -0.2, -2.4, -1.3, -0.9],
    entropy=[0.3, 1.2, 0.7, 2.0, 0.1, 0.9, 1.1, 0.4, 0.6, 1.3],
    advantage=[1.2, 1.2, 1.2, -0.8, -0.8, -1.5, 0.6, 0.6, -0.3, -1.0],
    turn=[4, 4, 4, 5, 5, 6, 0, 0, 9, 3],
    trajectory=[2, 2, 2, 2, 2, 2, 0, 0, 8, 5],
)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_combination_equals_reference(level: str, aggregation: str) -> None:
    for kl, correction, dual in product(KLS, CORRECTIONS, DUALS):
        assert_equals_reference(build(level, aggregation, kl, correction, dual), FIXED)


@pytest.mark.parametrize("level", LEVELS)
def test_the_fixed_tokens_reach_every_bound(level: str) -> None:
    objective = build(level, "token_mean", None, "off", 1.4)
    stops = {
        reference.stopped_by(objective, reference.ratio(objective, FIXED, t), advantage)
        for t, advantage in enumerate(FIXED.advantage)
    }
    assert stops == {"low", "high", "dual", None}


@pytest.mark.parametrize("level", LEVELS)
def test_no_anchors_are_the_current_logprobs(level: str) -> None:
    for aggregation, kl, correction in product(AGGREGATIONS, KLS, CORRECTIONS):
        objective = build(level, aggregation, kl, correction, 1.4)
        batch = tensors(objective, FIXED)
        leaf = batch["learner_logprobs"]
        results = []
        for anchors in (None, leaf.detach().clone()):
            loss = objective_sum(objective, **{**batch, "anchor_logprobs": anchors})[0]
            results.append((loss, *torch.autograd.grad(loss, leaf, retain_graph=True)))
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_half_precision_logprobs_are_computed_in_float32() -> None:
    objective = build("token", "token_mean", "k3", "off", None)
    whole = tensors(objective, FIXED)
    low = {n: v.detach().bfloat16() if v.is_floating_point() else v for n, v in whole.items()}
    leaves = {n: low[n].requires_grad_() for n in ("learner_logprobs", "entropy")}
    same = {n: v.double() if v.is_floating_point() else v for n, v in {**low, **leaves}.items()}
    got, expected = objective_sum(objective, **low)[0], objective_sum(objective, **same)[0]
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(tokens=ragged_tokens(), level=st.sampled_from(LEVELS), data=st.data())
def test_order_of_tokens_and_ids_do_not_matter(
    tokens: reference.Tokens, level: str, data: st.DataObject
) -> None:
    objective = build(level, "turn_mean", "k3", level, 1.4)
    batch = tensors(objective, tokens)
    order = torch.tensor(data.draw(st.permutations(range(len(tokens.turn)))))
    moved = {name: None if v is None else v[order] for name, v in batch.items()}
    moved["turn"] = moved["turn"] * -3 + 11
    moved["trajectory"] = moved["trajectory"] * 5 - 2**40
    before, after = objective_sum(objective, **batch)[0], objective_sum(objective, **moved)[0]
    assert after.item() == pytest.approx(before.item(), rel=1e-12, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(tokens=ragged_tokens(), level=st.sampled_from(LEVELS), factor=st.floats(0.1, 10))
def test_the_surrogate_scales_with_the_advantages(
    tokens: reference.Tokens, level: str, factor: float
) -> None:
    objective = Objective(ratio_level=level, dual_clip=1.4)  # type: ignore[arg-type]
    batch = tensors(objective, tokens)
    larger = {**batch, "advantages": batch["advantages"] * factor}
    before, after = objective_sum(objective, **batch)[0], objective_sum(objective, **larger)[0]
    assert after.item() == pytest.approx(factor * before.item(), rel=1e-9, abs=1e-12)
