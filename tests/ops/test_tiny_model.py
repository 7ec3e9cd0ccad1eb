"""Gradients of the objective through a real model, from trajectories to the minimised scalar.

A one-layer Qwen2 in float64 on the package's own path: packed micro-batches, `forward_train`,
log-probabilities, credit, objective, normaliser.  Ratios are set by choosing the anchors, so that
every bound is reached and none is near enough for a finite difference to step over it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from rllib_gtpo.ops.advantages import turn_advantages
from rllib_gtpo.ops.losses import Objective, normaliser, objective_sum
from rllib_gtpo.packing import TokenBatch, collate, token_sequences
from rllib_gtpo.rl_module import ENTROPY, LOGPROBS, LLMModule
from rllib_gtpo.types import Trajectory, Turn

QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "vocab_size": 300,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}
# Members of one prompt: for each turn its prompt ids, its sampled ids, its reward.
MEMBERS = [
    [([5, 6, 7], [8, 9], 0.0), ([4], [10, 11, 12], 1.0)],
    [([5, 6, 7], [20], -0.1), ([4, 3], [21, 22], 0.0), ([2], [23], 0.0)],
    [([5, 6, 7], [30, 31, 32], 0.5)],
    [([5, 6, 7], [40, 41], 0.0)],
]
LEVELS = ["token", "turn", "sequence"]
AGGREGATIONS = ["token_mean", "sequence_mean", "turn_mean", "constant"]
CORRECTIONS = ["off", "token", "turn", "sequence"]
MARGIN = 0.01  # of every ratio to every bound


def build(seed: int) -> LLMModule:
    """An LLMModule whose every operation is in float64."""
    settings = {"model": QWEN2, "tokenizer": None, "dtype": "float32", "seed": seed}
    module = LLMModule(model_config={**settings, "temperature": 0.8}).double()
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Qwen2RMSNorm":  # its own forward rounds to float32
                norm = torch.nn.RMSNorm(child.weight.shape[0], child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return module


@dataclass
class Setup:
    """A module, two micro-batches (one padded), and a reference model's log-probabilities."""

    module: LLMModule
    refs: list[Tensor]
    batches: list[TokenBatch]
    advantages: Tensor

    def forward(self, batch: TokenBatch) -> dict[str, Tensor]:
        output = self.module.forward_train({"tokens": batch})
        assert output[LOGPROBS].dtype == torch.float64
        return output

    def loss(self, objective: Objective, anchors: list[Tensor], advantages: Tensor) -> Tensor:
        turn = torch.cat([batch.turns_N for batch in self.batches])
        trajectory = torch.cat([batch.sequences_N for batch in self.batches])
        divisor = normaliser(objective, turn, trajectory)
        total = torch.zeros((), dtype=torch.float64)
        for batch, anchor, ref in zip(self.batches, anchors, self.refs, strict=True):
            output = self.forward(batch)
            total = (
                total
                + objective_sum(
                    objective,
                    learner_logprobs=output[LOGPROBS],
                    sampling_logprobs=batch.sampling_logprobs_N,
                    advantages=advantages[batch.turns_N],
                    turn=batch.turns_N,
                    trajectory=batch.sequences_N,
                    anchor_logprobs=anchor,
                    ref_logprobs=ref if objective.kl_coeff else None,
                    entropy=output[ENTROPY],
                )[0]
            )
        return total / divisor

    def anchors(self, log_ratio: list[float]) -> list[Tensor]:
        """Such that the current log-ratio of each trained token, by turn row, is `log_ratio`."""
        wanted = torch.tensor(log_ratio, dtype=torch.float64)
        with torch.no_grad():
            return [self.forward(b)[LOGPROBS] - wanted[b.turns_N] for b in self.batches]

    def gradient(self, *of: Any) -> list[Tensor]:
        return list(torch.autograd.grad(self.loss(*of), list(self.module.parameters())))


@cache
def setup() -> Setup:
    module, reference, trajectories = build(0), build(1), []
    for member, turns in enumerate(MEMBERS):
        rows = [
            Turn(i, prompt_ids=prompt, token_ids=ids, logprobs=[0.0] * len(ids))
            for i, (prompt, ids, _) in enumerate(turns)
        ]
        trajectories.append(Trajectory({}, member=member, turns=rows))
    sequences = token_sequences(trajectories)
    batches = [collate(sequences, part) for part in ([1], [0, 2, 3])]
    generator = torch.Generator().manual_seed(3)
    refs = []
    with torch.no_grad():
        for i, batch in enumerate(batches):
            refs.append(reference.forward_train({"tokens": batch})[LOGPROBS])
            now = module.forward_train({"tokens": batch})[LOGPROBS]
            noise = 0.4 * torch.randn(len(now), generator=generator, dtype=torch.float64)
            batches[i] = replace(batch, sampling_logprobs_N=now + noise)
    rewards = torch.tensor([r for m in MEMBERS for _, _, r in m], dtype=torch.float64)
    owner = torch.tensor([m for m, turns in enumerate(MEMBERS) for _ in turns])
    advantages = turn_advantages(rewards, owner, torch.zeros_like(owner))
    return Setup(module, refs, batches, advantages)


