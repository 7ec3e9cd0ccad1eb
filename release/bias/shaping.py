"""What similarity shaping does to the expected update, with the package's own `Shaping`.

Shape suffixes: `_CG` members of groups, `_D` logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bias.estimates import (
    Problem,
    all_groups,
    exact,
    figures,
    sample_groups,
    sampled,
)
from bias.process import accuracy, expected, gradient
from bias.processes import SIMILARITY
from bias.variants import Variant
from rllib_gtpo.rewards.shaping import SHAPING, Shaping
from rllib_gtpo.types import Group, ToolCall, Trajectory, Turn

GROUP_SIZE = 6  # with 4, most groups of a hard task have no correct member to be like
STEPS = 100


class Plane:
    """An embedder whose unit vectors have the cosines of `SIMILARITY` with the right code."""

    def embed(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One vector for each text."""
        return [
            np.array([SIMILARITY[text], math.sqrt(1.0 - SIMILARITY[text] ** 2)]) for text in texts
        ]


def bonus(problem: Problem, members_CG: Tensor, mode: str, alpha: float = 0.5) -> Tensor:
    """What the package's shaping adds to the last turn of each member: [C, G]."""
    if mode == "none":
        return torch.zeros(members_CG.shape, dtype=torch.float64)
    paths = problem.paths
    earned = paths.per_path(paths.accuracy_R).tolist()

    def member(path: int) -> Trajectory:
        call = ToolCall("python", {"code": paths.code_M[path]})
        turn = Turn(0, calls=[call], rewards={"accuracy": earned[path]})
        return Trajectory({}, turns=[turn], correct=earned[path] >= 1.0)

    groups = [
        Group(number, {}, [member(path) for path in members])
        for number, members in enumerate(members_CG.tolist())
    ]
    Shaping(Plane(), mode, alpha).score_groups(groups)
    return torch.tensor(
        [[t.turns[-1].rewards[SHAPING] for t in group.trajectories] for group in groups],
        dtype=torch.float64,
    )


def failed_copy(problem: Problem, logits_D: Tensor) -> Tensor:
    """Probability of a failed trajectory of the plan "copy"; differentiable."""
    paths, process = problem.paths, problem.process
    copies = paths.pair_R[paths.start_M] == process.index["plan", "copy"]
    failed = paths.per_path(paths.accuracy_R) < 1.0
    return paths.probability_M(process, logits_D)[copies & failed].sum()


@dataclass(frozen=True)
class Shaped:
    """Groups with what shaping adds to each member, by one mode; they serve every policy."""

    mode: str
    members_CG: Tensor
    bonus_CG: Tensor


def shaped_groups(problem: Problem, mode: str, samples: int, seed: int) -> Shaped:
    """All groups, or a sample of those of the problem's policy for "shuffled", which is random."""
    if mode == "shuffled":
        members_CG = sample_groups(problem, samples, GROUP_SIZE, seed)
    else:
        members_CG, _ = all_groups(problem, GROUP_SIZE)
    return Shaped(mode, members_CG, bonus(problem, members_CG, mode))


def shaped_figures(
    problem: Problem, variant: Variant, shaped: Shaped, batches: Sequence[int]
) -> dict[str, float]:
    """Bias against the accuracy's gradient, and where the reward goes.

    leak: share of all positive reward that failed trajectories get.
    toward_copy: cosine of the expected update to the gradient of `failed_copy`.
    """
    process, logits_D, bonus_CG = problem.process, problem.logits_D, shaped.bonus_CG
    if shaped.mode == "shuffled":
        moments = sampled(problem, shaped.members_CG, variant, 1, bonus_CG)
        leaked = float(bonus_CG.mean())
    else:
        moments = exact(problem, variant, GROUP_SIZE, bonus_CG)
        leaked = float(all_groups(problem, GROUP_SIZE)[1] @ bonus_CG.mean(1))
    leaf_D = logits_D.clone().requires_grad_()
    wrong_D = torch.autograd.grad(failed_copy(problem, leaf_D), leaf_D)[0]
    along = float(moments.mean_D @ wrong_D) / float(moments.mean_D.norm() * wrong_D.norm())
    earned = float(expected(process, logits_D, accuracy))
    return {
        **figures(moments, gradient(process, logits_D, accuracy), batches),
        "leak": leaked / (leaked + earned),
        "toward_copy": along,
    }


def trained_without_noise(problem: Problem, variant: Variant, bonus_CG: Tensor) -> dict[str, float]:
    """Accuracy and failed copies after following the expected update, in steps of length 0.1."""
    at = problem
    for _ in range(STEPS):
        mean_D = exact(at, variant, GROUP_SIZE, bonus_CG).mean_D
        if float(mean_D.norm()) < 1e-9:
            break
        at = replace(at, logits_D=at.logits_D + 0.1 * mean_D / mean_D.norm())
    return {
        "accuracy_after": float(expected(at.process, at.logits_D, accuracy)),
        "copies_after": float(failed_copy(at, at.logits_D)),
    }
