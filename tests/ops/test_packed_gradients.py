"""Gradients of packed micro-batches against a naive implementation.

The naive one pads all trajectories into one batch with an attention mask, makes all logits, and
writes the clipped objective down token by token, all in float64.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rllib_gtpo.ops.losses import Objective, normaliser, objective_sum
from rllib_gtpo.packing import NOT_TRAINED, TokenSequence, collate, empty_batch, micro_batches
from rllib_gtpo.rl_module import LOGPROBS
from tests.ops.test_tiny_model import AGGREGATIONS, LEVELS, build

CLIP_LOW, CLIP_HIGH, CONSTANT, TEMPERATURE = 0.2, 0.28, 50.0, 0.8
MODULE = build(0)
MODULE_PACKS = build(0)
assert MODULE_PACKS.pack()

# Turns of a trajectory: context tokens, sampled tokens.
TURNS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=4)


def sequences_of(shape: list[list[tuple[int, int]]], generator: torch.Generator):
    """Random tokens in that shape; turn rows count over all."""
    sequences, row = [], 0
    for turns in shape:
        ids: list[int] = []
        rows: list[int] = []
        logprobs: list[float] = []
        for context, sampled in turns:
            ids += torch.randint(0, 300, (context + sampled,), generator=generator).tolist()
            rows += [NOT_TRAINED] * context + [row] * sampled
            logprobs += [0.0] * context
            logprobs += (-5 - torch.rand(sampled, generator=generator)).tolist()
            row += 1
        sequences.append(TokenSequence(ids, rows, logprobs))
    return sequences, row


def naive_loss(sequences, advantages: Tensor, aggregation: str, level: str) -> Tensor:
    width = max(len(s.token_ids) for s in sequences)
    ids = torch.tensor([s.token_ids + [0] * (width - len(s.token_ids)) for s in sequences])
    real = torch.tensor([[1] * len(s.turns) + [0] * (width - len(s.turns)) for s in sequences])
    logits = MODULE.model(input_ids=ids, attention_mask=real, use_cache=False).logits
    table = torch.log_softmax(logits / TEMPERATURE, -1)
    old = [torch.tensor(s.logprobs, dtype=torch.float64) for s in sequences]
    trained = [
        (b, t, turn)
        for b, s in enumerate(sequences)
        for t, turn in enumerate(s.turns)
        if turn != NOT_TRAINED
    ]
    log_ratio = {(b, t): table[b, t - 1, ids[b, t]] - old[b][t] for b, t, _ in trained}
    total = torch.zeros((), dtype=torch.float64)
    for b, t, turn in trained:
        peers = {
            "token": [(b, t)],
            "turn": [(c, u) for c, u, other in trained if other == turn],
            "sequence": [(c, u) for c, u, _ in trained if c == b],
        }
        ratio = torch.stack([log_ratio[p] for p in peers[level]]).mean().exp()
        inside = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        value = -torch.minimum(ratio * advantages[turn], inside * advantages[turn])
        weight = {
            "token_mean": 1 / len(trained),
            "turn_mean": 1 / len({x for _, _, x in trained}) / len(peers["turn"]),
            "sequence_mean": 1 / len({c for c, _, _ in trained}) / len(peers["sequence"]),
            "constant": 1 / CONSTANT,
        }[aggregation]
        total = total + weight * value
    return total


def gradients(loss: Tensor, module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), allow_unused=True))


def packed_gradients(sequences, advantages: Tensor, aggregation: str, level: str, budget: int):
    objective = Objective(
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
        aggregation=aggregation,
        ratio_level=level,
        constant=CONSTANT if aggregation == "constant" else None,
        importance_sampling="off",
    )
    rows = [(b, x) for b, s in enumerate(sequences) for x in s.turns if x != NOT_TRAINED]
    divisor = normaliser(
        objective, torch.tensor([x for _, x in rows]), torch.tensor([b for b, _ in rows])
    )
    parts = micro_batches([len(s.token_ids) for s in sequences], budget, packed=True)
    batches = [collate(sequences, part, packed=True) for part in parts]
    total: list[Tensor] | None = None
    for batch in [*batches, empty_batch(packed=True)]:
        logprobs = MODULE_PACKS.forward_train({"tokens": batch})[LOGPROBS]
        loss, _ = objective_sum(
            objective,
            learner_logprobs=logprobs,
            sampling_logprobs=batch.sampling_logprobs_N.double(),
            anchor_logprobs=batch.sampling_logprobs_N.double(),
            advantages=advantages[batch.turns_N],
            turn=batch.turns_N,
            trajectory=batch.sequences_N,
        )
        new = gradients(loss / divisor, MODULE_PACKS)
        total = new if total is None else [a + b for a, b in zip(total, new, strict=True)]
    return total


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.lists(TURNS, min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    budget=st.sampled_from([1, 30, 64, 1000]),
)
def test_packed_micro_batches_have_the_gradient_of_the_padded_whole(
    aggregation, level, shape, seed, budget
):
    generator = torch.Generator().manual_seed(seed)
    sequences, turns = sequences_of(shape, generator)
    sequences = [  # the sampler's numbers as a batch holds them
        TokenSequence(s.token_ids, s.turns, torch.tensor(s.logprobs).tolist()) for s in sequences
    ]
    advantages = torch.randn(turns, generator=generator, dtype=torch.float64)
    want = gradients(naive_loss(sequences, advantages, aggregation, level), MODULE)
    have = packed_gradients(sequences, advantages, aggregation, level, budget)
    scale = max(float(g.abs().max()) for g in want)
    for one, other in zip(want, have, strict=True):
        assert float((one - other).abs().max()) <= 1e-6 * scale
