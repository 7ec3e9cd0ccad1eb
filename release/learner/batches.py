"""What the learner's bench trains: random models, and ragged trajectories of several turns.

Without ray.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rllib_gtpo.models import TINY_QWEN2
from rllib_gtpo.ops.advantages import turn_advantages
from rllib_gtpo.types import Group, StopReason, Trajectory, Turn, flat_turns

MEMBERS, GAMMA = 8, 0.9
SHORTEST, LONGEST, MEDIAN, SPREAD = 50, 2000, 400, 0.9  # tokens; log-normal
CONTEXT, SAMPLED = (20, 80), (40, 160)  # tokens before a turn, and in it
POSITIONS = {"max_position_embeddings": 2048}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {**TINY_QWEN2, **POSITIONS},
    "small": {
        **TINY_QWEN2,
        **POSITIONS,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "intermediate_size": 1536,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
}
"""By name: 0.3 and 25 million parameters, and the built-in tokenizer's vocabulary."""


def log_normal_lengths(count: int, seed: int = 0) -> list[int]:
    """Lengths of trajectories in tokens."""
    draw = random.Random(seed)
    lengths = []
    while len(lengths) < count:
        length = round(MEDIAN * draw.lognormvariate(0.0, SPREAD))
        if SHORTEST <= length <= LONGEST:
            lengths.append(length)
    return lengths


def ragged_groups(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[Group]:
    """Groups of MEMBERS trajectories of those lengths: random tokens, and random rewards at the
    end."""
    draw = random.Random(seed)
    groups: list[Group] = []
    for index, length in enumerate(lengths):
        number, member = divmod(index, MEMBERS)
        if not member:
            groups.append(Group(number, {"id": f"task-{number}"}, []))
        turns: list[Turn] = []
        while length > 0:
            context = min(draw.randint(*CONTEXT), max(1, length - 1))
            sampled = min(draw.randint(*SAMPLED), max(1, length - context))
            length -= context + sampled
            ids = [draw.randrange(vocabulary) for _ in range(context + sampled)]
            logprobs = [-5.0 - draw.random() for _ in range(sampled)]
            turns.append(Turn(len(turns), ids[:context], ids[context:], logprobs))
        turns[-1].rewards = {"accuracy": draw.random()}
        groups[-1].trajectories.append(
            Trajectory(groups[-1].task, number, member, turns, StopReason.ANSWER, "")
        )
    return groups


def trajectories_of(groups: Sequence[Group]) -> list[Trajectory]:
    """All members in order."""
    return [t for g in groups for t in g.trajectories]


def advantages_of(groups: Sequence[Group]) -> Tensor:
    """The advantage of every turn, as the learner's default estimator has it."""
    owners = [(i, t.group_id) for i, t in enumerate(trajectories_of(groups)) for _ in t.turns]
    trajectory, group = torch.tensor(owners).T
    rewards = torch.tensor([turn.reward for turn in flat_turns(groups)], dtype=torch.float64)
    return turn_advantages(rewards, trajectory, group, gamma=GAMMA).float()