# Log-ratio of each turn's tokens: rows 0 1 | 2 3 4 | 5 | 6.
RATIOS = [0.1, 0.5, 0.9, -0.6, -0.9, 0.2, 0.8]


def distance_to_bounds(objective: Objective, scene: Setup, anchors: list[Tensor]) -> float:
    """How near any ratio or importance weight is to a kink, and that all of them are passed."""
    near, passed = [], set()
    for batch, anchor in zip(scene.batches, anchors, strict=True):
        with torch.no_grad():
            log_ratio = scene.forward(batch)[LOGPROBS] - anchor
        ids = {"turn": batch.turns_N, "sequence": batch.sequences_N}
        own = ids.get(objective.ratio_level, torch.arange(len(log_ratio)))
        for row in range(len(log_ratio)):
            ratio = float(log_ratio[own == own[row]].mean().exp())
            good = scene.advantages[batch.turns_N[row]] > 0
            bounds = {"high": 1.28} if good else {"low": 0.8, "dual": 1.5}
            near += [abs(ratio - bound) for bound in bounds.values()]
            passed |= {n for n, b in bounds.items() if (ratio < b) == (n == "low")}
            passed |= {"free"} if 0.8 < ratio < 1.28 else set()
    assert passed == {"high", "low", "dual", "free"}
    return min(near)


@pytest.mark.parametrize("kind", [None, "k1", "k2", "k3"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_gradient_equals_finite_differences(level: str, aggregation: str, kind: Any) -> None:
    scene = setup()
    parameters = list(scene.module.parameters())
    generator = torch.Generator().manual_seed(0)
    anchors = scene.anchors(RATIOS)
    for correction in CORRECTIONS:
        objective = Objective(
            ratio_level=level,  # type: ignore[arg-type]
            aggregation=aggregation,  # type: ignore[arg-type]
            constant=9.0 if aggregation == "constant" else None,
            importance_sampling=correction,  # type: ignore[arg-type]
            importance_cap=1.2,
            dual_clip=1.5,
            entropy_coeff=0.03,
            **({"kl_coeff": 0.3, "kl_estimator": kind} if kind else {}),
        )
        assert distance_to_bounds(objective, scene, anchors) > MARGIN
        gradients = scene.gradient(objective, anchors, scene.advantages)
        direction = [torch.randn(p.shape, generator=generator).double() for p in parameters]
        expected = slope(scene, direction, objective, anchors)
        got = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        assert abs(expected) > 1e-3
        assert got == pytest.approx(expected, rel=1e-6), correction


def slope(scene: Setup, direction: list[Tensor], objective: Objective, anchors: Any) -> float:
    """Central difference of the loss along a direction of all parameters."""
    parameters, values = list(scene.module.parameters()), []
    step = 1e-5
    start = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for signed in (step, -step):
            for p, s, d in zip(parameters, start, direction, strict=True):
                p.copy_(s + signed * d)
            values.append(scene.loss(objective, anchors, scene.advantages).item())
        for p, s in zip(parameters, start, strict=True):
            p.copy_(s)
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("bound", "log_ratio", "sign"),
    [("high", 0.5, 1.0), ("low", -0.5, -1.0), ("dual", 1.5, -1.0)],
)
def test_a_stopped_token_moves_no_parameter(
    level: str, bound: str, log_ratio: float, sign: float
) -> None:
    scene, rows = setup(), len(RATIOS)
    dual = 3.0 if bound == "dual" else None
    objective = Objective(ratio_level=level, importance_sampling="turn", dual_clip=dual)  # type: ignore[arg-type]
    stopped = scene.anchors([log_ratio] * rows)
    advantages = sign * torch.linspace(0.5, 2.0, rows, dtype=torch.float64)
    assert scene.loss(objective, stopped, advantages).item() != 0.0
    for gradient in scene.gradient(objective, stopped, advantages):
        assert torch.count_nonzero(gradient) == 0
    wide = Objective(ratio_level=level, clip_low=1.0, clip_high=9.0)  # type: ignore[arg-type]
    assert max(g.abs().max() for g in scene.gradient(wide, stopped, advantages)) > 1e-3
    if bound != "dual":  # which is above the high clip too
        turned = scene.gradient(objective, stopped, -advantages)
        assert max(g.abs().max() for g in turned) > 1e-3


@pytest.mark.parametrize("level", LEVELS)
def test_only_the_free_turns_train(level: str) -> None:
    """Stopped trajectories next to a free one: the gradient is the free one's alone."""
    scene = setup()
    objective = Objective(ratio_level=level, dual_clip=3.0)  # type: ignore[arg-type]
    # trajectory 0 is above the high clip, 1 below the low one, 2 free, 3 beyond the dual clip
    anchors = scene.anchors([0.5, 0.5, -0.5, -0.5, -0.5, 0.1, 1.5])
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    alone = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    got = scene.gradient(objective, anchors, signs)
    expected = scene.gradient(objective, anchors, alone)
    assert max(g.abs().max() for g in expected) > 1e-3
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)
